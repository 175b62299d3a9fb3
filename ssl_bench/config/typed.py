"""Nothing typed is ignored: what a stage reads of the shared keys, and what was typed in vain.

A stage's module declares READS, the shared keys that it reads: "optimizer" is the group with all of
its keys, "data.root" that key alone, "data.name" the choice of the group. IDLE, in the module of
any constructor, says which keys do nothing where another has a certain value:
{"method.name=random": ("optimizer", ...)}. Both are literals, which are read without the imports of
the module; tests/config/test_typed.py compares READS with what the code reads. A stage without
READS, as a user's own may be, is taken to read everything.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ssl_bench.config import signatures
from ssl_bench.shell import in_quotes

# how a configuration is made, and where it runs
ALWAYS = ("stage", "experiment", "settings", "launcher", "hydra")


def key_of(override: str) -> str:
    """optimizer.base_lr of "+optimizer.base_lr=1"."""
    return re.split("[=@]", override.lstrip("+~"), maxsplit=1)[0]


def quote(text: str) -> str:
    """A text that looks like something else, quoted for an override; interpolations in it stay."""
    return in_quotes(text, '"')


def quoted(overrides: Iterable[str]) -> dict[str, str]:
    """{key: its value as a text} of what was typed; several values are quoted each."""
    pairs = (override.partition("=") for override in overrides)
    several = re.compile(r"[^\[\](){}'\",]+(,[^\[\](){}'\",]+)+")
    return {
        key_of(key): ",".join(map(quote, value.split(",")))
        if several.fullmatch(value)
        else quote(value)
        for key, _, value in pairs
    }


def in_vain(config: Mapping, overrides: Iterable[str]) -> dict[str, str]:
    """{override: a line about it} of those that the stage of this configuration doesn't read.

    config: plain, not resolved. What asks for nothing is left alone: KEY=null, and what makes
    others idle, as eval_every=0 does.
    """
    lines = {}
    for override in overrides:
        key = key_of(override)
        asks = not override.endswith("=null") and override not in _off(config)
        if asks and (why := _ignored_by(config, key)):
            readers = [] if " with " in why else _readers(key)
            instead = f"it is for {', '.join(readers)}" if readers else "leave it out"
            lines[override] = f"{override} would be ignored: {why} doesn't read {key}; {instead}"
    return lines


def swept_in_vain(members: Sequence[tuple[Mapping, Sequence[str]]]) -> list[str]:
    """As `in_vain`, a line each, of a sweep's members (configuration, overrides).

    What all of them share must be read by one of them at least; what tells them apart by each that
    has it, or one run would be several members.
    """
    shared = set.intersection(*(set(overrides) for _, overrides in members))
    unread = [in_vain(config, overrides) for config, overrides in members]
    lines = [
        line
        for word, line in unread[0].items()
        if word in shared and all(word in other for other in unread)
    ]
    lines += [line for each in unread for word, line in each.items() if word not in shared]
    return list(dict.fromkeys(lines))


def is_read(config: Mapping, key: str) -> bool:
    return not _ignored_by(config, key)


def reads(stage: str) -> tuple[str, ...] | None:
    """What the stage with this dotted path declares; None where it declares nothing."""
    return signatures.constant(stage, "READS")


def covers(declared: Iterable[str], key: str) -> bool:
    """Is the key, or the choice of a group, among the declared?"""
    return any(name in (key, f"{key}.name") or key.startswith(name + ".") for name in declared)


def _ignored_by(config: Mapping, key: str) -> str:
    """What doesn't read the key, in words; "" where it is read."""
    root = key.partition(".")[0]
    stage, declared = config["stage"], reads(config["stage"]["_target_"])
    if root in ALWAYS and not key.startswith("stage."):
        return ""
    nodes = {
        name: node
        for name, node in config.items()
        if isinstance(node, Mapping) and "_target_" in node
    }
    if (
        declared is not None
        and not covers((*ALWAYS, *declared), key)
        and not _stands_in(nodes, declared, key)
    ):
        return f"stage={stage['name']}"
    for node in nodes.values():
        for condition, idle in (signatures.constant(node["_target_"], "IDLE") or {}).items():
            where, _, value = condition.partition("=")
            if str(_select(config, where)) == value and covers(idle, key):
                return f"stage={stage['name']} with {where.removesuffix('.name')}={value}"
    return ""


def _off(config: Mapping) -> set[str]:
    """The conditions under which keys are idle that no choice of a group is."""
    targets = [
        node["_target_"]
        for node in config.values()
        if isinstance(node, Mapping) and "_target_" in node
    ]
    conditions = {
        condition for path in targets for condition in signatures.constant(path, "IDLE") or {}
    }
    return {
        condition for condition in conditions if not condition.partition("=")[0].endswith(".name")
    }


def _stands_in(nodes: Mapping[str, Mapping], declared: Sequence[str], key: str) -> bool:
    """Does an argument of a constructor that is read stand for it, as with zero_init_residual?"""
    read = (node for name, node in nodes.items() if covers(declared, name))
    return any(value == f"${{{key}}}" for node in read for value in node.values())


def _select(config: Mapping, key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


@cache
def _readers(key: str) -> list[str]:
    """Our stages that read it, as one types them."""
    names = sorted(path.stem for path in (Path(__file__).parents[1] / "stages").glob("[!_]*.py"))
    declared = {name: reads(f"ssl_bench.stages.{name}.{name}") for name in names}
    return [f"stage={name}" for name, keys in declared.items() if keys and covers(keys, key)]
