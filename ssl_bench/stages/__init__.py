"""Stages: functions `(cfg, run, **options) -> metrics`. The options are the keys of `cfg.stage`.

READS, in the module of a stage, lists the shared keys that it reads (see `typed`). It is put
together from the tuples here.
"""

from collections.abc import Callable
from typing import Any, TypeVar

Stage = TypeVar("Stage", bound=Callable[..., Any])

RUN = ("dir", "sweep", "metric", "tracking", "seed", "device")  # keys of a stage that leaves a run
IMAGES = ("source", "batch_size", "precision")  # keys of one that shows images to a network
# keys of a test view
LOOK = ("augmentation.name", "augmentation.image_size", "augmentation.mean", "augmentation.std")
EVERY = ("log_every", "eval_every", "save_every", "keep")
RECIPE = ("augmentation", "optimizer", "schedule", "epochs", "compile", "ema")
TRAINING = (*RUN, *IMAGES, *RECIPE, *EVERY, "devices", "data", "backbone")
PRETRAINED = ("pretrained", "pretrained_prefix")  # keys of one that reads weights
PARTED = ("accumulate", "compress")  # keys of how a step is split
WATCHED = ("patience", "save_best")
PRETRAINING = (*TRAINING, *PARTED, *WATCHED, "method", "sync_batch_norm", "on_collapse")


def single_process(stage: Stage) -> Stage:
    """Mark a stage that runs in one process, whatever `devices` says."""
    setattr(stage, "single_process", True)  # noqa: B010 - a function has no such attribute to mypy
    return stage
