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
    *("accumulate", "sync_batch_norm", "seed"),
)


def check(cfg: DictConfig, known: dict[str, Any]) -> None:
    """UserError for images that the training or evaluation `cfg` would refuse as it starts.

    known: what was found for others, which this fills. Nothing is asked of images that aren't here,
    that a user's own code gives, or that take long to list.
    """
    root = cfg.data.get("root")
    if not current(cfg.data._target_).startswith("ssl_bench.data.formats.") or is_elsewhere(cfg):
        return
    if root and _once(known, f"large {root}", lambda: holds_more(Path(root), QUICK)):
        return
    plain = OmegaConf.to_container(cfg, resolve=True)
    read = json.dumps([plain.get(key) for key in READ], default=str)
    if why := _once(known, read, lambda: _refusal(cfg, known)):
        raise UserError(why)


def counted(stage: Stage) -> None:
    """Mark a stage of which a sweep asks `check` before any member starts."""
    setattr(stage, "check_images", check)  # noqa: B010 - a function has no such attribute to mypy


def is_elsewhere(cfg: DictConfig) -> bool:
    """Are the images of a folder that isn't here, as on a machine that only submits?"""
    root = cfg.data.get("root")
    return bool(root) and not Path(identity.real(root)).exists()


def _once(known: dict[str, Any], key: str, find: Callable[[], Any]) -> Any:
    if key not in known:
        known[key] = find()
    return known[key]


def _refusal(cfg: DictConfig, known: dict[str, Any]) -> str:
    try:
        if "labels_per_class" in cfg.stage:
            check_labels(cfg, known)
        else:
            _check_pretraining(cfg, opened(cfg, known))
    except UserError as error:
        return str(error)
    return ""


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
    method: Any = build.locate(cfg.method._target_, "method")
    num_images = data.split(method.split).length
    check_fills(cfg, num_images)
    with distributed.as_if(cfg.devices):
        if (model := _on_paper(cfg, data)) is None:
            return
        model.check(num_images, cfg.batch_size // cfg.devices)
        check_sizes(cfg, model.backbone)
        parts = max(model.bn_splits, cfg.get("accumulate") or 1)
        check_norm(cfg, model, cfg.sync_batch_norm, parts)


def _on_paper(cfg: DictConfig, data: Dataset) -> Method | None:
    """The method as a pretraining has it, but for its values; None: it can't be made like that."""
    given = build.wanted(
        cfg.method,
        num_classes=lambda: data.num_classes,
        batch_size=lambda: cfg.batch_size,
        num_images=lambda: data.split("pretrain").length,
    )
    try:
        with weights.on_paper():
            backbone = build.construct(weights.unfilled(cfg.backbone))
            return build.construct(cfg.method, backbone=backbone, **given)
    except UserError:
        raise
    except Exception as error:  # of a teacher that must be read, of another's code: it says so then
        log.debug("%s isn't made without its data: %s", cfg.method.name, error)
        return None
