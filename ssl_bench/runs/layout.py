"""What lies where in the directory of a run."""

import re
from pathlib import Path

from ssl_bench.files import SUMS

WEIGHTS = "pretrained.sha256"  # in the directory of a run: of the file that it stands on
UNLISTED = (SUMS, "log.txt")  # of a run's own files: these go on


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
    """The file that `pretrained` means: itself, or the newest of a run directory or an export; None
    without one.
    """
    if source.is_dir():
        return next(iter([*complete(source), *source.glob("model.safetensors")]), None)
    return source if source.is_file() else None


def own(run: Path) -> list[str]:
    """What a finished run consists of: the files of its directory, and its last checkpoint."""
    names = [
        path.name for path in run.iterdir() if path.is_file() and not path.name.startswith(".")
    ]
    names += [path.relative_to(run).as_posix() for path in complete(run)[:1]]
    return [name for name in names if name not in UNLISTED and not name.endswith(".partial")]


def has_state(run: Path) -> bool:
    """Has the run of this directory saved anything, or finished?"""
    return (run / "summary.json").exists() or bool(complete(run))
