"""Stage runs: the runs there are, and the checkpoints that nothing stands on."""

import json
import re
import textwrap
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from ssl_bench import files
from ssl_bench.errors import UserError, several
from ssl_bench.report import tables
from ssl_bench.runs import checkpoint, identity, layout, record, units
from ssl_bench.runs.record import Ran
from ssl_bench.runs.run import Run
from ssl_bench.stages import single_process

READS = ("runs",)
# whose choice of each group a run is compared with, and which its directory shows already
CHOSEN = ("stage", "method", "backbone", "data")
AGES = {"d": 86400, "h": 3600, "min": 60}  # seconds
INDENT = 4 * " "  # of a line


@single_process
def runs(cfg: DictConfig, run: Run, prune: bool = False) -> dict[str, float]:
    """Show the runs at or below `cfg.runs`, and what could be deleted. Returns counts and sizes.

    prune: delete the checkpoints of finished runs that aren't their last and that no other run here
    began with.
    """
    folders = files.places(cfg.runs) or [Path("runs")]
    found = sorted(record.find(folders), key=lambda ran: ran.directory.parts)
    own = {ran: list(_own_files(ran, found)) for ran in found}
    differing = {ran: changed(ran) for ran in found}
    counts = {stage: common(differing, stage) for stage in {ran.stage for ran in found}}
    for stage, (number, count) in sorted(counts.items()):
        if shared := [word for word in count if count[word] == number > 1]:
            words = " ".join(sorted(shared))
            print(tables.plain(f"shared by all {number} of stage={stage}: {words}"))
    print()
    facts = {ran: [ran.state.name, newest_metric(ran), *age_and_size(own[ran])] for ran in found}
    widths = [max(map(len, column)) for column in zip(*facts.values(), strict=True)]
    for ran in found:
        cells = [fact.ljust(width) for fact, width in zip(facts[ran], widths, strict=True)]
        line = INDENT + "  ".join(cells)
        print(tables.plain(str(ran.directory)))
        for text in wrapped(line, telling(differing[ran], *counts[ran.stage])):
            print(tables.plain(text))
        if ran.state.note:
            print(tables.plain(INDENT + ran.state.note))
    idle = unneeded(found)
    total = sum(path.stat().st_size for path in idle)
    if prune:
        for path in idle:
            path.unlink()
            print(f"deleted {path}")
    elif idle:
        are, them = ("is", "it") if len(idle) == 1 else ("are", "them")
        checkpoints = f"{several(len(idle), 'checkpoint')} ({size(total)})"
        print(f"\n{checkpoints} {are} no longer needed: stage.prune=true deletes {them}")
    done = sum(ran.summary is not None for ran in found)
    return {"runs": len(found), "finished": done, "unneeded_gb": 0.0 if prune else total / 1e9}


def unneeded(found: Sequence[Ran]) -> list[Path]:
    """The checkpoints of finished runs that aren't the last, and that no run began with."""
    older = [path for ran in found if ran.summary is not None for path in _older(ran)]
    needed = {ran.stands_on for ran in found} | _places(found) | _averaged(found)
    needed |= {str(identity.node(ran.config, "method").get("teacher_sha256")) for ran in found}
    return [p for p in older if not {str(p.resolve()), files.digest(p)} & needed]


def _older(ran: Ran) -> list[Path]:
    """The checkpoints of a finished run before its last; none if that one is damaged."""
    states = layout.complete(ran.directory)
    if len(states) < 2:
        return []
    try:
        files.check(states[0])
        checkpoint.verify(states[0])
    except UserError as error:
        print(f"{error}: the checkpoints before it are kept")
        return []
    return states[1:]


def _places(found: Iterable[Ran]) -> set[str]:
    """The files that runs name as what they began with, some without having noted its digest."""
    named = (ran.config.get("pretrained") for ran in found)
    return {str(Path(path).resolve()) for path in named if path}


def _averaged(found: Iterable[Ran]) -> set[str]:
    """The digests of the files that means were made of (stage=average)."""
    notes = (ran.directory / layout.AVERAGED for ran in found)
    return {digest for path in notes if path.is_file() for digest in _digests(path)}


def _digests(path: Path) -> Iterable[str]:
    known = files.parse(path, json.loads)
    return known.values() if isinstance(known, dict) else ()


def common(differing: Mapping[Ran, list[str]], stage: str) -> tuple[int, Counter[str]]:
    """(how many runs of a stage there are, how many of them each word is of)."""
    known = [words for ran, words in differing.items() if ran.stage == stage]
    return len(known), Counter(word for words in known for word in words)


def changed(ran: Ran) -> list[str]:
    """The settings in which a run differs from the defaults of its method, backbone and data.

    Of another group that it chose, such as an augmentation: that choice, and what differs from it.
    """
    names = {group: identity.node(ran.config, group).get("name") for group in CHOSEN}
    options = GlobalHydra.instance().config_loader().get_group_options
    foreign = [group for group, name in names.items() if name and name not in options(group)]
    words = [f"{group}={name}" for group, name in names.items() if name and group not in foreign]
    if (usual := _default(tuple(words))) is None:
        return ["?"]
    ours = ran.identity.own
    theirs = _as_in(ours, usual)
    left_out = ("augmentation.mean", "augmentation.std", *(f"{group}." for group in foreign))
    keys = sorted(key for key in ours if ours[key] != theirs.get(key))
    keys = [key for key in keys if not key.startswith(left_out)]
    groups = sorted({key.partition(".")[0] for key in keys if key.endswith(".name")})
    short = [f"{group}={ours[f'{group}.name']}" for group in groups]
    if (chosen := _default((*words, *short))) is not None:
        theirs = _as_in(ours, chosen)
    # where the choice is a user's own, it says all that there is to say
    known = [key for key in keys if chosen is not None or key.partition(".")[0] not in groups]
    told = [key for key in known if ours[key] != theirs.get(key)]
    if ran.continued:
        ours = ours | {"continue_from": ran.continued}
    short += [f"{group}={names[group]}" for group in foreign]
    return short + [f"{key}={ours[key]}" for key in told]


def _as_in(ours: Mapping[str, Any], default: tuple[dict, dict[str, str]]) -> dict[str, Any]:
    """What decides the result of a default, in which keys that follow another follow that of ours.

    So that data.image_size=16 isn't said of the augmentation, too.
    """
    config, followed = default
    theirs = identity.Identity(config).own
    same = {key for key, other in followed.items() if ours.get(key) == ours.get(other) is not None}
    return theirs | {key: ours[key] for key in same}


@cache
def _default(words: tuple[str, ...]) -> tuple[dict, dict[str, str]] | None:
    """The configuration that these choices make, and {key: the key that it follows}.

    None: some of them are a user's own.
    """
    try:
        made = hydra.compose("config", list(words))
        made.dir = "."
        followed = {
            f"{group}.{key}": found[1]
            for group, node in OmegaConf.to_container(made).items()
            if isinstance(node, dict)
            for key, value in node.items()
            if (found := re.search(r"\$\{(\w+\.\w+)\}", str(value)))
        }
        return OmegaConf.to_container(made, resolve=True), followed
    except HydraException:
        return None


def telling(words: Iterable[str], number: int, count: Counter[str]) -> list[str]:
    """The words that not all `number` runs of a stage have, the rarest first: they say most."""
    own = [word for word in words if count[word] < number or number == 1]
    return sorted(own, key=count.__getitem__)


def wrapped(line: str, words: Sequence[str]) -> list[str]:
    """The words behind the line or, where they don't fit, below it."""
    text, width = " ".join(words), tables.width() - 2
    if len(line) + 2 + len(text) <= width:
        return [f"{line}  {text}".rstrip()]
    return [
        line.rstrip(),
        *textwrap.wrap(text, width, initial_indent=INDENT, subsequent_indent=INDENT),
    ]


def newest_metric(ran: Ran) -> str:
    """The newest value of the metric that a run is judged by; "": it has none yet."""
    key = ran.config.get("metric")
    lines = [*ran.lines, ran.summary or {}]
    values = [line[key] for line in lines if key in line]
    return f"{key} {units.spoken(str(key), values[-1])}" if values else ""


def age_and_size(paths: Sequence[Path]) -> tuple[str, str]:
    """The time since the newest of the files was written, and how large they are together."""
    written = [path.stat() for path in paths]
    seconds = time.time() - max((one.st_mtime for one in written), default=time.time())
    longest = next((unit for unit in AGES.items() if seconds >= unit[1]), ("", 1))
    age = f"{seconds // longest[1]:.0f} {longest[0]}" if longest[0] else "now"
    return age, size(sum(one.st_size for one in written))


def size(count: int) -> str:
    """A number of bytes."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _own_files(ran: Ran, found: Sequence[Ran]) -> Iterable[Path]:
    """The files below the directory of a run that aren't those of a run within it."""
    within = {other.directory for other in found if ran.directory in other.directory.parents}
    for path in ran.directory.rglob("*"):
        if path.is_file() and not within & set(path.parents):
            yield path
