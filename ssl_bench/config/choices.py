"""The YAML files of a folder of choices, such as a --config-dir, which may hold much else."""

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

CONF = Path(__file__).parents[1] / "conf"  # ours
# What a run, a sweep's folder or Hydra leaves in a folder. What lies there is no choice of anybody.
MARKS = ("metrics.jsonl", ".members", "multirun.yaml")


def folders(words: Sequence[str]) -> list[Path]:
    """Where the choices of a command line are: ours, and those of its --config-dir."""
    own = [Path(word.partition("=")[2]) for word in words if word.startswith("--config-dir=")]
    return [CONF, *own]


def yaml_below(root: Path, more: Iterable[str] = (), outside: bool = False) -> Iterator[Path]:
    """The YAML files of a folder of choices: its own, and those of its groups.

    Groups are ours, Hydra's, those in `more`, and those that the defaults of these files name.
    Other folders aren't looked into: with --config-dir=. they are the project's, with its runs,
    images and environments. outside: follow links that leave the folder, too.
    """
    todo, known = sorted({*_ours(), "hydra", *more}), {""}
    seen = {root.resolve()}
    for path in sorted(root.glob("*.yaml")):
        yield path
        todo += _groups_named(path, "")
    while todo:
        if (group := todo.pop(0)) in known:
            continue
        known.add(group)
        for path in _walk(root, group, seen, outside):
            yield path
            todo += _groups_named(path, path.parent.relative_to(root).as_posix())


def _walk(root: Path, group: str, seen: set[Path], outside: bool) -> Iterator[Path]:
    """The YAML files of a group and of the groups within it; no place is seen twice."""
    todo = [root / group]
    while todo:
        folder = todo.pop()
        place = folder.resolve()
        leaves = not (outside or place.is_relative_to(root.resolve()))
        hidden = folder.name.startswith(".")
        if hidden or leaves or place in seen or not folder.is_dir():
            continue
        if any((folder / mark).exists() for mark in MARKS):
            continue
        seen.add(place)
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        todo += [folder / entry.name for entry in found if entry.is_dir()]
        yield from (folder / entry.name for entry in found if entry.name.endswith(".yaml"))


@cache
def _ours() -> tuple[str, ...]:
    return tuple(path.name for path in CONF.iterdir() if path.is_dir() and path.name[0] not in "._")


def _groups_named(path: Path, own: str) -> list[str]:
    """The folders below the root in which the defaults of a file, of the group `own`, look."""
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text) if "defaults" in text else None
    except (OSError, ValueError, yaml.YAMLError):
        return []  # if the file is chosen, Hydra reports it
    listed = content.get("defaults") if isinstance(content, dict) else None
    return [top for item in listed or () if (top := _top(item, own))]


def _top(item: Any, own: str) -> str:
    """The first folder on the way to what an item of a defaults list names; "": it names none."""
    if isinstance(item, dict) and len(item) == 1:
        ((name, choice),) = item.items()
        words = str(name).split("@")[0].split()  # optional, override
        name = f"{words[-1] if words else ''}/{choice}"
    else:
        name = str(item).split("@")[0]
    path = name if name.startswith("/") else f"{own}/{name}"
    folders = path.strip("/").split("/")[:-1]
    return folders[0] if folders and folders[0] not in ("..", ".") else ""
