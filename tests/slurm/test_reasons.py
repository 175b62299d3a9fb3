"""What stage=status and the command say of a job that Slurm, or its own beginning, has ended."""

import json
import os
import re
import resource
import signal
from itertools import accumulate

import pytest
from patience import wait

from slurm.cluster import Cluster
from slurm.conftest import Sweeps, ended
from ssl_bench.runs.sweep import STARTS

BEGINNINGS = {
    "setup": (
        ["hydra.launcher.setup=[cd,'module load cuda']"],
        "hydra.launcher.setup failed (status 127): module load cuda",
    ),
    "env_script": (
        ["hydra.launcher.env_script='source nowhere.sh'"],
        "hydra.launcher.env_script failed (status 1): source nowhere.sh",
    ),
    "python": (["hydra.launcher.python=/nowhere/python"], "No such file or directory"),
    "container": (
        ["hydra.launcher.container=[/no/such/program]"],
        "/no/such/program: No such file or directory",
    ),
    "container-3": (
        ["hydra.launcher.container=[bash,-c,'echo no image >&2; exit 3']"],
        "no image",
    ),
}


@pytest.mark.parametrize(
    "which",
    [
        pytest.param(
            which, marks=[] if which in ("env_script", "container-3") else pytest.mark.exhaustive
        )
        for which in BEGINNINGS
    ],
)
def test_a_beginning_that_fails(sweeps: Sweeps, which: str) -> None:
    words, reason = BEGINNINGS[which]
    result = sweeps("epochs=1", *words)
    assert result.returncode == 2
    told = result.stderr.splitlines()[-1]
    assert ": failed: " in told
    assert reason in told
    assert reason in " ".join(sweeps.status().split())
    assert not (sweeps.run() / "metrics.jsonl").exists()


def test_a_job_that_needs_more_memory_than_it_asked_for(sweeps: Sweeps) -> None:
    """And the memory may be a fraction of a gigabyte."""
    result = sweeps("epochs=1", "hydra.launcher.mem_gb=0.5", GREEDY="1")
    assert result.returncode == 2
    (script,) = sweeps.root.glob(".submitit/*/*_submission.sh")
    assert "#SBATCH --mem=512MB" in script.read_text().splitlines()
    # without cgroups, this Slurm has the word for it in its log alone
    said = r"failed: type a larger hydra\.launcher\.mem_gb; slurmstepd.*: Exceeded job memory limit"
    assert re.search(said, result.stderr.splitlines()[-1])
    assert re.search(said, " ".join(sweeps.status().split()))


@pytest.mark.exhaustive
def test_starts_that_save_nothing(sweeps: Sweeps, slurm: Cluster) -> None:
    """The images aren't packed within a job's time, nor in the next one: that comes to an end."""
    # Slurm looks every 30 s, and warns the job of a minute when it looks first: within 30 s, and
    # some 20 s after the start of one that it has just requeued.
    words = ["data=own", "data.name=endless", "data._target_=mine.Endless", "data.image_size=16"]
    limit = ["hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=30"]
    result = sweeps("epochs=1", *words, *limit, SSL_BENCH_CACHE=f"{sweeps.folder}/cache")
    assert result.returncode == 2
    reason = f"{STARTS} starts in a row, of .* min each, have saved nothing"
    advice = "type a larger hydra.launcher.timeout_min"
    assert re.search(rf": failed: {reason}.*: {advice}; see ", result.stderr.splitlines()[-1])
    assert re.search(rf"failed: {reason}.*: {advice}", " ".join(sweeps.status().split()))
    job = sweeps.job()
    assert job not in slurm.jobs()
    starts = slurm("sacct", "-n", "-D", "-X", "-P", "-o", "State", "-j", job).split()
    assert len(starts) >= STARTS  # one that was warned at once doesn't count
    assert [starts[-1], {*starts[:-1]}] == ["FAILED", {"REQUEUED"}]


def test_a_gpu_that_torch_does_not_see(sweeps: Sweeps) -> None:
    """The job isn't trained on the CPU in silence; device=cpu is how one asks for that."""
    result = sweeps("epochs=1", "hydra.launcher.gres=gpu:1")
    assert result.returncode == 2
    assert "failed: the job has gres=gpu:1, and torch sees no GPU on " in result.stderr


# stands before the real one, which it calls late
SLOW = """#!/bin/bash
touch {folder}/asked
until [ -e {folder}/go ]; do sleep 0.1; done
exec /usr/bin/sbatch "$@"
"""


@pytest.fixture
def slow(sweeps: Sweeps) -> str:
    """A PATH on which sbatch is slow."""
    (sweeps.folder / "bin").mkdir()
    (sweeps.folder / "bin" / "sbatch").write_text(SLOW.format(folder=sweeps.folder))
    (sweeps.folder / "bin" / "sbatch").chmod(0o755)
    return f"{sweeps.folder}/bin:{sweeps.slurm.env['PATH']}"


HOLD = "+hydra.launcher.additional_parameters.hold=true"


def test_ctrl_c_while_sbatch_is_slow(sweeps: Sweeps, slurm: Cluster, slow: str) -> None:
    """Its job is known all the same."""
    process = sweeps.start(HOLD, PATH=slow)
    wait((sweeps.folder / "asked").exists)
    process.send_signal(signal.SIGINT)
    (sweeps.folder / "go").touch()
    stopped = ended(process)
    assert stopped.returncode == 130
    assert stopped.stderr.splitlines()[-1].endswith(f"this ends them: scancel {sweeps.job()}")
    assert [*slurm.jobs()] == [sweeps.job()]
    slurm("scancel", sweeps.job())


# in place of a Python that trains: how many of them run at once
STUB = """#!/bin/bash
echo +1 >> {folder}/log
sleep 0.2
echo -1 >> {folder}/log
"""


@pytest.mark.exhaustive
def test_sixty_members_and_a_command_killed_while_it_submits(
    sweeps: Sweeps, slurm: Cluster, slow: str
) -> None:
    """What sbatch has submitted behind its back is cancelled; each member has one job, in one array
    of which two run at once.
    """
    (sweeps.folder / "python").write_text(STUB.format(folder=sweeps.folder))
    (sweeps.folder / "python").chmod(0o755)
    grid = ["seed=range(0,30)", "method.temperature=0.1,0.2", "hydra.launcher.wait=false"]
    grid += [f"hydra.launcher.python={sweeps.folder}/python", "hydra.launcher.max_running=2"]
    process = sweeps.start(*grid, HOLD, PATH=slow)
    wait((sweeps.folder / "asked").exists)
    os.kill(process.pid, signal.SIGKILL)
    (sweeps.folder / "go").touch()
    wait(slurm.jobs)
    left = {*slurm.jobs()}
    assert len(left) == 60
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    again = sweeps(*grid)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert again.returncode == 0, again.stderr
    assert after.ru_utime - before.ru_utime < 20  # s, whatever else the machine does
    assert "cancelled, left by a command that was killed: " in again.stderr
    jobs = {json.loads(file.read_text())["job"] for file in sweeps.root.glob(".members/*.json")}
    assert len(jobs) == 60
    assert not left & jobs
    assert len({job.partition("_")[0] for job in jobs}) == 1
    wait(lambda: not slurm.jobs())
    steps = [int(line) for line in (sweeps.folder / "log").read_text().splitlines()]
    assert steps.count(1) == 60
    assert max(accumulate(steps)) == 2


def test_two_commands_at_once(sweeps: Sweeps, slurm: Cluster, slow: str) -> None:
    """The second one waits for what the first has submitted, and submits nothing."""
    grid = [HOLD, "seed=0,1,2", "hydra.launcher.wait=false"]
    first = sweeps.start(*grid, PATH=slow)
    wait((sweeps.folder / "asked").exists)
    second = sweeps.start(*grid)
    told = "another command is starting members of pretrain: waiting for it"
    assert any(told in line for line in second.stderr)
    (sweeps.folder / "go").touch()
    later = ended(second)
    assert ended(first).returncode == later.returncode == 0
    assert "0 finished, 3 under way, 0 to start" in later.stderr
    assert len(slurm.jobs()) == 3
    slurm("scancel", *slurm.jobs())
