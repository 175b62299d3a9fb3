"""One member of a sweep, run from its file, in a process or as a Slurm job.

`python -m ssl_bench.launch.member FILE` starts one by hand.

The file chooses among our constructors. A user's own constructors are named by whoever starts the
member, as launchers do: `python -m ssl_bench.launch.member FILE method._target_=my_module.Mine`.
"""

import logging
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import hydra

from ssl_bench.config import build
from ssl_bench.data import store
from ssl_bench.errors import Abandoned, Collapsed, Diverged, Interrupted, UserError
from ssl_bench.launch import resolvers
from ssl_bench.launch.process import launch, leave_fast, set_up_logging
from ssl_bench.runs import code, sweep

log = logging.getLogger(__name__)


def run(
    file: Path,
    named: Sequence[str] = (),
    job: str | None = None,
    gpus: str | None = None,
    submitted: str | None = None,
) -> None:
    """Run one rank of the member in `file`. An error is written beside the file, and raised.

    named: the user's constructors that the member may call (`build.strange`). job: the Slurm job
    that this is; gpus: the GPUs that it was given, in the words of the launcher; submitted: the
    code that it was submitted with (`code.digest`).
    """
    leave_fast()
    resolvers.register()
    build.restrict(named)
    member, rank = sweep.Member.load(file), int(os.environ.get("SLURM_PROCID", 0))
    member.job = job or member.job  # the file is older where the job was faster than its command
    set_up_logging(quiet=rank > 0)
    if submitted not in (None, code.digest()):
        log.warning(
            "%s has other code than the command that submitted this job: in a container, pass on "
            "PYTHONPATH and bind the folder of the sweep",
            code.PACKAGE,
        )
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
        attempt(member, rank, gpus)


def attempt(member: sweep.Member, rank: int = 0, gpus: str | None = None) -> None:
    try:
        if gpus:
            _check_gpus(gpus, member.config["device"])
        cfg = build.literal(member.config)
        build.check(cfg)  # the file may be older than the code
        launch(cfg)
    except Exception as error:
        if isinstance(error, Abandoned):
            time.sleep(1)  # until the rank that failed has written why
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        collapsed = isinstance(error, Collapsed)
        member.fail(f"{kind}{error}", rank, isinstance(error, Diverged), collapsed)
        raise


def _check_gpus(gpus: str, device: str) -> None:
    """UserError where `device` would be the CPU of a job that has GPUs."""
    import torch

    if device != "cpu" and not torch.cuda.is_available():
        raise UserError(
            f"the job has {gpus}, and torch sees no GPU on {platform.node()}: try nvidia-smi and "
            "ssl-bench doctor there; to train on its CPU all the same, type device=cpu"
        )


class SlurmTask:
    """What submitit pickles, and calls once in each task of the job.

    A job ends in one of four ways:
    - Slurm warns of the time limit or of a preemption: SIGUSR2, or SIGTERM while the job counts as
      running. The run saves, then submitit's handler has the job requeued.
    - Slurm ends it (scancel, scontrol requeue): SIGTERM when the job no longer counts as running.
      The run saves; Slurm does the rest.
    - It fails: exit status 1, and srun's --kill-on-bad-exit ends the other tasks. So does one that
      was warned, and that has saved nothing new in several starts: it would come back for ever.
    - It finishes.
    """

    gpus: str | None = None  # these three of a job that was submitted by an earlier version
    seconds = float("inf")
    code: str | None = None

    def __init__(
        self, file: Path, named: Sequence[str] = (), gpus: str | None = None, seconds: float = 0
    ) -> None:
        """gpus: what the job was given, in words; seconds: from its start to Slurm's warning."""
        self.file, self.named, self.gpus, self.seconds = file, named, gpus, seconds
        self.code = code.digest()

    def __call__(self) -> None:
        from submitit import JobEnvironment

        job = JobEnvironment().job_id
        began = float(os.environ.get("SSL_BENCH_BEGAN", time.time()))
        rank = int(os.environ.get("SLURM_PROCID", 0))
        member = sweep.Member.load(self.file)
        member.job = job

        def packed() -> list[str]:
            cache = member.config["data"].get("cache")
            return store.progress(cache and os.path.expanduser(cache))

        if rank == 0:
            member.count_starts(in_vain=False, packed=packed())
            if note := os.environ.get("SSL_BENCH_VAIN"):  # Python is ready in time
                Path(note).unlink(missing_ok=True)
        if shutil.which("scontrol") is None:
            _leave_requeue_to_the_script()
        # submitit's handler: rank 0 has the job requeued and exits, the others return
        submitits = signal.getsignal(signal.SIGUSR2)

        def requeue(signum: int, frame: object) -> None:
            if rank == 0:
                whole = time.time() - began > self.seconds / 2
                if (starts := member.count_starts(whole, packed())) >= sweep.STARTS:
                    member.fail(
                        f"{starts} starts in a row, of {self.seconds / 60:.0f} min each, have "
                        "saved nothing, and packed nothing: "
                        "type a larger hydra.launcher.timeout_min"
                    )
                    sys.exit(1)
            submitits(signum, frame)

        # `Run` sets an alarm at a warning: a long step must not cost the requeue
        for signum in (signal.SIGALRM, signal.SIGUSR2):
            signal.signal(signum, requeue)
        try:
            run(self.file, self.named, job, self.gpus, self.code)
        except Interrupted as stop:
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # one requeue is enough
            warned = stop.signum == signal.SIGUSR2
            if stop.signum == signal.SIGTERM:
                warned = _counts_as_running(job)
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
    queue = sweep.queued([job])
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
