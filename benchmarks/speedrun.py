"""The speedrun: from the start of the process to 90.5 % on digits, 10 labels a class, on two cores.

    python benchmarks/speedrun.py                   the newest record: five seeds, two minutes
    python benchmarks/speedrun.py --records all     every record, in turn: a quarter of an hour
    python benchmarks/speedrun.py --records 1 --seeds 0
    python benchmarks/speedrun.py --quickstart      the quickstart before the speedrun, and now:
                                                    a quarter of an hour
    python benchmarks/speedrun.py --ablations       what each part of the newest record brings,
                                                    without the test images: a quarter of an hour

The rules, and the log that this script writes: benchmarks/speedrun.md. Threads are as the
environment or the record has them: leave OMP_NUM_THREADS unset on an idle machine. Writes
results/speedrun.json, and the tables of speedrun.md.
"""

import argparse
import json
import os
import re
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import mean

import numpy as np
from common import machine

from ssl_bench.config.typed import key_of
from ssl_bench.data.formats.base import Digests, hashed
from ssl_bench.data.formats.digits import Digits
from ssl_bench.data.store import Split

HERE = Path(__file__).parent
GOAL = 90.5  # % of the test images, the mean of all seeds and draws
SEEDS = [0, 1, 2, 3, 4]  # of the pretraining; each has three draws of labels
TUNED_ON = 1000  # training images; the rest of them is what --ablations measures on

# The quickstart until then: MoCo v2, and classifiers to which every image is shown in each epoch.
PROTOCOL = (
    "stage.protocol=['stage.labels_per_class=10','stage.test_resize=1.0','augmentation=none',"
    "'optimizer.base_lr=0.03','optimizer.scaling=none','batch_size=50']"
)
QUICKSTART = (
    *("method=moco_v2", "method.queue_size=1024", "method.momentum=0.99", "precision=fp32"),
    *("augmentation.rotate=null", "augmentation.shear=null", "data.image_size=16"),
    *("epochs=150", "batch_size=128", "optimizer.base_lr=0.12", "schedule.warmup_epochs=5"),
    PROTOCOL,
)
CACHED = (
    "stage.protocol=['stage.labels_per_class=10','stage.test_resize=1.0','stage.features=cached',"
    "'stage.lrs=[0.03]','stage.weight_decays=[0]','augmentation=none','optimizer.scaling=none',"
    "'batch_size=50']"
)
UPRIGHT = ("augmentation.rotate=null", "augmentation.shear=null")
# What each was, in words of today: a later record changes conf/experiment/speedrun.yaml, and then
# the one before says here what it was. A word in capitals is an environment variable.
RECORDS: dict[int, tuple[str, tuple[str, ...]]] = {
    1: ("the quickstart of then: MoCo v2, 150 epochs at 16 pixels", QUICKSTART),
    2: (
        "60 epochs at 12 pixels in bfloat16; classifiers on cached features",
        (*QUICKSTART, CACHED, "data.image_size=12", "epochs=60", "precision=bf16"),
    ),
    3: (
        "SimCLR, 40 epochs",
        ("batch_size=128", "optimizer.base_lr=0.12", "epochs=40", *UPRIGHT),
    ),
    4: ("turned and sheared views; batches of 64 for 20 epochs", ("epochs=20",)),
    5: ("12 epochs", ()),
    6: ("one thread; the program starts and ends sooner", ("OMP_NUM_THREADS=1",)),
}
# in float32, for processors that don't multiply bfloat16, and longer than a record
QUICKSTARTS = {
    "before: MoCo v2": QUICKSTART,
    "now: the record's way, float32, 24 epochs": (PROTOCOL, "precision=fp32", "epochs=24"),
}
ABLATIONS = {
    "the record": "",
    "MoCo v2, queue of 512": "method=moco_v2 method.queue_size=512 method.momentum=0.99",
    "neither turned nor sheared": "augmentation.rotate=null augmentation.shear=null",
    "turned by 30, sheared by 40 degrees": "augmentation.rotate=30 augmentation.shear=40",
    "16 pixels": "data.image_size=16",
    "8 pixels": "data.image_size=8",
    "float32": "precision=fp32",
    "6 epochs": "epochs=6",
    "24 epochs": "epochs=24",
    "batch 32": "batch_size=32",
    "batch 128": "batch_size=128",
    "half the learning rate": "optimizer.base_lr=0.12",
    "twice the learning rate": "optimizer.base_lr=0.48",
    "zero-initialised residuals": "zero_init_residual=true",
    "crops of 40 % and more": "augmentation.crop_scale=[0.4,1.0]",
    "temperature 0.1": "method.temperature=0.1",
    "temperature 0.5": "method.temperature=0.5",
    "average of the weights": "ema=0.9",
}


class HeldOut(Digits):
    """The training split alone: its first images to learn from, its others to measure on."""

    def _list(self, name: str) -> Split:
        whole = super()._list("train")
        rows = np.arange(whole.length)
        rows = rows[TUNED_ON:] if name == "val" else rows[:TUNED_ON]
        images = np.stack([whole.read.images[row] for row in rows])
        labels = None if name == "pretrain" else whole.labels[rows]
        digest = hashed(images.tobytes())
        source = "heldout" if name == "val" else "tuned"
        read = type(whole.read)(images, self.side)
        return self._split(name, source, Digests(digest, digest), labels, read, "digit {}".format)


def settings(words: Iterable[str]) -> list[str]:
    """The overrides, of which a later one takes the place of an earlier one of the same key."""
    return [*{key_of(word): word for word in words}.values()]


def variables_of(words: Iterable[str]) -> tuple[list[str], list[str]]:
    """(environment variables, overrides)."""
    each: tuple[list[str], list[str]] = ([], [])
    for word in words:
        each[not word[0].isupper()].append(word)
    return each


def pack(cache: Path, image_size: int) -> None:
    """The one thing that is there before the clock starts."""
    for kind in (Digits, HeldOut):
        data = kind(image_size, cache=str(cache))
        for split in ("pretrain", "train", "val"):
            data.open(split)


def timed(words: list[str], folder: Path) -> dict:
    """One run of the program: seconds by the clock and of the processor, and its accuracy."""
    where = folder / f"run{len(list(folder.glob('run*')))}"
    variables, words = variables_of(words)
    command = [sys.executable, "-m", "ssl_bench", "experiment=speedrun", *words]
    command += [f"dir={where}", f"data.cache={folder / 'cache'}"]
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(paths), "TORCHINDUCTOR_CACHE_DIR": str(where) + ".cache"}
    own |= dict(word.split("=", 1) for word in variables)
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = sum(getattr(after, key) - getattr(before, key) for key in ("ru_utime", "ru_stime"))
    draws = [
        json.loads(file.read_text())["val_top1"]
        for file in sorted(where.glob("pretrained/seed*/summary.json"))
    ]
    assert len(draws) == 3, f"{len(draws)} classifiers in {where}"
    return {"seconds": seconds, "cpu_seconds": cpu, "top1": mean(draws), "draws": draws}


def runs(words: Iterable[str], seeds: list[int], folder: Path, held_out: bool = False) -> dict:
    """All seeds of one way, with what it needs packed."""
    asked = settings(words)
    sizes = [word.partition("=")[2] for word in asked if key_of(word) == "data.image_size"]
    pack(folder / "cache", int(sizes[0]) if sizes else 12)
    if held_out:
        asked += ["data._target_=speedrun.HeldOut", "data.name=digits_held_out"]
    each = []
    for seed in seeds:
        each.append({"seed": seed, **timed([*asked, f"seed={seed}"], folder)})
        print(
            "  seed {seed}: {top1:.2f} %, {seconds:.1f} s, {cpu_seconds:.1f} s CPU".format(
                **each[-1]
            )
        )
    variables, words = variables_of(asked)
    if not variables and (threads := os.environ.get("OMP_NUM_THREADS")):
        variables = [f"OMP_NUM_THREADS={threads}"]
    command = shlex.join([*variables, "ssl-bench", "experiment=speedrun", *words, "seed=N"])
    found = {"command": command, "runs": each}
    for key in ("top1", "seconds", "cpu_seconds"):
        values = [run[key] for run in each]
        found[key] = {"mean": mean(values), "min": min(values), "max": max(values)}
    return found


def spoken(found: dict, digits: int) -> str:
    low, high = (f"{found[key]:.{digits}f}" for key in ("min", "max"))
    return f"{found['mean']:.{digits}f} ({low} to {high})"


def record_table(records: dict) -> str:
    lines = ["| record | what | seconds | top-1 (%) | seconds of CPU | commit, machine |"]
    lines += ["|---:|---|---:|---:|---:|---|"]
    for number, one in sorted(records.items(), key=lambda item: int(item[0])):
        facts = one["machine"]
        reached = "" if one["top1"]["mean"] >= GOAL else " (missed)"
        cells = [number, one["what"], spoken(one["seconds"], 1), spoken(one["top1"], 1) + reached]
        cells += [spoken(one["cpu_seconds"], 1)]
        cells += [f"{facts['git_commit'][:7]}, {facts['cpus']} x {facts['cpu']}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def quickstart_table(rows: dict) -> str:
    lines = ["| | seconds | top-1 (%) | seconds of CPU |", "|---|---:|---:|---:|"]
    for name, one in rows.items():
        cells = [spoken(one["seconds"], 1), spoken(one["top1"], 1), spoken(one["cpu_seconds"], 1)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ablation_table(rows: dict) -> str:
    lines = ["| | top-1 (%) | seconds of CPU |", "|---|---:|---:|"]
    for name, one in rows.items():
        lines.append(f"| {name} | {spoken(one['top1'], 1)} | {one['cpu_seconds']['mean']:.1f} |")
    return "\n".join(lines)


def write(result: dict, out: Path) -> None:
    """The measured values, and the tables of the page made of them."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "speedrun.json").write_text(json.dumps(result, indent=1) + "\n")
    page = HERE / "speedrun.md" if out == HERE / "results" else out / "speedrun.md"
    text = (HERE / "speedrun.md").read_text()
    tables = {"records": record_table, "quickstart": quickstart_table}
    tables |= {"ablations": ablation_table}
    for name, table in tables.items():
        if name in result:
            marks = rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)"
            text = re.sub(marks, rf"\g<1>{table(result[name])}\n\g<2>", text, flags=re.S)
    page.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = [*map(str, RECORDS), "all"]
    parser.add_argument("--records", nargs="+", choices=numbers, default=[str(max(RECORDS))])
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--ablations", action="store_true", help="in place of records")
    parser.add_argument("--quickstart", action="store_true", help="in place of records")
    parser.add_argument("--only", nargs="+", choices=ABLATIONS, help="of the ablations")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    file = args.out / "speedrun.json"
    result = json.loads(file.read_text()) if file.exists() else {}
    with tempfile.TemporaryDirectory(prefix="ssl_bench_speedrun_") as name:
        folder = Path(name)
        if args.ablations:
            for name in args.only or ABLATIONS:
                print(name)
                found = runs(ABLATIONS[name].split(), args.seeds[:3], folder, held_out=True)
                result.setdefault("ablations", {})[name] = found | {"machine": machine()}
                write(result, args.out)
        elif args.quickstart:
            for name, words in QUICKSTARTS.items():
                print(name)
                found = runs(words, args.seeds, folder) | {"machine": machine()}
                result.setdefault("quickstart", {})[name] = found
                if words is QUICKSTART and args.seeds == SEEDS:  # the first record, measured
                    what = {"what": RECORDS[1][0]}
                    result.setdefault("records", {})["1"] = what | found
                write(result, args.out)
        else:
            chosen = map(str, RECORDS) if "all" in args.records else args.records
            for number in chosen:
                what, words = RECORDS[int(number)]
                print(f"record {number}: {what}")
                found = {"what": what, **runs(words, args.seeds, folder), "machine": machine()}
                result.setdefault("records", {})[number] = found
                write(result, args.out)
                print("  " + spoken(found["top1"], 2) + " %,", spoken(found["seconds"], 1), "s")
    print(f"written: {file}")


if __name__ == "__main__":
    main()
