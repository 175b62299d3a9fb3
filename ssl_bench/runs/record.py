"""Runs on disk, read back: configuration, metrics, what became of them, what they stand on."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from ssl_bench import files
from ssl_bench.config import build
from ssl_bench.errors import UserError
from ssl_bench.runs import checkpoint, identity, layout, sweep
from ssl_bench.runs.identity import Identity
from ssl_bench.runs.metrics import MetricsFile
from ssl_bench.runs.units import PRETRAINING

WAITING = sweep.State("waiting")
# What is read of a run; a finished one has their digests
READ = (
    "config.yaml",
    "metrics.jsonl",
    "summary.json",
    "environment.json",
    "inputs.json",
    layout.WEIGHTS,
    identity.ORIGIN,
)
# keys without which a configuration is none of a run
NEEDED = {"stage": str, "dir": str, "device": str, "seed": int, "epochs": int, "batch_size": int}
# no results
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


@dataclass(eq=False)
class Ran:
    """A run directory, whatever became of it."""

    directory: Path
    config: dict
    lines: list[dict[str, float]] = field(default_factory=list)  # of metrics.jsonl
    summary: dict[str, float] | None = None  # None: not finished
    environment: dict = field(default_factory=dict)
    state: sweep.State = WAITING
    pretraining: "Ran | None" = None  # what `pretrained` was made by, if it can be found
    holds_runs: bool = False  # a pipeline: its results are those of its members
    inputs: dict = field(default_factory=dict)  # the fingerprint of each split that it opened

    @classmethod
    def read(cls, directory: Path) -> "Ran":
        try:
            for name in READ:
                files.check(directory / name)
            summary = (
                files.parse(done, json.loads)
                if (done := directory / "summary.json").is_file()
                else None
            )
            environment, inputs = identity.environment(directory), identity.inputs(directory)
        except UserError as error:
            raise UserError(f"{error}, or leave this run out of runs=") from None
        path = directory / "config.yaml"
        config = build.read_back(path, path.read_bytes(), yaml.safe_load)
        known = config | {"stage": (config.get("stage") or {}).get("name")}
        if not all(isinstance(known.get(key), kind) for key, kind in NEEDED.items()):
            raise UserError(f"{path}: no configuration of a run; leave it out of runs=")
        words = {
            True: "finished",
            False: "running" if sweep.locked(directory / ".lock") else "stopped",
        }
        lines = MetricsFile.read(directory / "metrics.jsonl")
        state = sweep.State(words[summary is not None])
        return cls(directory, config, lines, summary, environment, state, inputs=inputs)

    @property
    def stage(self) -> str:
        return self.config["stage"]["name"]

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def weights(self) -> Path | None:
        """Its newest checkpoint, where that holds a network."""
        return (
            None
            if self.stage == "predict"
            else next(iter(checkpoint.complete(self.directory)), None)
        )

    def digest_of(self, name: str) -> str:
        """Of the checkpoint of this name; "" where it has none."""
        path = self.directory / "checkpoints" / name
        return files.digest(path) if path.is_file() else ""

    @cached_property
    def stands_on(self) -> str:
        """The sha256 of the file that `pretrained` was when it began; "" where that isn't known."""
        return identity.recorded(self.directory)

    @property
    def device(self) -> str:
        gpus, count = self.environment.get("gpus") or [], self.environment.get("world_size", 1)
        if gpus and self.config["device"] != "cpu":
            return f"{count} x {gpus[0]}"
        threads = count * self.environment.get("cpu_threads", 0)
        return f"CPU, {threads} thread{'s' if threads > 1 else ''}" if threads else ""

    @cached_property
    def older(self) -> int | None:
        """The step of the checkpoint that it stands on, unless that is the last of a finished
        training.
        """
        if (below := self.pretraining) is None:
            return None
        last = (
            [checkpoint.step_of(below.weights)]
            if below.weights
            else [line["step"] for line in below.lines[-1:]]
        )
        return identity.older(Path(self.config["pretrained"]), below.summary is not None, last)

    @cached_property
    def values(self) -> dict[str, float]:
        """What a finished run came to, the newest of all it logged, what it cost; the same of its
        pretraining.
        """
        if self.summary is None:
            return {}
        logged = {key: value for line in self.lines for key, value in line.items()}
        values = {
            key: value
            for key, value in (logged | self.summary).items()
            if isinstance(value, int | float)
        }
        below = self.pretraining.values if self.pretraining and self.older is None else {}
        values = {key: value for key, value in values.items() if key not in BESIDE} | self._costs()
        return values | {
            PRETRAINING + key: x for key, x in below.items() if not key.startswith(PRETRAINING)
        }

    def _costs(self) -> dict[str, float]:
        """hours: of training and the evaluations in between, not of packing images.
        images_per_second: the median.
        """
        seen, seconds, rates = 0, 0.0, []
        for line in self.lines:
            if rate := line.get("images_per_second"):
                seconds += (line["images_seen"] - seen) / rate
                seen = line["images_seen"]
                rates.append(rate)
        if not rates:
            return {}
        return {"hours": seconds / 3600, "images_per_second": median(rates)}

    @cached_property
    def identity(self) -> Identity:
        """With that of what it stands on, wherever this lies by now; gone, as it was known when
        this run began.
        """
        if self.pretraining is None:
            return identity.with_origin(self.config, self.directory)
        below = self.pretraining.identity
        return identity.known_by(
            self.config, self.environment, self.inputs, self.stands_on, below, self.older
        )

    @property
    def source(self) -> str | None:
        """The key of the run that it stands on; None where none is known."""
        return self.identity.below and self.identity.below.key

    @property
    def name(self) -> str:
        return self.identity.name


def find(paths: Iterable[Path]) -> list[Ran]:
    """Every run at or below the paths; members that wait, too. UserError where there is none."""
    runs: dict[Path, Ran] = {}
    for path in paths:
        found = {
            file.parent
            for file in path.rglob("metrics.jsonl")
            if file.with_name("config.yaml").exists()
        }
        runs |= {directory.resolve(): Ran.read(directory) for directory in sorted(found)}
        for folder in sorted(file.parent for file in path.rglob(".members")):
            members = sweep.members(folder)
            for member, state in zip(members, sweep.states(members), strict=True):
                known = (member.directory / "metrics.jsonl").exists()  # it may be elsewhere
                made = Ran.read(member.directory) if known else Ran(member.directory, member.config)
                runs.setdefault(member.directory.resolve(), made).state = state
        if not any(directory.is_relative_to(path.resolve()) for directory in runs):
            raise UserError(
                f"runs={path}: no run at or below it; "
                "name run directories, sweeps, or a folder of them"
            )
    for directory, ran in runs.items():
        ran.holds_runs = any(
            other.is_relative_to(directory) for other in runs if other != directory
        )
        ran.pretraining = _pretraining(ran, runs)
    return list(runs.values())


def _pretraining(ran: Ran, runs: dict[Path, Ran]) -> Ran | None:
    """The run that a run's `pretrained` is a checkpoint of, or the directory of.

    Runs move, and a path is relative to where a run was started: where the content of the file is
    known, it decides.
    """
    if not (source := ran.config.get("pretrained")):
        return None
    path = Path(source)
    folder = layout.run_of(path) or path
    there = runs.get(folder.resolve()) or (
        Ran.read(folder) if (folder / "metrics.jsonl").exists() else None
    )
    moved = [run for directory, run in runs.items() if directory.parts[-2:] == folder.parts[-2:]]
    likely = [there] if there else moved if len(moved) == 1 else []
    if ran.stands_on:
        for other in [*likely, *runs.values()]:  # in this order few files are read
            if other is not ran and other.digest_of(path.name) == ran.stands_on:
                return other
        # of older checkpoints, which are gone
        likely = [other for other in likely if not other.digest_of(path.name)]
    return likely[0] if likely else None


def of(weights: Path) -> Ran | None:
    """The run that wrote this checkpoint, if it is finished."""
    folder = layout.run_of(weights)
    return Ran.read(folder) if folder and (folder / "summary.json").is_file() else None


def unfinished(weights: Path) -> str:
    """How far a run is that wrote this checkpoint and goes on, like "step 51 of 160"; "" for other
    files.
    """
    folder = layout.run_of(weights)
    known = folder and all((folder / name).is_file() for name in ("config.yaml", "metrics.jsonl"))
    if not (known and weights.match("step*.pt")):
        return ""
    ran = Ran.read(folder)
    if ran.summary is not None:
        return ""
    total = [round(ran.config["epochs"] * line["step"] / line["epoch"]) for line in ran.lines[-1:]]
    return f"step {checkpoint.step_of(weights):,}" + "".join(f" of {steps:,}" for steps in total)


def measured(runs: Iterable[Ran], weights: Path) -> list[Ran]:
    """The finished evaluations of the network in this very file, as it is now; by its place where
    no more is known.
    """

    def same(ran: Ran) -> bool:
        if ran.stands_on:
            return ran.stands_on == files.digest(weights)
        return Path(ran.config["pretrained"]).resolve() == weights.resolve()

    return [
        ran
        for ran in runs
        if "val_top1" in (ran.summary or {}) and ran.config.get("pretrained") and same(ran)
    ]


def evidence(ran: Ran) -> dict[str, Any]:
    """What tells a finished run from any other, for the row of a results file: stage=verify looks
    for it.
    """
    sums = files.listed(ran.directory)
    weights = next((sums[name] for name in sums if name.startswith("checkpoints/")), "")
    return {
        "run": str(ran.directory),
        "key": ran.identity.key,
        "seed": ran.seed,
        "summary": sums.get("summary.json", ""),
        "weights": weights,
        "stands_on": ran.stands_on,
        "images": {split: facts["fingerprint"] for split, facts in ran.inputs.items()},
        "git_commit": ran.environment.get("git_commit", ""),
    }
