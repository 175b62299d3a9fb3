"""Where the files of a run lie in its directory."""

import re
from pathlib import Path

from ssl_bench.files import SUMS

CONFIG = "config.yaml"  # resolved, as it ran
METRICS = "metrics.jsonl"  # the truth about its metrics; see `runs.metrics`
SUMMARY = "summary.json"  # its result: a run that has one is finished
ENVIRONMENT = "environment.json"  # versions, commit, machine
PATCH = "code-{}.diff"  # how code that isn't committed differs from the commit; by its digest
INPUTS = "inputs.json"  # the images of each split that it has opened
VIEWS = "views.png"  # a picture of augmented views
# and those of what a vision transformer has learnt (`stages._pictures`)
LEARNT = {name: f"{name}.png" for name in ("attention", "patches", "reconstruction")}
RELIABILITY = "reliability.json"  # of neighbours' votes; a classifier's is in its checkpoint
WEIGHTS = "pretrained.sha256"  # file with the digest of the weights that the run started from
CHECKPOINTS = "checkpoints"  # folder of its newest states
BEST = "best"  # and of the best by a metric (`save_best`), which is a file of the same kind
AVERAGED = "averaged.json"  # of a mean of checkpoints: the sha256 of each
UNLISTED = (SUMS, "log.txt")  # files that have no digest: they are still written at the end


def run_of(path: Path) -> Path | None:
    """The run directory that a checkpoint file lies in; None for a file from elsewhere."""
    folders = (path.absolute().parent, path.resolve().parent)  # a link to a checkpoint is one
    return next((folder.parent for folder in folders if _is_ours(folder)), None)


def _is_ours(folder: Path) -> bool:
    """Is it a folder of checkpoints? "best" is a likelier name for one from elsewhere."""
    in_a_run = folder.name == BEST and (folder.parent / CONFIG).is_file()
    return folder.name == CHECKPOINTS or in_a_run


def run_at(path: Path) -> Path | None:
    """The run directory that a path means: itself, or that of a checkpoint; None: there is none.

    RUN/best means RUN's, too.
    """
    run = path if path.is_dir() else run_of(path)
    if run and run.name == BEST and not (run / CONFIG).is_file():
        run = run.absolute().parent
    return run if run and (run / CONFIG).is_file() else None


def complete(directory: Path) -> list[Path]:
    """The checkpoint files of a run directory that are whole, newest first."""
    return _states(directory / CHECKPOINTS)


def best(directory: Path) -> list[Path]:
    """The file with the best state of a run directory, in a list; empty: there is none.

    A kill may leave the one before it as well, for which the second place is.
    """
    return _states(directory / BEST)


def states(directory: Path) -> list[Path]:
    """The checkpoint files of a run directory, newest first; the best where it alone was kept."""
    return complete(directory) or best(directory)


def _states(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"step{10 * '[0-9]'}.pt"), reverse=True)


def step_of(path: Path) -> int:
    """The step of a checkpoint file, from its name."""
    found = re.search(r"\d+", path.stem)
    assert found, f"{path} is no checkpoint"
    return int(found[0])


def weights_of(source: Path) -> Path | None:
    """The file that `pretrained` means: itself, or the newest of a run directory or an export.

    RUN/best is the best state of a run. None: there is no such file.
    """
    if source.is_dir():
        found = _states(source) if source.name == BEST else states(source)
        return next(iter([*found, *source.glob("model.safetensors")]), None)
    return source if source.is_file() else None


def own(run: Path) -> list[str]:
    """The files that a finished run consists of, its last and best checkpoints included."""
    files = [path for path in run.iterdir() if path.is_file() and not path.name.startswith(".")]
    names = [path.relative_to(run).as_posix() for path in (*files, *complete(run)[:1], *best(run))]
    return [name for name in names if name not in UNLISTED and not name.endswith(".partial")]


def has_state(run: Path) -> bool:
    """Has the run of this directory saved anything, or finished?"""
    return (run / SUMMARY).exists() or bool(complete(run))
