"""What a run would refuse for the number of its images, asked before the members of a sweep start.

Members ask it again as they start: the images may be elsewhere, or too many to be listed here.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ssl_bench.config import build, typed
from ssl_bench.config.renamed import current
from ssl_bench.data.formats.base import Dataset
from ssl_bench.data.formats.listing import holds_more
from ssl_bench.errors import UserError
from ssl_bench.evaluate.labels import hold_out, labelled
from ssl_bench.methods.base import Method
from ssl_bench.runs import identity, weights
from ssl_bench.runtime import distributed
from ssl_bench.stages import Stage
from ssl_bench.stages._training import check_fills, check_norm, check_sizes

log = logging.getLogger(__name__)

QUICK = 200_000  # files of a folder that a sweep waits for; the queues of our recipes hold fewer
READ = (
    *("data", "method", "backbone", "stage", "augmentation", "batch_size", "devices"),
    *("accumulate", "sync_batch_norm"),
)


def check(cfg: DictConfig, known: dict[str, Any], sure: bool = True) -> None:
    """UserError for images that the training or evaluation `cfg` would refuse as it starts.

    known: what was found for others, which this fills. sure: the members see the folders that are
    here, so that what can't be listed here can't there. Nothing is asked of images that aren't
    here, that a user's own code gives, or that take long to list.
    """
    root = cfg.data.get("root")
    if not current(cfg.data._target_).startswith("ssl_bench.data.formats.") or is_elsewhere(cfg):
        return
    kind: Any = build.locate(cfg.data._target_, "data")
    if not kind.listed_at_once:
        return
    if root and _once(known, f"large {root}", lambda: holds_more(Path(root), QUICK)):
        return
    plain = OmegaConf.to_container(cfg, resolve=True)
    read = json.dumps([plain.get(key) for key in READ], default=str)
    if why := _once(known, read, lambda: _refusal(cfg, known, sure)):
        raise UserError(why)


def counted(stage: Stage) -> None:
    """Mark a stage of which a sweep asks `check` before any member starts."""
    setattr(stage, "check_images", check)  # noqa: B010 - a function has no such attribute to mypy


def is_elsewhere(cfg: DictConfig) -> bool:
    """Are the images of a folder that isn't here, as on a machine that only submits?"""
    root = cfg.data.get("root")
    try:
        return bool(root) and not Path(identity.real(root)).exists()
    except OSError:  # a folder above that this user may not look into
        return True


def _once(known: dict[str, Any], key: str, find: Callable[[], Any]) -> Any:
    if key not in known:
        known[key] = find()
    return known[key]


def _refusal(cfg: DictConfig, known: dict[str, Any], sure: bool) -> str:
    evaluates = "labels_per_class" in cfg.stage
    try:
        try:
            data = opened(cfg, known)
            for split in ("train", "val") if evaluates else (_method(cfg).split,):
                data.split(split)
        except UserError:  # of a folder that is empty here, and isn't mounted, say
            if sure:
                raise
            return ""
        if evaluates:
            check_labels(cfg, known)
        else:
            _check_pretraining(cfg, data)
    except UserError as error:
        return str(error)
    return ""


def _method(cfg: DictConfig) -> Any:
    return build.locate(cfg.method._target_, "method")


def opened(cfg: DictConfig, known: dict[str, Any]) -> Dataset:
    key = json.dumps(OmegaConf.to_container(cfg.data, resolve=True))
    return _once(known, key, lambda: build.construct(cfg.data))


def check_labels(cfg: DictConfig, known: dict[str, Any]) -> None:
    """UserError for labelled images that can't serve an evaluation: too few for a class, for its
    batch or to choose by, or a split isn't there.
    """
    stage = cfg.stage
    per_class, fraction = stage.labels_per_class, stage.label_fraction
    split, few = labelled(opened(cfg, known), per_class, fraction, cfg.seed)
    labels = split.labels
    assert labels is not None
    labels = labels if few is None else labels[few]
    if "optimizer" in (typed.reads(stage._target_) or ()):
        check_fills(cfg, len(labels))
    does: Any = build.locate(stage._target_, "stage")
    if hasattr(does, "chooses") and does.chooses(stage):
        hold_out(labels, stage.holdout, cfg.seed, *does.choice)


def _check_pretraining(cfg: DictConfig, data: Dataset) -> None:
    num_images = data.split(_method(cfg).split).length
    check_fills(cfg, num_images)
    try:
        with distributed.as_if(cfg.devices):
            model = _on_paper(cfg, data)
            model.check(num_images, cfg.batch_size // cfg.devices)
            check_sizes(cfg, model.backbone)
            parts = max(model.bn_splits, cfg.get("accumulate") or 1)
            check_norm(cfg, model, cfg.sync_batch_norm, parts)
    except UserError:
        raise
    except Exception as error:  # of a teacher that must be read, of another's code: it says so then
        log.debug("%s isn't checked without its values: %s", cfg.method.name, error)


def _on_paper(cfg: DictConfig, data: Dataset) -> Method:
    """The method as a pretraining has it, but for its values."""
    given = build.wanted(
        cfg.method,
        num_classes=lambda: data.num_classes,
        batch_size=lambda: cfg.batch_size,
        num_images=lambda: data.split("pretrain").length,
    )
    with weights.on_paper():
        backbone = build.construct(weights.unfilled(cfg.backbone))
        return build.construct(cfg.method, backbone=backbone, **given)
