"""Files that are whole or not there, and what tells them apart."""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ssl_bench.errors import UserError

WEIGHTS = "pretrained.sha256"  # in the directory of a run: of the file that it stands on


def places(given: str | Sequence[str] | None) -> list[Path]:
    """The paths of a setting like `runs`: one, or a list of them."""
    return [Path(path).expanduser() for path in ([given] if isinstance(given, str) else given or ())]


def run_of(path: Path) -> Path | None:
    """The run directory that a checkpoint file lies in; None for a file from elsewhere."""
    folders = (path.absolute().parent, path.resolve().parent)  # a link to one is one
    return next((folder.parent for folder in folders if folder.name == "checkpoints"), None)


def complete(directory: Path) -> list[Path]:
    """Checkpoint files of a run directory, newest first."""
    return sorted((directory / "checkpoints").glob(f"step{10 * '[0-9]'}.pt"), reverse=True)


def step_of(path: Path) -> int:
    """Of a checkpoint file, by its name."""
    return int(re.search(r"\d+", path.stem)[0])


def weights_of(source: Path) -> Path | None:
    """The file that `pretrained` means: itself, or the newest of a run directory or an export; None without one."""
    if source.is_dir():
        return next(iter([*complete(source), *source.glob("model.safetensors")]), None)
    return source if source.is_file() else None


@contextmanager
def replacing(path: Path, partial: Path, mode: str) -> Iterator[IO]:
    """Replace the file at once: nobody reads half of it, and a kill leaves the old one or the new one.

    partial: where it is written until it is whole; a failure, like a full disk, leaves nothing there.
    """
    try:
        with open(partial, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # the rename must not reach the disk before the bytes do
    except Exception:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(path)


def write(path: Path, text: str) -> None:
    with replacing(path, path.with_name(path.name + ".partial"), "w") as file:
        file.write(text)


def parse(path: Path, parser: Callable[[str], Any]) -> dict:
    """What a file of a run says. UserError where somebody damaged it: `write` doesn't leave half of one."""
    try:
        content = parser(path.read_text(encoding="utf-8"))
    except Exception:  # yaml's and json's have no common kind
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: put it back, or delete it")
    return content


def digest(path: Path, algorithm: str = "sha256") -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def has_state(run: Path) -> bool:
    """Has the run of this directory saved anything, or finished?"""
    return (run / "summary.json").exists() or bool(complete(run))
