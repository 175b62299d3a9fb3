"""Stage status: the states of the members of a sweep, and the table of their results."""

import logging
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from omegaconf import DictConfig

from ssl_bench import files
from ssl_bench.errors import UserError, unknown
from ssl_bench.report import sweeps
from ssl_bench.runs import sweep
from ssl_bench.runs.run import Run
from ssl_bench.runs.sweep import Member, State
from ssl_bench.shell import override
from ssl_bench.stages import single_process

log = logging.getLogger(__name__)

READS = ("runs", "metric")
# states of members that no command starts, or that have failed and would be started anyway
ASIDE = ("dropped", "diverged", "failed", "not reached")
# and of those that this machine, or Slurm, may start or run at any moment
BUSY = ("running", "pending", "configuring", "completing", "requeued", "suspended")


@single_process
def status(
    cfg: DictConfig,
    run: Run,
    drop: str | tuple[str, ...] = (),
    again: str | tuple[str, ...] = (),
) -> dict[str, float]:
    """Show the sweeps `cfg.runs` and write their table.md and table.csv. Returns counts of states.

    drop: members to take out of the sweep, by their names, the ends of these, patterns or states;
    their directories stay. again: those that were dropped or have diverged, for the next command to
    start. UserError for a folder that isn't a sweep, and for members that aren't there or run.
    """
    counts: dict[str, float] = {}
    paths: list[Path | None] = [*files.places(cfg.runs)] or [None]
    for path in paths:
        members = sweep.members(path) if path else []
        aside = sweep.dropped(path) if path else []
        if path is None or not (members or aside):
            near = path or Path("runs/sweeps")
            near_by = {*near.glob("*/.members"), *near.parent.glob("*/.members")}
            found = [one for one in sorted(near_by) if sweep.has_members(one.parent)]
            hint = ", like runs=runs/sweeps/lincls"
            if found:
                hint = ": " + ", ".join(override("runs", folder.parent) for folder in found)
            wanting = "runs= is missing; name the folder of a sweep"
            wrong = f"runs={path}: no sweep there; name the folder of one"
            raise UserError(f"{wrong if path else wanting}{hint}")
        known = list(dict.fromkeys(key for member in members for key in member.result() or {}))
        if known and cfg.metric and cfg.metric not in known:
            valid = [f"metric={key}" for key in known]
            raise UserError(unknown("value", f"metric={cfg.metric}", valid))
        if drop or again:
            _drop(members, _texts(drop))
            _take_back([*members, *aside], _texts(again))
            members, aside = sweep.members(path), sweep.dropped(path)
        parts = sweep.with_firsts(members)
        states = dict(zip((part.name for part in parts), sweep.states(parts), strict=True))
        if len(paths) > 1:
            print(f"\n{path}\n")
        print(sweeps.overview(parts, [*states.values()], cfg.metric))
        if aside:
            print(f"\ndropped: {', '.join(member.name for member in aside)}")
        if members and (shown := sweeps.sweep_table(path, cfg.metric)):
            print(f"\n{shown}")
        for state in [*(states[member.name] for member in members), *sweep.states(aside)]:
            counts[state.name] = counts.get(state.name, 0) + 1
    return counts


def _texts(given: str | tuple[str, ...]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else given


def _drop(members: Sequence[Member], texts: Sequence[str]) -> None:
    """UserError, before any is dropped, for one that runs or that isn't there."""
    chosen = _chosen("drop", members, texts)
    parts = sweep.with_firsts(member for member, _ in chosen)
    now = zip(parts, sweep.states(parts), strict=True)
    if busy := [(part, state) for part, state in now if state.name in BUSY]:
        member, state = busy[0]
        end = f"scancel {member.job}" if member.job else "end its process"
        raise UserError(f"stage.drop: {member.name} is {state.name}: {end} first")
    for member, _ in chosen:
        member.drop()
        log.info("dropped: %s; its directory, %s, stays", member.name, member.directory)


def _take_back(members: Sequence[Member], texts: Sequence[str]) -> None:
    """UserError, before any is taken back, for one that wasn't set aside or that isn't there."""
    chosen = _chosen("again", members, texts)
    if others := [(member, state) for member, state in chosen if state.name not in ASIDE]:
        member, state = others[0]
        raise UserError(
            f"stage.again: {member.name} is {state.name}: it is for members that were dropped, or "
            "have diverged or failed"
        )
    for member, state in chosen:
        if member.dropped:
            member.take_back()
        for part in sweep.with_firsts([member]):
            part.forget_failure()
        log.info("was %s: %s; the command of the sweep starts it", state.name, member.name)


def _chosen(
    key: str, members: Sequence[Member], texts: Sequence[str]
) -> list[tuple[Member, State]]:
    """The members that these texts mean, with their states. UserError: a text means none."""
    parts = sweep.with_firsts(members) if texts else []
    known: list[tuple[Member, State]] = []
    words: dict[str, set[str]] = {}  # the states of each member, and of what it waits for
    for part, state in zip(parts, sweep.states(parts), strict=True):
        if not part.is_first:
            known.append((part, state))
        if not (part.is_first and state.name == "finished"):
            words.setdefault(part.name.removesuffix(sweep.FIRST), set()).add(state.name)
    chosen: dict[str, tuple[Member, State]] = {}
    for text in texts:
        found = [(one, state) for one, state in known if _means(text, one, words[one.name])]
        if not found:
            raise UserError(
                unknown("member", f"stage.{key}={text}", [one.name for one, _ in known])
            )
        chosen |= {one.name: (one, state) for one, state in found}
    return [*chosen.values()]


def _means(text: str, member: Member, states: set[str]) -> bool:
    is_end = member.name.endswith(f"-{text}")  # the eight digits that a name ends with
    return is_end or text in states or fnmatchcase(member.name, text)
