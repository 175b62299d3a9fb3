"""Runs in groups and boards. Runs that differ in their seeds alone are a group, a row of a table.

It is named by what tells it from the other groups.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import yaml

from ssl_bench.runs import identity
from ssl_bench.runs.record import Ran
from ssl_bench.runs.units import PRETRAINING, UNITS, mean_std, smaller_is_better

# In the order of boards; other stages come before the last one.
TITLES = {
    "lincls": "Linear classification of frozen features",
    "knn": "Nearest neighbours as a classifier",
    "finetune": "Fine-tuning",
    "pretrain": "Pretraining",
}


def repeated(runs: Iterable[Ran]) -> dict[Ran, Ran]:
    """{run: the newest one of the same configuration, seeds and data}: only that one is a sample.

    A finished run counts as newer than one that isn't.
    """
    alike: dict[tuple[int, ...], list[Ran]] = {}
    for ran in runs:
        alike.setdefault(tuple(ran.identity.seeds), []).append(ran)

    def age(ran: Ran) -> tuple[bool, str]:
        return ran.summary is not None, ran.environment.get("started") or ""

    found: dict[Ran, Ran] = {}
    for with_seeds in alike.values():
        for same in identity.grouped(with_seeds, lambda ran: ran.identity):
            newest = max(same, key=age)
            found |= {ran: newest for ran in same if ran is not newest}
    return found


def left_out(runs: Iterable[Ran]) -> str:
    """A sentence about the runs that aren't counted; "": all are."""
    if not (older := repeated(ran for ran in runs if not ran.holds_runs)):
        return ""
    names = ", ".join(str(ran.directory) for ran in older)
    return (
        "Runs with the same configuration, seed and data are counted once, by the newest of them. "
        f"Not counted: {names}."
    )


# -- groups and boards -----------------------------------------------------------------------------


@dataclass(eq=False)
class Group:
    """Runs that differ in seeds alone."""

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
        """What `n` counts: the runs or, if they evaluate several pretrainings, these.

        Evaluations of one pretraining vary less than pretrainings do, and aren't independent.
        """
        shared: dict[Any, list[Ran]] = {}
        for ran in self.runs:
            shared.setdefault(ran.source or ran, []).append(ran)
        return list(shared.values()) if len(shared) > 1 else [[ran] for ran in self.runs]

    def values(self, metric: str) -> list[float]:
        """A value for each sample with a finished run that has the metric.

        Every mean ± std that is shown is `mean_std` of these. If all evaluate one pretraining, its
        own metrics have one value.
        """
        values = {ran: ran.values[metric] for ran in self.runs if metric in ran.values}
        means = self.by_sample(values)
        return means[:1] if metric.startswith(PRETRAINING) and self.pretrainings == 1 else means

    def by_sample(self, values: Mapping[Ran, float]) -> list[float]:
        """The mean value of each sample that has runs in `values`."""
        having = [[values[ran] for ran in sample if ran in values] for sample in self.samples]
        return [sum(of_one) / len(of_one) for of_one in having if of_one]

    @property
    def pretrainings(self) -> int:
        """How many different pretrainings its finished runs evaluate."""
        return len({ran.source for ran in self.finished if ran.source})

    def row(self, metric: str) -> dict:
        """The row of the group in a results file (see `tables`)."""
        metrics = list(dict.fromkeys(metric for ran in self.runs for metric in ran.values))
        row: dict[str, Any] = {"stage": self.stage, "name": self.name, "metric": metric}
        done = [sample for sample in self.samples if any(ran.summary is not None for ran in sample)]
        row |= {"n": len(done), "members": len(self.samples)}
        if self.pretrainings:
            row["pretrainings"] = self.pretrainings
        return row | {"values": {metric: self.values(metric) for metric in metrics}}


@dataclass
class Board:
    """The groups of a stage, best first by `metric` or, if it can't rank them, by their names.

    metric: "" for a stage that measures nothing, such as export.
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

    @cached_property
    def differing(self) -> dict[str, list[str]]:
        """The `differences` of its groups."""
        return differences([group.runs[0] for group in self.groups])

    @cached_property
    def pooled(self) -> "list[Pooled]":
        return pooled(self)


def groups(runs: Iterable[Ran]) -> list[Group]:
    """The groups of runs, without those that are `repeated`; they have no names yet."""
    runs = list(runs)
    older = repeated(runs)
    counted = [ran for ran in runs if ran not in older]
    found = identity.grouped(counted, lambda ran: ran.identity)
    return [Group("", sorted(group, key=lambda ran: ran.seed)) for group in found]


def boards(runs: Sequence[Ran], metric: str | None = None) -> list[Board]:
    """A board for each stage, in the order of TITLES. metric: None for the one that runs name."""
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
    """(the metric that judges groups of a stage, whether it can rank them, the groups).

    Groups come best first if it can; those without a finished run come last.
    """
    metric, able = _judge(groups, asked)
    return metric, able, _in_order(groups, metric if able else "")


def _in_order(groups: Sequence[Group], metric: str) -> list[Group]:
    """Best first by `metric`, or as they were if it is ""; those with no finished run come last."""
    sign = 1 if smaller_is_better(metric) else -1

    def order(group: Group) -> float:
        return sign * mean_std(group.values(metric) or [sign * math.inf])[0]

    ordered = sorted(groups, key=order) if metric else groups
    return sorted(ordered, key=lambda group: not group.finished)


@dataclass
class Pooled:
    """A board with the groups that have the same value of a key as one."""

    key: str
    also: list[str]  # keys that tell the same groups apart
    board: Board
    members: list[list[Group]]  # of each group of the board


POOLED = 300  # groups of all `pooled` boards of a stage: a page holds a table and curves of each


def pooled(board: Board) -> list[Pooled]:
    """A board for each key of which some groups have the same value, by the names of the keys.

    The n of its groups are the samples of all their runs: their std is over other settings, too.
    """
    same: dict[tuple[int, ...], list[str]] = {}  # which groups are alike -> the keys that say so
    for key, words in board.differing.items():
        first = {word: place for place, word in reversed([*enumerate(words)])}
        same.setdefault(tuple(first[word] for word in words), []).append(key)
    found, room = [], POOLED
    for places, keys in sorted(same.items(), key=lambda item: len(set(item[0]))):
        room -= len(set(places))
        if len(set(places)) == len(places) or room < 0:
            continue
        # the choice of a group says more than its single settings
        key, *also = sorted(keys, key=lambda key: (not key.endswith(".name"), len(key)))
        members: dict[str, list[Group]] = {}
        for word, group in zip(board.differing[key], board.groups, strict=True):
            members.setdefault(word, []).append(group)
        of: dict[Group, list[Group]] = {}
        for word, several in members.items():
            name = _assignment(key, word) if word else f"no {key.rpartition('.')[2]}"
            of[Group(name, [ran for group in several for ran in group.runs])] = several
        made = _in_order([*of], board.metric if board.ranked else "")
        joined = Board(board.stage, board.metric, board.ranked, made)
        found.append(Pooled(key, also, joined, [of[group] for group in made]))
    return sorted(found, key=lambda one: one.key)


def _place(stage: str) -> tuple[float, str]:
    order = list(TITLES)
    return (order.index(stage) if stage in order else len(order) - 1.5), stage


def _judge(groups: Sequence[Group], asked: str | None) -> tuple[str, bool]:
    """(the metric that judges groups of a stage, whether it can rank them)."""
    known = {key for group in groups for ran in group.runs for key in ran.values}
    firsts = [group.runs[0] for group in groups]
    alike = same_losses(groups)
    if asked in known:
        return asked, alike or "loss" not in asked
    # a pretraining in a pipeline names the pipeline's metric, which it doesn't have
    named = [ran.config.get("metric") for ran in firsts if ran.config.get("metric") in known]
    able = [key for key in named if alike or "loss" not in key]
    usual = [key for key in UNITS if key.endswith("top1") or (alike and key == "loss")]
    able += [key for key in usual if key in known]
    return (able or named or ["loss" if "loss" in known else ""])[0], bool(able)


def same_losses(groups: Sequence[Group]) -> bool:
    """Do losses mean the same in all groups of a stage?"""
    if groups[0].stage != "pretrain":
        return True
    return not identity.other_losses(group.runs[0].identity for group in groups)


def differences(runs: Sequence[Ran]) -> dict[str, list[str]]:
    """{key: its value in each run, "" for none} of what differs between runs besides the seed."""
    told = [_told(ran) for ran in runs]
    differing = {}
    for key in sorted({key for one in told for key in one}):
        words = [_word(one[key]) if key in one else "" for one in told]
        # A run without a pretraining lacks all of these keys, which isn't worth a line for each.
        known = key.startswith(("pretrained.", "images of "))
        compared = {word for word in words if word} if known else set(words)
        if len(compared) > 1:
            differing[key] = words
    return differing


def _told(ran: Ran) -> dict[str, Any]:
    """What the run's identity tells, and the name of the run that it goes on from."""
    told = ran.identity.told
    if (parent := ran.continued) is None:
        return {key: value for key, value in told.items() if key != "continue_from"}
    name = parent.parent.name if re.fullmatch(r"seed\d+", parent.name) else parent.name
    return told | {"continue_from": name}


def _names(firsts: Sequence[Ran]) -> list[str]:
    """A name for each run, all of different configurations: the method and, if need be, more.

    Runs of the same method are told apart by up to three of the settings that differ.
    """
    names = [ran.name for ran in firsts]
    for name in set(names):
        same = [i for i, other in enumerate(names) if other == name]
        if len(same) == 1:
            continue
        differing = differences([firsts[i] for i in same])
        chosen = {key.rpartition(".")[0] for key in differing if key.endswith(".name")}
        # the choice of a group says more than its single settings
        single = {key for key in differing if key.rpartition(".")[0] in chosen}
        keys = [key for key in differing if key.endswith(".name") or key not in single]
        keys.sort(key=lambda key: key != "continue_from")  # the parent says most
        for place, i in enumerate(same):
            values = {key: differing[key][place] for key in keys}
            words = [_assignment(key, value) for key, value in values.items() if value]
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
    """A value in one line of YAML."""
    if isinstance(value, str | int | float | None):
        return _scalar(type(value), value)
    return _yaml(value)


@cache
def _scalar(kind: type, value: Any) -> str:
    """`_yaml`, once for each: hundreds of runs share most of their settings. kind: True isn't 1."""
    return _yaml(value)


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf)
    return text.removesuffix("\n").removesuffix("\n...")


def evaluations(runs: Sequence[Ran]) -> list[dict]:
    """A row for each kind of evaluation of one network.

    It is named by its stage and labels and, if a stage has several, by what tells them apart.
    """
    rows = []
    for board in boards(runs):
        several = len(board.groups) > 1
        for group, row in zip(board.groups, board.rows, strict=True):
            words = [board.title, group.runs[0].identity.labels, row["name"] if several else ""]
            rows.append(row | {"name": ", ".join(filter(None, words))})
    return rows
