"""Faults on purpose: each mutant of mutants.toml in a copy of the program, and the quick tests that
bear on it.

    python tests/mutants/run.py [--only NAME ...] [--jobs 2] [--out benchmarks/results]

First all of these tests on the copy as it is, which must not alarm; then each mutant, until a test
fails: it is caught. One that passes them has escaped. `make mutants` writes mutants.json and
mutants.md.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_name("mutants.toml")
COPIED = ("ssl_bench", "conf", "launchers", "hydra_plugins", "tests", "benchmarks")
COPIED += ("setup.cfg", "pyproject.toml", "README.md", "CONTRIBUTING.md", "Makefile")
# What the tests import beside the program, once for all of them: it takes longer than most of the
# tests.
PRELOADED = (
    "pytest",
    "hypothesis",
    "hydra",
    "omegaconf",
    "pydantic",
    "filelock",
    "rich",
    "yaml",
    "numpy",
    "PIL.Image",
)
PRELOADED += (
    "scipy.stats",
    "sklearn.linear_model",
    "sklearn.pipeline",
    "sklearn.preprocessing",
    "torch",
)
PRELOADED += (
    "torch._dynamo",
    "torch.distributed",
    "torch.testing",
    "torch.utils.data",
    "torchvision.models",
)
PRELOADED += ("torchvision.transforms.v2.functional",)
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
SECONDS = 300  # a mutant that hangs is noticed, too
ALARMS = 1200  # seconds for all the tests of a file
PASSED, FAILED = 0, 1  # pytest's exit status


@dataclass(frozen=True)
class Mutant:
    """A small change of one file: each text of `old`, found once, becomes that of `new`."""

    name: str
    kind: str
    file: str
    old: tuple[str, ...]
    new: tuple[str, ...]
    tests: tuple[str, ...]  # FILE::FUNCTION or FILE::FUNCTION[PARAMETERS], below tests/

    @classmethod
    def of(cls, entry: dict[str, Any]) -> "Mutant":
        several = {
            key: (entry[key],) if isinstance(entry[key], str) else tuple(entry[key])
            for key in ("old", "new")
        }
        return cls(**{**entry, **several, "tests": tuple(entry["tests"])})

    def apply(self, text: str) -> str:
        """ValueError unless each `old` is there once."""
        for old in self.old:
            if text.count(old) != 1:
                raise ValueError(
                    f"{self.name}: found {text.count(old)} times in {self.file}: {old}"
                )
        places = sorted(
            (text.index(old), old, new) for old, new in zip(self.old, self.new, strict=True)
        )
        for place, old, new in reversed(places):  # of the text as it was: one may become another
            text = text[:place] + new + text[place + len(old) :]
        return text


def read(path: Path = TABLE) -> list[Mutant]:
    return [Mutant.of(entry) for entry in tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]]


@dataclass(frozen=True)
class Job:
    name: str
    tree: Path  # a copy of the program
    tests: tuple[str, ...]
    seconds: int  # until it is ended


@dataclass(frozen=True)
class Outcome:
    job: Job
    status: int | None  # pytest's; None: it didn't end by itself
    failed: tuple[str, ...]  # tests
    seconds: float
    cpu_seconds: float  # the same on a machine that does something else meanwhile


def copy(source: Path, tree: Path, mutant: Mutant | None = None) -> None:
    """The program and its tests, as the file system has them. With the compiled files of the copy
    that has run.
    """
    skipped = shutil.ignore_patterns(".*")
    for name in COPIED:
        if (source / name).is_dir():
            shutil.copytree(source / name, tree / name, symlinks=True, ignore=skipped)
        else:
            shutil.copy2(source / name, tree / name)
    if mutant is not None:
        path = tree / mutant.file
        text = mutant.apply(path.read_text(encoding="utf-8"))
        path.unlink()
        path.write_text(text, encoding="utf-8")
        for compiled in path.parent.glob(f"__pycache__/{path.stem}.*"):
            compiled.unlink()


def run(jobs: Iterable[Job], at_once: int) -> Iterator[Outcome]:
    """Each in a process of its own, forked from this one, which has imported everything but the
    program.
    """
    running: dict[int, tuple[Job, float]] = {}
    jobs = iter(jobs)
    while True:
        while len(running) < at_once and (job := next(jobs, None)) is not None:
            running[_start(job)] = job, time.monotonic()
        if not running:
            return
        pid, wait_status, usage = os.wait4(-1, os.WNOHANG)
        if pid in running:
            job, began = running.pop(pid)
            times = time.monotonic() - began, usage.ru_utime + usage.ru_stime
            yield _end(job, pid, times, os.waitstatus_to_exitcode(wait_status))
            continue
        for pid, (job, began) in list(running.items()):
            if time.monotonic() - began > job.seconds:
                os.killpg(pid, signal.SIGKILL)
        time.sleep(0.02)


def _start(job: Job) -> int:
    if pid := os.fork():
        return pid
    try:
        _work(job)
    finally:
        os._exit(70)


def _end(job: Job, pid: int, times: tuple[float, float], code: int) -> Outcome:
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # what its tests left behind
    result = job.tree / "result.json"
    if code < 0 or not result.exists():
        return Outcome(job, None, (), *times)
    found = json.loads(result.read_text())
    return Outcome(job, found["status"], tuple(found["failed"]), *times)


def _work(job: Job) -> NoReturn:
    """In the new process: pytest, with the copy in the place of the installed program."""
    import hypothesis
    import pytest

    os.setsid()
    output = os.open(job.tree / "output.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1), os.dup2(output, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(job.tree)
    os.environ["PYTHONPATH"] = str(job.tree)  # of the commands that tests start
    (job.tree / "tmp").mkdir()
    os.environ["TMPDIR"] = tempfile.tempdir = str(job.tree / "tmp")
    sys.path[:1] = [str(job.tree)]
    assert not any(name.partition(".")[0] in ("ssl_bench", "hydra_plugins") for name in sys.modules)

    class Failures:
        def __init__(self) -> None:
            self.names: list[str] = []

        def pytest_runtest_logreport(self, report: "pytest.TestReport") -> None:
            if report.failed:
                self.names.append(report.nodeid)

        def pytest_collectreport(self, report: "pytest.CollectReport") -> None:
            if report.failed:
                self.names.append(f"{report.nodeid} (import)")

    # what fails is not made smaller; the examples are the same in each run
    hypothesis.settings.register_profile(
        "mutants", phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate]
    )
    hypothesis.settings.load_profile("mutants")
    seen, options = (
        Failures(),
        ["-q", "-m", "not slow", "-p", "no:cacheprovider", "--hypothesis-seed=0"],
    )
    options += ["-x"] if job.seconds == SECONDS else []
    status = int(
        pytest.main([*options, f"--basetemp={job.tree}/tmp/pytest", *job.tests], plugins=[seen])
    )
    import ssl_bench

    if not str(ssl_bench.__file__).startswith(f"{job.tree}{os.sep}"):
        status = 71  # not the copy was tested
    (job.tree / "result.json").write_text(json.dumps({"status": status, "failed": seen.names}))
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)


def alarms(base: Path, tests: Iterable[str], at_once: int) -> tuple[list[str], float]:
    """Tests that fail on the unchanged program, and the CPU seconds of all of them."""
    files: dict[str, list[str]] = {}
    for test in sorted(set(tests)):
        files.setdefault(test.partition("::")[0], []).append(test)
    jobs, found, needed = [], [], 0.0
    for number, (name, mine) in enumerate(files.items()):
        tree = base.with_name(f"unchanged-{number}")
        copy(base, tree)
        jobs.append(Job(name, tree, tuple(f"tests/{test}" for test in mine), ALARMS))
    for outcome in run(jobs, at_once):
        names = (
            list(outcome.failed)
            if outcome.status in (PASSED, FAILED)
            else [f"{outcome.job.name} (no result)"]
        )
        if names:
            print((outcome.job.tree / "output.txt").read_text(), file=sys.stderr)
        found += names
        needed += outcome.cpu_seconds
        # for the mutants; not of the tests' temporary files, which may be going
        for compiled in [x for name in COPIED for x in (outcome.job.tree / name).rglob("*.pyc")]:
            if not (place := base / compiled.relative_to(outcome.job.tree)).exists():
                place.parent.mkdir(exist_ok=True)
                shutil.copy2(compiled, place)
        shutil.rmtree(outcome.job.tree, ignore_errors=True)
    return found, needed


def hunt(
    base: Path, mutants: Sequence[Mutant], at_once: int, keep: bool
) -> Iterator[dict[str, Any]]:
    """A row for each mutant: caught by which test, in what time."""
    known = {mutant.name: mutant for mutant in mutants}

    def jobs() -> Iterator[Job]:
        for number, mutant in enumerate(mutants):
            copy(base, tree := base.with_name(f"mutant-{number}"), mutant)
            yield Job(mutant.name, tree, tuple(f"tests/{test}" for test in mutant.tests), SECONDS)

    for outcome in run(jobs(), at_once):
        mutant, by = known[outcome.job.name], next(iter(outcome.failed), "").removeprefix("tests/")
        if outcome.status is None:
            by = "timeout" if outcome.seconds > SECONDS else "crash"
        elif outcome.status not in (PASSED, FAILED, 2):  # 2: the program can't be imported
            by = ""
            print(f"{mutant.name}: pytest ended with {outcome.status}", file=sys.stderr)
        if keep:
            print((outcome.job.tree / "output.txt").read_text())
        row = {
            "name": mutant.name,
            "kind": mutant.kind,
            "file": mutant.file,
            "caught": bool(by),
            "by": by,
        }
        print(f"{outcome.seconds:6.1f} s  {mutant.name}: {by or 'ESCAPED'}", flush=True)
        shutil.rmtree(outcome.job.tree, ignore_errors=True)
        yield row | {
            "seconds": round(outcome.seconds, 1),
            "cpu_seconds": round(outcome.cpu_seconds, 1),
        }


def markdown(result: dict[str, Any]) -> str:
    rows = [["kind", "change", "in", "noticed by", "CPU s"]]
    for row in result["mutants"]:
        by = f"`{row['by']}`" if row["caught"] else "**escaped**"
        rows.append(
            [
                row["kind"],
                row["name"],
                f"`{row['file']}`",
                by.replace("|", "\\|"),
                f"{row['cpu_seconds']:.1f}",
            ]
        )
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(
        [
            "# Would the tests notice a fault?",
            "",
            "Each row is a small fault that was put into a copy of the program on purpose, and the "
            "first test that failed on it.",
            "",
            f"`{result['command']}` at commit {result['git_commit'][:7]}: {summary(result)}.",
            "",
            lines[0],
            "|---|---|---|---|---:|",
            *lines[1:],
            "",
        ]
    )


def summary(result: dict[str, Any]) -> str:
    caught, total = sum(row["caught"] for row in result["mutants"]), len(result["mutants"])
    share = 100 * caught / max(total, 1)
    return (
        f"{caught} of {total} mutants caught ({share:.0f} %), {len(result['alarms'])} alarms on "
        f"the unchanged program, {result['seconds'] / 60:.1f} minutes on {result['at_once']} cores "
        f"({result['cpu_seconds'] / 60:.1f} of CPU)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Faults on purpose, and the tests that notice them."
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="these mutants, with what pytest says of them"
    )
    parser.add_argument("--jobs", type=int, default=2, help="at once")
    parser.add_argument("--out", type=Path, help="folder for mutants.json and mutants.md")
    args = parser.parse_args()
    mutants = [mutant for mutant in read() if args.only is None or mutant.name in args.only]
    if args.only and len(mutants) < len(args.only):
        parser.error(
            f"no such mutant: {', '.join({*args.only} - {mutant.name for mutant in mutants})}"
        )
    os.environ.update(ENVIRONMENT)
    began = time.monotonic()
    for module in PRELOADED:
        import_module(module)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        base = Path(folder).resolve() / "base"
        base.mkdir()
        copy(ROOT, base)
        told, needed = alarms(
            base, {test for mutant in mutants for test in mutant.tests}, args.jobs
        )
        print(
            f"unchanged: {len(told)} alarms in {time.monotonic() - began:.0f} s",
            *told,
            sep="\n",
            flush=True,
        )
        rows = list(hunt(base, mutants, args.jobs, keep=bool(args.only)))
    order = {mutant.name: number for number, mutant in enumerate(mutants)}
    rows.sort(key=lambda row: order[row["name"]])
    result = {
        "command": "make mutants",
        "at_once": args.jobs,
        "seconds": round(time.monotonic() - began),
    }
    used = needed + sum(row["cpu_seconds"] for row in rows)
    result |= {
        "cpu_seconds": round(used),
        "cpu_seconds_unchanged": round(needed),
        "alarms": told,
        "mutants": rows,
    }
    print(summary(result))
    if args.out:
        sys.path.insert(0, str(ROOT / "benchmarks"))
        from common import machine, publish  # only now: a fork must not have the program

        publish({**machine(), **result}, markdown(result), args.out / "mutants.json")
    sys.exit(bool(told) or not all(row["caught"] for row in rows))


if __name__ == "__main__":
    main()
