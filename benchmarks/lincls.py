"""Linear classification by the official protocol against cached features: time and accuracy.

    python benchmarks/lincls.py               data, a pretraining, 17 classifiers
    python benchmarks/lincls.py --folder DIR  keeps all that, and goes on with what is there
    python benchmarks/lincls.py --folder DIR --only official --seeds 0
                                              one of them, e.g. while nothing else runs

The whole takes an hour on 2 cores and 0.3 GB of disk.

Every run is the real command, on one thread. Times are those of the first seed, from the start of
the process to its end: of the processor, which other work on the machine changes little, and on the
wall, for a machine with nothing else to do.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from common import machine, workplace

from ssl_bench.runs.units import mean_std

COUNTS = {"num_unlabeled": 5000, "num_train": 2000, "num_val": 2000}
NETWORK = ("backbone=resnet18", "backbone.width=32")
# as conf/experiment/synthetic_dl21.yaml, for fewer images
PRETRAIN = (
    "stage=pretrain",
    "augmentation.image_size=64",
    "epochs=20",
    "batch_size=64",
    "method.queue_size=1024",
    "method.momentum=0.99",
)
PRETRAIN += (
    "method.bn_splits=2",
    "augmentation.crop_scale=[0.4,1.0]",
    "augmentation.brightness=0.6",
)
PRETRAIN += ("augmentation.contrast=0.6", "augmentation.saturation=0.8", "augmentation.hue=0.5")
PRETRAIN += ("augmentation.jitter_p=1.0", "augmentation.grayscale_p=0.3", "optimizer.base_lr=0.4")
PRETRAIN += ("schedule.warmup_epochs=1",)
CACHED = "stage.features=cached"
AS_CHOSEN = "official, with the lr that cached chose"
PROTOCOLS = {
    "official": (),
    "cached": (CACHED,),
    "cached, 5 copies": (CACHED, "stage.copies=5"),
    "cached, 10 copies": (CACHED, "stage.copies=10"),
    AS_CHOSEN: (),
}
LARGE = 88  # pixels: twice the work for the same network, for times alone


def seconds(words: list[str]) -> dict:
    """Of a command: on the wall, and of the processor, its threads' and children's."""
    own, began = sum(os.times()[2:4]), time.monotonic()
    subprocess.run(words, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return {"wall_seconds": time.monotonic() - began, "cpu_seconds": sum(os.times()[2:4]) - own}


def command(folder: Path, run: str, *overrides: str) -> None:
    """`ssl-bench` on the data in the folder, into folder/run, with its seconds in folder/run.json.
    Once.
    """
    report = folder / f"{run}.json"
    if report.exists():
        return
    words = [
        sys.executable,
        "-m",
        "ssl_bench",
        "data=dl21",
        f"data.root={folder / 'data'}",
        *NETWORK,
        *overrides,
    ]
    words += [f"data.cache={folder / 'cache'}", f"dir={folder / run}"]
    whole = seconds(words)
    # once more, when it is finished already: the start alone
    started = seconds(words)["cpu_seconds"]
    report.write_text(
        json.dumps(whole | {"cpu_seconds_after_start": whole["cpu_seconds"] - started})
    )


def classify(folder: Path, protocol: str, seed: int, pixels: int = 64) -> dict:
    """Result and seconds of one classifier."""
    overrides = PROTOCOLS[protocol]
    if protocol == AS_CHOSEN:
        chosen = classify(folder, "cached", seed)
        overrides = (
            f"optimizer.base_lr={chosen['lr']}",
            f"optimizer.weight_decay={chosen['weight_decay']}",
        )
    run = f"{protocol.replace(',', '').replace(' ', '-')}-{pixels}px-seed{seed}"
    overrides += (
        f"pretrained={folder / 'pretrained'}",
        f"augmentation.image_size={pixels}",
        f"seed={seed}",
    )
    command(folder, run, "stage=lincls", *overrides)
    summary = json.loads((folder / run / "summary.json").read_text())
    return summary | json.loads((folder / f"{run}.json").read_text())


def accuracy(results: list[dict]) -> dict:
    """Over the seeds of one protocol, and what was chosen for each."""
    top1 = [result["val_top1"] for result in results]
    mean, std = mean_std(top1)
    keys = ("lr", "weight_decay", "holdout_top1") if "holdout_top1" in results[0] else ()
    chosen = {key: [result[key] for result in results] for key in keys}
    return {"top1": top1, "top1_mean": mean, "top1_std": std, **chosen}


def times(result: dict, official: dict) -> dict:
    """Of one classifier, beside the official one."""
    keys = ("wall_seconds", "cpu_seconds", "cpu_seconds_after_start")
    return {key: result[key] for key in keys} | {
        f"{key}_times_fewer": official[key] / result[key] for key in keys
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Linear classification: the official protocol and cached features."
    )
    parser.add_argument("--folder", type=Path, help="to keep the data and the runs in")
    parser.add_argument("--only", choices=list(PROTOCOLS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pixels", type=int, choices=[64, LARGE], default=64, help="with --only")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "lincls.json"
    )
    args = parser.parse_args()
    with workplace(args.folder, **COUNTS) as folder:
        command(folder, "pretrained", *PRETRAIN)
        if args.only:
            for seed in args.seeds:
                print(json.dumps(classify(folder, args.only, seed, args.pixels)))
            return
        small = {name: [classify(folder, name, seed) for seed in args.seeds] for name in PROTOCOLS}
        large = {
            name: classify(folder, name, args.seeds[0], LARGE) for name in ("official", "cached")
        }
    rows = {name: accuracy(runs) for name, runs in small.items()}
    for name in PROTOCOLS.keys() - {AS_CHOSEN}:  # as long as `official`
        rows[name] |= times(small[name][0], small["official"][0])
    rows |= {
        f"{name}, {LARGE} pixels": times(run, large["official"]) for name, run in large.items()
    }
    settings = {
        "data": COUNTS,
        "network": NETWORK,
        "pretrain": PRETRAIN,
        "protocols": PROTOCOLS,
        "seeds": args.seeds,
    }
    document = {**settings, **machine(), "rows": rows}
    args.out.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(rows, indent=2), f"written: {args.out}", sep="\n")


if __name__ == "__main__":
    main()
