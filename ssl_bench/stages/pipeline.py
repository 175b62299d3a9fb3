"""Stage pipeline: pretrain, evaluate the features beside those of baselines, and show both."""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict
from pydantic import NonNegativeInt

from ssl_bench import console
from ssl_bench.config import build, typed
from ssl_bench.errors import UserError
from ssl_bench.evaluate.features import extract_all
from ssl_bench.launch.process import launch
from ssl_bench.report import figure
from ssl_bench.runs import identity, layout, published, units, weights
from ssl_bench.runs.metrics import MetricsFile
from ssl_bench.runs.run import Run
from ssl_bench.runtime import distributed
from ssl_bench.stages import (
    EVERY,
    PARTED,
    PRETRAINING,
    RECIPE,
    WATCHED,
    _images,
    _labels,
    single_process,
)
from ssl_bench.stages._training import make_test_view, on_device, open_source
from ssl_bench.stages.pretrain import picture as picture_of

log = logging.getLogger(__name__)

# Keys that an evaluation shares with the pretraining, unless its own overrides say otherwise.
SHARED = ("data", "backbone", "tracking", "device", "devices", "precision", "zero_init_residual")
JUDGES = ("probe_top1", "knn_top1")  # of the pretraining
READS = PRETRAINING
IDLE = {
    # the augmentation is read for the picture
    "method.name=random": (*RECIPE[1:], *PARTED, *EVERY, *WATCHED, "on_collapse"),
    "method.name=supervised": ("eval_every",),
}


@single_process  # its members start processes of their own
def pipeline(
    cfg: DictConfig,
    run: Run,
    protocol: list[str],
    rows: dict[str, list[str] | None],
    seeds: list[NonNegativeInt],
    picture: bool = True,
) -> dict[str, float]:
    """Pretrain by cfg, then run `stage=lincls` for each row and each seed.

    protocol: overrides of every evaluation. rows: {name: its own overrides}. If these begin with
    another stage, like stage=knn, the row is that one, without the protocol. Every run has a
    directory below the pipeline's and continues by itself. picture: draw overview.png. Returns the
    mean top-1 (percent) of each row, and of the pretraining its own accuracies (percent) and costs.
    """
    pretraining, evaluations = _parts(cfg, protocol, rows, seeds)
    check_labels(evaluations)
    total = 1 + sum(map(len, evaluations.values()))
    several = ", ".join(f"{len(members)} x {name}" for name, members in evaluations.items())
    log.info("%s runs: a pretraining, then %s", total, several)
    log.info("1 of %s: pretraining", total, extra={"heading": True})
    pretrained = launch(pretraining)
    done = 1
    results: dict[str, list[float]] = {}
    for name, members in evaluations.items():
        for member in members:
            if run.stopping(0):  # a signal that came between two of them
                run.interrupt()
            done += 1
            found = _evaluated(member, f"{done} of {total}: {name}, seed {member.seed}")
            if (top1 := found.get("val_top1")) is not None:  # an export has none
                results.setdefault(name, []).append(top1)
    any_results = distributed.any_rank(bool(results))  # some stages return them on rank 0 alone
    if any_results and run.is_main:
        print(f"\n{figure.table(results, 'top-1')}")
    if picture and any_results:
        path = run.directory / "overview.png"
        try:
            with console.aside():
                draw(cfg, run, evaluations, results, path)
            if run.is_main:
                run.log_image(0, "overview", path)
                print(f"\npicture: {path}")
        except Exception as error:  # whatever it is: without a picture the results still count
            log.warning("no picture: %s: %s", type(error).__name__, error)
    top1 = {f"{name} top-1": units.mean_std(values)[0] for name, values in results.items()}
    judged = {key: pretrained[key] for key in JUDGES if key in pretrained}
    return top1 | judged | cost(MetricsFile.read(run.directory / "pretrain" / layout.METRICS))


def _evaluated(member: DictConfig, part: str) -> dict[str, float]:
    """What the evaluation finds, told in a line; its log.txt has all of it."""
    began, before = time.monotonic(), (Path(member.dir) / layout.SUMMARY).is_file()
    try:
        with console.aside():
            found = launch(member)
    except BaseException:
        log.info("in %s", part, extra={"result": True})
        raise
    said = units.headline({key: found[key] for key in units.HEADLINE if key in found}, 34)
    took = console.duration(time.monotonic() - began)
    end = "finished already" if before else f"took {took}"
    log.info("%s", "  ".join(filter(None, [part, said, end])), extra={"result": True})
    return found


def _parts(
    cfg: DictConfig, protocol: list[str], rows: dict[str, list[str] | None], seeds: list[int]
) -> tuple[DictConfig, dict[str, list[DictConfig]]]:
    """The pretraining and the evaluations of each row, all checked before any takes time."""
    (pretraining,) = pretrainings([cfg])
    evaluations = {
        name: [evaluation(cfg, name, protocol, overrides, seed) for seed in seeds]
        for name, overrides in rows.items()
        if overrides is not None
    }
    for member in chain([pretraining], *evaluations.values()):
        build.check(member)
    for name, members in evaluations.items():
        for member in members:
            check_weights(member, name, cfg.dir)
            if _labels.learns_labels(cfg.method):
                check_choice(member, pretraining)
    return pretraining, evaluations


def check_parts(cfg: DictConfig) -> None:
    """UserError for a pipeline whose rows are mistaken, before its pretraining takes time.

    The images are looked at for rows of few labels alone: to list millions takes minutes.
    """
    _, evaluations = _parts(cfg, cfg.stage.protocol, cfg.stage.rows, cfg.stage.seeds[:1])
    few = ("labels_per_class", "label_fraction")
    check_labels(
        {
            name: members
            for name, members in evaluations.items()
            if any(member.stage.get(key) is not None for member in members for key in few)
        }
    )


def pretrainings(cfgs: Sequence[DictConfig]) -> list[DictConfig]:
    """The pretraining of each pipeline, a run of its own in a directory below.

    Launchers give it a slot or a job of its own (`launch.launchers`).
    """
    stage = hydra.compose("config", ["stage=pretrain"]).stage
    return [_part(cfg, f"{cfg.dir}/pretrain", cfg, stage=stage) for cfg in cfgs]


pipeline.pretrainings, pipeline.check_parts = pretrainings, check_parts
pipeline.read_by_parts = (*SHARED, "stage", "augmentation")  # and which method it is


def check_weights(member: DictConfig, row: str, directory: str) -> None:
    """UserError for a row whose weights aren't there, unless the pipeline itself leaves them.

    A row that has finished needs them no more.
    """
    if (source := member.pretrained) is None or (Path(member.dir) / layout.SUMMARY).exists():
        return
    own = Path(identity.real(directory))
    if why := published.missing(os.path.expanduser(source), {own}):
        raise UserError(f"stage.rows, {row}: {why}")


def check_labels(evaluations: Mapping[str, Sequence[DictConfig]]) -> None:
    """UserError for a row that its labelled images can't serve, before its pretraining takes time:
    a split isn't there, a class has fewer than it asks for, they don't fill its batch, or it has
    too few to choose by.

    Of each row the first member stands for all. Rows that have finished pass, and so do images that
    this machine doesn't have, as the one that only submits may not.
    """
    known: dict[str, Any] = {}  # each data set is listed once
    for name, members in evaluations.items():
        for member in members[:1]:
            done = (Path(member.dir) / layout.SUMMARY).exists()
            if done or _images.is_elsewhere(member) or "labels_per_class" not in member.stage:
                continue
            try:
                _images.check_labels(member, known)
            except UserError as error:
                raise UserError(f"stage.rows, {name}: {error}") from None


def check_choice(member: DictConfig, pretraining: DictConfig) -> None:
    """UserError for an evaluation that would choose by labels that the pretraining learns from."""
    stage, source = build.locate(member.stage._target_, "stage"), member.pretrained
    if source is None or identity.real(source) != identity.real(pretraining.dir):
        return
    same_data = member.data.name == pretraining.data.name
    if same_data and hasattr(stage, "chooses") and stage.chooses(member.stage):
        raise UserError(_labels.refusal(member, *stage.choice))


def cost(lines: list[dict[str, float]]) -> dict[str, float]:
    """The costs of a training, from its metrics.jsonl; empty if nothing was trained."""
    if not lines:
        return {}
    rate = median(line["images_per_second"] for line in lines if "images_per_second" in line)
    return {"images_per_second": rate, "memory_gb": max(line.get("memory_gb", 0) for line in lines)}


def evaluation(
    cfg: DictConfig, name: str, protocol: list[str], own: list[str], seed: int
) -> DictConfig:
    """The configuration of a row's run. UserError for overrides that it would ignore."""
    overrides = own if own and own[0].startswith("stage=") else ["stage=lincls", *protocol, *own]
    keys = {word: typed.key_of(word) for word in overrides}
    chosen = {*keys.values()}
    # single keys of a shared group, which isn't chosen anew: they change the pretraining's
    roots = {word: key.partition(".")[0] for word, key in keys.items()}
    changed = [word for word, root in roots.items() if root in SHARED and root not in chosen]
    member = hydra.compose("config", [word for word in overrides if word not in changed])
    shared = {key: cfg[key] for key in SHARED if key not in chosen}
    made = _part(cfg, f"{cfg.dir}/{identity.slug(name)}/seed{seed}", member, seed=seed, **shared)
    for key in ("mean", "std"):  # so that the baselines see the same images
        if key in made.augmentation and made.augmentation[key] is None:
            made.augmentation[key] = cfg.augmentation[key]
    for override in OverridesParser.create().parse_overrides(changed):
        OmegaConf.update(made, override.key_or_group, override.value(), force_add=True)
    lines = [*typed.in_vain(OmegaConf.to_container(member), overrides).values()]
    for key, instead in {"seed": "stage.seeds says it", "dir": "the pipeline says it"}.items():
        lines += [f"{word} would be ignored: {instead}" for word in overrides if keys[word] == key]
    if lines:
        raise UserError("\n".join(f"stage.rows, {name}: {line}" for line in lines))
    return made


def _part(cfg: DictConfig, directory: str, own: DictConfig, **nodes: object) -> DictConfig:
    """A run of the pipeline `cfg`: `own` in this directory, with these nodes in place of its own.

    On a dashboard it has a name of its own.
    """
    made = OmegaConf.create(OmegaConf.to_container(own))
    with open_dict(made):
        for key, node in (nodes | {"dir": directory}).items():
            if OmegaConf.is_config(node):
                node = OmegaConf.to_container(node, resolve=True)
            made[key] = node
    for node in (made.tracking, *made.tracking.values()):  # tracking=several has some within
        if OmegaConf.is_config(node) and (name := node.get("name")):
            node.name = f"{name} {os.path.relpath(directory, cfg.dir)}"
    return made


def draw(
    cfg: DictConfig,
    run: Run,
    evaluations: dict[str, list[DictConfig]],
    results: dict[str, list[float]],
    path: Path,
) -> None:
    """overview.png: curves, accuracies, augmented views, and a map of features of the val split.

    All processes compute the features; rank 0 draws.
    """
    data = build.construct(cfg.data)
    views = build.construct(cfg.augmentation).to(run.device)
    view = make_test_view(cfg, run, 1.0)
    train_images = open_source(cfg, run, data, "pretrain", views)
    test = open_source(cfg, run, data, "val", view)
    backbone = build.construct(weights.unfilled(cfg.backbone))
    weights.load_backbone(backbone, f"{cfg.dir}/pretrain")
    on_device(backbone, run).eval()
    features = extract_all(cfg.precision, run, backbone, test, lambda images, _: view(images))
    if not run.is_main:
        return
    shown = picture_of(views, train_images)[:, :8]
    curves = {"pretraining": MetricsFile.read(run.directory / "pretrain" / layout.METRICS)}
    for name in results:
        curves[name] = MetricsFile.read(Path(evaluations[name][0].dir) / layout.METRICS)
    title = f"{cfg.method.name}, {cfg.backbone.name}, {cfg.data.name}"
    labels = test.labels[test.rows]
    figure.overview(path, title, curves, shown.cpu(), features.numpy(), labels, results)
