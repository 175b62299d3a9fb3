"""Nothing typed is ignored: which shared keys a stage reads, and which were typed in vain.

A stage's module declares READS, the shared keys that it reads: "optimizer" is the group with all of
its keys, "data.root" that key alone, "data.name" the choice of the group. IDLE, in the module of
any constructor, lists the keys that do nothing where another key has a certain value:
{"method.name=random": ("optimizer", ...)}. Both are literals and are read without importing the
module; tests/config/test_typed.py compares READS with what the code reads. A stage without READS,
such as a user's own, is taken to read everything.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ssl_bench.config import signatures
from ssl_bench.shell import in_quotes

# Keys that choose how a configuration is composed and where it runs, for every stage.
ALWAYS = ("stage", "experiment", "settings", "launcher", "hydra", "verbosity")


def key_of(override: str) -> str:
    """The key of an override: optimizer.base_lr for "+optimizer.base_lr=1"."""
    return re.split("[=@]", override.lstrip("+~"), maxsplit=1)[0]


def quote(text: str) -> str:
    """A text that looks like something else, quoted for an override; interpolations in it stay."""
    return in_quotes(text, '"')


def quoted(overrides: Iterable[str]) -> dict[str, str]:
    """{key: its value, quoted as a text} of overrides; each of several values is quoted."""
    several = re.compile(r"[^\[\](){}'\",]+(,[^\[\](){}'\",]+)+")
    found = {}
    for override in overrides:
        key, _, value = override.partition("=")
        values = value.split(",") if several.fullmatch(value) else [value]
        found[key_of(key)] = ",".join(map(quote, values))
    return found


def in_vain(config: Mapping, overrides: Iterable[str]) -> dict[str, str]:
    """{override: a line about it} for each override that the stage of `config` doesn't read.

    config: plain, not resolved. An override that asks for nothing is left alone: KEY=null, or one
    that makes other keys idle, such as eval_every=0.
    """
    lines = {}
    for override in overrides:
        key = key_of(override)
        asks = not override.endswith("=null") and override not in _off(config)
        if asks and (why := _ignored_by(config, key)):
            readers = [] if " with " in why else _readers(key)
            instead = f"it is for {', '.join(readers)}" if readers else "leave it out"
            if key == "dir" and "out" in config["stage"]:
                instead = f"type stage.out={override.partition('=')[2]}"
            lines[override] = f"{override} would be ignored: {why} doesn't read {key}; {instead}"
    return lines


def swept_in_vain(members: Sequence[tuple[Mapping, Sequence[str]]]) -> list[str]:
    """The lines of `in_vain` for the members of a sweep, each (configuration, overrides).

    An override that all members share must be read by at least one of them. One that tells members
    apart must be read by each member that has it, or several members would be the same run.
    """
    shared = set.intersection(*(set(overrides) for _, overrides in members))
    unread = [in_vain(config, overrides) for config, overrides in members]
    by_none = {word for word in shared if all(word in one for one in unread)}
    lines = [line for word, line in unread[0].items() if word in by_none]
    lines += [line for each in unread for word, line in each.items() if word not in shared]
    return list(dict.fromkeys(lines))


def is_read(config: Mapping, key: str) -> bool:
    return not _ignored_by(config, key)


def reads(stage: str) -> tuple[str, ...] | None:
    """The READS of the stage with this dotted path; None: it declares none."""
    return signatures.constant(stage, "READS")


def covers(declared: Iterable[str], key: str) -> bool:
    """Is the key, or the choice of the group `key`, among the declared ones?"""
    return any(name in (key, f"{key}.name") or key.startswith(name + ".") for name in declared)


def _ignored_by(config: Mapping, key: str) -> str:
    """The stage that doesn't read the key, as it was typed; "" where the key is read."""
    root = key.partition(".")[0]
    stage, declared = config["stage"], reads(config["stage"]["_target_"])
    if root in ALWAYS and not key.startswith("stage."):
        return ""
    nodes = _nodes(config)
    if declared is not None:
        read = covers((*ALWAYS, *declared), key) or _stands_in(nodes, declared, key)
        if not read:
            return f"stage={stage['name']}"
    for node in nodes.values():
        for condition, idle in _idle(node).items():
            where, _, value = condition.partition("=")
            if _spelt(select(config, where)) == value and covers(idle, key):
                return f"stage={stage['name']} with {where.removesuffix('.name')}={value}"
    return ""


def _off(config: Mapping) -> set[str]:
    """The conditions of IDLE that switch something off (eval_every=0), not those that choose."""
    conditions = {condition for node in _nodes(config).values() for condition in _idle(node)}
    return {word for word in conditions if not key_of(word).endswith(".name")}


def _nodes(config: Mapping) -> dict[str, Mapping]:
    """{name: node} of the nodes that describe an object."""
    items = config.items()
    return {name: node for name, node in items if isinstance(node, Mapping) and "_target_" in node}


def _idle(node: Mapping) -> Mapping[str, Sequence[str]]:
    """IDLE of the constructor that a node names."""
    return signatures.constant(node["_target_"], "IDLE") or {}


def _stands_in(nodes: Mapping[str, Mapping], declared: Sequence[str], key: str) -> bool:
    """Is the key passed on as an argument of a node that is read, as is zero_init_residual?"""
    read = (node for name, node in nodes.items() if covers(declared, name))
    return any(value == f"${{{key}}}" for node in read for value in node.values())


def _spelt(value: Any) -> str:
    """A value as a condition of IDLE spells it."""
    return "null" if value is None else str(value)


def select(config: Mapping, key: str) -> Any:
    """The value of a dotted key; None: there is none."""
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


@cache
def _readers(key: str) -> list[str]:
    """Our stages that read the key, as one types them."""
    names = sorted(path.stem for path in (Path(__file__).parents[1] / "stages").glob("[!_]*.py"))
    declared = {name: reads(f"ssl_bench.stages.{name}.{name}") for name in names}
    return [f"stage={name}" for name, keys in declared.items() if keys and covers(keys, key)]
