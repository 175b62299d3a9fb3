"""What the stages that train have in common."""

import json
import logging
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssl_bench import files
from ssl_bench.augment.views import EvalView, Views
from ssl_bench.augment.windows import Look
from ssl_bench.config import build
from ssl_bench.data.cutting import CutSource
from ssl_bench.data.encoded import Encoded
from ssl_bench.data.formats.base import Dataset, SplitName
from ssl_bench.data.source import HostSource, ResidentSource, Source, StreamedSource, fits
from ssl_bench.data.store import size
from ssl_bench.errors import UserError, several
from ssl_bench.methods.base import Method
from ssl_bench.runs import tracking, weights
from ssl_bench.runs.run import Run
from ssl_bench.runtime import convolutions, distributed
from ssl_bench.runtime.seeding import fold, seed_torch
from ssl_bench.training.average import Average
from ssl_bench.training.engine import fit

log = logging.getLogger(__name__)

RGB = tuple[float, float, float]
SOURCES = {"resident": ResidentSource, "host": HostSource}


def check_tracking(cfg: DictConfig) -> None:
    """UserError now, and not when the work is done, if the tracker can't be made."""
    if distributed.rank() == 0:
        tracking.check(cfg.tracking)


def check_batch(cfg: DictConfig, num_images: int) -> int:
    """The images of a batch on each process.

    UserError for a batch that doesn't fit the dataset or the processes.
    """
    check_tracking(cfg)
    if cfg.dir is None:
        raise UserError("dir=null: training needs a directory; type dir=... or leave it out")
    check_fills(cfg, num_images)
    processes = distributed.world_size()
    if cfg.batch_size % processes:
        raise UserError(
            f"batch_size={cfg.batch_size} is global, "
            f"and can't be divided among {processes} processes"
        )
    return cfg.batch_size // processes


def check_fills(cfg: DictConfig, num_images: int) -> None:
    """UserError for fewer images than a batch has."""
    if cfg.batch_size > num_images:
        raise UserError(
            f"batch_size={cfg.batch_size} is larger than the dataset ({num_images:,} "
            f"training images): choose at most batch_size={num_images}"
        )


def check_parts(cfg: DictConfig, model: Method, local_batch: int) -> None:
    """UserError for a batch that can't come in `accumulate` parts, or gradients that don't travel.

    Warns if batch norm would see less than without the parts.
    """
    if cfg.get("compress") is not None and distributed.world_size() == 1:
        raise UserError(
            f"compress={cfg.compress} is for gradients that travel, and this is one process: type "
            "compress=null, or devices=2"
        )
    if (count := cfg.get("accumulate")) is None:
        return
    if model.whole_batch is not None:
        raise UserError(
            f"accumulate={count}: by parts of a batch method={cfg.method.name} would learn "
            f"something else: {model.whole_batch}. Type accumulate=null, and a smaller batch_size= "
            "or precision=bf16 if memory is short"
        )
    if local_batch % count:
        raise UserError(
            f"accumulate={count} does not divide the {local_batch} images of a process: change one "
            "of accumulate, batch_size, devices"
        )
    learning = (module for module in model.train().modules() if isinstance(module, _BatchNorm))
    if model.bn_splits == 1 and any(norm.training for norm in learning):
        log.warning(
            "accumulate=%s: batch norm sees %s images at once, and not %s: in a network that has "
            "it, the gradients aren't quite those of the whole batch",
            *(count, local_batch // count, local_batch),
        )


def check_optimizer(cfg: DictConfig, *own: str) -> None:
    """UserError if the optimizer can't take the parameter groups that the stage will give it.

    own: keys, such as "lr" and "weight_decay", of which the groups have values of their own.
    """
    params = [nn.Parameter(torch.zeros(1, 1)), nn.Parameter(torch.zeros(1))]
    group = {"params": params, **dict.fromkeys(own, 0.0)}
    build.construct(cfg.optimizer, params=[group], batch_size=cfg.batch_size)


def check_norm(cfg: DictConfig, model: nn.Module, synced: bool, splits: int = 1) -> None:
    """UserError if a batch norm of the model would see a single image.

    splits: in how many parts it sees the batch of a process. synced: does batch norm see the
    batches of all processes as one?
    """
    parts = splits if synced else splits * distributed.world_size()
    norms = [module for module in model.train().modules() if isinstance(module, _BatchNorm)]
    learning = [norm.training for norm in norms]
    if cfg.batch_size // parts < 2 and any(learning):
        of = f", and sees one of {parts} parts" if parts > 1 else ""
        raise UserError(
            f"batch_size={cfg.batch_size}: batch norm needs two images{of}: "
            f"choose batch_size={2 * parts} or more"
        )


def seed_init(cfg: DictConfig) -> None:
    """Have every initial weight follow from `seed`, on any device: modules are made on the CPU."""
    seed_torch(fold(cfg.seed, "init"), torch.device("cpu"))


def open_source(
    cfg: DictConfig,
    run: Run,
    data: Dataset,
    split: SplitName,
    look: Look,
    subset: np.ndarray | None = None,
    once: bool = False,
) -> Source:
    """The images of a split, kept where `cfg.source` says, and packed first if they must be.

    look: how they are to be seen. subset: the images to use; None: all. once: they are seen once,
    so that pictures of any size aren't packed for it.
    """
    count, called = data.split(split).length, data.split(split).name
    run.uses(split, data.split(split).facts())
    if split == "train" and data.class_names and run.is_main and run.leaves:
        text = json.dumps({"classes": list(data.class_names)}) + "\n"
        files.write(run.directory / weights.CLASSES, text)
    rank, world = distributed.rank(), distributed.world_size()
    share = (cfg.batch_size, cfg.seed, run.device, rank, world, subset)
    kind = cfg.source
    if data.image_size is None:
        opened = _open_encoded(cfg, run, data, split, look, once)
        if isinstance(opened, Encoded):
            kept = "packed in" if opened.is_packed else "where they are, indexed in"
            log.info(
                "%s: %s pictures as they are, %s, %s %s",
                *(called, f"{len(opened):,}", size(opened.nbytes), kept, opened.directory),
            )
            values, draft, workers = data.values, data.draft, data.workers
            cuts = CutSource(opened, look, *share, values=values, draft=draft, workers=workers)
            cuts.waiting = run.waiting
            return cuts
        data = opened
    if kind == "auto" and distributed.any_rank(not data.has_room(split)):
        advice = "streaming; data.cache= sets another disk"
        log.warning("no room on the disk to keep %s decoded: %s", split, advice)
        kind = "streamed"
    if kind == "streamed":
        _warn_of_groups(data, split)
        if data.on_error == "skip" and cfg.stage.name != "pretrain":
            raise UserError(
                "data.on_error=skip with streamed images puts the next one in the place of one "
                "that can't be decoded, and it would count twice: type source=host (and "
                "data.cache= for another disk), or remove the bad ones"
            )
        log.info("%s: %s images, decoded as they are needed", called, f"{count:,}")
        options: dict[str, Any] = {"workers": data.workers, "on_error": data.on_error}
        streamed = StreamedSource(data.split(split), *share, **options)
        streamed.waiting = run.waiting
        return streamed
    with run.ends_at_once():
        store = data.open(split)
    if kind == "auto":
        kind = "resident" if fits(store.images.nbytes, run.device) else "host"
    place = run.device if kind == "resident" else store.directory / "images.npy"
    images, nbytes = several(len(store.images), "image"), size(store.images.nbytes)
    log.info("%s: %s, %s, on %s", called, images, nbytes, place)
    return SOURCES[kind](store.images, store.labels, store.indices, *share)


def _open_encoded(
    cfg: DictConfig, run: Run, data: Dataset, split: SplitName, look: Look, once: bool
) -> Encoded | Dataset:
    """The pictures of a split as they are; where these are small squares, the data set of squares.

    Squares of one size that aren't larger than the views cost least decoded.
    """
    if cfg.source == "resident":
        raise UserError(
            "source=resident keeps decoded images of one size on the device, and "
            "data.image_size=null takes them as they are: type data.image_size=96, or leave "
            "source= out"
        )
    rewritten = data.max_side is not None  # what is made smaller is in the store alone
    by_itself = rewritten or not (once or data.in_shards)
    packed = cfg.source == "host" or (once and rewritten) or (cfg.source == "auto" and by_itself)
    if packed and cfg.source == "auto" and distributed.any_rank(not data.has_room(split)):
        log.warning(
            "no room on the disk to pack %s: its files are read where they are; data.cache= sets "
            "another disk",
            split,
        )
        packed = False
    if not (packed or once):
        _warn_of_groups(data, split)
    if not packed and data.max_side is not None:
        raise UserError(
            f"data.max_side={data.max_side} rewrites pictures as they are packed, and they aren't: "
            "leave it out, or type source=host and data.cache= for another disk"
        )
    with run.ends_at_once():
        if data.begins_small(split, look.image_size):
            side = data.open_encoded(split, packed=False).side
            if side is not None and side <= look.image_size:
                log.info("%s: all images are %d x %d, and are packed decoded", split, side, side)
                return data.squares(side)
        return data.open_encoded(split, packed)


def _warn_of_groups(data: Dataset, split: SplitName) -> None:
    if not data.reads_singly(split):
        log.warning(
            "%s: its files give a whole group of images for each that is read, and in a random "
            "order that is slow: type source=host, and data.cache= for a disk with room",
            split,
        )


def check_sizes(cfg: DictConfig, backbone: nn.Module) -> None:
    """UserError for views of a size that the backbone doesn't take, before any image is read."""
    small = ("small_size",) if cfg.augmentation.get("num_small_views") else ()
    for key in ("image_size", *small):
        typed, pixels = f"augmentation.{key}", cfg.augmentation[key]
        instead = backbone.instead if hasattr(backbone, "instead") else None
        check_size(typed, pixels, backbone, cfg.backbone.name, instead)


def check_size(
    key: str,
    size: int,
    backbone: nn.Module,
    name: str,
    instead: Callable[[str, int], str] | None = None,
) -> None:
    """UserError if the backbone, called `name`, doesn't take images of `size` pixels.

    key: what to type for another size. instead: (key, size) -> what to type, or "".
    """
    if not (hasattr(backbone, "refuses") and (why := backbone.refuses(size))):
        return
    mend = instead(key, size) if instead else ""
    if mend:
        raise UserError(f"{key}={size} {why}: {mend}")
    raise UserError(f"{key}={size} {why}; backbone={name} doesn't take it: change one of the two")


def make_views(cfg: DictConfig, run: Run, method: type[Method] | Method) -> Views:
    """The augmentation. UserError if it makes other views than the method takes."""
    views = build.construct(cfg.augmentation).to(run.device)
    num_views = method.num_views
    taker = f"method={cfg.method.name}" if cfg.get("method") else f"stage={cfg.stage.name}"
    if views.num_small_views and not method.takes_small_views:
        raise UserError(
            f"augmentation.num_small_views={views.num_small_views}, but {taker} takes none: "
            "type augmentation.num_small_views=0, or choose a method of multi-crop, as method=dino"
        )
    if views.num_views != num_views:
        raise UserError(
            f"augmentation.num_views={views.num_views}, but {taker} takes {num_views}: "
            f"type augmentation.num_views={num_views}, or choose another augmentation="
        )
    if method.image_size not in (None, views.image_size):
        raise UserError(
            f"augmentation.image_size={views.image_size}, but {taker} takes the size of its "
            f"backbone: type backbone.image_size={views.image_size}"
        )
    if cfg.compile:
        views.compile_transforms()
    return views


def make_test_view(cfg: DictConfig, run: Run, resize: float) -> EvalView:
    """How test images are shown: as large, and normalised, as those of the training."""
    return EvalView(cfg.augmentation.image_size, resize, *normalization(cfg)).to(run.device)


def train(
    cfg: DictConfig,
    run: Run,
    model: Method,
    source: Source,
    views: Callable[[Tensor | list[Tensor], Tensor], list[Tensor]],
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    groups: list[dict] | None = None,
    measures: Collection[str] = (),
    **further: Any,
) -> dict[str, float]:
    """`fit` as the configuration says; returns what it does.

    groups: parameter groups with rates of their own; None: those of the model. measures: the
    metrics of `evaluate` that are shown as it trains. further: what `fit` is given beside them:
    accumulate, compress, on_collapse.
    """
    run.to_come = measures
    params = groups or model.param_groups()
    optimizer = build.construct(cfg.optimizer, params=params, batch_size=cfg.batch_size)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rates = [group["lr"] for group in optimizer.param_groups]
    lr = "peak lr " + " to ".join(f"{rate:.4g}" for rate in sorted({min(rates), max(rates)}))
    base = None if groups else cfg.optimizer.get("base_lr")
    if base is not None and {base} != {*rates}:
        lr += f" (base_lr {base:g})"
    count = sum(parameter.numel() for parameter in trained)
    parameters = f"{count / 1e6:,.1f} M" if count >= 1e5 else f"{count:,}"
    steps = f"{several(source.steps_per_epoch, 'step')} an epoch"
    images = f"{several(source.num_images, 'image')}, {steps}"
    devices = f"{distributed.world_size()} x {run.device}"
    log.info(
        "%s, batch %s on %s, %s, %s trained parameters",
        *(images, cfg.batch_size, devices, lr, parameters),
        extra={
            "title": cfg.stage.name,
            "cells": {
                "method": cfg.method.name if cfg.stage.name == "pretrain" else "",
                "backbone": f"{cfg.backbone.name}, {parameters} trained parameters",
                "data": f"{cfg.data.name}, {images}",
                "training": f"{several(cfg.epochs, 'epoch')}, batch {cfg.batch_size}, {lr}",
                "device": f"{devices}, {cfg.precision}",
                "begins with": str(cfg.pretrained or ""),
                "directory": str(run.directory),
            },
        },
    )
    log.info("in %s", run.directory, extra={"cells": {}})  # a terminal has it in the panel
    average = None
    if (decay := cfg.get("ema")) is not None:
        log.info(
            "ema=%g: evaluations and exports see the average of the weights over about %s steps",
            decay,
            f"{1 / (1 - decay):,.0f}",
        )
        average = Average(model, decay)
    if cfg.compile:
        compile_(model, run.device)
    return fit(
        model,
        optimizer,
        build.construct(cfg.schedule),
        source,
        views,
        run,
        epochs=cfg.epochs,
        seed=cfg.seed,
        precision=cfg.precision,
        evaluate=evaluate,
        average=average,
        **further,
    )


def compile_(model: nn.Module, device: torch.device) -> None:
    """Compile a model in place; on one GPU with CUDA graphs, which replay the launches of a step.

    There are a thousand of them, and a fast GPU has computed 512 images before the host has made
    them all. Several processes communicate during a step, which a graph can't hold.

    UserError for a network that a compiled step would damage: it chooses memory formats itself.
    """
    if device.type == "cpu" and convolutions.narrow(model):
        raise UserError(
            "compile=true: on a CPU, torch compiles strided convolutions of fewer than 8 channels "
            "to a program that damages its memory; type compile=false, or backbone.width=8 or more"
        )
    graphs = device.type == "cuda" and distributed.world_size() == 1
    model.compile(mode="reduce-overhead" if graphs else None)


def on_device(module: nn.Module, run: Run) -> nn.Module:
    module = module.to(run.device, memory_format=torch.channels_last)
    if run.device.type == "cpu":
        convolutions.guard_(module)
    return module


def normalization(cfg: DictConfig) -> tuple[RGB, RGB]:
    """(mean, std) of the training views, which the test images must share."""
    return tuple(cfg.augmentation.mean), tuple(cfg.augmentation.std)
