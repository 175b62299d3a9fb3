"""What the benchmarks share."""

import json
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ssl_bench.data.pool import default_workers
from ssl_bench.data.synthetic import write_dl21
from ssl_bench.runs.run import environment


@contextmanager
def folder_for(kept: Path | None) -> Iterator[Path]:
    """An absolute folder: `kept`, or a temporary one."""
    with tempfile.TemporaryDirectory(prefix="ssl_bench_") as temporary:
        folder = (kept or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


@contextmanager
def workplace(kept: Path | None, **counts: int) -> Iterator[Path]:
    """A folder like these, with synthetic images of 10 classes in its data/."""
    with folder_for(kept) as folder:
        if not (folder / "data").exists():
            write_dl21(folder / "data", **counts, num_classes=10)
        yield folder


def publish(result: dict, table: str, file: Path) -> None:
    """What was measured to `file`, a .json, and its table to a .md beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    file.with_suffix(".md").write_text(table.rstrip("\n") + "\n")


def machine() -> dict:
    """What a figure depends on: the machine, versions, commit."""
    environ = environment()
    cpus = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    kept = (
        "started",
        "platform",
        "python",
        "packages",
        "git_commit",
        "git_dirty",
        "cpu_threads",
        "gpus",
    )
    facts = {
        "cpu": cpus[0] if cpus else platform.machine(),
        "cpus": default_workers(),
        "memory_bytes": memory,
    }
    return facts | {key: environ[key] for key in kept}
