"""pretrained=SWEEP: an evaluation of each finished member of a sweep."""

import logging
from collections.abc import Sequence
from pathlib import Path

from ssl_bench.config import typed
from ssl_bench.errors import UserError
from ssl_bench.runs import layout, sweep
from ssl_bench.shell import quote

log = logging.getLogger(__name__)

# words by which a command is a sweep, or chooses what makes it one
SWEEPING = ("-m", "--multirun")
CHOOSING = ("launcher", "hydra/launcher", "hydra.mode")


def with_members(words: Sequence[str]) -> list[str]:
    """The words of a command, in which `pretrained` names the members of a sweep in its place.

    UserError for a sweep of which no member has finished, or in a command that is no sweep.
    """
    return [
        _expanded(word, words) if typed.key_of(word) == "pretrained" else word for word in words
    ]


def _expanded(word: str, words: Sequence[str]) -> str:
    key, _, value = word.partition("=")
    places = value.split(",")
    if not any(_members(place) for place in places):
        return word
    is_sweep = any(one in SWEEPING or typed.key_of(one) in CHOOSING for one in words)
    found: list[str] = []
    for place in places:
        if not (members := _members(place)):
            found.append(place)
            continue
        if not is_sweep:
            raise UserError(
                f"{word} is a sweep of {len(members)}: add -m, for each of them that has finished"
            )
        finished = [member for member in members if member.result() is not None]
        if not finished:
            raise UserError(
                f"{word}: none of its {len(members)} members has finished: "
                f"ssl-bench stage=status runs={place} shows them"
            )
        runs = [(member.name, _run_of(member)) for member in finished]
        if without := [name for name, run in runs if run is None]:
            log.warning("%s: no checkpoint, and left out: %s", place, ", ".join(without))
        if not (able := [str(run) for _, run in runs if run is not None]):
            raise UserError(f"{word}: none of its finished members has a checkpoint")
        log.info(
            "%s: %s of its %s members have finished and are measured; "
            "the same command measures the others, too, once they have",
            *(place, len(able), len(members)),
        )
        found += map(quote, able)
    return f"{key}={','.join(found)}"


def _members(place: str) -> list[sweep.Member]:
    folder = Path(place.strip("'\"")).expanduser()
    return sweep.members(folder) if (folder / ".members").is_dir() else []


def _run_of(member: sweep.Member) -> Path | None:
    """The directory of the run that trained its backbone; None: there is no checkpoint in it."""
    for run in (member.directory, member.directory / "pretrain"):  # a pipeline trains there
        if layout.states(run):
            return run
    return None
