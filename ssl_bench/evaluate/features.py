"""Features of many images on the disk, where a run that was interrupted finds what it has."""

import json
import logging
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import filelock
import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from ssl_bench import distributed, files
from ssl_bench.data.source import Source
from ssl_bench.errors import UserError
from ssl_bench.run import Run
from ssl_bench.stages.cached import extract_all

log = logging.getLogger(__name__)

BLOCK = 16_384  # images whose features are written together: what a kill can cost, and what is in memory


def new_array(path: Path, dtype: type[np.floating], shape: tuple[int, ...]) -> np.memmap:
    """An .npy file to be filled, whose room is taken now: a page that finds none later ends the process (SIGBUS)."""
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def stored_features(
    cfg: DictConfig, run: Run, backbone: nn.Module, source: Source, view: Callable[[Tensor], Tensor], path: Path
) -> np.ndarray:
    """float16 (N, dim), memory-mapped from `path`: the features of all images of the source, in its order.

    All processes compute together what isn't in the file yet; how far they have come is in a .json beside it. Its name
    must tell whose features they are. UserError for features that aren't finite in float16.
    """
    progress, rows = path.with_suffix(".json"), source.rows
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
            block = extract_all(cfg, run, backbone, source, lambda images, _: view(images)).half().numpy()
            if not np.isfinite(block).all():
                raise UserError(f"pretrained={cfg.pretrained}: its features aren't finite numbers in float16")
            if run.is_main:
                stored = np.load(path, mmap_mode="r+")
                stored[done : done + len(block)] = block
                stored.flush()
                files.write(progress, json.dumps({"images": done + len(block)}))
            done += len(block)
            rate = (done - start) / (time.monotonic() - began)
            left = timedelta(seconds=round((len(rows) - done) / rate))
            log.info("features of %s of %s images, %.0f images/s, left %s", f"{done:,}", f"{len(rows):,}", rate, left)
            if run.stopping(0) and done < len(rows):
                run.interrupt()
        source.rows = rows
    return np.load(path, mmap_mode="r")
