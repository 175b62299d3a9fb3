"""What the stages that measure a backbone, or go on from it, have in common."""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from omegaconf import DictConfig, OmegaConf
from pydantic import ValidationError
from torch import nn

from ssl_bench import build, distributed, files, interop, results, zoo
from ssl_bench.augment.views import EvalView
from ssl_bench.data.pool import Progress
from ssl_bench.data.source import Batch, Source
from ssl_bench.errors import UserError
from ssl_bench.run import Run
from ssl_bench.seeding import fold
from ssl_bench.stages.training import check_tracking, seed_init

log = logging.getLogger(__name__)


def load_pretrained(cfg: DictConfig) -> nn.Module:
    """The backbone of cfg, filled from `cfg.pretrained`; as initialised where that is null."""
    seed_init(cfg)
    backbone = build.construct(cfg.backbone)
    if cfg.pretrained is None:
        log.info("pretrained=null: the backbone stays as initialised")
        return backbone
    loaded = interop.load_backbone(backbone, cfg.pretrained)
    tell(loaded)
    before = interop.look(loaded.source)
    for key in ("mean", "std"):
        now, then = cfg.augmentation.get(key), before.get(key)
        if now and then and list(now) == list(then):
            log.info("augmentation.%s=%s, as it was trained with", key, listed(now))
        elif now and then:
            log.warning("augmentation.%s=%s, but it was trained with %s", key, listed(now), listed(then))
    return backbone


def listed(values: Iterable[float]) -> str:
    """As one types it."""
    return f"[{','.join(f'{value:g}' for value in values)}]"


def tell(loaded: interop.Loaded) -> None:
    log.info(
        "loaded all %s tensors of the backbone from %s (%s layout)", loaded.num_tensors, loaded.source, loaded.layout
    )
    if loaded.left_out:
        more = ", ..." if len(loaded.left_out) > 4 else ""
        log.info("left out %s others: %s%s", len(loaded.left_out), ", ".join(loaded.left_out[:4]), more)
    if distributed.rank() == 0 and (reached := results.unfinished(loaded.source)):
        log.warning("%s is not finished: %s", files.run_of(loaded.source), reached)


def few_labels(labels: np.ndarray, per_class: int | None, fraction: float | None, seed: int) -> np.ndarray | None:
    """Sorted positions of the labelled images to learn from, drawn by seed; None stands for all. labels (N,).

    per_class: so many of each class. fraction: this share of each class, as SimCLR's 1 % and 10 % (arXiv:2002.05709,
    section 6), rounded, but at least one image. UserError for labels of one class: what tells nothing apart is always
    right.
    """
    check_classes(labels)
    if per_class is None and fraction is None:
        return None
    if per_class is not None and fraction is not None:
        raise UserError(
            f"stage.labels_per_class={per_class} and stage.label_fraction={fraction:g}: give one of the two"
        )
    classes, counts = np.unique(labels, return_counts=True)
    if per_class is not None:
        if (fewest := counts.min()) < per_class:
            raise UserError(
                f"stage.labels_per_class={per_class}: class {classes[counts.argmin()]} has only {fewest} images: "
                f"choose at most stage.labels_per_class={fewest}"
            )
        wanted = np.full(len(classes), per_class)
    else:
        wanted = np.maximum(np.round(fraction * counts).astype(int), 1)
        if (total := wanted.sum()) > 1.5 * fraction * len(labels):
            raise UserError(
                f"stage.label_fraction={fraction:g} of {len(labels):,} images is {fraction * len(labels):.0f}, and one "
                f"of each class makes {total:,}: choose a larger share, or type stage.labels_per_class=1"
            )
    chosen = []
    for label, number in zip(classes, wanted, strict=True):
        members = np.flatnonzero(labels == label)
        rng = np.random.default_rng(fold(seed, "labels", int(label)))
        chosen.append(rng.choice(members, number, replace=False))
    log.info("%s of %s labels, %.3g %%", f"{wanted.sum():,}", f"{len(labels):,}", 100 * wanted.sum() / len(labels))
    return np.sort(np.concatenate(chosen))


def check_classes(labels: np.ndarray) -> None:
    if labels.min() == labels.max():
        raise UserError(
            f"all {len(labels):,} labelled images are of one class, and what tells nothing apart is always right: give "
            "data.root= a data set of two classes or more"
        )


def watched(run: Run, source: Source, title: str) -> Iterator[Batch]:
    """The source's pass over its images: shows how far it is, and stops for a signal."""
    world = distributed.world_size()
    everywhere = source.num_images // world // (source.batch_size // world)  # batches that every process has
    with Progress(source.num_images, title, run.is_main) as progress:
        for step, batch in enumerate(source.epoch_pass()):
            if step < everywhere and run.stopping(step):
                run.interrupt()
            yield batch
            progress.add(min(len(batch[1]) * world, source.num_images - progress.done))


def log_result(run: Run, result: dict[str, float]) -> None:
    """The one line of metrics.jsonl, and of the dashboard, of a stage that doesn't train."""
    if run.is_main:
        run.metrics.truncate(0)  # that of an attempt which was killed after it
    for _ in run.progress([1], 0, 1):
        run.log(1, {"epoch": 1.0, **result})


def digest(*modules: nn.Module) -> str:
    """Of every parameter and buffer."""
    whole = hashlib.blake2b()
    for module in modules:
        for key, value in module.state_dict().items():
            whole.update(key.encode())
            whole.update(value.cpu().contiguous().numpy().tobytes())
    return whole.hexdigest()


def check_directory(cfg: DictConfig) -> None:
    """UserError for a stage that couldn't leave its result in a directory, or with the tracker."""
    if cfg.dir is None:
        raise UserError(f"dir=null: stage={cfg.stage.name} writes its result there; type dir=... or leave it out")
    check_tracking(cfg)


class Pretrained(NamedTuple):
    """A file of weights, and what it says about itself."""

    path: Path
    config: dict[str, Any]  # of the run that made it; empty where that isn't known
    network: dict[str, Any]  # the node that the backbone was made from
    backbone: nn.Module
    classifier: nn.Linear | None
    classes: list[str]  # names of what it tells apart; empty where they have none

    def view(self, image_size: int | None, resize: float | None) -> tuple[int, EvalView]:
        """How its run shows test images: (size they are packed at, test view); None is what the run has.

        ImageNet's 224 pixels, mean and std where nothing is known.
        """
        view = view_of(self.config, self.path, image_size, resize)
        packed = (self.config.get("data") or {}).get("image_size") if image_size is None else None
        if not isinstance(packed, int):
            packed = round(view.image_size * view.resize)
        return packed, view


def view_of(config: Mapping, place: Path, image_size: int | None = None, resize: float | None = None) -> EvalView:
    """As the configuration that was read from `place` shows test images, unless size (pixels) or resize say so.

    ImageNet's 224 pixels, mean and std where it doesn't say; UserError where it says what can't be.
    """
    augmentation, stage = config.get("augmentation") or {}, config.get("stage") or {}
    try:
        size = image_size or int(augmentation.get("image_size", 224))
        resize = resize or float(stage.get("test_resize", 256 / 224))
        look = {key: tuple(float(x) for x in augmentation[key]) for key in ("mean", "std") if augmentation.get(key)}
        return EvalView(size, resize, **look)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{place}: its configuration doesn't say how to show images ({error})") from None


def open_pretrained(cfg: DictConfig) -> Pretrained:
    """What `cfg.pretrained` names, with the backbone of its run unless the command line chose another."""
    if cfg.pretrained is None:
        raise UserError(
            f"stage={cfg.stage.name} needs weights: type pretrained=... (a run directory, a file, a zoo name)"
        )
    path = interop.find(cfg.pretrained)
    config = interop.recipe(path) or {}
    chosen = cfg.get("backbone")
    known = zoo.WEIGHTS.get(cfg.pretrained)
    advice = f"type backbone={known.backbone if known else '..., the one that it is of'}"
    if chosen is not None:
        node = OmegaConf.to_container(chosen, resolve=True)
    elif not config.get("backbone"):
        raise UserError(f"pretrained={cfg.pretrained}: doesn't say which of our networks it is of: {advice}")
    else:
        node = build.found(config, "backbone", cfg, path)
    try:
        backbone = build.construct(node)
    except ValidationError:
        raise UserError(f"pretrained={cfg.pretrained}: its backbone is of another version: {advice}") from None
    tell(interop.load_backbone(backbone, cfg.pretrained))
    classifier = interop.load_classifier(cfg.pretrained)
    if classifier is not None and classifier.in_features != backbone.dim:
        classifier = None  # it belongs to something else than the backbone
    if classifier is not None:
        log.info("and its classifier of %d classes", classifier.out_features)
    names = interop.class_names(path)
    classes = names if classifier is not None and len(names) == classifier.out_features else []
    return Pretrained(path, config, node, backbone.eval(), classifier, classes)
