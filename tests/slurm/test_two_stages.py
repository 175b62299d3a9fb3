"""Pipelines on a real Slurm: pretrainings, and evaluations that wait for them."""

import csv
import json
import re
from pathlib import Path

import pytest
from patience import wait

from slurm.cluster import Cluster
from slurm.conftest import Sweeps, ended

TWO = ["stage=pipeline", "augmentation=digits", "epochs=2", "save_every=4"]
TWO += ["stage.protocol=['epochs=1','stage.labels_per_class=10','batch_size=50']"]
TWO += ["hydra.launcher.evaluation={cpus_per_task: 2}"]
GRIDS = [
    ["seed=0,1"],
    pytest.param(
        ["seed=0,1", "method.temperature=0.1,0.3", "optimizer.base_lr=0.1,0.2"],
        marks=pytest.mark.exhaustive,
    ),
]


@pytest.mark.parametrize("grid", GRIDS, ids=["2", "2x2x2"])
def test_evaluations_wait_for_their_pretraining(
    sweeps: Sweeps, slurm: Cluster, grid: list[str]
) -> None:
    """One pretraining fails, another is preempted and requeued; the same command does the rest."""
    sweeps.root = sweeps.root.with_name("pipeline")
    before = len(ended_jobs(slurm))
    process = sweeps.start(*TWO, *grid, FAIL="one", PAUSE="0.3")
    wait(lambda: list(sweeps.root.glob(".members/*.failed")))
    (failed,) = sweeps.root.glob(".members/*.failed")
    unlucky = failed.stem.removesuffix(".pretrain")
    assert failed.stem != unlucky
    wait(lambda: "FAILED" in [state for _, state, _ in ended_jobs(slurm)[before:]])

    def begun() -> list[Path]:
        logs = sweeps.root.glob("*/pretrain/metrics.jsonl")
        return [log.parents[1] for log in logs if 5 <= log.read_bytes().count(b"\n") < 15]

    wait(begun)
    # a job that goes first, and for which all but one core of those that are in use are too few
    used = slurm("squeue", "-h", "-t", "RUNNING", "-o", "%C").split()
    cores = 16 - sum(map(int, used)) + 1
    first = ["--partition=high", f"--cpus-per-task={cores}", "--output=/dev/null"]
    slurm("sbatch", "--quiet", *first, "--wrap=sleep 1")
    wait(lambda: list(sweeps.root.glob("*/pretrain/checkpoints/step*")))
    result = ended(process)
    assert result.returncode == 2
    told = [line for line in result.stderr.splitlines() if line.startswith(unlucky)]
    assert len(told) == 1
    reason = "not reached: its pretraining is failed: RuntimeError: out of luck"
    assert told[0].startswith(f"{unlucky}: {reason}")
    rows = sweeps.status().splitlines()
    shown = [line for line in rows if line.startswith(f"| {unlucky[-8:]} ")]
    assert ["failed" in shown[0], "not reached" in shown[1]] == [True, True]
    job = json.loads((sweeps.root / ".members" / f"{unlucky}.json").read_text())["job"]
    assert job not in slurm.jobs()  # Slurm has dropped it

    again = sweeps(*TWO, *grid)
    assert again.returncode == 0, again.stderr
    members = sweeps.records()
    assert f"{len(members) - 1} finished, 0 under way, 1 to start" in again.stderr
    jobs = ended_jobs(slurm)[before:]
    done = [cores for _, state, cores in jobs if state == "COMPLETED"]
    assert sorted(done) == sorted([*(["1"] * len(members)), *(["2"] * len(members)), str(cores)])
    logs = [*sweeps.root.glob("*/log.txt"), *sweeps.root.glob("*/*/log.txt")]
    ends = [re.findall(rf"finished: \S*{log.parent.name}\n", log.read_text()) for log in logs]
    assert {len(end) for end in ends} == {1}  # nothing ran twice
    requeued = [log for log in logs if "continuing after step" in log.read_text()]
    assert requeued
    with open(sweeps.root / "table.csv") as file:
        header, *rows = csv.reader(file)
    assert {"pretrained top-1 mean", "random init top-1 mean", "probe_top1 mean"} <= {*header}
    assert [row[-2:] for row in rows] == [["2", "2"]] * (len(members) // 2)


def ended_jobs(slurm: Cluster) -> list[list[str]]:
    """[job, state, cores] of each."""
    lines = slurm("sacct", "-n", "-X", "-P", "-o", "JobID,State,AllocCPUS").splitlines()
    return [[job, state.split()[0], cores] for job, state, cores in (x.split("|") for x in lines)]
