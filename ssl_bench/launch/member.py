"""One member of a sweep, run from its file, in a process or as a Slurm job.

`python -m ssl_bench.launch.member FILE` starts one by hand.

The file chooses among our constructors. A user's own constructors are named by whoever starts the
member, as launchers do: `python -m ssl_bench.launch.member FILE method._target_=my_module.Mine`.
"""

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import hydra

from ssl_bench.config import build
from ssl_bench.errors import Abandoned, Interrupted, UserError
from ssl_bench.launch import resolvers
from ssl_bench.launch.process import launch, set_up_logging
from ssl_bench.runs import sweep


def run(file: Path, named: Sequence[str] = ()) -> None:
    """Run one rank of the member in `file`. An error is written beside the file, and raised.

    named: the user's constructors that the member may call (`build.strange`).
    """
    resolvers.register()
    build.restrict(named)
    member, rank = sweep.Member.load(file), int(os.environ.get("SLURM_PROCID", 0))
    set_up_logging(quiet=rank > 0)
    for folder in (member.cwd, member.conf):
        if not (os.path.isabs(folder) and os.path.isdir(folder)):
            raise UserError(
                f"{file}: {folder} isn't here: the command of the sweep makes its members anew"
            )
    os.chdir(member.cwd)
    if named:
        sys.path.append(member.cwd)  # a user's own modules
    # a pipeline composes the configurations of its parts
    with hydra.initialize_config_dir(member.conf, version_base="1.3"):
        attempt(member, rank)


def attempt(member: sweep.Member, rank: int = 0) -> None:
    try:
        cfg = build.literal(member.config)
        build.check(cfg)  # the file may be older than the code
        launch(cfg)
    except Exception as error:
        if isinstance(error, Abandoned):
            time.sleep(1)  # until the rank that failed has written why
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        member.fail(f"{kind}{error}", rank)
        raise


class SlurmTask:
    """What submitit pickles, and calls once in each task of the job.

    A job ends in one of four ways:
    - Slurm warns of the time limit or of a preemption: SIGUSR2, or SIGTERM while the job counts as
      running. The run saves, then submitit's handler has the job requeued.
    - Slurm ends it (scancel, scontrol requeue): SIGTERM when the job no longer counts as running.
      The run saves; Slurm does the rest.
    - It fails: exit status 1, and srun's --kill-on-bad-exit ends the other tasks.
    - It finishes.
    """

    def __init__(self, file: Path, named: Sequence[str] = ()) -> None:
        self.file, self.named = file, named

    def __call__(self) -> None:
        if shutil.which("scontrol") is None:
            _leave_requeue_to_the_script()
        # submitit's handler: rank 0 has the job requeued and exits, the others return
        requeue = signal.getsignal(signal.SIGUSR2)
        # `Run` sets an alarm at a warning: a long step must not cost the requeue
        signal.signal(signal.SIGALRM, requeue)
        try:
            run(self.file, self.named)
        except Interrupted as stop:
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # one requeue is enough
            member = sweep.Member.load(self.file)
            warned = stop.signum == signal.SIGUSR2
            if stop.signum == signal.SIGTERM:
                warned = _counts_as_running(member.job)
            if not warned:
                sys.exit(128 + stop.signum)
            try:
                requeue(signal.SIGUSR2, None)
            except Exception as error:
                member.fail(f"{stop}, but it can't be requeued: {error}")
                raise
            sys.exit(0)  # a failure here would end rank 0, which is requeueing the job

    def checkpoint(self) -> object:
        """submitit: what to run after a requeue."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _counts_as_running(job: str) -> bool:
    """Does Slurm list the job as running? True where it can't be asked, as in a container.

    There the batch script asks.
    """
    queue = sweep.queued()
    return queue is None or (job in queue and queue[job].name == "running")


def _leave_requeue_to_the_script() -> None:
    """Put an `scontrol` on the PATH of a container that lacks Slurm's programs.

    It leaves a note for the batch script, which runs outside.
    """
    folder = Path(tempfile.mkdtemp())
    (folder / "scontrol").write_text('#!/bin/sh\n: > "$SSL_BENCH_REQUEUE"\n')
    (folder / "scontrol").chmod(0o755)
    os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"


if __name__ == "__main__":
    try:
        run(Path(sys.argv[1]), sys.argv[2:])
    except UserError as error:
        sys.exit(f"ssl-bench: {error}")
    except Interrupted as stop:
        sys.exit(128 + stop.signum)
