"""One member of a sweep, from its file, in a process of its own or as a Slurm job.

`python -m ssl_bench.launch.member FILE` starts one by hand.

The file chooses among our constructors. Those of a user's own are named by who starts it, as its
launcher does: `python -m ssl_bench.launch.member FILE method._target_=my_module.Mine`.
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
    """As one of its ranks. What goes wrong is written beside the file, and raised. named: see
    `build.strange`.
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
    # a pipeline composes its parts
    with hydra.initialize_config_dir(member.conf, version_base="1.3"):
        attempt(member, rank)


def attempt(member: sweep.Member, rank: int = 0) -> None:
    try:
        cfg = build.literal(member.config)
        build.check(cfg)  # a file's, and by the code of today
        launch(cfg)
    except Exception as error:
        if isinstance(error, Abandoned):
            time.sleep(1)  # until the other one has said why
        member.fail(
            str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}", rank
        )
        raise


class SlurmTask:
    """What submitit pickles and calls, once a task of the job.

    A job ends in one of four ways:
    - Slurm warns of the time limit or of a preemption: SIGUSR2, or SIGTERM while the job counts as
      running. The run saves, then submitit's own handler has the job requeued.
    - Slurm takes it away (scancel, scontrol requeue): SIGTERM, when it doesn't count as running any
      more. The run saves; the rest is Slurm's.
    - It fails: exit status 1, and srun's --kill-on-bad-exit ends the other tasks.
    - It finishes.
    """

    def __init__(self, file: Path, named: Sequence[str] = ()) -> None:
        self.file, self.named = file, named

    def __call__(self) -> None:
        if shutil.which("scontrol") is None:
            _leave_requeue_to_the_script()
        # submitit's: rank 0 has the job requeued and exits, others return
        requeue = signal.getsignal(signal.SIGUSR2)
        # set by `Run` at a warning: a long step must not cost the requeue
        signal.signal(signal.SIGALRM, requeue)
        try:
            run(self.file, self.named)
        except Interrupted as stop:
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # one requeue is enough
            member = sweep.Member.load(self.file)
            if stop.signum != signal.SIGUSR2 and not (
                stop.signum == signal.SIGTERM and _counts_as_running(member.job)
            ):
                sys.exit(128 + stop.signum)
            try:
                requeue(signal.SIGUSR2, None)
            except Exception as error:
                member.fail(f"{stop}, but it can't be requeued: {error}")
                raise
            sys.exit(0)  # not with a failure: it would end rank 0, which is busy requeueing

    def checkpoint(self) -> object:
        """submitit: what to run after a requeue."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _counts_as_running(job: str) -> bool:
    """Where Slurm can't be asked, as in a container, the batch script will ask."""
    queue = sweep.queued()
    return queue is None or (job in queue and queue[job].name == "running")


def _leave_requeue_to_the_script() -> None:
    """In a container without Slurm's programs: an `scontrol` that leaves a note for the batch
    script outside.
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
