"""Speed of pretraining beside its peers, by batch and data set, and of its parts beside their
floors.

    pip install -e ".[bench]"
    python benchmarks/speed.py            on two CPU cores: twenty minutes, 9 GB of disk
    python benchmarks/speed.py --only contenders --workers 2
                                          the peers alone, as their examples have them and tuned:
                                          a quarter of an hour
    python benchmarks/speed.py --quick    a smoke test of a minute; its figures mean nothing
    python benchmarks/speed.py --only contenders parts --cases resnet50:512 --repeats 1 --workers 16
                                                                the shortest that tells something,
                                                                on a GPU: minutes

Synthetic 96x96 PNG files are written to a temporary folder; the peers read them, ours packs them
first (timed apart). Every contender is a process of its own, they take turns, and what counts is
the median. Ours is the program itself, `ssl-bench`, timed from outside by when the lines of
its metrics.jsonl appear. Threads are as the environment has them: leave OMP_NUM_THREADS unset.
Writes speed_DEVICE.json, .md and .png to --out.
"""

import argparse
import importlib.util
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import torch
from common import machine, publish
from memory import OVERRIDES as SMALL
from memory import private_bytes
from speed_report import plot, tables

from ssl_bench.data.formats.dl21 import DL21
from ssl_bench.data.pool import default_workers
from ssl_bench.data.synthetic import write_dl21

HERE = Path(__file__).parent
TICK = 0.01  # seconds between looks at metrics.jsonl
PARTS = ("contenders", "startup", "parts", "by_batch", "by_size")
# each as its own example has it, and as a good user of it would run it
PEERS = {
    "plain": ["plain"],
    "plain, tuned": ["plain", "--tuned"],
    "lightly": ["lightly"],
    "lightly, tuned": ["lightly", "--tuned"],
}
CALM = 0.1  # cores that other programs may take


@dataclass(frozen=True)
class Plan:
    """What to measure. A window is what one figure is taken from; ours runs as much before it."""

    cases: tuple[tuple[str, int], ...]  # (backbone, batch) of the contenders and the parts
    ours: tuple[str, ...] = ()  # overrides of the program beside the case
    # steps of the peers, on a GPU more than their workers have ready when it begins
    warmup: int = 3
    tuning: tuple[int, int] = (2, 3)  # steps before and in a window, for each number of workers
    steps: int = 5  # of a window
    files: int = 5000  # distinct images
    images: int = 70_000  # names for them: more than the queue
    queue: int = 65_536
    image_size: int = 96
    batches: tuple[int, ...] = (32, 64, 128, 256)  # with the first case's backbone
    # of the data set, with a small network
    sizes: tuple[int, ...] = (5_000, 20_000, 100_000, 200_000)
    small_steps: int = 20  # of a window with it
    windows: int = 2  # for each of `batches` and `sizes`
    tries: int = 3  # of what other programs disturb


SHARED = ("stage=pretrain", "data=dl21", "tracking=local", "save_every=1000000")
CPU = Plan(cases=(("resnet18", 128), ("resnet50", 64)), ours=("precision=bf16",))
CUDA = Plan(
    cases=(("resnet50", 256), ("resnet50", 512), ("resnet50", 1024)),
    ours=("precision=bf16", "compile=true"),
    warmup=80,
    tuning=(80, 40),
    steps=40,
    batches=(64, 128, 256, 512, 1024),
    small_steps=400,
    tries=1,  # what torch.compile starts looks like other programs
)
QUICK = Plan(
    cases=(("resnet18", 16),),
    ours=("precision=bf16",),
    warmup=1,
    steps=2,
    files=300,
    images=300,
    queue=256,
    image_size=32,
    batches=(8, 16),
    sizes=(4_200, 5_000),
    small_steps=2,
    tries=1,
)


class Bench:
    """Where the files are, and how the contenders are run on them."""

    def __init__(self, plan: Plan, device: str, work: Path) -> None:
        self.plan, self.device, self.work = plan, device, work
        self.data, self.cache, self.peers = work / "data", work / "cache", work / "peers"
        write_dl21(self.data, plan.files, 1, 1, num_classes=10)
        self.grow(self.data, plan.images)
        self.peers.mkdir()
        (self.peers / "class").symlink_to(self.data / "unlabeled")

    def grow(self, root: Path, count: int) -> None:
        """Make it `count` images in `root`: more names for the same files."""
        folder = root / "unlabeled"
        for index in range(len(os.listdir(folder)), count):
            os.link(
                self.data / "unlabeled" / f"{index % self.plan.files}.png", folder / f"{index}.png"
            )

    def pack(self, root: Path) -> dict:
        """Pack the images in `root`, as the program does at its first start."""
        began = time.perf_counter()
        images = len(DL21(str(root), cache=str(self.cache)).open("pretrain").images)
        seconds = time.perf_counter() - began
        return {"images": images, "seconds": seconds, "images_per_second": images / seconds}

    def case(self, backbone: str, batch: int) -> list[str]:
        """The program's overrides."""
        sizes = [
            f"method.queue_size={self.plan.queue}",
            f"augmentation.image_size={self.plan.image_size}",
        ]
        return [f"backbone={backbone}", f"batch_size={batch}", *sizes, *self.plan.ours]

    def peer(
        self, name: str, backbone: str, batch: int, workers: list[int], warmup: int, steps: int
    ) -> dict:
        """Images a second for each number of workers."""
        plan = self.plan
        command = [
            sys.executable,
            str(HERE / "contenders.py"),
            *PEERS[name],
            str(self.peers),
            "--device",
            self.device,
        ]
        command += ["--backbone", backbone, "--batch", str(batch), "--workers", *map(str, workers)]
        command += ["--image-size", str(plan.image_size), "--queue", str(plan.queue)]
        command += ["--warmup", str(warmup), "--steps", str(steps)]
        with Others() as others:
            seconds = json.loads(self.printed(command))["seconds"]
        rates = {int(number): steps * batch / value for number, value in seconds.items()}
        return {"images_per_second": rates, "others": others.share}

    def printed(self, command: list[str]) -> str:
        """The last line of what a command prints."""
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return result.stdout.splitlines()[-1]

    def ours(
        self, overrides: list[str], batch: int, every: int, lines: int, root: Path | None = None
    ) -> dict:
        """Run the program until `lines` lines of `every` steps are logged. Windows are what lies
        between two lines.
        """
        folder = Path(tempfile.mkdtemp(prefix="ours_", dir=self.work))
        where = [
            f"data.root={root or self.data}",
            f"data.cache={self.cache}",
            f"device={self.device}",
        ]
        command = [sys.executable, "-m", "ssl_bench", *SHARED, *where, *overrides]
        command += [f"dir={folder / 'run'}", f"log_every={every}"]
        metrics, seen, private = folder / "run" / "metrics.jsonl", [], 0
        with Others() as others, open(folder / "log", "w+") as log:
            began = time.perf_counter()
            with subprocess.Popen(command, stdout=log, stderr=log) as process:
                while len(seen) < lines and process.poll() is None:
                    found = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
                    seen += [time.perf_counter() - began] * (found - len(seen))
                    private = max(private, private_bytes(process.pid))
                    time.sleep(TICK)
                process.send_signal(signal.SIGTERM)
            if len(seen) < lines:
                log.seek(0)
                sys.exit(f"{' '.join(command)} ended early:\n{log.read()}")
        rows = [json.loads(line) for line in metrics.read_text().splitlines()[:lines]]
        shutil.rmtree(folder)  # its checkpoint has the size of network and queue
        return {
            "first_line_seconds": seen[0],
            "images_per_second": [every * batch / (end - start) for start, end in pairwise(seen)],
            "logged_images_per_second": [row["images_per_second"] for row in rows[1:]],
            "data_wait": [row["data_wait"] for row in rows[1:]],
            "private_bytes": private,
            "others": others.share,
        }


class Others:
    """`share`: of the machine's cores, how many other programs kept busy meanwhile."""

    def __enter__(self) -> "Others":
        self.began, self.busy, self.own = time.perf_counter(), *self.used()
        return self

    def __exit__(self, *_: object) -> None:
        busy, own = self.used()
        self.share = (busy - self.busy - (own - self.own)) / (time.perf_counter() - self.began)

    def used(self) -> tuple[float, float]:
        """CPU seconds of the machine, and of this process and its ended children, so far."""
        user, nice, system, _, _, irq, softirq, steal = map(
            int, Path("/proc/stat").read_text().split()[1:9]
        )
        usage = [
            resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        ]
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return busy, sum(one.ru_utime + one.ru_stime for one in usage)


def calm(measure: Callable[[], dict], tries: int) -> dict:
    """A measurement that other programs left alone, or of `tries` the one that they disturbed
    least.
    """
    done = []
    for _ in range(tries):
        done.append(measure())
        if done[-1]["others"] < CALM:
            break
        print(f"other programs took {done[-1]['others']:.2f} cores", flush=True)
    return min(done, key=lambda found: found["others"]) | {"tries": len(done)}


def contenders(bench: Bench, repeats: int, workers: int | None) -> dict:
    """Each peer with the workers that suit it best, or as many as asked for, and ours, in turn."""
    plan, cores = bench.plan, default_workers()
    there = importlib.util.find_spec("lightly") is not None
    peers = [name for name in PEERS if there or not name.startswith("lightly")]
    if not there:
        print('lightly is not installed, and left out: pip install -e ".[bench]"', flush=True)
    tuning, chosen = {}, dict.fromkeys(peers, workers)
    for name in peers if workers is None else ():
        numbers = sorted({max(1, cores // 2), cores, 2 * cores})
        tuning[name] = calm(
            partial(bench.peer, name, *plan.cases[0], numbers, *plan.tuning), plan.tries
        )
        rates = tuning[name]["images_per_second"]
        chosen[name] = max(rates, key=rates.get)
        print(f"{name}, images/s by workers: {rounded(rates)}", flush=True)
    rows = [{"backbone": backbone, "batch": batch, "repeats": {}} for backbone, batch in plan.cases]
    for repeat in range(repeats):
        for row in rows:
            case, latest = (row["backbone"], row["batch"]), {}
            for name in peers:
                latest[name] = calm(
                    partial(bench.peer, name, *case, [chosen[name]], plan.warmup, plan.steps),
                    plan.tries,
                )
                (latest[name]["images_per_second"],) = latest[name]["images_per_second"].values()
            latest["ours"] = calm(
                partial(bench.ours, bench.case(*case), row["batch"], plan.steps, 2), plan.tries
            )
            for key in ("images_per_second", "logged_images_per_second", "data_wait"):
                (latest["ours"][key],) = latest["ours"][key]
            for name, found in latest.items():
                row["repeats"].setdefault(name, []).append(found)
            rates = {name: found["images_per_second"] for name, found in latest.items()}
            print(
                f"{repeat + 1}/{repeats} {case[0]}, batch {case[1]}, images/s: {rounded(rates)}",
                flush=True,
            )
    for row in rows:
        rates = {
            name: [one["images_per_second"] for one in done]
            for name, done in row["repeats"].items()
        }
        row["images_per_second"] = {name: spread(values) for name, values in rates.items()}
        medians = {name: statistics.median(values) for name, values in rates.items()}
        row["ratio"] = {name: medians["ours"] / medians[name] for name in peers}
    return {"tuning": tuning, "workers": chosen, "rows": rows}


def startup(bench: Bench, repeats: int) -> dict:
    """Seconds from the start of the process to the first step's line, to the help, to a mistake's
    message.
    """
    (backbone, batch), program = bench.plan.cases[0], [sys.executable, "-m", "ssl_bench"]
    words = {"help": ["--help"], "mistake": ["method.temprature=1"]}
    seconds: dict[str, list[float]] = {"first step": [], **{name: [] for name in words}}
    for _ in range(repeats):
        found = bench.ours(bench.case(backbone, batch), batch, every=1, lines=1)
        seconds["first step"].append(found["first_line_seconds"])
        for name, arguments in words.items():
            began = time.perf_counter()
            subprocess.run([*program, *arguments], capture_output=True)
            seconds[name].append(time.perf_counter() - began)
    return {name: spread(values) for name, values in seconds.items()}


def by_batch(bench: Bench) -> list[dict]:
    rows, plan = [], bench.plan
    backbone, usual = plan.cases[0]
    for batch in plan.batches:
        # as many images as in a window of the first case
        every = max(2, plan.steps * usual // batch)
        found = calm(
            partial(bench.ours, bench.case(backbone, batch), batch, every, 1 + plan.windows),
            plan.tries,
        )
        rows.append({"backbone": backbone, "batch": batch, **found})
        rows[-1]["images_per_second"] = spread(found["images_per_second"])
        print(
            f"{backbone}, batch {batch}: {rows[-1]['images_per_second']['median']:,.1f} images/s",
            flush=True,
        )
    return rows


def by_size(bench: Bench) -> list[dict]:
    """With the small network of benchmarks/memory.py, so that the loop is measured and not the
    network.
    """
    rows, root = [], bench.work / "sized"
    (root / "unlabeled").mkdir(parents=True)
    small = [word for word in SMALL if word.startswith(("method.", "backbone.", "augmentation."))]
    for images in bench.plan.sizes:
        bench.grow(root, images)
        packing = bench.pack(root)
        steps, lines = bench.plan.small_steps, 1 + bench.plan.windows
        found = calm(
            partial(bench.ours, [*small, "batch_size=256"], 256, steps, lines, root),
            bench.plan.tries,
        )
        shutil.rmtree(bench.cache)
        rows.append({"images": images, "packing": packing, **found})
        rows[-1]["images_per_second"] = spread(found["images_per_second"])
        print(
            f"{images:,} images: {rows[-1]['images_per_second']['median']:,.0f} images/s",
            flush=True,
        )
    return rows


def parts(bench: Bench, out: Path) -> list[dict]:
    """benchmarks/parts.py for each case, and the last one's profile."""
    rows = []
    for backbone, batch in bench.plan.cases:
        where = [
            f"data.root={bench.data}",
            f"data.cache={bench.cache}",
            f"device={bench.device}",
            "dir=none",
        ]
        command = [
            sys.executable,
            str(HERE / "parts.py"),
            *SHARED,
            *where,
            *bench.case(backbone, batch),
        ]
        command += ["--warmup", str(bench.plan.warmup), "--steps", str(bench.plan.steps)]
        command += ["--images", str(min(300, bench.plan.files))]
        if (backbone, batch) == bench.plan.cases[-1]:
            command += ["--profile", str(out / f"profile_{bench.device}.txt")]

        def measure(command: list[str] = command) -> dict:
            with Others() as others:
                found = json.loads(bench.printed(command))
            return found | {"others": others.share}

        found = calm(measure, bench.plan.tries)
        rows.append({"backbone": backbone, "batch": batch, **found})
        print(
            f"{backbone}, batch {batch}: {1000 * sum(found['seconds'].values()):,.0f} ms a step",
            flush=True,
        )
    return rows


def spread(values: list[float]) -> dict:
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "all": values,
    }


def rounded(rates: dict) -> str:
    return "  ".join(f"{name} {rate:,.1f}" for name, rate in rates.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: to see that it works")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument(
        "--cases", nargs="+", metavar="BACKBONE:BATCH", help="of the contenders and the parts"
    )
    parser.add_argument(
        "--workers", type=int, help="of the peers, without trying which number suits each"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; leave it out to measure on the CPU")
    if args.device == "cpu":
        print(
            "On the CPU" + ("" if torch.cuda.is_available() else ": torch sees no GPU here"),
            flush=True,
        )
    plan = QUICK if args.quick else CUDA if args.device == "cuda" else CPU
    if args.cases:
        pairs = (case.split(":") for case in args.cases)
        plan = replace(plan, cases=tuple((backbone, int(batch)) for backbone, batch in pairs))
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="ssl_bench_speed_") as folder:
        bench = Bench(plan, args.device, Path(folder))
        result = {"device": args.device, **facts(), "plan": asdict(plan), "repeats": args.repeats}
        result["packing"] = bench.pack(bench.data)
        work = (
            partial(contenders, bench, args.repeats, args.workers),
            partial(startup, bench, args.repeats),
            partial(parts, bench, args.out),
            partial(by_batch, bench),
            partial(by_size, bench),
        )
        for name, measure in zip(PARTS, work, strict=True):
            if name in args.only:
                result[name] = measure()
                result["minutes"] = (time.perf_counter() - began) / 60
                write(result, args.out)  # each time: the rest may take long
    written = ", ".join(str(file) for file in sorted(args.out.glob(f"speed_{args.device}.*")))
    print(f"\n{tables(result)}\nwritten: {written}")


def write(result: dict, out: Path) -> None:
    path = out / f"speed_{result['device']}.json"
    publish(result, tables(result), path)
    plot(result, path.with_suffix(".png"))


def facts() -> dict:
    found = machine()
    if importlib.util.find_spec("lightly"):
        found["packages"]["lightly"] = metadata.version("lightly")
    return found


if __name__ == "__main__":
    main()
