"""Files that are named by patterns."""

import glob
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ssl_bench.errors import UserError

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def matching(root: Path, patterns: str | Sequence[str], suffix: str, key: str) -> list[Path]:
    """The files below root that these patterns name, each once, in the order of the patterns.

    A pattern is a file, a glob, a brace range such as train-{000..146}.tar, or a folder, of which
    the files are taken that end with `suffix`. key: what was typed, for the error. UserError for a
    pattern that names no file.
    """
    found: dict[Path, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if re.match(r"[a-z0-9]+://|pipe:", pattern):
            raise UserError(
                f"{key}={pattern}: files are read from a disk or a mounted file system: fetch "
                "them, and type where they are below data.root="
            )
        for name in ranged(pattern):
            files = _files(root, name, suffix)
            if not files:
                raise UserError(
                    f"{key}={pattern}: no file {root / name}; type a file, a glob "
                    f"(train-*{suffix}), a range (train-{{000..146}}{suffix}) or a folder with "
                    f"*{suffix}, below data.root={root}"
                )
            found |= dict.fromkeys(files)
    return list(found)


def ranged(pattern: str) -> Iterator[str]:
    """The names that a shell makes of brace ranges: a{08..10} gives a08, a09, a10."""
    if (match := RANGE.search(pattern)) is None:
        yield pattern
        return
    first, last = match.groups()
    width = max(map(len, match.groups())) if "0" in (first[:1], last[:1]) else 0
    for number in range(int(first), int(last) + 1):
        yield from ranged(pattern[: match.start()] + f"{number:0{width}}" + pattern[match.end() :])


def _files(root: Path, name: str, suffix: str) -> list[Path]:
    path = root / name
    if path.is_dir():
        return sorted(file for file in path.glob(f"*{suffix}") if file.is_file())
    if path.is_file():
        return [path]
    names = glob.glob(name, root_dir=root, recursive=True)
    return sorted(root / name for name in names if (root / name).is_file())
