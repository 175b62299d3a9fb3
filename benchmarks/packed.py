"""Several members of a sweep on one device: images a second of all of them beside those of one.

    python benchmarks/packed.py                 two CPU cores: half an hour
    python benchmarks/packed.py --device cuda   one GPU, by hydra.launcher.members_per_gpu: minutes

They are started by `launcher=workstation`, as a user's. On a CPU one member has all cores, two have
a core each, four share them. A member's rate is the median of those that it logs while all run;
they take turns, and what counts is the median of the turns. Threads are as the launcher sets them.
Writes packed_DEVICE.json and .md to --out.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from common import machine, publish

from ssl_bench.report.tables import markdown

DIGITS = ("stage=pretrain", "data=digits", "tracking=local", "eval_every=0", "save_every=1000000")
DIGITS += ("augmentation=digits", "method.queue_size=1024", "backbone.stem=small", "log_every=10")
# a network, as the quickstart's and larger
NETWORKS = {
    "ResNet-18, width 16, 16 pixels, batch 128": (
        "data.image_size=16",
        "backbone.width=16",
        "batch_size=128",
    ),
    "ResNet-18, 32 pixels, batch 64": ("data.image_size=32", "batch_size=64"),
}
STEPS = {"cpu": 60, "cuda": 600}


def rates(network: str, count: int, device: str, steps: int, folder: Path) -> list[float]:
    """Images a second of each of `count` members that run at once."""
    per_epoch = 1297 // int(NETWORKS[network][-1].partition("=")[2])
    words = [
        *DIGITS,
        *NETWORKS[network],
        f"epochs={max(1, steps // per_epoch)}",
        f"device={device}",
    ]
    words += [f"data.cache={folder / 'cache'}", f"seed={','.join(map(str, range(count)))}"]
    words += ["launcher=workstation", f"hydra.launcher.at_once={count}"]
    if device == "cuda":
        words += [f"hydra.launcher.members_per_gpu={count}", "precision=bf16"]
    place = Path(tempfile.mkdtemp(dir=folder))
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    if device == "cuda":
        environment.setdefault("CUDA_VISIBLE_DEVICES", "0")
    command = [sys.executable, "-m", "ssl_bench", *words]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    lines = [
        [json.loads(line) for line in file.read_text().splitlines()]
        for file in place.glob("runs/sweeps/pretrain/*/metrics.jsonl")
    ]
    assert len(lines) == count, f"{len(lines)} members in {place}"
    # the first line has the start in it, and at the end some are alone
    return [median(line["images_per_second"] for line in own[1:-1]) for own in lines]


def table(result: dict) -> str:
    counts = result["members"]
    lines = []
    for name, found in result["networks"].items():
        one = found[str(counts[0])]["median"]
        cells = [
            f"{found[str(count)]['median']:,.0f} ({found[str(count)]['median'] / one:.2f})"
            for count in counts
        ]
        lines.append([name, *cells])
    header = ["images/s of all members", *map(str, counts)]
    return markdown(header, lines, right=len(counts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--members", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of each member")
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=[*NETWORKS])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    steps = args.steps or STEPS[args.device]
    result = {"members": args.members, "steps": steps, **machine(), "networks": {}}
    with tempfile.TemporaryDirectory(prefix="ssl_bench_packed_") as folder:
        for name in args.only:
            turns: dict[str, list[list[float]]] = {str(count): [] for count in args.members}
            for _ in range(args.repeats):
                for count in args.members:
                    found = rates(name, count, args.device, steps, Path(folder))
                    turns[str(count)].append(found)
                    print(f"{name}, {count}: {sum(found):,.0f} images/s", flush=True)
            result["networks"][name] = {
                count: {"median": median(map(sum, each)), "turns": each}
                for count, each in turns.items()
            }
    file = args.out / f"packed_{args.device}.json"
    publish(result, table(result), file)
    print(f"\n{table(result)}\nwritten: {file}")


if __name__ == "__main__":
    main()
