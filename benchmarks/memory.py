"""Private memory and speed of packing and training as the number of images grows.

    python benchmarks/memory.py    5k, 20k and 100k images: 10 minutes, 6 GB of disk
    python benchmarks/memory.py --counts 1000 2000 --out memory.json

For each count: synthetic 96x96 PNG files in the dl21 layout in a temporary folder, then the real
command with a fresh cache: it packs them and trains for an epoch, with a small network so that what
grows with the data would show.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import machine

from ssl_bench.data.synthetic import write_dl21

SAMPLE_SECONDS = 0.05
OVERRIDES = (
    "stage=pretrain",
    "data=dl21",
    "method.queue_size=4096",
    "backbone.width=8",
    "augmentation.image_size=32",
    "epochs=1",
    "log_every=10",
)


def private_bytes(pid: int) -> int:
    """Memory that this process alone holds, in RAM or swap; 0 when it has ended.

    Not RSS, which counts the pages of mapped files too: those of the packed images are the kernel's
    page cache, shared by all processes and dropped when memory is short.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    sizes = {key: value for key, _, value in (line.partition(":") for line in lines)}
    return sum(int(sizes.get(key, "0 kB").split()[0]) * 1024 for key in ("RssAnon", "VmSwap"))


def pool_workers(parent: int) -> list[int]:
    """Processes of `ssl_bench.data.pool` that `parent` started.

    A child that isn't one yet, between fork and exec, is the parent's own memory a second time.
    """
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent_of_it = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if (
                parent_of_it == parent
                and b"ssl_bench.data.pool" in (folder / "cmdline").read_bytes()
            ):
                found.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def measure(root: Path, cache: Path, run: Path) -> dict:
    """Run the command on the images in `root`; peaks in bytes, packing in seconds."""
    command = [sys.executable, "-m", "ssl_bench", *OVERRIDES]
    command += [f"data.root={root}", f"data.cache={cache}", f"dir={run}"]
    peaks, samples = {"packing": 0, "training": 0}, {"packing": 0, "training": 0}
    began = ended = None
    with (
        open(run.with_suffix(".log"), "w") as log,
        subprocess.Popen(command, stdout=log, stderr=log) as process,
    ):
        while process.poll() is None:
            # The store appears under its own name when it is complete: until then the images are
            # listed and packed.
            names = os.listdir(cache) if cache.exists() else []
            if began is None and any(name.endswith(".partial") for name in names):
                began = time.monotonic()
            if ended is None and any("." not in name for name in names):
                ended = time.monotonic()
            phase = "packing" if ended is None else "training"
            total = private_bytes(process.pid) + sum(map(private_bytes, pool_workers(process.pid)))
            peaks[phase], samples[phase] = max(peaks[phase], total), samples[phase] + 1
            time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        sys.exit(run.with_suffix(".log").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = sorted(line["images_per_second"] for line in lines)
    return {
        "packing_private_bytes": peaks["packing"],
        "training_private_bytes": peaks["training"],
        "samples": samples,
        "packing_seconds": ended - began,
        "training_images_per_second": rates[len(rates) // 2],
    }


def table(rows: list[dict]) -> str:
    lines = [
        "| images | packing, GB private | training, GB private | packing, images/s "
        "| training, images/s |"
    ]
    lines.append("| ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        gigabytes = (row["packing_private_bytes"] / 1e9, row["training_private_bytes"] / 1e9)
        speeds = (row["packing_images_per_second"], row["training_images_per_second"])
        cells = [
            f"{row['images']:,}",
            *(f"{value:.2f}" for value in gigabytes),
            *(f"{value:,.0f}" for value in speeds),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Private memory of packing and training, by the number of images."
    )
    parser.add_argument("--counts", type=int, nargs="+", default=[5_000, 20_000, 100_000])
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "memory.json"
    )
    args = parser.parse_args()
    rows = []
    for count in args.counts:
        with tempfile.TemporaryDirectory(prefix="ssl_bench_memory_") as folder:
            root = Path(folder, "data")
            write_dl21(root, count, 0, 0, num_classes=10)
            load = os.getloadavg()[0]  # of what else the machine does
            row = {
                "images": count,
                "load_average_before": load,
                **measure(root, Path(folder, "cache"), Path(folder, "run")),
            }
        row["packing_images_per_second"] = count / row["packing_seconds"]
        rows.append(row)
        print(table([row]), flush=True)
    result = {"command": ["ssl-bench", *OVERRIDES], **machine(), "rows": rows}
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n{table(rows)}\n\nwritten: {args.out}")


if __name__ == "__main__":
    main()
