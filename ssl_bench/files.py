"""Files that are whole or not there, and what tells them apart."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any

from ssl_bench.errors import UserError

# The digests of the files beside it, in an export and in the directory of a finished run.
# `sha256sum --check` reads it.
SUMS = "SHA256SUMS"


def places(given: str | Sequence[str] | None) -> list[Path]:
    """The paths of a setting like `runs`: one, or a list of them."""
    paths = [given] if isinstance(given, str) else given or ()
    return [Path(path) for path in paths]


def _open(path: Path, mode: str) -> IO:
    """Text is UTF-8; a file's name in it that isn't UTF-8 is written by its bytes, as \\udcff."""
    if "b" in mode:
        return open(path, mode)
    return open(path, mode, encoding="utf-8", errors="backslashreplace")


@contextmanager
def replacing(path: Path, partial: Path, mode: str) -> Iterator[IO]:
    """Replace a file at once: nobody reads half of it, and a kill leaves the old or the new one.

    partial: where the file is written until it is whole; a failure, like a full disk, leaves
    nothing there.
    """
    try:
        with _open(partial, mode) as file:
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
    """The content of a run's file. UserError if it is damaged, since `write` never leaves half."""
    check(path)
    try:
        content = parser(path.read_text(encoding="utf-8"))
    except Exception:  # yaml's and json's have no common type
        content = None
    if not isinstance(content, dict):
        raise damaged(path)
    return content


def damaged(path: Path) -> UserError:
    return UserError(f"{path} is damaged: put it back, or delete it")


@cache
def _digest(path: Path, algorithm: str, state: tuple[int, ...]) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def digest(path: Path, algorithm: str = "sha256") -> str:
    """The digest of a file, in hex; a large file is read once, and again only if it changes."""
    return _digest(path.resolve(), algorithm, state(path))


def state(path: Path) -> tuple[int, ...]:
    """Size and times (ns) of a file, which differ once it has changed."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def listed(folder: Path) -> dict[str, str]:
    """The sha256 of each file that the folder's SHA256SUMS names; empty if there is none."""
    path = folder / SUMS
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return {line[66:]: line[:64] for line in text.splitlines() if line[64:66] == "  "}


def check(path: Path) -> Path | None:
    """The SHA256SUMS that names the file, in its folder or (for a checkpoint) in its run's.

    UserError if the file has another digest.
    """
    for folder in (path.parent, path.parent.parent):
        said = listed(folder).get(path.relative_to(folder).as_posix()) if path.is_file() else None
        if said and said != (found := digest(path)):
            raise UserError(
                f"{path}: its sha256 is {found[:8]}..., not {said[:8]}... as {folder / SUMS} says: "
                "a broken or another file; put back the one that was written"
            )
        if said:
            return folder / SUMS
    return None


def sums_of(folder: Path, names: Iterable[str]) -> dict[str, str]:
    return {name: digest(folder / name) for name in names}


def seal(folder: Path, sums: Mapping[str, str]) -> None:
    """Write SHA256SUMS; sums: {name: hex digits}."""
    write(folder / SUMS, "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))
