"""Stage select: which of the unlabelled images to label next."""

import csv
import io
import logging
import os
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from omegaconf import DictConfig
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from ssl_bench import files
from ssl_bench.augment.views import EvalView
from ssl_bench.config import build
from ssl_bench.config.fields import FeaturesOf, Place, Resize
from ssl_bench.data.source import Source
from ssl_bench.data.store import Split
from ssl_bench.errors import UserError, several
from ssl_bench.evaluate import selection
from ssl_bench.evaluate.features import stored_features
from ssl_bench.evaluate.readout import read_out_
from ssl_bench.methods.base import digest
from ssl_bench.methods.probe import restored
from ssl_bench.runs import checkpoint, identity, weights
from ssl_bench.runs.run import Run
from ssl_bench.runtime.seeding import fold
from ssl_bench.stages import IMAGES, LOOK, PRETRAINED, RUN
from ssl_bench.stages._pretrained import check_directory, load_pretrained, log_result
from ssl_bench.stages._training import (
    check_sizes,
    make_test_view,
    normalization,
    on_device,
    open_source,
)

log = logging.getLogger(__name__)

SHOWN, A_ROW = 144, 12  # images on the contact sheet


READS = (*RUN, *IMAGES, *LOOK, "devices", "data", "backbone", *PRETRAINED)
FEATURES = (*PRETRAINED, "backbone", *LOOK, "stage.dim", "stage.test_resize", "stage.features")
FEATURES += ("stage.features_of",)
IDLE = {"stage.strategy=random": FEATURES, "pretrained=null": ("pretrained_prefix",)}


def select(
    cfg: DictConfig,
    run: Run,
    strategy: Literal["random", "kmeans_plusplus", "k_center", "typiclust", "margin"] = "typiclust",
    budget: PositiveInt = 12_800,
    requested: Place | list[Place] | None = None,
    cover_train: bool = True,
    dim: NonNegativeInt = 128,
    max_clusters: PositiveInt | None = None,
    features_of: FeaturesOf | None = None,
    test_resize: Resize = 256 / 224,
    features: Place | None = None,
    out: Place | None = None,
) -> dict[str, float]:
    """Choose `budget` images of the "pretrain" split by a strategy of `selection`.

    Images that data.extra_labels or the files `requested` name are never chosen, and count as
    covered. So do the images of the train split if `cover_train`, unless they are the images to
    choose from.

    Writes request_NN.csv, an index a line, the most wanted first; NN is the next number that is
    free in the folder of the data and in `out`. Also chosen.csv, with the names of the images, and
    chosen.png. Returns counts and, if features were needed, the mean distance of an unlabelled
    image to the nearest one that is covered or chosen (between unit vectors: 0 to 2).
    """
    check_directory(cfg)
    if out is not None and not os.access(Path(out), os.W_OK):
        raise UserError(
            f"stage.out={out}: not a folder that can be written; leave it out for the run directory"
        )
    if max_clusters is not None and strategy != "typiclust":
        raise UserError(
            f"stage.max_clusters={max_clusters} would be ignored: "
            "it is for stage.strategy=typiclust"
        )
    classifier = read_classifier(cfg) if strategy == "margin" else {}
    data = build.construct(cfg.data)
    split = data.split("pretrain")
    named = [requested] if isinstance(requested, str) else list(requested or [])
    known = data.requested(named)
    check_budget(budget, split.length - len(known))
    others = cover_train and data.num_classes and data.split("train").store_name != split.store_name
    if cover_train and data.num_classes and not others:
        log.info(
            "the images to choose from are those of the train split: "
            "they are chosen though they have labels"
        )
    if strategy != "random":
        backbone = load_pretrained(cfg)
        check_sizes(cfg, backbone)
        read_out_(backbone, features_of)

    view = make_test_view(cfg, run, test_resize)
    source = open_source(cfg, run, data, "pretrain", view)
    indices = source.indices[source.rows]
    free = np.flatnonzero(~np.isin(indices, known))
    check_budget(budget, len(free))  # data.on_error=skip may have left some out
    generator = torch.Generator().manual_seed(fold(cfg.seed, "select", strategy))
    log.info("%s of %s images are to be chosen by %s", f"{budget:,}", f"{len(free):,}", strategy)
    if strategy == "random":
        if not run.is_main:
            return {}
        order = selection.random(torch.empty(len(free), 0), torch.empty(0, 0), generator)
        chosen, result = take(order, budget, run), {"num_covered": len(known)}
    else:
        on_device(backbone, run).eval()
        folder = run.directory / "features" if features is None else Path(features)
        mine = compute(cfg, run, backbone, source, split, view, folder)
        theirs = mine[:0]
        if others:
            train = open_source(cfg, run, data, "train", view)
            theirs = compute(cfg, run, backbone, train, data.split("train"), view, folder)
        if not run.is_main:  # the other ranks were needed for the features
            return {}
        project = selection.Projection(mine, dim, fold(cfg.seed, "projection"), run.device)
        points = project(mine)
        shown = (points.shape[1], backbone.dim, 100 * project.explained)
        log.info("distances in %s of %s dimensions, which hold %.1f %% of the variance", *shown)
        # not those of data.extra_labels, which are in the train split, too
        labelled = np.isin(indices, np.setdiff1d(known, data.requested()) if others else known)
        pool, covered = points[free], torch.cat([points[labelled], project(theirs)])
        if strategy == "margin":
            order = margins(classifier, backbone, mine, free).argsort(stable=True).tolist()
        elif strategy == "typiclust":
            order = selection.typiclust(pool, covered, generator, budget, max_clusters)
        else:
            order = getattr(selection, strategy)(pool, covered, generator)
        chosen = take(order, budget, run)
        some = pool[torch.randperm(len(pool), generator=generator)[: selection.SAMPLE]]
        nearest = selection.nearest_distances(some, torch.cat([covered, pool[chosen]]))
        result = {"num_covered": len(covered), "mean_distance": nearest.sqrt().mean().item()}
    result = {"num_chosen": budget, **result}
    log_result(run, result)
    write(run, split, indices[free[chosen]], data.root, [*named, *data.extra], out)
    return result


def check_budget(budget: int, free: int) -> None:
    """UserError for a budget of more images than are free to choose."""
    if budget > free:
        raise UserError(
            f"stage.budget={budget} is more than the {free:,} images without a label: "
            f"choose at most stage.budget={free}"
        )


def read_classifier(cfg: DictConfig) -> dict[str, Tensor]:
    """The state of a `stage=lincls` run. UserError for anything else."""
    pretrained = cfg.pretrained
    content = checkpoint.read(weights.find(pretrained)) if pretrained else {}
    ours = isinstance(content, dict) and "model" in content
    state = weights.measured(content) if ours else {}
    if "fc.weight" not in state:
        raise UserError(
            f"pretrained={pretrained} holds no classifier, which stage.strategy=margin needs: "
            "name the directory of a run of stage=lincls, which holds the backbone too"
        )
    if len(state["fc.weight"]) < 2:
        raise UserError(
            f"pretrained={pretrained}: its classifier knows one class, "
            "and stage.strategy=margin compares two: choose another stage.strategy="
        )
    learnt = identity.node(weights.recipe(weights.find(pretrained)) or {}, "stage")
    if (features_of := learnt.get("features_of")) != cfg.stage.features_of:
        instead = "choose another stage.strategy="
        if features_of != "attentive":
            instead = f"type stage.features_of={features_of or 'null'}"
        raise UserError(
            f"pretrained={pretrained}: its classifier was trained with "
            f"stage.features_of={features_of or 'null'}: {instead}"
        )
    return state


def compute(
    cfg: DictConfig,
    run: Run,
    backbone: nn.Module,
    source: Source,
    split: Split,
    view: EvalView,
    folder: Path,
) -> np.ndarray:
    """Features (N, dim) of the test views, in a file of the folder.

    Its name has a hash of all that they depend on.
    """
    look = (view.image_size, view.resize, normalization(cfg))
    images = (split.store_name, split.fingerprint, source.num_images)
    tokens = [cfg.stage.features_of] if cfg.stage.features_of else []
    whose = fold(digest(backbone).hex(), cfg.precision, repr(look), *images, *tokens)
    path = folder / f"{split.name}-{whose:016x}.npy"
    return stored_features(cfg.precision, run, backbone, source, view, path)


@torch.no_grad()
def margins(
    state: dict[str, Tensor], backbone: nn.Module, features: np.ndarray, rows: np.ndarray
) -> Tensor:
    """(M,): the margin between the two likeliest classes, for rows (M,) of the features (N, dim).

    state: that of a trained LinearProbe.
    """
    probe = restored(backbone, state)
    # Allocated at once: small pieces that stay would keep the allocator from reusing memory.
    result = torch.empty(len(rows))
    parts = torch.from_numpy(rows).split(selection.ROWS)
    for part, margin in zip(parts, result.split(selection.ROWS), strict=True):
        inputs = torch.from_numpy(features[part]).float()
        margin.copy_(selection.margin(probe.fc(probe.norm(inputs))))
    return result


def take(order: Iterable[int], budget: int, run: Run) -> list[int]:
    """The first `budget` rows of `order`, unless a signal arrives."""
    chosen = []
    for row in run.progress(islice(order, budget), 0, budget):
        chosen.append(row)
        if run.signalled:
            run.interrupt()
    return chosen


def write(
    run: Run, split: Split, chosen: np.ndarray, root: str, named: list[str], out: str | None
) -> None:
    """Write request_NN.csv, chosen.csv and chosen.png.

    chosen: indices in the split. named: the index files that the command has named.
    """
    table = io.StringIO()
    rows = [(index, split.where(index)) for index in chosen.tolist()]
    csv.writer(table).writerows([("index", "image"), *rows])
    files.write(run.directory / "chosen.csv", table.getvalue())
    contact_sheet(split, chosen, run.directory / "chosen.png")
    run.log_image(1, "chosen", run.directory / "chosen.png")
    folders = [Path(folder) for folder in (root, out) if folder]
    taken = [path.name for folder in folders for path in folder.glob("request_*.csv")]
    if others := ", ".join(sorted(set(taken) - {Path(name).name for name in named})):
        advice = "stage.requested= doesn't name it"
        log.warning("images of %s may be among the chosen: %s", others, advice)
    matches = (re.fullmatch(r"request_(\d+)\.csv", name) for name in taken)
    numbers = [int(match[1]) for match in matches if match]
    number = f"{max(numbers, default=-1) + 1:02d}"
    path = (folders[-1] if out else run.directory) / f"request_{number}.csv"
    files.write(path, "".join(f"{index}\n" for index in chosen.tolist()))
    print(
        f"written: {path}: {several(len(chosen), 'image')} to label. With their labels, in the "
        f"same order, in label_{number}.pt in the folder of data=dl21, it is for "
        f"data.extra_labels=[request_{number}.csv,label_{number}.pt]"
    )


def contact_sheet(split: Split, chosen: np.ndarray, path: Path) -> None:
    """chosen.png: SHOWN of the images, evenly spaced in the order of choice.

    Beside each row is the place in that order of its first image.
    """
    from ssl_bench.report import sheet

    places = np.linspace(0, len(chosen) - 1, min(SHOWN, len(chosen))).round().astype(int)
    images = [split.small(int(index)) for index in chosen[places]]
    rows = range(0, len(places), A_ROW)
    sheet.write(path, {f"{places[row] + 1:,}": images[row : row + A_ROW] for row in rows})
