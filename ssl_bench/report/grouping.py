"""Runs as groups and boards: those that differ in their seeds alone make a row, named by what
differs.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ssl_bench.runs import identity
from ssl_bench.runs.record import Ran
from ssl_bench.runs.units import PRETRAINING, UNITS, mean_std, smaller_is_better

# In the order of boards; other stages stand before the last.
TITLES = {
    "lincls": "Linear classification of frozen features",
    "knn": "Nearest neighbours as a classifier",
    "finetune": "Fine-tuning",
    "pretrain": "Pretraining",
}


def repeated(runs: Iterable[Ran]) -> dict[Ran, Ran]:
    """{run: the newest of the same configuration, seeds and data}: as samples they are one."""
    alike: dict[tuple[int, ...], list[Ran]] = {}
    for ran in runs:
        alike.setdefault(tuple(ran.identity.seeds), []).append(ran)
    found: dict[Ran, Ran] = {}
    for same in (
        group
        for runs in alike.values()
        for group in identity.grouped(runs, lambda ran: ran.identity)
    ):
        newest = max(
            same, key=lambda ran: (ran.summary is not None, ran.environment.get("started") or "")
        )
        found |= {ran: newest for ran in same if ran is not newest}
    return found


def left_out(runs: Iterable[Ran]) -> str:
    """A sentence about those that aren't counted; "" where all are."""
    if not (older := repeated(ran for ran in runs if not ran.holds_runs)):
        return ""
    names = ", ".join(str(ran.directory) for ran in older)
    return f"Left out, for the newest of the same configuration and seed counts: {names}."


# -- groups of them --------------------------------------------------------------------------------


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
        """A value for each sample with a finished run that has the metric; of what is one
        pretraining's, one.

        Every mean ± std that is shown is `mean_std` of these.
        """
        means = self.by_sample(
            {ran: ran.values[metric] for ran in self.runs if metric in ran.values}
        )
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
    """The groups of a stage, best first by `metric`; in the order of their names where it can't
    rank them.

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
    """Of those that differ in seeds alone, without what is `repeated`: what has a row in a table;
    not named yet.
    """
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
    """What judges them, whether it can rank them, and they, best first if it can; who isn't
    finished comes last.
    """
    metric, able = _judge(groups, asked)
    if able:
        sign = 1 if smaller_is_better(metric) else -1
        groups = sorted(
            groups, key=lambda group: sign * mean_std(group.values(metric) or [sign * math.inf])[0]
        )
    return metric, able, sorted(groups, key=lambda group: not group.finished)


def _place(stage: str) -> tuple[float, str]:
    order = list(TITLES)
    return (order.index(stage) if stage in order else len(order) - 1.5), stage


def _judge(groups: Sequence[Group], asked: str | None) -> tuple[str, bool]:
    """The metric that judges a stage, of those that its runs have, and whether it can rank its
    groups.
    """
    known = {key for group in groups for ran in group.runs for key in ran.values}
    alike = groups[0].stage != "pretrain" or not identity.other_losses(
        group.runs[0].identity for group in groups
    )
    if asked in known:
        return asked, alike or "loss" not in asked
    named = [
        key for key in (group.runs[0].config.get("metric") for group in groups) if key in known
    ]
    able = [key for key in named if alike or "loss" not in key]
    able += [
        key for key in UNITS if key in known and (key.endswith("top1") or (alike and key == "loss"))
    ]
    # A pretraining in a pipeline has that one's metric in its configuration.
    return (able or named or ["loss" if "loss" in known else ""])[0], bool(able)


def differences(runs: Sequence[Ran]) -> dict[str, list[str]]:
    """{key: its value for each of the runs}, of what differs besides the seed; "" where a run has
    no such key.
    """
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
    """A name for each of these runs, which are configured differently: the method; if need be, what
    differs, too.
    """
    names = [ran.name for ran in firsts]
    for name in set(names):
        same = [i for i, other in enumerate(names) if other == name]
        if len(same) == 1:
            continue
        differing = differences([firsts[i] for i in same])
        chosen = {key.rpartition(".")[0] for key in differing if key.endswith(".name")}
        keys = [
            key
            for key in differing
            if key.endswith(".name") or key.rpartition(".")[0] not in chosen
        ]
        for place, i in enumerate(same):
            words = [
                _assignment(key, differing[key][place]) for key in keys if differing[key][place]
            ]
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
    return (
        yaml.safe_dump(value, default_flow_style=True, width=math.inf)
        .removesuffix("\n")
        .removesuffix("\n...")
    )


def evaluations(runs: Sequence[Ran]) -> list[dict]:
    """A row for each kind of evaluation that these runs of one network are, named by its stage and
    its labels; where a stage has several, by what differs, too.
    """
    rows = []
    for board in boards(runs):
        for group, row in zip(board.groups, board.rows, strict=True):
            words = [
                board.title,
                group.runs[0].identity.labels,
                row["name"] if len(board.groups) > 1 else "",
            ]
            rows.append(row | {"name": ", ".join(filter(None, words))})
    return rows
