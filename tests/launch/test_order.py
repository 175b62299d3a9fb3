"""In which order the members of a sweep start, and what becomes of them."""

import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

import filelock
import pytest
from commands import member
from conftest import TINY_PRETRAIN, Command

from ssl_bench.data import store
from ssl_bench.errors import Interrupted
from ssl_bench.launch.launchers import InTurn
from ssl_bench.launch.member import SlurmTask
from ssl_bench.report.sweeps import overview
from ssl_bench.runs import sweep


def of_two_stages(folder: Path, seed: int) -> tuple[sweep.Member, sweep.Member]:
    """A pretraining, and the pipeline that it is of."""
    whole = member(folder, None, f"seed={seed}")
    config = whole.config | {"dir": f"{whole.config['dir']}/pretrain"}
    first = replace(whole, file=whole.file.with_name(f"{whole.name}.pretrain.json"), config=config)
    first.save()
    return first, whole


def finish(one: sweep.Member) -> None:
    one.directory.mkdir(parents=True, exist_ok=True)
    (one.directory / "config.yaml").write_text(json.dumps(one.config))
    (one.directory / "summary.json").write_text('{"loss": 1.0}')


def test_pretrainings_come_first(tmp_path: Path) -> None:
    """An evaluation starts when its own has finished, and never if that has failed."""
    (first, rest), (other, dropped) = (of_two_stages(tmp_path / "sweep", seed) for seed in (0, 1))
    assert first.directory == rest.directory / "pretrain"
    plan = InTurn([first, rest, other, dropped])
    assert plan.next(()) is first
    assert plan.next({first.name}) is other
    assert plan.next({first.name, other.name}) is None
    finish(first)
    other.fail("out of luck")
    assert plan.next({other.name}) is rest
    assert plan.next(()) is None
    assert plan.waiting == []


def test_the_state_of_both_stages(tmp_path: Path) -> None:
    first, rest = of_two_stages(tmp_path / "sweep", 0)
    members = sweep.members(tmp_path / "sweep")
    assert sweep.with_firsts(members) == [first, rest]

    def told() -> list[str]:
        return [str(state) for state in sweep.states(sweep.with_firsts(members))]

    assert told() == ["waiting", "waiting: its pretraining is waiting"]
    both = sweep.with_firsts(members)
    assert overview(both, sweep.states(both)).startswith("1 member: 1 waiting\n")
    first.directory.mkdir(parents=True)
    with filelock.FileLock(first.lock):
        assert told() == ["running", "waiting: its pretraining is running"]
    first.fail("out of luck")
    reason = "failed: out of luck"
    assert told() == [reason, f"not reached: its pretraining is {reason}"]
    finish(first)
    assert told() == ["finished", "waiting"]
    # where the sweep is moved to, the two are found again
    (tmp_path / "sweep").rename(tmp_path / "moved")
    (moved,) = sweep.members(tmp_path / "moved")
    assert moved.first.result() == {"loss": 1.0}


def test_a_job_that_slurm_never_starts_is_not_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pretraining has failed."""
    first, rest = of_two_stages(tmp_path / "sweep", 0)
    for one, job in ((first, "7"), (rest, "8")):
        one.job = job
        one.save()
    first.fail("out of luck")
    pending = {"8": sweep.State("pending", "DependencyNeverSatisfied")}
    monkeypatch.setattr(sweep, "queued", lambda jobs: pending)
    monkeypatch.setattr(sweep, "accounted", lambda jobs: {})
    assert [state.name for state in sweep.states([first, rest])] == ["failed", "not reached"]


def test_starts_that_save_nothing_come_to_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was packed is saved, too; a preemption early in a start isn't counted."""
    one = member(tmp_path / "sweep", None, "seed=0")
    checkpoints = one.directory / "checkpoints"
    checkpoints.mkdir(parents=True)
    for key, value in {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "7"}.items():
        monkeypatch.setenv(key, value)
    requeued = []

    early = iter([False, True] * 4)

    def warned(*_: object) -> None:
        if next(early):  # before `Run` handles it
            signal.raise_signal(signal.SIGUSR2)
        raise Interrupted(signal.SIGUSR2)

    monkeypatch.setattr("ssl_bench.launch.member.run", warned)

    def submitits(*_: object) -> None:
        requeued.append(1)
        sys.exit(0)

    def start(seconds: float) -> int:
        before = {signum: signal.getsignal(signum) for signum in (signal.SIGUSR2, signal.SIGALRM)}
        signal.signal(signal.SIGUSR2, submitits)
        try:
            with pytest.raises(SystemExit) as stopped:
                SlurmTask(one.file, seconds=seconds)()
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
        return stopped.value.code

    one.job = "7"
    one.config["data"]["cache"] = str(tmp_path / "cache")
    one.save()
    assert [start(0), start(0), start(1000)] == [0, 0, 0]
    (checkpoints / "step0000000004.pt").touch()
    assert [start(0), start(0)] == [0, 0]
    packing = tmp_path / "cache" / "some.partial" / store.JOURNAL
    packing.parent.mkdir(parents=True)
    packing.write_text("a chunk\n")
    assert [start(0), start(0)] == [0, 0]
    assert one.failure is None
    assert start(0) == 1
    assert len(requeued) == 7
    assert one.failure.startswith(
        "3 starts in a row, of 0 min each, have saved nothing, and packed"
    )


SQUEUE = """#!/bin/bash
case "$1" in
    --jobs=7) exit 1 ;;  # as of a single job that it no longer knows
    --jobs=*7*) echo "7_0|RUNNING|None" ;;
esac
"""


def test_slurm_is_asked_for_the_jobs_that_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be another user's, and Slurm may have forgotten them."""
    (tmp_path / "squeue").write_text(SQUEUE)
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert sweep.queued(["7_0", "7_1"]) == {"7_0": sweep.State("running")}
    assert sweep.queued(["8"]) == {}
    assert sweep.queued(["7"]) == {"7_0": sweep.State("running")}


def test_the_last_words_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own error, and not how srun puts it; and what to type, where Slurm ended it."""
    one = member(tmp_path / "sweep", None, "seed=0")
    one.job = "7"
    folder = tmp_path / "sweep" / ".submitit" / "7"
    folder.mkdir(parents=True)
    log = (
        "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0.\nsrun: error: task 0: Killed\n"
    )
    (folder / "7_0_log.err").write_text(log)
    monkeypatch.setattr(sweep, "queued", lambda jobs: {})
    monkeypatch.setattr(sweep, "accounted", lambda jobs: {"7": "out_of_memory"})
    (state,) = sweep.states([one])
    assert state.name == "out_of_memory"
    advice, said, see = state.note.split("; ")
    assert advice == "type a larger hydra.launcher.mem_gb"
    assert said == "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0."
    assert see == f"see {folder}"
    # the script of the job has seen a status, and Slurm only that of the script
    monkeypatch.setattr(sweep, "accounted", lambda jobs: {"7": "failed"})
    assert sweep.states([one])[0] == sweep.State("failed", state.note)


def test_a_failure_belongs_to_the_job_that_failed(tmp_path: Path) -> None:
    one = member(tmp_path / "sweep", None, "seed=0")
    one.job = "7"
    one.fail("out of luck")
    one.job = "8"
    assert one.failure is None


@pytest.mark.slow
def test_two_stages_here(ssl_bench: Command, tmp_path: Path) -> None:
    """A failed pretraining costs its own evaluations alone; mistaken rows are told first."""
    command = ["-m", *TINY_PRETRAIN, "stage=pipeline", "augmentation=digits", "epochs=1"]
    rows = "stage.rows={pretrained: ['augmentation.image_sise=8']}"
    refused = ssl_bench(*command, "seed=0,1", rows)
    assert refused.returncode == 2
    assert "augmentation.image_sise: no such key" in refused.stderr
    assert not list(tmp_path.glob("runs/sweeps/*/*/pretrain"))
    command += ["stage.protocol=['epochs=1','stage.labels_per_class=10','batch_size=50']"]
    result = ssl_bench(*command, "accumulate=3,2")
    assert result.returncode == 2
    begins = "not reached: its pretraining is failed: accumulate=3 does not divide"
    assert begins in result.stderr.splitlines()[-1]
    assert "1 of 2 members are not finished" in result.stderr
    header = (tmp_path / "runs/sweeps/pipeline/table.md").read_text().splitlines()[0]
    assert all(f" {key} " in header for key in ("pretrained top-1", "probe_top1", "n"))
