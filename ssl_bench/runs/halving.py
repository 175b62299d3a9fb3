"""Successive halving of a sweep (ASHA: Li et al., arXiv:1810.05934): the best members alone go on.

A member runs to a rung, a share of its epochs, and pauses. Of those that have come to a rung the
best one in eta go on to the next, as soon as a place is free; the others stay paused, and whoever
comes later may let them pass. The last rung is the end. Exact resume makes a pause free: a member
that goes on is, bit for bit, one that never paused.

The paper draws members without end, and gives a free place to the highest rung that has somebody to
promote, to a new member last. Here they are a grid: a place goes to a new member first, then to the
lowest rung. No place stays free for that, and of few places hardly one is given by a guess.

SWEEP/halving.jsonl   the rules, and line by line who was sent where and who came with which value.
                      What is next follows from these lines alone, in any process.
"""

import fcntl
import json
import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from ssl_bench import files
from ssl_bench.errors import UserError
from ssl_bench.runs import units, watch
from ssl_bench.runs.sweep import Member

log = logging.getLogger(__name__)

FILE = "halving.jsonl"
KEY = "hydra.launcher.halving"


class Rules(NamedTuple):
    """metric: as `save_best` names one. rungs: shares of the epochs before the end, ascending."""

    metric: str
    eta: int
    rungs: tuple[float, ...]

    @classmethod
    def of(cls, node: Mapping[str, Any] | None) -> "Rules | None":
        """The rules that hydra.launcher.halving states; None: there is no metric. UserError."""
        if not node or (metric := node["metric"]) is None:
            return None
        watch.named(f"{KEY}.metric", metric)
        if (eta := node["eta"]) < 2:
            raise UserError(f"{KEY}.eta={eta}: one in eta goes on: type 2 or more")
        rungs = node["rungs"]
        rungs = (1 / eta**2, 1 / eta) if rungs is None else tuple(rungs)
        ascending = all(low < high for low, high in pairwise((0, *rungs, 1)))
        if not rungs or not ascending:
            told = ",".join(f"{rung:g}" for rung in rungs)
            raise UserError(
                f"{KEY}.rungs=[{told}]: shares of the epochs, ascending, between 0 and 1: "
                f"type {KEY}.rungs=[0.1,0.3], or leave it out"
            )
        return cls(metric, eta, rungs)

    def epochs(self, config: Mapping[str, Any]) -> list[int]:
        """The epochs of a member at which the rungs are, its last among them. UserError."""
        every = [max(1, round(rung * config["epochs"])) for rung in (*self.rungs, 1)]
        if len({*every}) < len(every):
            raise UserError(
                f"epochs={config['epochs']} has no room for rungs after "
                f"{', '.join(map(str, every))} epochs: type more epochs, or {KEY}.rungs=[0.5]"
            )
        return every


class Ladder:
    """Who was sent to which rung, and who has come there; `eta`, `top` (the last rung)."""

    def __init__(self, eta: int, top: int, smaller: bool) -> None:
        self.eta, self.top, self.sign = eta, top, 1 if smaller else -1
        self.sent: dict[str, int] = {}  # in the order of the first time
        # {member: value} in the order of arrival; None: it failed
        self.came: list[dict[str, float | None]] = [{} for _ in range(top + 1)]

    def send(self, name: str, rung: int) -> None:
        self.sent[name] = rung
        self.came[rung].pop(name, None)  # where it has failed

    def arrive(self, name: str, rung: int, value: float | None) -> None:
        self.came[rung][name] = None if value is None or math.isnan(value) else value

    def open(self) -> Iterator[str]:
        """Those that were sent to a rung and haven't come."""
        return (name for name, rung in self.sent.items() if name not in self.came[rung])

    def best(self, rung: int) -> list[str]:
        """Those with a value at a rung, best first; of equals the first that came."""
        values = {name: value for name, value in self.came[rung].items() if value is not None}
        return sorted(values, key=lambda name: self.sign * values[name])

    def promotable(
        self, closing: bool = False, among: Collection[str] | None = None
    ) -> tuple[str, int] | None:
        """(member, the rung it came to) that may go on, from the lowest rung that has one.

        among: those that can be sent; None: all. closing: nobody else will come, and from each rung
        at least one goes on.
        """
        for rung in range(self.top):
            count = len(self.came[rung]) // self.eta
            for name in self.best(rung)[: max(count, 1) if closing else count]:
                if self.sent[name] == rung and (among is None or name in among):
                    return name, rung
        return None


class Halving:
    """What is to run next of a sweep's members, by rules and by what has come so far."""

    def __init__(
        self, folder: Path, rules: Rules, members: Sequence[Member], running: Sequence[Member] = ()
    ) -> None:
        """running: members that run already; those that these rules have sent are followed."""
        self.file, self.rules = folder / FILE, rules
        self._by_name = {member.name: member for member in members}
        what = watch.named("metric", rules.metric)
        self.metric = what.metric
        self.ladder = Ladder(rules.eta, len(rules.rungs), what.smaller)
        self._read()
        going = {*self.ladder.open()}
        self._by_name |= {one.name: one for one in running if one.name in going}
        for name in going - self._by_name.keys():
            self._look_up(folder / ".members" / f"{name}.json")
        for name, rung in self.ladder.sent.items():
            if name not in self._by_name:
                continue
            self._aim(self._by_name[name], rung)
            if self.ladder.came[rung].get(name, 0) is None:  # the command was repeated
                self._send(self._by_name[name], rung, "it failed, and is tried again")

    def next(self, running: Collection[str]) -> Member | None:
        """The member to start now, whose `until` is set; None: none, unless one of these ends."""
        for name in [*self.ladder.open()]:
            if name not in self._by_name or name in running:
                continue
            member = self._aim(self._by_name[name], self.ladder.sent[name])
            if member.result() is None and not member.paused:
                return member
            self.ended(member)  # it came while no command was watching
        for name, member in self._by_name.items():
            if name not in self.ladder.sent:
                return self._send(member, 0, "it is new")
        found = self._promotable(running)
        return found if found or running else self._promotable(running, closing=True)

    def ended(self, member: Member) -> None:
        """Note what a member came to that has ended; nothing of one that isn't followed.

        UserError where it came, and nothing has measured the metric yet.
        """
        if member.name not in self._by_name:
            return
        rung = self.ladder.sent[member.name]
        at = self.rules.epochs(member.config)[rung]
        lines = [line for line in member.lines if line.get("epoch", 0) <= at]
        values = [line[self.metric] for line in lines if self.metric in line]
        there = member.result() is not None or member.paused
        measured = any(value is not None for came in self.ladder.came for value in came.values())
        if there and lines and not values and not measured:
            logged = sorted(lines[-1].keys() - {"step", "epoch", "images_seen"})
            raise UserError(
                f"{KEY}.metric={self.metric}: nothing measures it: type one of {', '.join(logged)}"
            )
        value = values[-1] if there and values else None
        self._write({"member": member.name, "came_to": rung + 1, "epoch": at, "value": value})
        self.ladder.arrive(member.name, rung, value)

    def say(self, member: Member) -> str:
        """How far a member that `next` gave will run, in words."""
        until = member.config["until"] or member.config["epochs"]
        return f"to epoch {until} of {member.config['epochs']}"

    def summary(self) -> str:
        """What the rules have spared, in words."""
        counts = [len(values) for values in self.ladder.came]
        told = ", ".join(f"{count} to rung {rung}" for rung, count in enumerate(counts, start=1))
        first = ""
        if finished := self.ladder.best(self.ladder.top):
            value = self.ladder.came[self.ladder.top][finished[0]]
            assert value is not None
            first = f"; the best: {finished[0]}, {self.metric} {units.spoken(self.metric, value)}"
        return f"of {len(self.ladder.sent)} members came {told} (the end){first}"

    def _look_up(self, file: Path) -> None:
        """Note what a member came to that has finished while no command was watching."""
        if file.exists() and (member := Member.load(file)).result() is not None:
            self._by_name[member.name] = member
            self.ended(member)

    def _promotable(self, running: Collection[str], closing: bool = False) -> Member | None:
        found = self.ladder.promotable(closing, self._by_name.keys() - {*running})
        if found is None:
            return None
        name, rung = found
        place, count = self.ladder.best(rung).index(name) + 1, len(self.ladder.came[rung])
        return self._send(self._by_name[name], rung + 1, f"it is number {place} of {count}")

    def _send(self, member: Member, rung: int, why: str) -> Member:
        at = self.rules.epochs(member.config)[rung]
        self._write({"member": member.name, "sent_to": rung + 1, "epoch": at, "why": why})
        self.ladder.send(member.name, rung)
        log.info("halving: %s runs to epoch %s: %s", member.name, at, why)
        return self._aim(member, rung)

    def _aim(self, member: Member, rung: int) -> Member:
        epochs = self.rules.epochs(member.config)
        member.config["until"] = None if rung == self.ladder.top else epochs[rung]
        member.save()
        return member

    def _read(self) -> None:
        text = self.file.read_text(encoding="utf-8") if self.file.exists() else ""
        if whole := text[: text.rfind("\n") + 1]:
            files.write(self.file, whole)  # without a last line that a kill has torn
        lines = whole.splitlines()
        rules = {"rules": self.rules._asdict() | {"rungs": [*self.rules.rungs]}}
        try:
            events = [json.loads(line) for line in lines]
            known = events[0] if events else rules
            if known != rules:
                told = ", ".join(f"{key}={value}" for key, value in known["rules"].items())
                if all(event.get("value") is None for event in events):  # they decided nothing
                    self.file.unlink()
                    self._read()
                    return
                raise UserError(
                    f"{self.file}: this sweep was halved by other rules ({told}): "
                    f"type these as {KEY}, or choose another sweep="
                )
            for event in events[1:]:
                if "sent_to" in event:
                    self.ladder.send(event["member"], event["sent_to"] - 1)
                else:
                    self.ladder.arrive(event["member"], event["came_to"] - 1, event["value"])
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{self.file} is damaged: put it back, or delete it") from None
        if not lines:
            self._write(rules)

    def _write(self, event: Mapping[str, Any]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file, "ab", buffering=0) as file:
            file.write(json.dumps(event).encode() + b"\n")


@contextmanager
def alone(folder: Path, halves: bool = True) -> Iterator[None]:
    """While a command runs members of this sweep, by rules or without them. UserError.

    By rules it must be the only one: two would decide for each other, and one without rules would
    start whom they let wait. Without them there may be others without.
    """
    (folder / ".members").mkdir(parents=True, exist_ok=True)
    with open(folder / ".members" / ".halving.lock", "a") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_EX if halves else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            what = "runs members of" if halves else "halves"
            raise UserError(
                f"{folder}: another command {what} this sweep: wait, or choose another sweep="
            ) from None
        yield
