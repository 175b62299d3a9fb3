"""Whatever takes a job off its node, it ends as if nothing had happened, bit for bit."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from compared import assert_identical, final
from conftest import TINY_PRETRAIN
from patience import wait

from slurm.cluster import Cluster
from slurm.conftest import Sweeps, ended

STEPS, AT = 60, 15
LONG = [
    f"epochs={STEPS // 10}",
    "save_every=1000",
    "eval_every=0",
]  # nothing is saved but after a warning
PACE = {"PAUSE": "0.2"}  # s a step: no run is over before it is interrupted


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple]:
    """What a run without interruptions comes to, on one process or two."""
    results = {}

    def run(*words: str) -> tuple:
        if words not in results:
            folder = tmp_path_factory.mktemp("whole")
            command = [
                sys.executable,
                "-m",
                "ssl_bench",
                *TINY_PRETRAIN,
                *LONG,
                *words,
                "dir=run",
            ]
            # as in the jobs: sums differ with the number of threads
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run(command, cwd=folder, check=True, capture_output=True, env=env)
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
    return [
        int(step)
        for step in re.findall(r"continuing after step (\d+)", (run / "log.txt").read_text())
    ]


# -- the ways of being interrupted: each starts a sweep of one member in its own folder, and sees it
# through


def warned_in_every_way(sweeps: Sweeps, slurm: Cluster) -> None:
    """One after the other: before Python is ready to handle it, by a requeue, by Slurm's warning,
    and as clusters do that preempt with a grace time and no other warning.
    """
    process = sweeps.start(*LONG, **PACE, PACED_STARTS="4")
    wait(lambda: slurm.answers("pgrep", "-f", sweeps.task))
    wait(sweeps.job)
    slurm("scancel", "--signal=USR2", sweeps.job())
    saved = [0]
    ways = (["scontrol", "requeue"], ["scancel", "--signal=USR2"], ["scancel", "--signal=TERM"])
    for interrupt in ways:
        slurm(*interrupt, sweeps.wait_for_step(saved[-1] + 10, process))
        wait(lambda: sweeps.saved() > saved[-1])
        saved.append(sweeps.saved())
    assert saved[-1] < STEPS
    result = ended(process)
    assert result.returncode == 0, result.stderr
    assert continued_after(sweeps.run()) == saved[1:]  # not a step is lost
    # it was requeued each time
    assert len(slurm("sacct", "-n", "-D", "-X", "-j", sweeps.job()).splitlines()) == 1 + len(saved)


def usr2_to_all_processes(sweeps: Sweeps, slurm: Cluster) -> None:
    """Of a task that has started its ranks itself."""
    warned(sweeps, lambda job: slurm("scancel", "--signal=USR2", job), "devices=2")


def warned(sweeps: Sweeps, interrupt: Callable[[str], object], *words: str) -> None:
    """Not a step is lost, and the job comes back by itself."""
    process = sweeps.start(*LONG, *words, **PACE)
    interrupt(sweeps.wait_for_step(AT, process))
    wait(sweeps.saved)
    saved = sweeps.saved()
    assert AT <= saved < STEPS
    result = ended(process)
    assert result.returncode == 0, result.stderr
    assert continued_after(sweeps.run()) == [saved]


def at_the_time_limit(sweeps: Sweeps, slurm: Cluster) -> None:
    """submitit's own default gives up here."""
    # Slurm looks every 30 s, and warns early rather than late: 72 to 102 s after the start. With a
    # limit of one minute it was 12 to 42 s, and a busy machine made no step in that time.
    limit = ["hydra.launcher.timeout_min=2", "hydra.launcher.signal_delay_s=18"]
    result = sweeps(*LONG, *limit, PAUSE="1.9")
    assert result.returncode == 0, result.stderr
    assert continued_after(sweeps.run())  # more than once, where the machine is slow


def in_a_step_longer_than_the_warning(sweeps: Sweeps, slurm: Cluster) -> None:
    """It can't be finished; the job is requeued all the same, and continues from the last
    checkpoint.
    """
    process = sweeps.start(
        *LONG, "save_every=10", "hydra.launcher.signal_delay_s=4", STUCK="1", **PACE
    )
    wait(lambda: (sweeps.folder / "stuck-once").exists())
    slurm("scancel", "--signal=USR2", sweeps.job())
    result = ended(process)
    assert result.returncode == 0, result.stderr
    assert continued_after(sweeps.run()) == [10]


def killed_and_cancelled(sweeps: Sweeps, slurm: Cluster) -> None:
    def kill(job: str) -> None:
        os.kill(int(slurm("pgrep", "-f", sweeps.task)), signal.SIGKILL)

    assert ended_for_good(sweeps, slurm, AT, kill, "failed") == 10
    saved = ended_for_good(sweeps, slurm, AT + 10, lambda job: slurm("scancel", job), "cancelled")
    assert saved >= AT + 10
    result = sweeps(*LONG, "save_every=10")
    assert result.returncode == 0, result.stderr
    assert continued_after(sweeps.run()) == [10, saved]


def ended_for_good(
    sweeps: Sweeps, slurm: Cluster, step: int, end: Callable[[str], object], word: str
) -> int:
    """Not requeued, and reported; the same command continues after the step that is returned."""
    process = sweeps.start(*LONG, "save_every=10", **PACE)
    job = sweeps.wait_for_step(step, process)
    end(job)
    result = ended(process)
    assert result.returncode == 2
    assert re.search(
        rf"1 of 1 members are not finished; .*:\n{sweeps.run().name}: {word}", result.stderr
    )
    assert job not in slurm.jobs()
    assert f"| {word} " in sweeps.status()
    return sweeps.saved()


def test_interrupted(slurm: Cluster, tmp_path: Path, whole: Callable[..., tuple]) -> None:
    """Side by side, since they spend most of their time waiting."""
    ways = (
        at_the_time_limit,
        warned_in_every_way,
        killed_and_cancelled,
        usr2_to_all_processes,
        in_a_step_longer_than_the_warning,
    )
    with ThreadPoolExecutor(4) as pool:
        sweeps = {way: Sweeps(slurm, tmp_path / way.__name__) for way in ways}
        outcomes = [pool.submit(way, sweeps[way], slurm) for way in ways]
    for outcome, way in zip(outcomes, ways, strict=True):
        outcome.result()
        words = ("devices=2",) if way is usr2_to_all_processes else ()
        assert_as_if_nothing_happened(sweeps[way].run(), whole(*words))


def test_a_lost_node(sweeps: Sweeps, slurm: Cluster, whole: Callable[..., tuple]) -> None:
    """No warning reaches the run: what it did since the last checkpoint is done again."""
    # the task outlives its daemon: not to its end
    process = sweeps.start(*LONG, "save_every=10", PAUSE="0.8")
    job = sweeps.wait_for_step(AT, process)
    slurm.kill_node()
    wait(lambda: slurm.jobs().get(job) != "RUNNING")
    slurm.start_node()
    result = ended(process)
    assert result.returncode == 0, result.stderr
    (saved,) = continued_after(sweeps.run())
    assert 10 <= saved < STEPS
    assert_as_if_nothing_happened(sweeps.run(), whole())


def test_two_tasks(sweeps: Sweeps, slurm: Cluster, whole: Callable[..., tuple]) -> None:
    """One process group, one voice, one W&B run; preempted by a job of a partition that goes first,
    and resumed.
    """
    first = [
        "sbatch",
        "--quiet",
        "--partition=high",
        "--exclusive",
        "--output=/dev/null",
        "--wrap=sleep 1",
    ]
    warned(sweeps, lambda job: slurm(*first), "tracking=wandb", "hydra.launcher.tasks_per_node=2")
    run = sweeps.run()
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2
    assert_as_if_nothing_happened(run, whole("devices=2"))
    (first,) = sweeps.root.glob(".submitit/*/*_0_log.err")
    (second,) = sweeps.root.glob(".submitit/*/*_1_log.err")
    assert f"step {STEPS}/{STEPS}" in first.read_text()
    assert "step" not in second.read_text()
    ids = {path.name.rpartition("-")[2] for path in run.glob("wandb/offline-run-*")}
    assert ids == {(run / "wandb_id").read_text().strip()}
