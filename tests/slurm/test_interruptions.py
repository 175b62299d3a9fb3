"""Whatever takes a job off its node, it ends as if nothing had happened, bit for bit."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY_PRETRAIN
from test_resume import assert_identical, final

from slurm.cluster import Cluster, wait
from slurm.conftest import Sweeps, ended

STEPS, AT = 60, 15
LONG = [f"epochs={STEPS // 10}", "save_every=1000"]  # nothing is saved but after a warning
PACE = {"PAUSE": "0.2"}  # s a step: no run is over before it is interrupted


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple]:
    """What a run without interruptions comes to, on one process or two."""
    results = {}

    def run(*words: str) -> tuple:
        if words not in results:
            folder = tmp_path_factory.mktemp("whole")
            command = [sys.executable, "-m", "ssl_bench.train", *TINY_PRETRAIN, *LONG, *words, "dir=run"]
            subprocess.run(command, cwd=folder, check=True, capture_output=True)
            results[words] = final(folder / "run")
        return results[words]

    return run


def assert_as_if_nothing_happened(run: Path, whole: tuple) -> None:
    state, lines = final(run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines == whole[1]
    for key in ("step", "model", "optimizer"):
        assert_identical(state[key], whole[0][key], key)


def continued_after(run: Path) -> list[int]:
    return [int(step) for step in re.findall(r"continuing after step (\d+)", (run / "log.txt").read_text())]


def requeue(slurm: Cluster, job: str) -> None:
    slurm("scontrol", "requeue", job)


def preempt(slurm: Cluster, job: str) -> None:
    """By a job of a partition that goes first. Slurm warns by USR2."""
    slurm("sbatch", "--quiet", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")


def usr2(slurm: Cluster, job: str) -> None:
    slurm("scancel", "--signal=USR2", job)


def term(slurm: Cluster, job: str) -> None:
    """As clusters do that preempt with a grace time and no other warning."""
    slurm("scancel", "--signal=TERM", job)


@pytest.mark.parametrize("interrupt", [requeue, preempt, usr2, term])
def test_a_warning(
    sweeps: Sweeps, slurm: Cluster, whole: Callable[..., tuple], interrupt: Callable[[Cluster, str], None]
) -> None:
    """Not a step is lost, and the job comes back by itself."""
    process = sweeps.start(*LONG, **PACE)
    interrupt(slurm, sweeps.wait_for_step(AT, process))
    wait(sweeps.saved)
    saved = sweeps.saved()
    assert AT <= saved < STEPS
    result = ended(process)
    assert result.returncode == 0, result.stderr
    assert continued_after(sweeps.run()) == [saved]
    assert_as_if_nothing_happened(sweeps.run(), whole())


def test_the_time_limit(sweeps: Sweeps, whole: Callable[..., tuple]) -> None:
    """submitit's own default gives up here."""
    limit = ["hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=18"]
    result = sweeps(*LONG, *limit, PAUSE="0.8")  # Slurm looks every 30 s, and warns early rather than late
    assert result.returncode == 0, result.stderr
    assert len(continued_after(sweeps.run())) == 1
    assert_as_if_nothing_happened(sweeps.run(), whole())


def test_a_step_longer_than_the_warning(sweeps: Sweeps, slurm: Cluster, whole: Callable[..., tuple]) -> None:
    """It can't be finished; the job is requeued all the same, and continues from the last checkpoint."""
    process = sweeps.start(*LONG, "save_every=10", "hydra.launcher.signal_delay_s=4", STUCK="1", **PACE)
    wait(lambda: (sweeps.folder / "stuck-once").exists(), 60)
    usr2(slurm, *slurm.jobs())
    result = ended(process)
    assert result.returncode == 0, result.stderr
    assert continued_after(sweeps.run()) == [10]
    assert_as_if_nothing_happened(sweeps.run(), whole())


def test_a_lost_node(sweeps: Sweeps, slurm: Cluster, whole: Callable[..., tuple]) -> None:
    """No warning reaches the run: what it did since the last checkpoint is done again."""
    process = sweeps.start(*LONG, "save_every=10", PAUSE="0.5")
    job = sweeps.wait_for_step(AT, process)
    slurm.kill_node()
    wait(lambda: slurm.jobs().get(job) != "RUNNING", 60)
    slurm.start_node()
    result = ended(process)
    assert result.returncode == 0, result.stderr
    assert_as_if_nothing_happened(sweeps.run(), whole())


@pytest.mark.parametrize("how", ["scancel", "kill"])
def test_ended_for_good(sweeps: Sweeps, slurm: Cluster, whole: Callable[..., tuple], how: str) -> None:
    """Not requeued, and reported; the same command continues."""
    process = sweeps.start(*LONG, "save_every=10", **PACE)
    job = sweeps.wait_for_step(AT, process)
    if how == "scancel":
        slurm("scancel", job)
    else:
        (pid,) = (int(pid) for pid in slurm("pgrep", "-f", f"^{sys.executable} -u -m submitit.core._submit {sweeps.folder}").split())
        os.kill(pid, signal.SIGKILL)
    result = ended(process)
    word = "cancelled" if how == "scancel" else "failed"
    assert result.returncode == 2
    assert f"1 of 1 members are not finished:\n{sweeps.run().name}: {word}" in result.stderr
    assert slurm.jobs() == {}
    assert word in sweeps.status()
    saved = sweeps.saved()
    assert saved >= AT if how == "scancel" else saved == 10
    result = sweeps(*LONG, "save_every=10")
    assert result.returncode == 0, result.stderr
    assert continued_after(sweeps.run()) == [saved]
    assert_as_if_nothing_happened(sweeps.run(), whole())


def test_two_tasks(sweeps: Sweeps, slurm: Cluster, whole: Callable[..., tuple]) -> None:
    """One process group, one voice, one W&B run; preempted and resumed."""
    process = sweeps.start(*LONG, "tracking=wandb", "hydra.launcher.tasks_per_node=2", **PACE)
    preempt(slurm, sweeps.wait_for_step(AT, process))
    result = ended(process)
    assert result.returncode == 0, result.stderr
    run = sweeps.run()
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2
    (saved,) = continued_after(run)
    assert saved >= AT
    assert_as_if_nothing_happened(run, whole("devices=2"))
    (first,) = sweeps.root.glob(".submitit/*/*_0_log.err")
    (second,) = sweeps.root.glob(".submitit/*/*_1_log.err")
    assert f"step {STEPS}/{STEPS}" in first.read_text()
    assert "step" not in second.read_text()
    ids = {path.name.rpartition("-")[2] for path in run.glob("wandb/offline-run-*")}
    assert ids == {(run / "wandb_id").read_text().strip()}
