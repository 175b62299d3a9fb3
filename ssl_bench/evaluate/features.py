"""Features of all images of a split, in memory, or on disk, from where a stopped run goes on."""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import filelock
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_bench import files
from ssl_bench.console import Bar
from ssl_bench.data.source import Batch, Source
from ssl_bench.errors import UserError
from ssl_bench.evaluate.passes import extract
from ssl_bench.runs.run import Run
from ssl_bench.runtime import distributed
from ssl_bench.runtime.precision import autocast

log = logging.getLogger(__name__)

# Images whose features are written together: what a kill can cost, and what is held in memory.
BLOCK = 16_384


def new_array(path: Path, dtype: type[np.floating], shape: tuple[int, ...]) -> np.memmap:
    """An .npy file to be filled, with its disk space allocated now.

    A page that finds no space later would end the process (SIGBUS).
    """
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def stored_features(
    precision: str,
    run: Run,
    backbone: nn.Module,
    source: Source,
    view: Callable[[Tensor | list[Tensor]], Tensor],
    path: Path,
) -> np.ndarray:
    """Features of all images of the source, in its order: float16 (N, dim), mapped from `path`.

    All processes together compute what isn't in the file yet; how far they are is in a .json beside
    it. The path must identify the features. UserError for features that aren't finite in float16.
    """
    progress, rows = path.with_suffix(".json"), source.rows

    def seen(images: Tensor | list[Tensor], indices: Tensor) -> Tensor:
        return view(images)

    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{path}.lock") if run.is_main else nullcontext():
        there = path.exists() and progress.exists()
        done = json.loads(progress.read_text(encoding="utf-8"))["images"] if there else 0
        start = done = int(distributed.broadcast(torch.tensor(done)))
        if run.is_main and not done:
            new_array(path, np.float16, (len(rows), backbone.dim)).flush()
        began = time.monotonic()
        while done < len(rows):
            source.rows = rows[done : done + BLOCK]
            block = extract_all(precision, run, backbone, source, seen).half().numpy()
            if not np.isfinite(block).all():
                raise UserError(
                    "its features aren't finite numbers in float16: choose another pretrained="
                )
            if run.is_main:
                stored = np.load(path, mmap_mode="r+")
                stored[done : done + len(block)] = block
                stored.flush()
                files.write(progress, json.dumps({"images": done + len(block)}))
            done += len(block)
            rate = (done - start) / (time.monotonic() - began)
            left = timedelta(seconds=round((len(rows) - done) / rate))
            log.info(
                "features of %s of %s images, %.0f images/s, left %s",
                f"{done:,}",
                f"{len(rows):,}",
                rate,
                left,
            )
            if run.stopping(0) and done < len(rows):
                run.interrupt()
        source.rows = rows
    return np.load(path, mmap_mode="r")


def extract_all(
    precision: str,
    run: Run,
    backbone: nn.Module,
    source: Source,
    view: Callable[[Tensor | list[Tensor], Tensor], Tensor],
    title: str | None = None,
    epoch: int = 0,
) -> Tensor:
    """Features (N, dim) float32 of all images of the source, in its order, on every process's CPU.

    view: (images, their indices) -> what the backbone sees. Each process computes its share. title:
    of a progress bar; with it, a signal stops the pass, so don't give one within a training, which
    has a state to save. epoch: whose draws the view is of.
    """
    passed = source.epoch_pass(epoch)
    if title is not None:
        passed = watched(run, source, passed, title)
    batches = ((view(images, indices), labels, indices) for images, labels, indices in passed)
    with autocast(precision, run.device):
        mine, _ = extract(backbone, batches, nn.Identity())
    world = distributed.world_size()
    share = math.ceil(source.num_images / world)  # all_gather wants shares of equal length
    padded = F.pad(mine, (0, 0, 0, share - len(mine)))
    shares = distributed.all_gather(padded).unflatten(0, (world, share))
    # share r has every world-th image from the r-th on
    return shares.transpose(0, 1).flatten(0, 1)[: source.num_images]


def watched(run: Run, source: Source, passed: Iterator[Batch], title: str) -> Iterator[Batch]:
    """A pass over the source's images; shows how far it is, and stops for a signal."""
    world = distributed.world_size()
    # the number of batches that every process has
    everywhere = source.num_images // world // (source.batch_size // world)
    with Bar(source.num_images, title, shown=run.is_main) as progress:
        for step, batch in enumerate(passed):
            if step < everywhere and run.stopping(step):
                run.interrupt()
            yield batch
            progress.add(min(len(batch[1]) * world, source.num_images - progress.done))
