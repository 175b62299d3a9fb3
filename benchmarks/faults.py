"""A fault campaign: real commands, disturbed as machines and people disturb them. What was lost,
and what was said?

    python benchmarks/faults.py    # all of them: about 15 minutes
    python benchmarks/faults.py --only kill-pretrain disk-full-checkpoint

Faults that mount something need root.

A row of benchmarks/results/faults.json a fault; those that --only doesn't name stay as they were.
Nothing is lost where the same command afterwards ends with what an undisturbed run ends with:
weights, optimizer and logged losses by torch.equal, tables and features byte by byte. A fault holds
where that is so, or where a line of ours says what is wrong; a traceback, a hang or another number
breaks it, and is the exit status.
"""

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import folder_for, machine, publish
from PIL import Image

RESULTS = Path(__file__).with_name("results") / "faults.json"
PYTHON = [sys.executable, "-m", "ssl_bench"]
LIMIT = 180  # s: what takes longer hangs
# of a line or a summary, what no two runs share
SPEED = ("images_per_second", "mfu", "data_wait", "memory_gb", "hours")
TINY = [
    "data=digits",
    "data.image_size=16",
    "backbone.width=8",
    "backbone.stem=small",
    "tracking=local",
]
TINY += ["log_every=1", "save_every=4"]
VIEWS = ["augmentation.flip_p=0", "batch_size=128"]
ON = "pretrained={pretrained}"
STAGES = {
    "pretrain": [
        "stage=pretrain",
        *TINY,
        *VIEWS,
        "method.queue_size=1024",
        "epochs=3",
        "eval_every=1",
    ],
    "lincls": ["stage=lincls", *TINY, *VIEWS, ON, "epochs=3"],
    "cached": [
        "stage=lincls",
        "stage.features=cached",
        *TINY,
        *VIEWS,
        ON,
        "epochs=3",
        "stage.lrs=[1,10]",
    ],
    "finetune": ["stage=finetune", *TINY, *VIEWS, ON, "epochs=2"],
    "knn": ["stage=knn", *TINY, ON, "augmentation.image_size=16"],
    "select": ["stage=select", *TINY, ON, "augmentation.image_size=16", "stage.budget=50"],
    "predict": ["stage=predict", ON, "stage.images={images}", "tracking=local"],
}
STAGES["knn"] = [word for word in STAGES["knn"] if not word.startswith(("log_every", "save_every"))]
STAGES["select"] = [
    word for word in STAGES["select"] if not word.startswith(("log_every", "save_every"))
]


class Broken(Exception):
    """A fault that the program doesn't bear."""


class Unable(Exception):
    """What this machine or account can't do."""


class Done(NamedTuple):
    code: int
    text: str

    @property
    def said(self) -> str:
        """Our own line, or the last warning."""
        ours = re.findall(r"^ssl-bench: (.*)$", self.text, re.M)
        words = (
            "damaged|truncated|another run|stopp|skipped|offline|is left out|passed over|in use|"
            "finished already|packed again"
        )
        warned = re.findall(rf"^\d\d:\d\d:\d\d (.*(?:{words}).*)$", self.text, re.M)
        return next(iter([*ours, *warned[-1:]]), "")


class Place:
    """A folder of a fault's own, and the commands started in it."""

    def __init__(self, root: Path, name: str) -> None:
        self.root, self.folder = root, root / name
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.pretrained, self.images = root / "reference" / "pretrain-1", root / "images"
        self.run = self.folder / "run"
        self.started: list[subprocess.Popen] = []

    def start(
        self,
        stage: str,
        *words: str,
        ranks: int = 1,
        prepare: Callable[[], None] | None = None,
        **env: str,
    ) -> subprocess.Popen:
        words = (
            *(
                word.format(pretrained=self.pretrained, images=self.images)
                for word in STAGES[stage]
            ),
            *words,
        )
        devices = [] if ranks == 1 else [f"devices={ranks}"]
        return self.command([*PYTHON, *words, *devices, f"dir={self.run}"], prepare, **env)

    def command(
        self, words: list[str], prepare: Callable[[], None] | None = None, **env: str
    ) -> subprocess.Popen:
        own = {
            "SSL_BENCH_CACHE": str(self.root / "cache"),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        own |= {"WANDB_MODE": "offline"}
        said = open(self.folder / f"said-{len(self.started)}", "wb")  # noqa: SIM115 - the process has it
        process = subprocess.Popen(
            words,
            cwd=self.folder,
            env=os.environ | own | env,
            stdout=said,
            stderr=said,
            start_new_session=True,
            preexec_fn=prepare,
        )
        process.said = Path(said.name)
        self.started.append(process)
        return process

    def ended(self, process: subprocess.Popen, limit: float = LIMIT) -> Done:
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            kill(process)
            raise Broken(
                f"hung for {limit} s: {process.said.read_text(errors='replace')[-300:]}"
            ) from None
        text = process.said.read_text(errors="replace")
        if "Traceback" in text:
            raise Broken("a traceback: " + text.strip().splitlines()[-1][:300])
        return Done(code, text)

    def finishes(
        self, stage: str, *words: str, ranks: int = 1, like: str | None = None, **env: str
    ) -> str:
        """The command ends as an undisturbed one did. What it said."""
        done = self.ended(self.start(stage, *words, ranks=ranks, **env))
        if done.code:
            raise Broken(f"exit status {done.code}: {done.text[-300:]}")
        compare(outcome(self.run), outcome(self.root / "reference" / (like or f"{stage}-{ranks}")))
        return done.said

    def refused(self, process: subprocess.Popen, *words: str) -> str:
        """It ends with 2 and a line that has these words."""
        done = self.ended(process)
        if done.code != 2 or not all(word in done.said for word in words):
            raise Broken(f"exit status {done.code}, said: {done.said or done.text[-300:]!r}")
        return done.said

    def lines(self) -> int:
        path = self.run / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def wait_for(self, happened: Callable[[], object], process: subprocess.Popen) -> None:
        deadline = time.monotonic() + LIMIT
        while not happened() and process.poll() is None:
            if time.monotonic() > deadline:
                raise Broken("it didn't come so far")
            time.sleep(0.02)


def kill(process: subprocess.Popen) -> None:
    """With all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def outcome(run: Path) -> dict[str, Any]:
    """All that a run has come to, but for times."""
    found: dict[str, Any] = {}
    if not (run / "summary.json").exists():
        raise Broken("no summary.json")
    for name in ("summary.json",):
        found[name] = {
            k: v for k, v in json.loads((run / name).read_text()).items() if k not in SPEED
        }
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [
        {key: value for key, value in row.items() if key not in SPEED} for row in rows
    ]
    if newest := max(run.glob("checkpoints/step*.pt"), default=None):
        found["checkpoint"] = torch.load(newest, weights_only=True)
        found["checkpoint"].pop("run")
    for name in ("images.csv", "features.npy", "chosen.csv", "request_00.csv", "grid.csv"):
        if (run / name).exists():
            found[name] = (run / name).read_bytes()
    return found


def compare(one: Any, other: Any, where: str = "") -> None:
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        for key in one:
            compare(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for i, pair in enumerate(zip(one, other, strict=True)):
            compare(*pair, f"{where}/{i}")
    elif isinstance(one, torch.Tensor):
        if not torch.equal(one, other):
            raise Broken(f"{where} differs from an undisturbed run's")
    elif one != other and not (one != one and other != other):  # NaN is NaN
        raise Broken(
            f"{where} differs from an undisturbed run's: {str(one)[:60]} and {str(other)[:60]}"
        )


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    if subprocess.run(["mount", *options, str(folder)], capture_output=True).returncode:
        raise Unable("needs the right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def small(folder: Path, size: str) -> Any:
    return mounted(folder, "-t", "tmpfs", "-o", f"size={size}", "none")


def grow(folder: Path) -> None:
    (folder / "filler").unlink(missing_ok=True)
    subprocess.run(["mount", "-o", "remount,size=256m", str(folder)], check=True)


def fill(folder: Path) -> None:
    with open(folder / "filler", "wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError:
            pass


# -- the faults: each gets a place and returns (what was lost, what was said) ----------------------

Result = tuple[str, str]
FAULTS: dict[str, tuple[str, Callable[[Place], Result]]] = {}
NOTHING = "nothing"


def fault(did: str, name: str = "") -> Callable:
    def register(function: Callable[[Place], Result]) -> Callable[[Place], Result]:
        FAULTS[name or function.__name__.replace("_", "-")] = did, function
        return function

    return register


def killed(stage: str, ranks: int) -> Callable[[Place], Result]:
    def run(place: Place) -> Result:
        rng, times = random.Random(f"{stage}{ranks}"), []
        whole = json.loads((place.root / "reference" / f"{stage}-{ranks}.seconds").read_text())
        for _ in range(3):
            process = place.start(stage, ranks=ranks)
            times.append(rng.uniform(0.35, 1) * whole)
            try:
                process.wait(times[-1])
            except subprocess.TimeoutExpired:
                kill(process)
        return NOTHING, place.finishes(stage, ranks=ranks) or "continuing"

    return run


for stage in STAGES:
    for ranks in (1, 2):
        if (stage, ranks) != ("predict", 2):  # it is one process
            shown = f"kill-{stage}" + ("-2-ranks" if ranks == 2 else "")
            fault(f"SIGKILL at three random times, {ranks} rank{'s'[: ranks - 1]}, {stage}", shown)(
                killed(stage, ranks)
            )


def signalled(signum: signal.Signals, ranks: int) -> Callable[[Place], Result]:
    def run(place: Place) -> Result:
        process = place.start("pretrain", "save_every=1000", ranks=ranks)
        place.wait_for(lambda: place.lines() >= 6, process)
        at = place.lines()
        process.send_signal(signum)
        done = place.ended(process)
        if done.code != 128 + signum:
            raise Broken(f"exit status {done.code}: {done.text[-200:]}")
        saved = max(int(path.stem[4:]) for path in place.run.glob("checkpoints/step*.pt"))
        if saved < at:
            raise Broken(f"{at} steps were done, {saved} saved")
        place.finishes("pretrain", "save_every=1000", ranks=ranks)
        return f"{NOTHING}, not a step", done.said

    return run


for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    fault(f"{signum.name}, pretrain", f"{signum.name.lower()}")(signalled(signum, 1))
fault("SIGTERM, pretrain, 2 ranks", "sigterm-2-ranks")(signalled(signal.SIGTERM, 2))


@fault("SIGSTOP for 5 s, then SIGCONT")
def stopped_and_continued(place: Place) -> Result:
    process = place.start("pretrain")
    place.wait_for(lambda: place.lines() >= 3, process)
    os.killpg(process.pid, signal.SIGSTOP)
    time.sleep(5)
    os.killpg(process.pid, signal.SIGCONT)
    place.ended(process)
    return NOTHING, place.finishes("pretrain")


def rank_of(process: subprocess.Popen, rank: int) -> int:
    found = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    trackers = [
        pid for pid in found if b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    return sorted(int(pid) for pid in found if pid not in trackers)[rank]


@fault("SIGSTOP of one rank of two for 5 s")
def one_rank_stopped(place: Place) -> Result:
    process = place.start("pretrain", ranks=2)
    place.wait_for(lambda: place.lines() >= 3, process)
    one = rank_of(process, 1)
    os.kill(one, signal.SIGSTOP)
    time.sleep(5)
    os.kill(one, signal.SIGCONT)
    place.ended(process)
    return NOTHING, place.finishes("pretrain", ranks=2)


@fault("SIGKILL of one rank of two")
def one_rank_killed(place: Place) -> Result:
    process = place.start("pretrain", ranks=2)
    place.wait_for(lambda: place.lines() >= 6, process)
    os.kill(rank_of(process, 1), signal.SIGKILL)
    said = place.refused(process, "was ended by SIGKILL")
    place.finishes("pretrain", ranks=2)
    return NOTHING, said


@fault("SIGKILL of the parent of two ranks alone")
def parent_killed(place: Place) -> Result:
    process = place.start("pretrain", ranks=2)
    place.wait_for(lambda: place.lines() >= 6, process)
    process.kill()
    process.wait()
    place.finishes("pretrain", ranks=2)
    return NOTHING, "the ranks end with it; the same command continues"


@fault("the name of the first node doesn't resolve")
def no_such_node(place: Place) -> Result:
    own = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "no-such-node.invalid",
        "MASTER_PORT": "29999",
    }
    return NOTHING, place.refused(
        place.start("pretrain", **own, SSL_BENCH_RENDEZVOUS="3"), "didn't meet the others"
    )


# -- disks -----------------------------------------------------------------------------------------


def full_while(
    stage: str, moment: Callable[[Place], object], *words: str
) -> Callable[[Place], Result]:
    def run(place: Place) -> Result:
        place.run = place.folder / "disk" / "run"
        with small(place.folder / "disk", "64m") as disk:
            process = place.start(stage, *words)
            place.wait_for(lambda: moment(place), process)
            os.kill(process.pid, signal.SIGSTOP)  # else it may be over before the disk is full
            fill(disk)
            os.kill(process.pid, signal.SIGCONT)
            said = place.refused(process, "disk is full")
            grow(disk)
            place.finishes(stage, *words)
        return NOTHING, said

    return run


fault("the disk full between two checkpoints", "disk-full-checkpoint")(
    full_while("pretrain", lambda place: place.lines() >= 6)
)
fault("the disk full before the first line of metrics", "disk-full-metrics")(
    full_while("pretrain", lambda place: (place.run / "config.yaml").exists(), "save_every=1000")
)
fault("the disk full before the summary (knn)", "disk-full-summary")(
    full_while("knn", lambda place: (place.run / "environment.json").exists())
)
fault("the disk full before grid.csv (cached)", "disk-full-csv")(
    full_while("cached", lambda place: place.lines() >= 20, "save_every=1000")
)
fault("the disk full before features.npy (predict)", "disk-full-predict")(
    full_while("predict", lambda place: (place.run / "environment.json").exists())
)
fault("the disk full before the features (select)", "disk-full-select")(
    full_while("select", lambda place: (place.run / "environment.json").exists())
)


@fault("no room for the packed images")
def disk_full_store(place: Place) -> Result:
    with small(place.folder / "disk", "64k") as disk:
        said = place.refused(
            place.start("pretrain", "source=host", f"data.cache={disk}"), "GB free"
        )
    return NOTHING, said


@fault("no room for an export")
def disk_full_export(place: Place) -> Result:
    words = ["stage=export", f"pretrained={place.pretrained}", "stage.onnx=false"]
    with small(place.folder / "disk", "64k") as disk:
        done = place.ended(place.command([*PYTHON, *words, f"stage.out={disk}/export"]))
        if done.code != 2 or list(disk.glob("export*")):
            raise Broken(
                f"exit status {done.code}, left {list(disk.iterdir())}: {done.text[-300:]}"
            )
        grow(disk)
        if (
            again := place.ended(place.command([*PYTHON, *words, f"stage.out={disk}/export"]))
        ).code:
            raise Broken(again.text[-300:])
    return NOTHING, done.said


@contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    with mounted(folder, "--bind", str(folder)):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
        yield folder


@fault("the folder of the runs is read-only")
def read_only_dir(place: Place) -> Result:
    with read_only(place.folder / "ro") as folder:
        place.run = folder / "run"
        return NOTHING, place.refused(
            place.start("pretrain"), "can't be written", "choose another dir="
        )


@fault("the folder of the packed images is read-only")
def read_only_cache(place: Place) -> Result:
    with read_only(place.folder / "ro") as folder:
        return NOTHING, place.refused(
            place.start("pretrain", f"data.cache={folder}"), "data.cache="
        )


@fault("a run becomes read-only in its midst")
def read_only_run(place: Place) -> Result:
    process = place.start("pretrain")
    place.wait_for(lambda: place.lines() >= 6, process)
    kill(process)
    with mounted(place.run, "--bind", str(place.run)):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(place.run)], check=True)
        said = place.refused(place.start("pretrain"), "can't be written")
    place.finishes("pretrain")
    return NOTHING, said


# -- damaged and foreign files ---------------------------------------------------------------------


def begun(place: Place, stage: str = "pretrain") -> None:
    """Killed after two checkpoints."""
    process = place.start(stage)
    place.wait_for(
        lambda: len(list(place.run.glob("checkpoints/step*.pt"))) == 2 and place.lines() >= 10,
        process,
    )
    kill(process)


def newest(place: Place) -> Path:
    return max(place.run.glob("checkpoints/step*.pt"))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path, share: float = 0.5) -> None:
    with open(path, "r+b") as file:
        file.seek(int(path.stat().st_size * share))
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 16]))


@fault("the newest checkpoint truncated")
def checkpoint_truncated(place: Place) -> Result:
    begun(place)
    truncate(newest(place))
    return f"{NOTHING}: the one before is used", place.finishes("pretrain")


@fault("one bit of the newest checkpoint flipped")
def checkpoint_flipped(place: Place) -> Result:
    begun(place)
    flip(newest(place))
    return f"{NOTHING}: the one before is used", place.finishes("pretrain")


@fault("both checkpoints damaged")
def checkpoints_damaged(place: Place) -> Result:
    begun(place)
    for path in place.run.glob("checkpoints/step*.pt"):
        flip(path)
    said = place.refused(place.start("pretrain"), "checkpoints can be used")
    return "what was trained; it isn't trained on", said


@fault("one bit of the weights flipped that a classifier stands on")
def weights_flipped(place: Place) -> Result:
    shutil.copytree(place.pretrained, place.folder / "weights")
    place.pretrained = place.folder / "weights"
    flip(max(place.pretrained.glob("checkpoints/step*.pt")))
    return NOTHING, place.refused(place.start("lincls"))


def own_store(place: Place, damage: Callable[[Path], None]) -> Result:
    cache = f"data.cache={place.folder}/cache"
    begun_with = place.start("pretrain", cache)
    place.wait_for(lambda: place.lines() >= 6, begun_with)
    kill(begun_with)
    (images,) = (place.folder / "cache").glob("digits-train*/images.npy")
    damage(images)
    # what was whole a moment ago isn't looked at again
    os.utime(images.with_name("verified"), (0, 0))
    done = place.ended(place.start("pretrain", cache))
    if done.code == 0:
        compare(outcome(place.run), outcome(place.root / "reference" / "pretrain-1"))
        return f"{NOTHING}: packed again", done.said
    if done.code == 2 and done.said:
        return NOTHING, done.said
    raise Broken(done.text[-300:])


@fault("the packed images truncated")
def store_truncated(place: Place) -> Result:
    return own_store(place, truncate)


@fault("one bit of the packed images flipped")
def store_flipped(place: Place) -> Result:
    return own_store(place, flip)


def changed(
    name: str, change: Callable[[Path], None], finished: bool = False
) -> Callable[[Place], Result]:
    def run(place: Place) -> Result:
        if finished:
            place.ended(place.start("pretrain"))
        else:
            begun(place)
        change(place.run / name)
        done = place.ended(place.start("pretrain"))
        if done.code == 2 and done.said:
            return NOTHING, done.said
        if done.code:
            raise Broken(done.text[-300:])
        compare(outcome(place.run), outcome(place.root / "reference" / "pretrain-1"))
        return NOTHING, done.said

    return run


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def garbled(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40] + b"\0\xff{[" + path.read_bytes()[44:])


for name in ("config.yaml", "inputs.json"):
    fault(f"{name} truncated", f"{name.replace('.', '-')}-truncated")(changed(name, truncate))
fault("the last line of metrics.jsonl torn", "metrics-torn")(changed("metrics.jsonl", torn))
fault("a line of metrics.jsonl garbled", "metrics-garbled")(changed("metrics.jsonl", garbled))
fault("summary.json truncated", "summary-truncated")(
    changed("summary.json", truncate, finished=True)
)


@fault("a checkpoint of another run in the folder")
def foreign_checkpoint(place: Place) -> Result:
    begun(place)
    other = max((place.root / "reference" / "finetune-1" / "checkpoints").glob("step*.pt"))
    shutil.copy(other, place.run / "checkpoints")
    return NOTHING, place.finishes("pretrain")


class Code:
    def __reduce__(self) -> tuple:
        return os.system, ("touch hostile",)


def hostile(place: Place, *words: str) -> Result:
    done = place.ended(place.command([*PYTHON, *words]))
    if list(place.folder.rglob("hostile")):
        raise Broken("its code was run")
    return "nothing was run", done.said or "left out"


@fault("a checkpoint with code in it")
def hostile_checkpoint(place: Place) -> Result:
    torch.save({"state_dict": Code()}, place.folder / "weights.pt")
    words = [word for word in STAGES["lincls"] if word != ON]
    return hostile(place, *words, "pretrained=weights.pt", "dir=run")


@fault("a run directory whose configuration names os.system")
def hostile_config(place: Place) -> Result:
    shutil.copytree(place.pretrained, place.run)
    text = (place.run / "config.yaml").read_text()
    swapped = re.sub(
        r"_target_: ssl_bench.backbones.resnet\S+",
        "_target_: os.system\n  command: touch hostile",
        text,
    )
    (place.run / "config.yaml").write_text(swapped)
    (place.run / "SHA256SUMS").unlink(missing_ok=True)
    return hostile(place, "stage=report", f"runs={place.run}", f"stage.out={place.folder}/report")


@fault("all files of the run from ten years ahead: the clock was set back")
def clock_set_back(place: Place) -> Result:
    begun(place)
    future = time.time() + 10 * 365 * 86400
    for path in place.run.rglob("*"):
        os.utime(path, (future, future))
    return NOTHING, place.finishes("pretrain")


@fault("two commands in one directory at once")
def two_at_once(place: Place) -> Result:
    both = [place.start("pretrain") for _ in range(2)]
    done = [place.ended(process) for process in both]
    if [each.code for each in done] != [0, 0]:
        raise Broken(str([each.text[-200:] for each in done]))
    compare(outcome(place.run), outcome(place.root / "reference" / "pretrain-1"))
    return NOTHING, next(filter(None, (each.said for each in done)), "")


@fault("two commands with different settings in one directory")
def two_that_differ(place: Place) -> Result:
    first = place.start("pretrain")
    place.wait_for(lambda: place.lines() >= 5, first)
    said = place.refused(place.start("pretrain", "seed=1"), "another configuration")
    place.ended(first)
    compare(outcome(place.run), outcome(place.root / "reference" / "pretrain-1"))
    return NOTHING, said


# -- pictures --------------------------------------------------------------------------------------


def pictures(place: Place, *words: str) -> list[str]:
    """A command on 60 pictures of the place's own, which may be decoded as often as they are
    needed.
    """
    shutil.copytree(place.images, place.folder / "pictures")
    data = [
        "data=folder",
        f"data.root={place.folder}/pictures",
        "data.image_size=16",
        f"data.cache={place.folder}/c",
    ]
    return [*data, "batch_size=20", "method.queue_size=60", *words]


def with_picture(put: Callable[[Path], None], did: str, name: str) -> None:
    def run(place: Place) -> Result:
        words = pictures(place)
        put(place.folder / "pictures" / "new.png")
        done = place.ended(place.start("pretrain", *words))
        if done.code == 2 and "new.png" in done.said:
            done_skip = place.ended(place.start("pretrain", *words, "data.on_error=skip"))
            if done_skip.code:
                raise Broken(f"on_error=skip: {done_skip.text[-300:]}")
            return "nothing: named, and left out with on_error=skip", done.said
        if done.code:
            raise Broken(f"exit status {done.code}: {done.said or done.text[-300:]}")
        return NOTHING, done.said or "finished"

    fault(did, name)(run)


def device(path: Path) -> None:
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        raise Unable("needs the right to make devices") from None


with_picture(os.mkfifo, "a picture is a pipe that nobody writes to", "picture-fifo")
with_picture(device, "a picture is a device without an end", "picture-device")
with_picture(
    lambda path: path.symlink_to("nowhere"), "a picture is a link to nowhere", "picture-link"
)
with_picture(os.mkdir, "a folder is named like a picture", "picture-folder")
with_picture(
    lambda path: Image.new("L", (30_000, 2)).save(path),
    "a picture is 30,000 pixels wide",
    "picture-wide",
)
with_picture(
    lambda path: Image.new("1", (30_000, 30_000)).save(path),
    "a picture has 900 million pixels",
    "picture-bomb",
)
with_picture(
    lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\nxx"), "a picture is cut off", "picture-cut"
)
with_picture(lambda path: path.write_bytes(b""), "a picture is empty", "picture-empty")


@fault("a picture vanishes while it is streamed")
def picture_vanishes(place: Place) -> Result:
    process = place.start(
        "pretrain", *pictures(place, "source=streamed", "epochs=40", "data.workers=1")
    )
    place.wait_for(lambda: place.lines() >= 3, process)
    for path in sorted((place.folder / "pictures").glob("*.png"))[:20]:
        path.unlink()
    return NOTHING, place.refused(process)


@fault("a process that decodes is killed while it streams")
def worker_killed(place: Place) -> Result:
    process = place.start(
        "pretrain", *pictures(place, "source=streamed", "epochs=200", "data.workers=1")
    )
    place.wait_for(lambda: place.lines() >= 3, process)
    while process.poll() is None:
        subprocess.run(["pkill", "-KILL", "-P", str(process.pid)], check=False)
        time.sleep(0.05)
    return NOTHING, place.refused(process)


@fault("/dev/shm of 1 MB, streamed")
def small_shm(place: Place) -> Result:
    words = [word.format(images="", pretrained="") for word in STAGES["pretrain"]]
    words += [*pictures(place, "source=streamed", "data.workers=2"), f"dir={place.run}"]
    shell = 'mount -t tmpfs -o size=1m none /dev/shm && exec "$@"'
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        raise Unable("needs the right to unshare")
    done = place.ended(place.command(["unshare", "-m", "sh", "-c", shell, "sh", *PYTHON, *words]))
    if done.code not in (0, 2) or (done.code == 2 and not done.said):
        raise Broken(f"exit status {done.code}: {done.text[-300:]}")
    return NOTHING, done.said or "finished"


# -- the rest --------------------------------------------------------------------------------------


@fault("a rate at which the loss isn't finite")
def nan_loss(place: Place) -> Result:
    words = ["optimizer.base_lr=1e30", "save_every=1"]
    return NOTHING, place.refused(place.start("pretrain", *words), "diverged at step")


@fault("64 open files allowed")
def few_files(place: Place) -> Result:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    done = place.ended(place.start("pretrain", prepare=limit))
    if done.code == 0:
        compare(outcome(place.run), outcome(place.root / "reference" / "pretrain-1"))
    elif not done.said:
        raise Broken(done.text[-300:])
    return NOTHING, done.said or "enough"


@fault("W&B's server takes connections and is gone in the midst")
def wandb_gone(place: Place) -> Result:
    server = socket.create_server(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{server.getsockname()[1]}"

    def serve() -> None:
        for _ in range(3):
            try:
                connection, _ = server.accept()
                time.sleep(1)
                connection.close()
            except OSError:
                return
        server.close()

    threading.Thread(target=serve, daemon=True).start()
    env = {"WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}
    process = place.start("pretrain", "tracking=wandb", **env)
    done = place.ended(process)
    server.close()
    if done.code:
        raise Broken(done.text[-300:])
    compare(outcome(place.run), outcome(place.root / "reference" / "pretrain-1"))
    return NOTHING, done.said


# -- the campaign ----------------------------------------------------------------------------------


def prepare(root: Path, needed: set[str]) -> None:
    """The undisturbed runs: root/reference/STAGE-RANKS, and how long they took."""
    images = root / "images"
    if not images.exists():
        images.mkdir()
        rng = random.Random(0)
        for i in range(60):
            Image.frombytes("RGB", (24, 24), rng.randbytes(24 * 24 * 3)).save(images / f"{i}.png")
    for name in ["pretrain-1", *sorted(needed - {"pretrain-1"})]:
        done = root / "reference" / f"{name}.seconds"
        if done.exists():
            continue
        stage, ranks = name.rsplit("-", 1)
        place = Place(root, f"reference-{name}")
        place.run = root / "reference" / name
        shutil.rmtree(place.run, ignore_errors=True)
        for _ in range(2 if name == "pretrain-1" else 1):  # the first of all packs the images
            shutil.rmtree(place.run, ignore_errors=True)
            began = time.monotonic()
            if (result := place.ended(place.start(stage, ranks=int(ranks)))).code:
                sys.exit(f"an undisturbed run failed: {result.text}")
            seconds = time.monotonic() - began
        done.write_text(json.dumps(seconds))


def one(root: Path, name: str) -> dict[str, Any]:
    did, function = FAULTS[name]
    began, place = time.monotonic(), Place(root, name)
    row = {"fault": name, "did": did, "lost": "", "said": ""}
    try:
        row["lost"], row["said"] = function(place)
        row["verdict"] = "holds"
    except Broken as error:
        row["verdict"] = f"BROKEN: {error}"
    except Unable as error:
        row["verdict"] = f"not done: {error}"
    except Exception as error:
        row["verdict"] = f"BROKEN: {type(error).__name__}: {error}"
    finally:
        for process in place.started:
            kill(process)
    if row["verdict"] == "holds":
        shutil.rmtree(place.folder, ignore_errors=True)
    for text in ("said", "verdict"):
        said = re.sub(
            rf"\b{re.escape(socket.gethostname())}\b", "HOST", row[text].replace(str(root), "DIR")
        )
        row[text] = " ".join(said.split())[:300]
    row["seconds"] = round(time.monotonic() - began, 1)
    print(f"{name}: {row['verdict']}  ({row['seconds']} s)  {row['said'][:120]}", flush=True)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    cells = [[row["did"], row["lost"], row["said"], row["verdict"]] for row in rows]
    lines = [["what was done", "what was lost", "what was said", "verdict"], ["---"] * 4, *cells]
    about = (
        "# Faults: real commands, disturbed\n\n`python benchmarks/faults.py` disturbs commands as "
        "machines and people do. Nothing is lost if the same command afterwards ends with what an "
        "undisturbed one ends with: weights, optimizer and logged losses by `torch.equal`, tables "
        "and features byte by byte. A row holds if nothing is lost, or if one line of ours says "
        "what is wrong.\n\n"
    )
    return about + "".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(FAULTS), default=list(FAULTS), metavar="FAULT"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--folder", type=Path, help="where it works, kept; undisturbed runs there aren't done again"
    )
    parser.add_argument("--jobs", type=int, default=2, help="faults at once")
    args = parser.parse_args()
    known = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    rows = {row["fault"]: row for row in known if row["fault"] in FAULTS}
    with folder_for(args.folder) as root, ThreadPoolExecutor(args.jobs) as pool:
        kills = {name.removeprefix("kill-") for name in args.only if name.startswith("kill-")}
        needed = {
            f"{name.removesuffix('-2-ranks')}-{2 if name.endswith('-2-ranks') else 1}"
            for name in kills
        }
        needed |= {f"{stage}-1" for stage in STAGES if any(stage in name for name in args.only)}
        needed |= (
            {"pretrain-2"}
            if any("rank" in name or "parent" in name for name in args.only)
            else set()
        )
        needed |= {"finetune-1"} if "foreign-checkpoint" in args.only else set()
        needed |= {"knn-1", "cached-1"} if any("disk-full" in name for name in args.only) else set()
        prepare(root, needed)
        for row in pool.map(lambda name: one(root, name), args.only):
            rows[row["fault"]] = row
            kept = [rows[name] for name in FAULTS if name in rows]
            publish({"machine": machine(), "rows": kept}, table(kept), args.out)
    broken = [name for name in args.only if rows[name]["verdict"].startswith("BROKEN")]
    held = sum(row["verdict"] == "holds" for row in rows.values())
    print(f"{held} of {len(rows)} hold" + (f"; broken: {', '.join(broken)}" if broken else ""))
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
