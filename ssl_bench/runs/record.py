"""Runs read back from disk: their configuration, metrics and state, and the runs below them."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from ssl_bench import files
from ssl_bench.config import build
from ssl_bench.errors import UserError
from ssl_bench.runs import checkpoint, identity, layout, metrics, sweep, watch
from ssl_bench.runs.identity import Identity
from ssl_bench.runs.metrics import MetricsFile
from ssl_bench.runs.units import PRETRAINING


class NoRunError(UserError):
    """There is no run at or below a path."""


WAITING = sweep.State("waiting")
# The files that are read of a run; those of a finished one are compared with their digests.
READ = (
    layout.CONFIG,
    layout.METRICS,
    layout.SUMMARY,
    layout.ENVIRONMENT,
    layout.INPUTS,
    layout.WEIGHTS,
    identity.ORIGIN,
)
# Logged values that are no results.
BESIDE = (
    "step",
    "epoch",
    "images_seen",
    "lr",
    "weight_decay",
    "grad_norm",
    "data_wait",
    "k",
    "temperature",
)


def _parse(text: str | bytes) -> Any:
    """YAML of plain values, by the parser in C if PyYAML has it: ten times as quick."""
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))


@dataclass(eq=False)
class Ran:
    """A run that was started, or a member of a sweep that waits for its start."""

    directory: Path
    config: dict
    lines: list[dict[str, float]] = field(default_factory=list)  # the lines of metrics.jsonl
    summary: dict[str, float] | None = None  # None: not finished
    environment: dict = field(default_factory=dict)
    state: sweep.State = WAITING
    pretraining: "Ran | None" = None  # the run that made `pretrained`, if it can be found
    holds_runs: bool = False  # a pipeline, whose results are those of its parts
    inputs: dict = field(default_factory=dict)  # the fingerprint of each split that it opened

    @classmethod
    def read(cls, directory: Path) -> "Ran":
        try:
            for name in READ:
                files.check(directory / name)
            summary = metrics.summary(directory)
            environment, inputs = identity.environment(directory), identity.inputs(directory)
        except UserError as error:
            raise UserError(f"{error}, or leave this run out of runs=") from None
        path = directory / layout.CONFIG
        config = build.read_back(path, path.read_bytes(), _parse)
        if not build.is_of_run(config):
            raise UserError(f"{path}: no configuration of a run; leave it out of runs=")
        lines = MetricsFile.read(directory / layout.METRICS)
        if summary is not None:
            state = sweep.State("finished", watch.ended_early(config, lines))
        else:
            state = sweep.State("running" if sweep.locked(directory / ".lock") else "stopped")
        return cls(directory, config, lines, summary, environment, state, inputs=inputs)

    @property
    def stage(self) -> str:
        return self.config["stage"]["name"]

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def weights(self) -> Path | None:
        """Its newest checkpoint; None: it has none, or these hold no network."""
        if self.stage == "predict":
            return None
        return next(iter(layout.states(self.directory)), None)

    def digest_of(self, name: str) -> str:
        """The sha256 of the checkpoint with this name; "": there is none."""
        places = (self.directory / folder / name for folder in (layout.CHECKPOINTS, layout.BEST))
        return next((files.digest(path) for path in places if path.is_file()), "")

    @cached_property
    def stands_on(self) -> str:
        """The sha256 of the file that `pretrained` was when the run began; "": not known."""
        return identity.recorded(self.directory)

    @property
    def continued(self) -> Path | None:
        """The directory of the run that it goes on from or, where that is lost, what was typed."""
        if not (typed := self.config.get("continue_from")):
            return None
        return self.pretraining.directory if self.pretraining else Path(typed)

    @property
    def device(self) -> str:
        gpus, count = self.environment.get("gpus") or [], self.environment.get("world_size", 1)
        if gpus and self.config["device"] != "cpu":
            return f"{count} x {gpus[0]}"
        threads = count * self.environment.get("cpu_threads", 0)
        return f"CPU, {threads} thread{'s' if threads > 1 else ''}" if threads else ""

    @cached_property
    def older(self) -> int | None:
        """The step of the checkpoint `pretrained`; None: the last one of a finished run."""
        if (below := self.pretraining) is None:
            return None
        last = [int(line["step"]) for line in below.lines[-1:]]
        if states := checkpoint.complete(below.directory):
            last = [checkpoint.step_of(states[0])]
        return identity.older(Path(self.config["pretrained"]), below.summary is not None, last)

    @cached_property
    def values(self) -> dict[str, float]:
        """The results and costs of a finished run, and the last value of all else that it logged.

        Those of its pretraining are there too, under PRETRAINING.
        """
        if self.summary is None:
            return {}
        logged = {key: value for line in self.lines for key, value in line.items()}
        values = {
            key: value
            for key, value in (logged | self.summary).items()
            if isinstance(value, int | float) and key not in BESIDE
        }
        values |= self._costs()
        below = self.pretraining.values if self.pretraining and self.older is None else {}
        own = {key: value for key, value in below.items() if not key.startswith(PRETRAINING)}
        return values | {PRETRAINING + key: value for key, value in own.items()}

    def _costs(self) -> dict[str, float]:
        """hours: training and the evaluations during it, without packing images.

        images_per_second: the median over the lines, and with it mfu, where that was counted.
        """
        seen, seconds = 0.0, 0.0
        rates: list[float] = []
        if self.lines and self.config.get("continue_from"):
            seen = self.lines[0].get("images_seen", 0.0)  # where it began
        for line in self.lines:
            if (rate := line.get("images_per_second")) and "images_seen" in line:
                seconds += (line["images_seen"] - seen) / rate
                seen = line["images_seen"]
                rates.append(rate)
        if not rates:
            return {}
        shares = [line["mfu"] for line in self.lines if "mfu" in line]
        costs = {"hours": seconds / 3600, "images_per_second": median(rates)}
        return costs | ({"mfu": median(shares)} if shares else {})

    @cached_property
    def identity(self) -> Identity:
        """Its identity, with that of its pretraining, wherever that lies by now.

        If the pretraining can't be found, with what was known of it when this run began.
        """
        if self.pretraining is None:
            return identity.with_origin(self.config, self.directory)
        below = self.pretraining.identity
        return identity.known_by(
            self.config, self.environment, self.inputs, self.stands_on, below, self.older
        )

    @property
    def source(self) -> str | None:
        """The key of its pretraining; None: not known."""
        below = self.identity.below
        return below.key if below else None

    @property
    def name(self) -> str:
        return self.identity.name


class Reader:
    """Reads runs again and again, each time no more than what has changed since.

    It makes another Ran of a run that has changed. What can't be read is left out, and named in
    `broken`: other runs go on.
    """

    def __init__(self) -> None:
        self.broken: list[str] = []
        self._known: dict[Path, tuple[dict[str, tuple[int, ...]], bool, Ran]] = {}

    def __call__(self, directory: Path) -> Ran | None:
        now: dict[str, tuple[int, ...]] = {}
        for name in READ:
            with suppress(FileNotFoundError):
                status = (directory / name).stat()
                # a file that was replaced is another one, though it may have grown
                now[name] = (status.st_ino, status.st_size, status.st_mtime_ns)
        busy = layout.SUMMARY not in now and sweep.locked(directory / ".lock")
        before, was_busy, ran = self._known.get(directory, ({}, False, None))
        if ran is None or before != now or was_busy != busy:
            try:
                ran = self._grown(ran, before, now) or Ran.read(directory)
            except (UserError, OSError) as error:
                self.broken.append(str(error))
                return None
            self._known[directory] = now, busy, ran
        return ran

    def _grown(self, ran: Ran | None, before: dict, now: dict) -> Ran | None:
        """The run with the lines that were added; None: more than that has changed."""
        if ran is None or layout.SUMMARY in now or before.keys() != now.keys():
            return None
        if any(before[name] != now[name] for name in now if name != layout.METRICS):
            return None
        (node, size, _), (node_now, size_now, _) = before[layout.METRICS], now[layout.METRICS]
        if node != node_now or size_now < size:
            return None  # a restart has taken lines back
        path = ran.directory / layout.METRICS
        added = MetricsFile.read(path, skip=len(ran.lines))
        state = "running" if sweep.locked(ran.directory / ".lock") else "stopped"
        return replace(ran, lines=ran.lines + added, state=sweep.State(state))


def find(paths: Iterable[Path], read: Callable[[Path], Ran | None] = Ran.read) -> list[Ran]:
    """Every run at or below the paths, and members that wait. UserError: a path has none.

    read: may return None for a run to leave out.
    """
    runs: dict[Path, Ran] = {}
    for path in paths:
        for directory in sorted({file.parent for file in path.rglob(layout.METRICS)}):
            if (directory / layout.CONFIG).exists() and (ran := read(directory)):
                runs[directory.resolve()] = ran
        for folder in sorted(file.parent for file in path.rglob(".members")):
            members = sweep.members(folder)
            for member, state in zip(members, sweep.states(members), strict=True):
                started = (member.directory / layout.METRICS).exists()  # perhaps not below `path`
                made = read(member.directory) if started else Ran(member.directory, member.config)
                if made:
                    runs.setdefault(member.directory.resolve(), made).state = state
        if not any(directory.is_relative_to(path.resolve()) for directory in runs):
            raise NoRunError(
                f"runs={path}: no run at or below it; "
                "name run directories, sweeps, or a folder of them"
            )
    folders = {folder for directory in runs for folder in directory.parents}
    for directory, ran in runs.items():
        above = directory in folders
        # evaluations lie in the directory of the run that they measure, which has left something
        ran.holds_runs = above and not (ran.lines or ran.weights)
        below = _pretraining(ran, runs)
        if below is not ran.pretraining:  # of a run that was read before, too
            ran.pretraining = below
            for name in ("older", "identity", "values"):
                vars(ran).pop(name, None)
    return list(runs.values())


def _pretraining(ran: Ran, runs: dict[Path, Ran]) -> Ran | None:
    """The run whose checkpoint, or whose directory, is the `pretrained` of another run.

    If the digest of the file is known, it decides: runs move, and a path is relative to the folder
    in which a run was started.
    """
    if not (source := ran.config.get("pretrained")):
        return None
    path = Path(source)
    folder = layout.run_of(path) or path
    there = runs.get(folder.resolve())
    if there is None and (folder / layout.METRICS).exists():
        there = Ran.read(folder)
    moved = [run for directory, run in runs.items() if directory.parts[-2:] == folder.parts[-2:]]
    likely = there or (moved[0] if len(moved) == 1 else None)
    if ran.stands_on:
        # the likely one first: it saves reading the files of the others
        for other in [likely, *runs.values()]:
            if other and other is not ran and other.digest_of(path.name) == ran.stands_on:
                return other
        if likely and likely.digest_of(path.name):
            return None  # another training has written this file since
    return likely  # perhaps it has deleted this checkpoint, which wasn't its last


def of(weights: Path) -> Ran | None:
    """The run that wrote this checkpoint, if it is finished."""
    folder = layout.run_of(weights)
    return Ran.read(folder) if folder and (folder / layout.SUMMARY).is_file() else None


def unfinished(weights: Path) -> str:
    """The step of a checkpoint whose run isn't finished, like "step 51 of 160"; "": other files."""
    folder = layout.run_of(weights)
    if folder is None or not weights.match("step*.pt"):
        return ""
    if not all((folder / name).is_file() for name in (layout.CONFIG, layout.METRICS)):
        return ""
    ran = Ran.read(folder)
    if ran.summary is not None:
        return ""
    steps = metrics.per_epoch(folder)
    of = f" of {round(ran.config['epochs'] * steps):,}" if steps else ""
    return f"step {checkpoint.step_of(weights):,}{of}"


def measured(runs: Iterable[Ran], weights: Path) -> list[Ran]:
    """The finished evaluations of the network in this file.

    The digest of the file decides, or its path where a run has recorded no digest.
    """

    def same(ran: Ran) -> bool:
        if ran.stands_on:
            return ran.stands_on == files.digest(weights)
        return Path(ran.config["pretrained"]).resolve() == weights.resolve()

    evaluations = [ran for ran in runs if "val_top1" in (ran.summary or {})]
    return [ran for ran in evaluations if ran.config.get("pretrained") and same(ran)]


def evidence(ran: Ran) -> dict[str, Any]:
    """What identifies a finished run, for its row of a results file; stage=verify compares it."""
    sums = files.listed(ran.directory)
    kept = sorted(name for name in sums if name.startswith(("checkpoints/", "best/")))
    weights = sums[kept[-1]] if kept else ""
    return {
        "run": str(ran.directory),
        "key": ran.identity.key,
        "seed": ran.seed,
        "summary": sums.get(layout.SUMMARY, ""),
        "weights": weights,
        "stands_on": ran.stands_on,
        "images": {split: facts["fingerprint"] for split, facts in ran.inputs.items()},
        "git_commit": ran.environment.get("git_commit", ""),
    }
