"""What it costs that damage is found: to save, read and seal a checkpoint, to open a packed store,
with and without.

    python benchmarks/digests.py    a 2 GB checkpoint, a 5 GB store: 10 GB of disk
    python benchmarks/digests.py --checkpoint-gb 0.1 --store-gb 0.1 --folder DIR --out digests.json

Each figure is the median of three: [on the clock, of the processor], which differ where other work
is about. "cold" is after the kernel was told to forget the file's pages, as at a restart.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import torch
from common import folder_for, machine
from torch import nn

from ssl_bench import files
from ssl_bench.data.store import Split, open_store
from ssl_bench.runs import checkpoint, layout
from ssl_bench.runs.checkpoint import Checkpoint

TIMES = 3
SIZE = 96  # pixels of an image of the store


def seconds(call: Callable[[], object], before: Callable[[], object] = lambda: None) -> list[float]:
    """[on the clock, of the processor]"""
    measured = []
    for _ in range(TIMES):
        before()
        start = time.perf_counter(), time.process_time()
        call()
        measured.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return [round(median(times), 3) for times in zip(*measured, strict=True)]


def forget(path: Path) -> None:
    """Have the kernel drop the pages of a file, or of those of a folder, so that the disk is read
    again.
    """
    for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def of_checkpoint(folder: Path, gigabytes: float) -> dict[str, object]:
    """As a run has it: half of it a model, half its momenta."""
    torch.manual_seed(0)
    width = round((gigabytes * 1e9 / 2 / 4 / 20) ** 0.5)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(20)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    state = {"model": model, "optimizer": optimizer}
    run = Checkpoint(folder / "run", "run", keep=1)

    def sealed() -> None:
        files._digest.cache_clear()
        files.sums_of(run.directory, [file.relative_to(run.directory).as_posix()])

    torch.serialization.set_crc32_options(False)
    without = {"save": seconds(lambda: run.save(1, **state))}
    torch.serialization.set_crc32_options(True)
    found = {"save": seconds(lambda: run.save(1, **state))}
    (file,) = layout.complete(run.directory)
    for name, before in (("restore, warm", lambda: None), ("restore, cold", lambda: forget(file))):
        found[name] = seconds(lambda: run.restore(**state), before)
        with mock.patch.object(checkpoint, "verify"):
            without[name] = seconds(lambda: run.restore(**state), before)
    found["sha256 when the run ends"] = seconds(sealed)
    return {"bytes": file.stat().st_size, "seconds": found, "seconds without": without}


def of_store(folder: Path, gigabytes: float) -> dict[str, object]:
    count = round(gigabytes * 1e9 / (SIZE * SIZE * 3))
    bank = np.random.default_rng(0).integers(0, 256, (64, SIZE, SIZE, 3), dtype=np.uint8)
    read = partial(np.take, bank, axis=0, mode="wrap")  # what other processes can import
    split = Split("pretrain", count, None, "noise", "noise", "noise", read, str)

    def opened(verify: bool = True) -> None:
        open_store(split, SIZE, folder / "cache", verify=verify)

    start = time.perf_counter()
    opened()
    packing = time.perf_counter() - start
    store = folder / "cache" / "noise"

    def unverified() -> None:
        (store / "verified").unlink(missing_ok=True)

    def anew() -> None:
        unverified()
        forget(store)

    found = {"packing": round(packing, 1), "open, warm": seconds(opened, unverified)}
    found |= {"open, cold": seconds(opened, anew), "open again": seconds(opened)}
    without = {
        "open, warm": seconds(lambda: opened(False)),
        "open, cold": seconds(lambda: opened(False), anew),
    }
    size = sum(file.stat().st_size for file in store.iterdir())
    return {"bytes": size, "images": count, "seconds": found, "seconds without": without}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint-gb", type=float, default=2)
    parser.add_argument("--store-gb", type=float, default=5)
    parser.add_argument("--folder", type=Path, help="where the files are written; they are deleted")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "digests.json"
    )
    args = parser.parse_args()
    with folder_for(args.folder) as folder:
        results = {}
        for name, measure, size in (
            ("checkpoint", of_checkpoint, args.checkpoint_gb),
            ("store", of_store, args.store_gb),
        ):
            place = folder / name
            try:
                results[name] = measure(place, size)
            finally:
                shutil.rmtree(place, ignore_errors=True)
            print(json.dumps({name: results[name]}, indent=1), flush=True)
    command = ["python", "benchmarks/digests.py"]
    command += [f"--checkpoint-gb={args.checkpoint_gb:g}", f"--store-gb={args.store_gb:g}"]
    args.out.write_text(json.dumps({"command": command, **machine(), **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
