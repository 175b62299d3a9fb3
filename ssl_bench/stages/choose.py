"""Stage choose: which pretraining to take without labels, and how well that would have chosen."""

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from pydantic import PositiveInt
from torch import Tensor, nn

from ssl_bench import files
from ssl_bench.augment.draws import keys
from ssl_bench.config import build
from ssl_bench.config.fields import Place
from ssl_bench.data.formats.base import SplitName
from ssl_bench.data.source import Source
from ssl_bench.errors import UserError, writable
from ssl_bench.evaluate import criteria
from ssl_bench.evaluate.criteria import BETTER
from ssl_bench.evaluate.passes import extract
from ssl_bench.methods.base import Method
from ssl_bench.report import grouping, tables
from ssl_bench.runs import checkpoint, identity, layout, metrics, record, units, weights
from ssl_bench.runs.record import Ran
from ssl_bench.runs.run import Run
from ssl_bench.runtime.precision import autocast
from ssl_bench.runtime.seeding import fold, seed_torch
from ssl_bench.stages import single_process
from ssl_bench.stages._labels import learns_labels
from ssl_bench.stages._training import check_size, on_device, open_source
from ssl_bench.stages.report import DATA, labelled_split, open_data, shown_to

log = logging.getLogger(__name__)

Criterion = Literal[
    "rankme",
    "alpha_req",
    "nesum",
    "uniformity",
    "lidar",
    "alignment",
    "align_uniform",
    "heldout_loss",
]
READS = ("runs", "metric", *DATA, "source", "precision", "seed", "device")
FILE = "choice.json"
JUDGES = ("lincls", "knn", "finetune")  # whose val_top1 is the truth, of the first that is there
LOGGED = ("probe_top1", "knn_top1")  # and what a pretraining itself has logged
DEFAULT = "val (without labels: pretrain)"  # which split
LISTED = 30  # rows of candidates that the console shows


@dataclass
class Candidate:
    """A checkpoint of a pretraining."""

    ran: Ran
    path: Path
    name: str  # of its setting, which other seeds share
    values: dict[str, float] = field(default_factory=dict)  # of the criteria
    truth: dict[str, float] = field(default_factory=dict)  # what labels say, by its name

    @property
    def step(self) -> int:
        return layout.step_of(self.path)

    @property
    def is_last(self) -> bool:
        return self.path == layout.states(self.ran.directory)[0]

    @property
    def at(self) -> str:
        """Its setting and, unless it is the run's last, its step."""
        return self.name if self.is_last else f"{self.name} at step {self.step:,}"

    @property
    def row(self) -> dict[str, Any]:
        said = {"name": self.at, "seed": self.ran.seed, "step": self.step}
        return said | {
            "checkpoint": str(self.path),
            "weights": files.digest(self.path),
            "criteria": self.values,
            "labels": self.truth,
        }


@single_process
def choose(
    cfg: DictConfig,
    run: Run,
    by: Criterion = "uniformity",
    split: SplitName | None = None,
    images: PositiveInt = 2000,
    views: PositiveInt = 8,
    last: bool = False,
    out: Place | None = None,
) -> dict[str, float]:
    """Rank the checkpoints of the pretrainings at or below `cfg.runs` by criteria without labels.

    Those of `criteria`, of `images` images of a split, for the features of the backbone; by default
    of val, or of the images without labels where the data of a run has no val. A run whose data or
    weights can't be read is left out. Writes choice.md and choice.json, from which what was
    measured before is taken again. Returns how many checkpoints there are and, where labels are
    there, rho and regret of the criterion `by`. UserError if there is nothing to choose from.
    """
    paths = files.places(cfg.runs)
    if not paths:
        raise UserError("runs= needs a value: a sweep, or a folder of runs: runs=runs/sweeps/NAME")
    if views < 2 and by in ("lidar", "alignment", "align_uniform"):
        raise UserError(f"stage.views={views}: stage.by={by} compares 2 or more")
    runs = record.find(paths)
    found = candidates(cfg, runs, last)
    folder = Path(out or (paths[0] if len(paths) == 1 else "runs/choice"))
    with writable("stage.out", folder):
        folder.mkdir(parents=True, exist_ok=True)
    settings = {"split": split, "images": images, "views": views, "seed": cfg.seed}
    known = remembered(folder / FILE, settings)
    unread: dict[Path, UserError] = {}
    for number, candidate in enumerate(found, start=1):
        if run.signalled:
            run.interrupt()
        directory = candidate.ran.directory
        before = known.get(files.digest(candidate.path))
        if before is None and directory not in unread:
            log.info("%s of %s: %s", number, len(found), candidate.path)
            try:
                before = measure(cfg, run, candidate, split, images, views)
            except UserError as error:
                log.warning("left out: %s: %s", directory, error)
                unread[directory] = error
        if before is not None:
            candidate.values = criteria.complete(before)
        if number == len(found) or number % 10 == 0:
            save(folder / FILE, [one for one in found[:number] if one.values], settings)
    found = [one for one in found if one.ran.directory not in unread]  # all of it or nothing
    if not found:
        raise next(iter(unread.values()))
    judge(found, runs, cfg.metric)
    notes = remarks(found)
    text, evidence = write(found, by, notes, settings)
    save(folder / FILE, found, settings, evidence=evidence, notes=notes)
    files.write(folder / "choice.md", text)
    print(shortened(text))
    print(f"\nwritten: {folder}/choice.md, {FILE}")
    said: dict[str, float] = {"checkpoints": len(found)}
    for truth, rows in evidence.items():
        mine = next(row for row in rows if row["criterion"] == by)
        said |= {f"{key} ({truth})": mine[key] for key in ("rho", "regret") if key in mine}
    return said


def candidates(cfg: DictConfig, runs: Sequence[Ran], last: bool) -> list[Candidate]:
    """The checkpoints of pretrainings that learnt without labels. UserError if there are none."""

    def learnt(ran: Ran) -> bool:
        if ran.stage != "pretrain" or not ran.weights:
            return False
        place = ran.directory / layout.CONFIG
        method = OmegaConf.create(build.found(ran.config, "method", cfg, place))
        made = build.locate(method._target_, "method")
        return getattr(made, "learns", True) and not learns_labels(method)

    named = []
    for ran in runs:
        try:
            named += [ran] if learnt(ran) else []
        except UserError as error:  # its method is of a module that isn't here
            log.warning("left out: %s: %s", ran.directory, error)
    boards = grouping.boards(named)
    found = []
    for group in (group for board in boards for group in board.groups):
        for ran in group.runs:
            paths = layout.states(ran.directory)
            found += [Candidate(ran, path, group.name) for path in paths[: 1 if last else None]]
    if not found:
        raise UserError(
            "runs= names no pretraining without labels that has a checkpoint: "
            "name a sweep of stage=pretrain or stage=pipeline"
        )
    return found


# -- what is measured ------------------------------------------------------------------------------


def measure(
    cfg: DictConfig,
    run: Run,
    candidate: Candidate,
    split: SplitName | None,
    images: int,
    views: int,
) -> dict[str, float]:
    """The criteria of a checkpoint; those that its method or its views can't have are left out."""
    ran, place = candidate.ran, candidate.ran.directory / layout.CONFIG
    data = open_data(cfg, ran)
    split = split or labelled_split(data)
    count = data.split(split).length
    rng = np.random.default_rng(fold(cfg.seed, "choose"))
    chosen = np.sort(rng.permutation(count)[:images])
    # batches as large as the run's, on which the loss may depend
    asked = OmegaConf.merge(cfg, {"batch_size": min(ran.config["batch_size"], len(chosen))})
    node = build.found(ran.config, "backbone", cfg, place)
    backbone = build.construct(weights.unfilled(node))
    view = shown_to(ran)
    check_size("augmentation.image_size", view.image_size, backbone, node.get("name", ""))
    weights.load_backbone(backbone, str(candidate.path))
    on_device(backbone, run).eval()
    source = open_source(asked, run, data, split, view, chosen)
    with autocast(cfg.precision, run.device):
        features, _ = extract(backbone, source.epoch_pass(), view.to(run.device))
    values = criteria.of_features(features)
    seen = build.construct(build.found(ran.config, "augmentation", cfg, place)).to(run.device)
    shown = source.shown_as(seen)
    if views > 1:
        each: list[Tensor] = []
        for epoch in range(math.ceil(views / seen.num_views)):
            each += augmented(cfg, run, backbone, shown, seen, epoch)
        values |= criteria.of_views(torch.stack(each[:views]))
    loss = heldout_loss(cfg, run, candidate, shown, seen)
    return values if loss is None else values | {"heldout_loss": loss}


@torch.no_grad()
def augmented(
    cfg: DictConfig, run: Run, backbone: nn.Module, source: Source, views: Any, epoch: int
) -> list[Tensor]:
    """Features (N, D) of each full view of the source's images, as an epoch draws them."""
    parts: list[list[Tensor]] = [[] for _ in range(views.num_views)]
    for images, _, indices in source.epoch_pass(epoch):
        batch = views(images, keys(cfg.seed, epoch, indices))
        for part, view in zip(parts, batch[: views.num_views], strict=True):
            with autocast(cfg.precision, run.device):
                part.append(backbone(view).float().cpu())
    return [torch.cat(part) for part in parts]


@torch.no_grad()
def heldout_loss(
    cfg: DictConfig, run: Run, candidate: Candidate, source: Source, views: Any
) -> float | None:
    """The mean loss of the method on the source's whole batches, in eval mode.

    None for a method that has a state for each image it learns from, or a teacher elsewhere, for a
    checkpoint that is a backbone alone, and for fewer images than a batch had, since the loss may
    depend on their number.
    """
    ran, place = candidate.ran, candidate.ran.directory / layout.CONFIG
    node = build.found(ran.config, "method", cfg, place)
    elsewhere = any(build.takes(node, name) for name in ("num_images", "teacher_network"))
    if elsewhere or source.batch_size < ran.config["batch_size"]:
        return None
    content = checkpoint.read(candidate.path)
    assert isinstance(content, dict), "load_backbone has read it"
    if "kept" in content:
        return None
    given = build.wanted(node, batch_size=lambda: ran.config["batch_size"])
    network = build.construct(weights.unfilled(build.found(ran.config, "backbone", cfg, place)))
    model: Method = build.construct(node, backbone=network, **given)
    model.load_state_dict(content["model"])
    on_device(model, run).eval()
    per_epoch = metrics.per_epoch(ran.directory)
    epochs = ran.config["epochs"]
    model.begin(min(candidate.step / per_epoch, epochs) if per_epoch else epochs, epochs)
    losses = []
    for step, (images, labels, indices) in enumerate(source.epoch_pass()):
        if len(indices) < source.batch_size:
            continue
        image_keys = keys(cfg.seed, 0, indices)
        seed_torch(fold(cfg.seed, "choose", step), run.device)
        batch = views(images, image_keys)
        with autocast(cfg.precision, run.device):
            output = model(batch, labels, *model.draw(image_keys, indices))
        losses.append(output["loss"].item())
    return sum(losses) / len(losses)


# -- what labels say -------------------------------------------------------------------------------


def judge(found: Sequence[Candidate], runs: Iterable[Ran], metric: str | None) -> None:
    """Note in each candidate what labels say of it.

    Of evaluations of its file, the mean over their seeds: of the first of JUDGES that is there. Of
    the pretraining itself, what it logged at that step. metric: this value alone.
    """
    evaluations: dict[tuple[str, str], list[float]] = {}
    for ran in runs:
        value = (ran.summary or {}).get("val_top1" if metric is None else metric)
        if ran.stage in JUDGES and ran.stands_on and value is not None:
            evaluations.setdefault((ran.stage, ran.stands_on), []).append(value)
    there = [stage for stage in JUDGES if any(stage == key for key, _ in evaluations)]
    for one in found:
        digest = files.digest(one.path)
        for stage in there[:1]:
            if values := evaluations.get((stage, digest)):
                one.truth[f"{stage} {metric or 'val_top1'}"] = sum(values) / len(values)
        for line in one.ran.lines:
            if line["step"] == one.step:
                asked = LOGGED if metric is None else (metric,)
                one.truth |= {key: line[key] for key in asked if key in line}
    if metric is not None and not any(one.truth for one in found):
        raise UserError(f"metric={metric}: no run here has it for a checkpoint that is there")


def remarks(found: Sequence[Candidate]) -> list[str]:
    """What readers of the table must know."""
    first = {one.name: one.ran for one in found}.values()
    notes = []
    if differing := identity.other_losses(ran.identity for ran in first):
        few = ", ".join(differing[:4]) + (", ..." if len(differing) > 4 else "")
        notes.append(
            "heldout_loss can't be compared here: these settings differ in what it depends on "
            f"({few})."
        )
    if any(key.startswith("augmentation.") for key in differing):
        notes.append(
            "lidar and alignment are of each run's own views, which differ: the weaker these are, "
            "the better it seems."
        )
    return notes


def evidence_of(found: Sequence[Candidate]) -> dict[str, list[dict[str, Any]]]:
    """{truth: a row for each criterion}: how well it would have chosen, for each seed apart.

    Of what evaluations say, over the settings; of what pretrainings have logged, over all
    checkpoints. Only where a seed has three candidates or more.
    """
    tables_of: dict[str, list[dict[str, Any]]] = {}
    for truth in dict.fromkeys(key for one in found for key in one.truth):
        seeds: dict[int, list[Candidate]] = {}
        for one in found:
            if truth in one.truth:
                seeds.setdefault(one.ran.seed, []).append(one)
        several = [each for each in seeds.values() if len(each) >= 3]
        if not several:
            continue
        rows = []
        for name in [name for name in BETTER if all(name in c.values for e in several for c in e)]:
            rhos, regrets = [], []
            for each in several:
                scores = [criteria.score(name, one.values[name]) for one in each]
                values = [one.truth[truth] for one in each]
                rhos.append(criteria.spearman(scores, values))
                regrets.append(criteria.regret(scores, values))
            rows.append(
                {
                    "criterion": name,
                    "rho": units.mean_std(rhos)[0],
                    "regret": units.mean_std(regrets)[0],
                    "rhos": rhos,
                    "regrets": regrets,
                }
            )
        chance = [max(v) - sum(v) / len(v) for v in ([c.truth[truth] for c in e] for e in several)]
        rows.append({"criterion": "a choice by chance", "regrets": chance})
        rows[-1]["regret"] = units.mean_std(chance)[0]
        tables_of[truth] = rows
    return tables_of


# -- what is shown ---------------------------------------------------------------------------------


def write(
    found: Sequence[Candidate], by: str, notes: Sequence[str], settings: Mapping[str, Any]
) -> tuple[str, dict[str, list[dict[str, Any]]]]:
    """(the text of choice.md, what `evidence_of` returns). UserError if none has the criterion."""
    groups: dict[str, list[Candidate]] = {}
    for one in found:
        groups.setdefault(one.at, []).append(one)
    having = {at: each for at, each in groups.items() if all(by in one.values for one in each)}
    if not having:
        raise UserError(f"stage.by={by}: none of these methods has it; choose another")

    def rank(each: Sequence[Candidate]) -> float:
        score = sum(criteria.score(by, one.values[by]) for one in each) / len(each)
        return -score if math.isfinite(score) else math.inf

    order = sorted(having, key=lambda at: rank(having[at]))
    order += [at for at in groups if at not in having]
    names = [name for name in BETTER if any(name in one.values for one in found)]
    truths = list(dict.fromkeys(key for one in found for key in one.truth))
    rows = []
    for at in order:
        each = groups[at]
        cells = [_shown([one.values[key] for one in each if key in one.values]) for key in names]
        judged = [
            units.shown("val_top1", [one.truth[key] for one in each if key in one.truth])
            for key in truths
        ]
        rows.append([at, *cells, *judged])
    better = {"larger": "↑", "smaller": "↓", "nearer to 1": "→ 1"}
    header = ["", *(f"{name} {better[BETTER[name]]}" for name in names), *truths]
    best = max(having[order[0]], key=lambda one: criteria.score(by, one.values[by]))
    parts = [
        f"# The choice by {by}: {order[0]}",
        f"pretrained={best.path}",
        f"Of at most {settings['images']:,} images of the {settings['split'] or DEFAULT} split; "
        "best first, mean ± sample standard deviation over seeds.",
        tables.markdown(header, rows, right=len(header) - 1),
        *notes,
    ]
    evidence = evidence_of(found)
    for truth, lines in evidence.items():
        number = len(lines[-1]["regrets"])
        seeds = f"{number} seed{'s' if number > 1 else ''}"
        parts.append(f"## How well each would have chosen, by {truth}, mean over {seeds}")
        body = [
            [row["criterion"], _shown(row.get("rhos", []), ".2f"), _shown(row["regrets"], ".1f")]
            for row in lines
        ]
        parts.append(tables.markdown(["", "Spearman's rho", "regret (points)"], body, right=2))
    if not evidence:
        parts.append(
            "No result with labels is here for three checkpoints of a seed: how well this chooses "
            "isn't known. docs/results/choice.md says how well it did elsewhere."
        )
    return "\n\n".join(parts) + "\n", evidence


def _shown(values: Sequence[float], form: str = ".3g") -> str:
    if not values:
        return ""
    mean, std = units.mean_std(list(values))
    return f"{mean:{form}}" if math.isnan(std) else f"{mean:{form}} ± {std:{form}}"


def shortened(text: str) -> str:
    """The text with no more than LISTED rows of its first table."""
    lines = text.rstrip("\n").split("\n")
    rows = [number for number, line in enumerate(lines) if line.startswith("|")]
    begin = rows[0]
    end = next(number for number in range(begin, len(lines)) if not lines[number].startswith("|"))
    if (left := end - begin - 2 - LISTED) > 0:
        lines[end - left : end] = [f"and {left} more in choice.md"]
    return "\n".join(lines)


def save(
    path: Path, found: Sequence[Candidate], settings: Mapping[str, Any], **remarks: Any
) -> None:
    content = {"settings": settings, **remarks, "rows": [one.row for one in found]}
    files.write(path, json.dumps(content, indent=1) + "\n")


def remembered(path: Path, settings: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """{digest of a checkpoint: its criteria}, of an earlier command with the same settings."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["settings"] != dict(settings):
            return {}
        rows = ((row["weights"], row["criteria"]) for row in content["rows"])
        return {
            digest: {name: float(value) for name, value in values.items() if name in BETTER}
            for digest, values in rows
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # another program's file, or a damaged one: everything is measured anew
