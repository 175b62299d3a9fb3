"""Stage pretrain: train a backbone without labels, and watch what it learns."""

import copy
import logging
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from pydantic import NonNegativeInt
from torch import Tensor, nn

from ssl_bench.augment.draws import keys
from ssl_bench.augment.views import EvalView, Views
from ssl_bench.config import build
from ssl_bench.data.formats.base import Dataset
from ssl_bench.data.source import Source
from ssl_bench.errors import UserError
from ssl_bench.evaluate import criteria
from ssl_bench.evaluate.features import extract_all
from ssl_bench.evaluate.labels import check_classes, hold_out
from ssl_bench.evaluate.neighbours import knn_and_ridge
from ssl_bench.methods import layers
from ssl_bench.runs import layout, watch, weights
from ssl_bench.runs.checkpoint import check_fits
from ssl_bench.runs.run import Run
from ssl_bench.runtime import distributed
from ssl_bench.runtime.seeding import fold
from ssl_bench.stages import (
    EVERY,
    IMAGES,
    PARTED,
    PRETRAINED,
    PRETRAINING,
    RECIPE,
    WATCHED,
    _images,
    _labels,
)
from ssl_bench.stages._pictures import painter
from ssl_bench.stages._pretrained import load_pretrained
from ssl_bench.stages._teacher import load_teacher
from ssl_bench.stages._training import (
    check_batch,
    check_norm,
    check_parts,
    check_sizes,
    make_test_view,
    make_views,
    on_device,
    open_source,
    seed_init,
    train,
)

log = logging.getLogger(__name__)


WEIGHTS = (*PRETRAINED, "continue_from")
READS = (*PRETRAINING, *WEIGHTS, "until")
ONLINE = ("stage.online_images",)
JUDGED = ("knn_top1", "probe_top1")  # measured on labelled images
IDLE = {
    "method.name=random": (
        *(*RECIPE, *PARTED, *EVERY, *WATCHED, *IMAGES, *WEIGHTS, *ONLINE),
        *("until", "on_collapse"),
    ),
    "pretrained=null": ("pretrained_prefix",),
    "eval_every=0": (*ONLINE, *WATCHED),
    "stage.online_images=0": ("eval_every",),
    # it learns from all the labels that could judge it
    "method.name=supervised": ("eval_every", "stage.online_images"),
}


def pretrain(cfg: DictConfig, run: Run, online_images: NonNegativeInt = 2000) -> dict[str, float]:
    """Returns what the last step logged.

    The backbone begins with the weights of `cfg.pretrained`; the rest of the method is initialised
    from the seed, the same with and without these weights. With `cfg.continue_from` everything is
    then replaced by the state of that run (`Run.restore`). online_images: how many labelled images
    show every `eval_every` epochs what is learnt; see `online`.
    """
    if str(cfg.metric).startswith("val_"):
        raise UserError(
            f"metric={cfg.metric}: stage=pretrain never looks at val: type metric=knn_top1 "
            "or metric=probe_top1, which held-out training images give, or metric=loss"
        )
    judged_online = str(cfg.metric).startswith(("knn_top1", "probe_top1", "features_"))
    if judged_online and not (cfg.eval_every and online_images):
        raise UserError(
            f"metric={cfg.metric}: nothing measures it with eval_every={cfg.eval_every} and "
            f"stage.online_images={online_images}: type 1 or more for both, or metric=loss"
        )
    what = watch.watched(cfg)  # UserError
    data = build.construct(cfg.data)

    def num_classes() -> int:
        check_classes(data.split("train").labels)  # UserError without labels
        return data.num_classes

    given = build.wanted(
        cfg.method,
        num_classes=num_classes,
        batch_size=lambda: cfg.batch_size,
        num_images=lambda: data.split("pretrain").length,
        teacher_network=lambda: load_teacher(cfg),
    )
    goes_on = cfg.get("continue_from") is not None
    if run.is_main and not goes_on and (shorter := extendable(run.directory, cfg.epochs)):
        log.info("%s differs in epochs alone: continue_from=%s extends it", shorter, shorter)
    if goes_on:  # all of it is replaced by the state of the run before: nothing is fetched for it
        seed_init(cfg)
        backbone = build.construct(weights.unfilled(cfg.backbone))
    else:
        backbone = load_pretrained(cfg)
    model = build.construct(cfg.method, backbone=backbone, **given)
    if goes_on:
        check_fits(Path(cfg.pretrained), f"continue_from={cfg.continue_from}", model)
    check_sizes(cfg, model.backbone)
    num_images = data.split(model.split).length
    local_batch = check_batch(cfg, num_images)
    model.check(num_images, local_batch)
    check_parts(cfg, model, local_batch)
    splits = model.bn_splits
    check_norm(cfg, model, cfg.sync_batch_norm, max(splits, cfg.get("accumulate") or 1))
    if cfg.sync_batch_norm and distributed.world_size() > 1:
        if splits > 1:
            raise UserError(
                "sync_batch_norm=true, but batch norm is to see parts of the batch "
                f"(method.bn_splits={splits}): type sync_batch_norm=false, or method.bn_splits=1"
            )
        layers.sync_batch_norm_(model, run.device, cfg.compile)
    model = on_device(model, run)
    before = _labels.known_of(cfg)
    learns_labels = _labels.learns_labels(cfg.method)
    own = [_labels.data_set(cfg, data.split("train"))] if learns_labels else []
    before._replace(seen=(*before.seen, *own)).record(run)
    if not model.learns:
        run.save(0, model=model)
        return {}
    views = make_views(cfg, run, model)
    source = open_source(cfg, run, data, model.split, views)
    judged = cfg.eval_every and online_images and not learns_labels
    if learns_labels:
        log.info(
            "method=%s learns from all labels of the train split: none are left to judge by",
            cfg.method.name,
        )
    judge = online(cfg, run, data, source, online_images) if judged else None
    if what and what.metric in JUDGED and judge is None:
        raise UserError(
            f"save_best={what.metric}: no labelled images measure it here: type "
            "save_best=effective_rank or save_best=loss"
        )
    paint = None
    if run.is_main:
        show_views(cfg, run, source, views)
        paint = painter(cfg, run, source, model)

    def evaluate(network: nn.Module) -> dict[str, float]:
        line = judge(network) if judge else {}
        if paint:
            paint(network)
        return line

    looked_at = judge or hasattr(model.backbone, "last_tokens")  # the same on all ranks
    further = {"accumulate": cfg.get("accumulate") or 1, "compress": cfg.get("compress")}
    further["measures"] = JUDGED if judge else ()
    further["on_collapse"] = cfg.on_collapse
    return train(cfg, run, model, source, views, evaluate if looked_at else None, **further)


_images.counted(pretrain)  # no decorator: the signature is read from the source


def online(
    cfg: DictConfig, run: Run, data: Dataset, trained: Source, num_images: int
) -> Callable[[nn.Module], dict[str, float]]:
    """A function that measures the backbone of a network on at most `num_images` images.

    On those of the train split, if it has labels that the weights haven't learnt from: those of a
    fifth of them are predicted from the others. Else on some of the images of `trained`, the source
    that is learnt from. `criteria` need no labels. The val split is never looked at.
    """
    try:
        known = data.split("train").labels
    except UserError:
        known = None
    test_view = make_test_view(cfg, run, 1.0)
    source = None
    if known is not None and _labels.are_seen(cfg, data.split("train")):
        log.info(
            "pretrained=%s has learnt from the labels of the train split: "
            "none are left to judge by",
            cfg.pretrained,
        )
    else:
        if known is not None:
            source = judges(cfg, run, data, test_view, known, num_images)
        if source is None:
            log.info("no labels, so knn_top1 and probe_top1 won't be logged")
    targets = asked = None
    if source is not None:
        targets = source.labels[source.rows]
        asked = torch.from_numpy(hold_out(targets, 0.2, cfg.seed))
    else:
        source = copy.copy(trained.shown_as(test_view))
        rng = np.random.default_rng(fold(cfg.seed, "online"))
        source.rows = np.sort(rng.permutation(trained.rows)[:num_images])

    def evaluate(network: nn.Module) -> dict[str, float]:
        backbone = network.backbone.eval()
        features = extract_all(cfg.precision, run, backbone, source, lambda x, _: test_view(x))
        line = {f"features_{key}": value for key, value in criteria.of_features(features).items()}
        if targets is None:
            return line
        return line | knn_and_ridge(features, torch.from_numpy(targets), asked)

    return evaluate


def judges(
    cfg: DictConfig, run: Run, data: Dataset, view: EvalView, known: np.ndarray, num_images: int
) -> Source | None:
    """At most `num_images` images of the train split, at least two of each of two classes or more.

    known: (N,), the labels of that split. None: there are no such images.
    """
    rng = np.random.default_rng(fold(cfg.seed, "online"))
    chosen = np.sort(rng.permutation(len(known))[:num_images])
    chosen = chosen[paired(known[chosen])]
    if not len(chosen):
        return None
    source = open_source(cfg, run, data, "train", view, chosen)
    # once more, since images that can't be decoded were left out
    source.rows = source.rows[paired(source.labels[source.rows])]
    return source if len(source.rows) else None


def extendable(directory: Path, epochs: int) -> Path | None:
    """The finished run beside one that begins which differs in its epochs alone, fewer than these.

    Of several the one with the most.
    """
    if layout.has_state(directory):
        return None
    mine = (directory / layout.CONFIG).read_text(encoding="utf-8").splitlines()
    found = {}
    for summary in directory.parent.parent.glob(f"*/{directory.name}/{layout.SUMMARY}"):
        with suppress(OSError, UnicodeError):
            theirs = (summary.parent / layout.CONFIG).read_text(encoding="utf-8").splitlines()
            differing = {line.partition(":")[0] for line in {*mine} ^ {*theirs}}
            said = [line for line in theirs if re.fullmatch(r"epochs: \d+", line)]
            if said and differing <= {"epochs", "dir"}:
                found[int(said[0].split()[1])] = summary.parent
    fewer = [count for count in found if count < epochs]
    return found[max(fewer)] if fewer else None


def paired(targets: np.ndarray) -> np.ndarray:
    """Mask of the images whose class has another image; empty if only one class has two."""
    _, of, counts = np.unique(targets, return_inverse=True, return_counts=True)
    return (counts > 1)[of] & ((counts > 1).sum() > 1)


@torch.no_grad()
def show_views(
    cfg: DictConfig, run: Run, source: Source, views: Views, num_images: int = 8
) -> None:
    """views.png: the views of the first images; a column an image, the original on top."""
    from ssl_bench.report import sheet

    shown = picture(views, source)[:, :num_images].permute(0, 1, 3, 4, 2).cpu().numpy()
    names = ("image", *(f"view {number}" for number in range(1, len(shown))))
    sheet.write(run.directory / layout.VIEWS, dict(zip(names, shown, strict=True)))
    run.log_image(0, "views", run.directory / layout.VIEWS)


def picture(views: Views, source: Source) -> Tensor:
    """The first batch of a source, uint8 (1 + V, N, 3, S, S): the images, then their V views.

    The source's seed draws the views. It is a whole batch, since a compiled augmentation would be
    compiled again for another size.
    """
    from torchvision.transforms.v2.functional import resize

    images, _, indices = next(source.epoch_pass())
    seen = views(images, keys(source.seed, 0, indices))
    if not isinstance(images, Tensor):  # the source has cut the views
        square = EvalView(views.image_size, resize=1.0)
        (images,), _, _ = next(source.shown_as(square).epoch_pass())
    rows = [images, *(views.denormalize(view) for view in seen)]
    return torch.stack([resize(row, [views.image_size, views.image_size]) for row in rows])
