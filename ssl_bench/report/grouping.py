"""Runs on disk as rows of a table: read, grouped by their configuration but for the seed, named by what differs.

A results file (`save`, `load`) keeps such rows, so that a table can be made again where the runs are gone (`fill`):
{"rows": [{"stage": "lincls", "name": "moco_v2", "values": {"val_top1": [46.9, 46.8, 47.1], "hours": [...]}}]}, a value
a seed; a row may also have "metric", which it is judged by, "n" and "members", how many seeds are finished and how many
there should be, "pretrainings", how many its runs stand on, and "runs", what these are (`evidence`). Other keys of the
file are remarks.
"""

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import yaml

from ssl_bench import build, checkpoint, files, identity, sweep
from ssl_bench.errors import UserError
from ssl_bench.identity import Identity
from ssl_bench.report import markdown, mean_std, smaller_is_better
from ssl_bench.tracking import MetricsFile


class Unit(NamedTuple):
    """How a metric is shown: its name, what it is multiplied by, the format of its mean."""

    label: str
    scale: float = 1
    form: str = ".4g"


# In the order of columns; metrics that aren't here come after these.
UNITS = {
    "val_top1": Unit("top-1 (%)", form=".1f"),
    "val_top5": Unit("top-5 (%)", form=".1f"),
    "val_loss": Unit("cross-entropy", form=".3f"),
    "holdout_top1": Unit("held-out top-1 (%)", form=".1f"),
    "knn_top1": Unit("kNN top-1 (%)", form=".1f"),
    "probe_top1": Unit("probe top-1 (%)", form=".1f"),
    "loss": Unit("loss", form=".3f"),
    "accuracy": Unit("accuracy (%)", 100, ".1f"),
    "embedding_std": Unit("std of embeddings", form=".3f"),
    "effective_rank": Unit("effective rank", form=".1f"),
    "alignment": Unit("alignment", form=".3f"),
    "uniformity": Unit("uniformity", form=".3f"),
    "hours": Unit("hours", form=".3f"),
    "images_per_second": Unit("images/s", form=",.0f"),
    "memory_gb": Unit("memory (GB)", form=".2f"),
    "lr": Unit("learning rate", form=".3g"),
    "grad_norm": Unit("gradient norm"),
    "data_wait": Unit("time spent waiting for data (%)", 100, ".1f"),
}
# In the order of boards; other stages stand before the last.
TITLES = {
    "lincls": "Linear classification of frozen features",
    "knn": "Nearest neighbours as a classifier",
    "finetune": "Fine-tuning",
    "pretrain": "Pretraining",
}
WAITING = sweep.State("waiting")
PRETRAINING = "pretraining_"  # before the metrics of what an evaluation stands on
COSTS = ("hours", "images_per_second", "memory_gb", f"{PRETRAINING}hours", f"{PRETRAINING}images_per_second")
# What is read of a run; a finished one has their digests
READ = (
    "config.yaml",
    "metrics.jsonl",
    "summary.json",
    "environment.json",
    "inputs.json",
    files.WEIGHTS,
    identity.ORIGIN,
)
# keys without which a configuration is none of a run
NEEDED = {"stage": str, "dir": str, "device": str, "seed": int, "epochs": int, "batch_size": int}
# no results
BESIDE = ("step", "epoch", "images_seen", "lr", "weight_decay", "grad_norm", "data_wait", "k", "temperature")


def unit(metric: str) -> Unit:
    if metric.startswith(PRETRAINING):
        own = unit(metric.removeprefix(PRETRAINING))
        return own._replace(label=f"pretraining {own.label}")
    return UNITS.get(metric) or Unit(metric.replace("_", " "), form=".1f" if re.search(r"top-?\d$", metric) else ".4g")


def shown(metric: str, values: Sequence[float]) -> str:
    """Mean ± sample standard deviation as people read this metric; "" for no values."""
    if not values:
        return ""
    _, scale, form = unit(metric)
    mean, std = mean_std([scale * value for value in values])
    return f"{mean:{form}}" + ("" if math.isnan(std) else f" ± {std:{'.2g' if form.endswith('g') else form}}")


def spoken(metric: str, value: float) -> str:
    """One value as people read it beside others: shares are percent, as in tables."""
    label, scale, _ = unit(metric)
    value *= scale
    return (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}") + " %" * label.endswith("(%)")


# -- runs --------------------------------------------------------------------------------------------------------------


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
            summary = files.parse(done, json.loads) if (done := directory / "summary.json").is_file() else None
            environment, inputs = identity.environment(directory), identity.inputs(directory)
        except UserError as error:
            raise UserError(f"{error}, or leave this run out of runs=") from None
        path = directory / "config.yaml"
        config = build.read_back(path, path.read_bytes(), yaml.safe_load)
        known = config | {"stage": (config.get("stage") or {}).get("name")}
        if not all(isinstance(known.get(key), kind) for key, kind in NEEDED.items()):
            raise UserError(f"{path}: no configuration of a run; leave it out of runs=")
        words = {True: "finished", False: "running" if sweep.locked(directory / ".lock") else "stopped"}
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
        return None if self.stage == "predict" else next(iter(checkpoint.complete(self.directory)), None)

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
        """The step of the checkpoint that it stands on, unless that is the last of a finished training."""
        if (below := self.pretraining) is None:
            return None
        last = [checkpoint.step_of(below.weights)] if below.weights else [line["step"] for line in below.lines[-1:]]
        return identity.older(Path(self.config["pretrained"]), below.summary is not None, last)

    @cached_property
    def values(self) -> dict[str, float]:
        """What a finished run came to, the newest of all it logged, what it cost; the same of its pretraining."""
        if self.summary is None:
            return {}
        logged = {key: value for line in self.lines for key, value in line.items()}
        values = {key: value for key, value in (logged | self.summary).items() if isinstance(value, int | float)}
        below = self.pretraining.values if self.pretraining and self.older is None else {}
        values = {key: value for key, value in values.items() if key not in BESIDE} | self._costs()
        return values | {PRETRAINING + key: x for key, x in below.items() if not key.startswith(PRETRAINING)}

    def _costs(self) -> dict[str, float]:
        """hours: of training and the evaluations in between, not of packing images. images_per_second: the median."""
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
        """With that of what it stands on, wherever this lies by now; gone, as it was known when this run began."""
        if self.pretraining is None:
            return identity.with_origin(self.config, self.directory)
        below = self.pretraining.identity
        return identity.known_by(self.config, self.environment, self.inputs, self.stands_on, below, self.older)

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
        found = {file.parent for file in path.rglob("metrics.jsonl") if file.with_name("config.yaml").exists()}
        runs |= {directory.resolve(): Ran.read(directory) for directory in sorted(found)}
        for folder in sorted(file.parent for file in path.rglob(".members")):
            members = sweep.members(folder)
            for member, state in zip(members, sweep.states(members), strict=True):
                known = (member.directory / "metrics.jsonl").exists()  # it may be elsewhere
                made = Ran.read(member.directory) if known else Ran(member.directory, member.config)
                runs.setdefault(member.directory.resolve(), made).state = state
        if not any(directory.is_relative_to(path.resolve()) for directory in runs):
            raise UserError(f"runs={path}: no run at or below it; name run directories, sweeps, or a folder of them")
    for directory, ran in runs.items():
        ran.holds_runs = any(other.is_relative_to(directory) for other in runs if other != directory)
        ran.pretraining = _pretraining(ran, runs)
    return list(runs.values())


def _pretraining(ran: Ran, runs: dict[Path, Ran]) -> Ran | None:
    """The run that a run's `pretrained` is a checkpoint of, or the directory of.

    Runs move, and a path is relative to where a run was started: where the content of the file is known, it decides.
    """
    if not (source := ran.config.get("pretrained")):
        return None
    path = Path(source)
    folder = files.run_of(path) or path
    there = runs.get(folder.resolve()) or (Ran.read(folder) if (folder / "metrics.jsonl").exists() else None)
    moved = [run for directory, run in runs.items() if directory.parts[-2:] == folder.parts[-2:]]
    likely = [there] if there else moved if len(moved) == 1 else []
    if ran.stands_on:
        for other in [*likely, *runs.values()]:  # in this order few files are read
            if other is not ran and other.digest_of(path.name) == ran.stands_on:
                return other
        likely = [other for other in likely if not other.digest_of(path.name)]  # of older checkpoints, which are gone
    return likely[0] if likely else None


def of(weights: Path) -> Ran | None:
    """The run that wrote this checkpoint, if it is finished."""
    folder = files.run_of(weights)
    return Ran.read(folder) if folder and (folder / "summary.json").is_file() else None


def unfinished(weights: Path) -> str:
    """How far a run is that wrote this checkpoint and goes on, like "step 51 of 160"; "" for other files."""
    folder = files.run_of(weights)
    known = folder and all((folder / name).is_file() for name in ("config.yaml", "metrics.jsonl"))
    if not (known and weights.match("step*.pt")):
        return ""
    ran = Ran.read(folder)
    if ran.summary is not None:
        return ""
    total = [round(ran.config["epochs"] * line["step"] / line["epoch"]) for line in ran.lines[-1:]]
    return f"step {checkpoint.step_of(weights):,}" + "".join(f" of {steps:,}" for steps in total)


def measured(runs: Iterable[Ran], weights: Path) -> list[Ran]:
    """The finished evaluations of the network in this very file, as it is now; by its place where no more is known."""

    def same(ran: Ran) -> bool:
        if ran.stands_on:
            return ran.stands_on == files.digest(weights)
        return Path(ran.config["pretrained"]).resolve() == weights.resolve()

    return [ran for ran in runs if "val_top1" in (ran.summary or {}) and ran.config.get("pretrained") and same(ran)]


def repeated(runs: Iterable[Ran]) -> dict[Ran, Ran]:
    """{run: the newest of the same configuration, seeds and data}: as samples they are one."""
    alike: dict[tuple[int, ...], list[Ran]] = {}
    for ran in runs:
        alike.setdefault(tuple(ran.identity.seeds), []).append(ran)
    found: dict[Ran, Ran] = {}
    for same in (group for runs in alike.values() for group in identity.grouped(runs, lambda ran: ran.identity)):
        newest = max(same, key=lambda ran: (ran.summary is not None, ran.environment.get("started") or ""))
        found |= {ran: newest for ran in same if ran is not newest}
    return found


def left_out(runs: Iterable[Ran]) -> str:
    """A sentence about those that aren't counted; "" where all are."""
    if not (older := repeated(ran for ran in runs if not ran.holds_runs)):
        return ""
    names = ", ".join(str(ran.directory) for ran in older)
    return f"Left out, for the newest of the same configuration and seed counts: {names}."


# -- groups of them ----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Group:
    """Runs that differ in nothing but the seed."""

    name: str
    runs: list[Ran]

    @property
    def stage(self) -> str:
        return self.runs[0].stage

    @property
    def finished(self) -> list[Ran]:
        return [ran for ran in self.runs if ran.summary is not None]

    @property
    def samples(self) -> list[list[Ran]]:
        """What `n` counts: runs, or where they stand on several pretrainings, those that share one.

        Evaluations of one pretraining vary less than pretrainings do, and aren't independent.
        """
        shared: dict[Any, list[Ran]] = {}
        for ran in self.runs:
            shared.setdefault(ran.source or ran, []).append(ran)
        return list(shared.values()) if len(shared) > 1 else [[ran] for ran in self.runs]

    def values(self, metric: str) -> list[float]:
        """A value for each sample with a finished run that has the metric; of what is one pretraining's, one.

        Every mean ± std that is shown is `mean_std` of these.
        """
        means = self.by_sample({ran: ran.values[metric] for ran in self.runs if metric in ran.values})
        return means[:1] if metric.startswith(PRETRAINING) and self.pretrainings == 1 else means

    def by_sample(self, values: Mapping[Ran, float]) -> list[float]:
        """The mean of each sample that has runs among these."""
        having = [[values[ran] for ran in sample if ran in values] for sample in self.samples]
        return [sum(of_one) / len(of_one) for of_one in having if of_one]

    @property
    def pretrainings(self) -> int:
        """How many different ones its finished runs stand on."""
        return len({ran.source for ran in self.finished if ran.source})

    def row(self, metric: str) -> dict:
        """Of a results file."""
        metrics = list(dict.fromkeys(metric for ran in self.runs for metric in ran.values))
        row = {"stage": self.stage, "name": self.name, "metric": metric}
        done = [sample for sample in self.samples if any(ran.summary is not None for ran in sample)]
        row |= {"n": len(done), "members": len(self.samples)}
        if self.pretrainings:
            row["pretrainings"] = self.pretrainings
        return row | {"values": {metric: self.values(metric) for metric in metrics}}


@dataclass
class Board:
    """The groups of a stage, best first by `metric`; in the order of their names where it can't rank them.

    metric: "" for a stage that measures nothing, like export.
    """

    stage: str
    metric: str
    ranked: bool
    groups: list[Group]

    @property
    def rows(self) -> list[dict]:
        return [group.row(self.metric) for group in self.groups]

    @property
    def title(self) -> str:
        return TITLES.get(self.stage, self.stage)

    @property
    def has_results(self) -> bool:
        return bool(self.metric)


def groups(runs: Iterable[Ran]) -> list[Group]:
    """Of those that differ in seeds alone, without what is `repeated`: what has a row in a table; not named yet."""
    runs = list(runs)
    older = repeated(runs)
    found = identity.grouped([ran for ran in runs if ran not in older], lambda ran: ran.identity)
    return [Group("", sorted(group, key=lambda ran: ran.seed)) for group in found]


def boards(runs: Sequence[Ran], metric: str | None = None) -> list[Board]:
    """A board for each stage, in the order of TITLES. metric: None is what the runs name."""
    made = groups(ran for ran in runs if not ran.holds_runs)
    found = []
    for stage in sorted({group.stage for group in made}, key=_place):
        mine = [group for group in made if group.stage == stage]
        for group, name in zip(mine, _names([group.runs[0] for group in mine]), strict=True):
            group.name = name
        mine.sort(key=lambda group: group.name)
        found.append(Board(stage, *ranked(mine, metric)))
    return found


def ranked(groups: Sequence[Group], asked: str | None) -> tuple[str, bool, list[Group]]:
    """What judges them, whether it can rank them, and they, best first if it can; who isn't finished comes last."""
    metric, able = _judge(groups, asked)
    if able:
        sign = 1 if smaller_is_better(metric) else -1
        groups = sorted(groups, key=lambda group: sign * mean_std(group.values(metric) or [sign * math.inf])[0])
    return metric, able, sorted(groups, key=lambda group: not group.finished)


def _place(stage: str) -> tuple[float, str]:
    order = list(TITLES)
    return (order.index(stage) if stage in order else len(order) - 1.5), stage


def _judge(groups: Sequence[Group], asked: str | None) -> tuple[str, bool]:
    """The metric that judges a stage, of those that its runs have, and whether it can rank its groups."""
    known = {key for group in groups for ran in group.runs for key in ran.values}
    alike = groups[0].stage != "pretrain" or not identity.other_losses(group.runs[0].identity for group in groups)
    if asked in known:
        return asked, alike or "loss" not in asked
    named = [key for key in (group.runs[0].config.get("metric") for group in groups) if key in known]
    able = [key for key in named if alike or "loss" not in key]
    able += [key for key in UNITS if key in known and (key.endswith("top1") or (alike and key == "loss"))]
    # A pretraining in a pipeline has that one's metric in its configuration.
    return (able or named or ["loss" if "loss" in known else ""])[0], bool(able)


def differences(runs: Sequence[Ran]) -> dict[str, list[str]]:
    """{key: its value for each of the runs}, of what differs besides the seed; "" where a run has no such key."""
    told = [ran.identity.told for ran in runs]
    differing = {}
    for key in sorted({key for one in told for key in one}):
        words = [_word(one[key]) if key in one else "" for one in told]
        # What stands on no pretraining differs from one in all of its keys.
        known = key.startswith(("pretrained.", "images of "))
        compared = {word for word in words if word} if known else set(words)
        if len(compared) > 1:
            differing[key] = words
    return differing


def _names(firsts: Sequence[Ran]) -> list[str]:
    """A name for each of these runs, which are configured differently: the method; if need be, what differs, too."""
    names = [ran.name for ran in firsts]
    for name in set(names):
        same = [i for i, other in enumerate(names) if other == name]
        if len(same) == 1:
            continue
        differing = differences([firsts[i] for i in same])
        chosen = {key.rpartition(".")[0] for key in differing if key.endswith(".name")}
        keys = [key for key in differing if key.endswith(".name") or key.rpartition(".")[0] not in chosen]
        for place, i in enumerate(same):
            words = [_assignment(key, differing[key][place]) for key in keys if differing[key][place]]
            names[i] = " ".join([name, *words[:3]])
        for again in {n for n in names if names.count(n) > 1}:
            for number, i in enumerate([i for i in same if names[i] == again], start=1):
                names[i] += f" #{number}"
    return names


def _assignment(key: str, value: str) -> str:
    if key.endswith(".name"):
        return value
    outer, _, last = key.rpartition(".")
    return f"pretraining {last}={value}" if outer == "pretrained" else f"{last}={value}"


def _word(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("\n").removesuffix("\n...")


# -- tables ------------------------------------------------------------------------------------------------------------


def columns(rows: Sequence[dict]) -> list[str]:
    """The metrics worth a column: the one they are judged by, results, `n`, costs. Others can be asked for."""
    known = list(dict.fromkeys(metric for row in rows for metric, values in row["values"].items() if values))
    if any(metric.startswith("val_") for metric in known):  # what it learnt by is of no interest then
        known = [metric for metric in known if metric not in ("loss", "accuracy")]
    order = list(UNITS)
    known.sort(key=lambda metric: order.index(metric) if metric in order else len(order))
    judges = list(dict.fromkeys(row["metric"] for row in rows if row.get("metric") in known))
    own = [metric for metric in known if not metric.startswith(PRETRAINING)]
    results = [metric for metric in own if metric not in (*judges, *COSTS)]
    several = ["pretrainings"] if any(row.get("pretrainings") for row in rows) else []
    return [*judges, *results, "n", *several, *(metric for metric in COSTS if metric in known)]


def cell(row: dict, column: str) -> str:
    if column == "n":
        done = row.get("n", max(map(len, row["values"].values()), default=0))
        return f"{done}" if done == row.get("members", done) else f"{done} of {row['members']}"
    if column == "pretrainings":
        return str(row.get("pretrainings") or "")
    return shown(column, row["values"].get(column, []))


def heading(column: str) -> str:
    return column if column in ("n", "pretrainings") else unit(column).label


def table(rows: Sequence[dict], wanted: Sequence[str]) -> str:
    """Markdown: the name of each row and these columns, mean ± std over its n seeds."""
    header = ["", *map(heading, wanted)]
    return markdown(header, [[row["name"], *(cell(row, column) for column in wanted)] for row in rows], len(wanted))


def evaluations(runs: Sequence[Ran]) -> list[dict]:
    """A row for each kind of evaluation that these runs of one network are, named by its stage and its labels; where a
    stage has several, by what differs, too."""
    rows = []
    for board in boards(runs):
        for group, row in zip(board.groups, board.rows, strict=True):
            words = [board.title, group.runs[0].identity.labels, row["name"] if len(board.groups) > 1 else ""]
            rows.append(row | {"name": ", ".join(filter(None, words))})
    return rows


COST = ("images_per_second", "memory_gb")  # of the training, where a summary has them


def sweep_table(folder: Path, metric: str | None = None) -> str:
    """table.md and table.csv of a sweep; returns the former, or "" as long as no member has the metric.

    Its rows are those of a report (`groups`), with what tells them apart on the command line, or where YAML files were
    edited meanwhile, in the configuration. metric: None is what the members name.
    """
    members = {member.directory.resolve(): member for member in sweep.members(folder)}
    runs = [ran for ran in find([folder]) if ran.directory.resolve() in members]  # and not those within a pipeline
    member_of = {ran: members[ran.directory.resolve()] for ran in runs}
    metric, able, rows = ranked(groups(runs), metric)
    if not any(row.values(metric) for row in rows):
        return ""
    keys = _told_apart(rows, member_of)
    if not able:  # by what was typed
        order = sorted(range(len(rows)), key=lambda i: [words[i] for words in keys.values()])
        rows, keys = [rows[i] for i in order], {key: [words[i] for i in order] for key, words in keys.items()}
    costs = [key for key in COST if any(row.values(key) for row in rows)]
    numbers = [row.row(metric) for row in rows]
    shown = [
        [*(words[i] for words in keys.values()), *(cell(row, column) for column in (metric, "n", *costs))]
        for i, row in enumerate(numbers)
    ]
    text = markdown([*keys, metric, "n", *costs], shown, right=2 + len(costs))
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow([*keys, f"{metric} mean", f"{metric} std", *COST, "finished", "members"])
    for i, (group, row) in enumerate(zip(rows, numbers, strict=True)):
        spread = mean_std(group.values(metric) or [math.nan])
        means = [mean_std(group.values(key) or [math.nan])[0] for key in COST]
        writer.writerow([*(words[i] for words in keys.values()), *spread, *means, row["n"], row["members"]])
    files.write(folder / "table.md", text + "\n")
    files.write(folder / "table.csv", file.getvalue())
    return text


def _told_apart(rows: Sequence[Group], members: Mapping[Ran, sweep.Member]) -> dict[str, list[str]]:
    """{key: its value in each row}, of what differs: overrides, and what else does where these are the same."""
    keys = dict.fromkeys(key for member in members.values() for key in member.choices if key != "seed")
    found = {key: [_values(key, [members[ran] for ran in row.runs]) for row in rows] for key in keys}
    found = {key: words for key, words in found.items() if len(set(words)) > 1}
    typed = list(zip(*found.values(), strict=True)) or [()] * len(rows)
    for words in {words for words in typed if typed.count(words) > 1}:
        alike = [row.runs[0] for row, mine in zip(rows, typed, strict=True) if mine == words]
        edited = differences(alike).keys() - found.keys()
        everywhere = differences([row.runs[0] for row in rows])
        found |= {key: everywhere[key] for key in sorted(edited)}
    return found


def _values(key: str, members: Sequence[sweep.Member]) -> str:
    """Of one row: several where they are of seeds, as of the pretrainings that it stands on."""
    words = list(dict.fromkeys(member.value(key) for member in members))
    return ", ".join(words[:3]) + (", ..." if len(words) > 3 else "")


def save(path: Path, rows: Sequence[dict], **remarks: Any) -> None:
    files.write(path, json.dumps({**remarks, "rows": rows}, indent=1) + "\n")


def evidence(ran: Ran) -> dict[str, Any]:
    """What tells a finished run from any other, for the row of a results file: stage=verify looks for it."""
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


def remarks(path: Path) -> dict[str, Any]:
    """What a results file says besides its rows."""
    return {key: value for key, value in json.loads(path.read_text(encoding="utf-8")).items() if key != "rows"}


def load(path: Path) -> list[dict]:
    """The rows of a results file. UserError unless it is one."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        assert all(isinstance(row["name"], str) and isinstance(row["values"], dict) for row in rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError):
        raise UserError(f"{path}: not a results file; `ssl-bench stage=report runs=...` writes results.json") from None
    return rows


BLOCK = re.compile(r"(?ms)(<!-- results: (\S+)((?: \w+=\S+)*) -->\n)(.*?)(^<!-- end of results -->)")


def fill(text: str, folder: Path) -> str:
    """Markdown with its tables made anew from results files, each between two lines:

        <!-- results: FILE.json stage=lincls columns=val_top1,n,hours -->
        <!-- end of results -->

    FILE: relative to `folder`. stage: rows of this stage only. columns: all that `columns` finds, if left out.
    UserError for a file or an option that isn't there, and for a text without a block.
    """
    if not BLOCK.search(text):
        raise UserError("no table to fill: write a line <!-- results: FILE.json --> and one <!-- end of results -->")

    def made(block: re.Match) -> str:
        options = dict(word.split("=", 1) for word in block[3].split())
        if unknown := sorted(options.keys() - {"stage", "columns"}):
            raise UserError(f"{block[2]}: {build.unknown('option', unknown[0], ['stage', 'columns'])}")
        rows = [row for row in load(folder / block[2]) if options.get("stage") in (None, row.get("stage"))]
        wanted = options["columns"].split(",") if "columns" in options else columns(rows)
        known = {"n", "pretrainings", *(metric for row in rows for metric in row["values"])}
        if missing := [column for column in wanted if column not in known]:
            raise UserError(f"{block[2]}: {build.unknown('column', missing[0], sorted(known))}")
        return f"{block[1]}{table(rows, wanted)}\n{block[5]}"

    return BLOCK.sub(made, text)
