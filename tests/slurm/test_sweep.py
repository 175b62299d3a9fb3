"""Sweeps on a real Slurm: what is submitted, what fails, what is done again, and the table at the
end.
"""

import csv
import json
import re
import shutil
import signal
import statistics
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from patience import wait

from slurm.cluster import Cluster
from slurm.conftest import CLUSTER, Sweeps, ended
from ssl_bench.runs import code, halving

GRID = ["epochs=1", "seed=0,1", "method.temperature=0.1,0.3"]


def accounted(slurm: Cluster) -> list[str]:
    """How jobs ended, the latest last: COMPLETED, CANCELLED by 0, ..."""
    return slurm("sacct", "-n", "-X", "-P", "-o", "State").splitlines()


def test_a_grid(sweeps: Sweeps, slurm: Cluster) -> None:
    """2 x 2 seeds; one member raises, the others finish, and the same command does only that
    one again.
    """
    before = len(accounted(slurm))
    result = sweeps(*GRID, FAIL="one")
    assert result.returncode == 2
    assert sorted(accounted(slurm)[before:]) == ["COMPLETED"] * 3 + ["FAILED"]
    names = {path.stem for path in sweeps.root.glob(".members/*.json")}
    (unlucky,) = names - {path.parent.name for path in sweeps.root.glob("*/summary.json")}
    assert len(names) == 4
    *_, summary, reason = result.stderr.splitlines()
    assert summary.startswith("ssl-bench: 1 of 4 members are not finished; ")
    said, _, logs = reason.partition("; see ")
    assert said == f"{unlucky}: failed: RuntimeError: out of luck"
    (log,) = (sweeps.folder / logs).glob("*_0_log.err")
    assert 'raise RuntimeError("out of luck")' in log.read_text()  # the traceback
    shown = sweeps.status()
    assert re.search(rf"\| {unlucky[-8:]} .*\| failed +\|", shown)
    assert f"failed: RuntimeError: out of luck\n  {unlucky[-8:]}\n" in shown
    assert (sweeps.root / "table.md").read_text().count("1 of 2") == 1

    again = sweeps(*GRID)
    assert again.returncode == 0, again.stderr
    assert "3 finished, 0 under way, 1 to start" in again.stderr
    assert accounted(slurm)[before + 4 :] == ["COMPLETED"]
    assert_table_is_right(sweeps.root)
    table = (sweeps.root / "table.md").read_text()
    assert table in again.stdout
    assert table in sweeps.status()

    nothing = sweeps(*GRID)
    assert nothing.returncode == 0
    assert len(accounted(slurm)) == before + 5


def assert_table_is_right(root: Path) -> None:
    """Against the run directories themselves."""
    measured: dict[str, list[float]] = {}
    for summary in root.glob("*/summary.json"):
        config = yaml.safe_load((summary.parent / "config.yaml").read_text())
        temperature = str(config["method"]["temperature"])
        measured.setdefault(temperature, []).append(json.loads(summary.read_text())["probe_top1"])
    assert sorted(map(len, measured.values())) == [2, 2]
    with open(root / "table.csv") as file:
        header, *rows = csv.reader(file)
    keys = ["method.temperature", "probe_top1 mean", "probe_top1 std"]
    assert header == [*keys, "images_per_second", "memory_gb", "finished", "members"]
    table = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in (root / "table.md").read_text().splitlines()
    ]
    means = [float(row[1]) for row in rows]
    assert means == sorted(means, reverse=True)
    for temperature, mean, std, speed, _, *counts in rows:
        values = measured.pop(temperature)
        assert float(mean) == pytest.approx(statistics.mean(values))
        assert float(std) == pytest.approx(statistics.stdev(values))
        assert float(speed) > 0
        assert counts == ["2", "2"]
        (shown,) = (cells for cells in table if cells[0] == temperature)
        assert shown[1:3] == [
            f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}",
            "2",
        ]


def test_what_sbatch_refuses(sweeps: Sweeps) -> None:
    result = sweeps("hydra.launcher.partition=nowhere")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "invalid partition specified: nowhere" in result.stderr.splitlines()[-1]
    assert "| failed |" in sweeps.status()  # and doesn't wait for ever


def test_who_stops_waiting_loses_nothing(sweeps: Sweeps, slurm: Cluster) -> None:
    """The jobs go on, and the same command waits for them."""
    process = sweeps.start("epochs=1", "+hydra.launcher.additional_parameters.hold=true")
    assert any("submitted: " in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    stopped = ended(process)
    assert stopped.returncode == 130
    assert stopped.stderr.splitlines()[-1].endswith(f"this ends them: scancel {sweeps.job()}")
    slurm("scontrol", "release", sweeps.job())
    again = sweeps("epochs=1", "+hydra.launcher.additional_parameters.hold=true")
    assert again.returncode == 0, again.stderr
    assert "0 to start" in again.stderr


@pytest.mark.exhaustive
def test_halving(sweeps: Sweeps, slurm: Cluster) -> None:
    """Two at once; its command is killed, and the same one follows the jobs that went on. Nobody
    is sent to a rung twice.
    """
    before = len(accounted(slurm))
    grid = ["epochs=4", "eval_every=9", "seed=0,1,2,3", "hydra.launcher.max_running=2"]
    grid += [f"{halving.KEY}.metric=knn_top1", f"{halving.KEY}.rungs=[0.25,0.5]"]
    refused = sweeps(*grid, "hydra.launcher.wait=false")
    assert "wait=false: hydra.launcher.halving decides whenever" in refused.stderr

    def events() -> list[dict]:
        file = sweeps.root / halving.FILE
        lines = file.read_text().splitlines()[1:] if file.exists() else []
        return [json.loads(line) for line in lines]

    def ran() -> int:
        """Of the jobs; what was submitted as the command was killed, and not yet written down, is
        cancelled by the next one.
        """
        ended = [state for state in accounted(slurm)[before:] if not state.startswith("CANCELLED")]
        return len(ended)

    process = sweeps.start(*grid, PAUSE="1")
    wait(lambda: any("came_to" in event for event in events()) and slurm.jobs())
    process.kill()
    process.wait()
    again = sweeps(*grid)
    assert again.returncode == 0, again.stderr
    sent = [(one["member"], one["sent_to"]) for one in events() if "sent_to" in one]
    came = {(one["member"], one["came_to"]): one["value"] for one in events() if "came_to" in one}
    assert len(sent) == len({*sent}) == len(came) == ran()
    assert len(events()) == 2 * len(sent)
    rungs = [{name: came[name, at] for name, at in came if at == rung} for rung in (1, 2, 3)]
    assert len(rungs[0]) == 4
    for low, high in pairwise(rungs):  # who came first may have been sent on by a guess
        assert max(low.values()) in [low[name] for name in high]
    states = sweeps.status()
    assert states.count("| finished |") == len(rungs[2])
    assert states.count("| paused ") == 4 - len(rungs[2])

    nothing = sweeps(*grid)
    assert nothing.returncode == 0
    assert ran() == len(sent)


def test_any_rank_can_fail(sweeps: Sweeps, slurm: Cluster) -> None:
    result = sweeps("epochs=1", "hydra.launcher.tasks_per_node=2", FAIL="rank1")
    assert result.returncode == 2
    assert "failed: RuntimeError: out of luck" in result.stderr
    assert accounted(slurm)[-1] == "FAILED"


def test_what_is_queued_stays_as_it_was_composed(sweeps: Sweeps, slurm: Cluster) -> None:
    """Neither a key nor what a pipeline composes later follows a YAML file that is edited while the
    job is pending, nor do its jobs have a package that is.
    """
    package = sweeps.folder / "checkout" / "ssl_bench"
    shutil.copytree(code.PACKAGE, package)
    checkout = {"PYTHONPATH": str(package.parent)}
    for group, text in {
        "method": "# @package _global_\ndefaults: [moco_v2]\nmethod: {temperature: 0.15}\n",
        "augmentation": "defaults: [none]\nmean: [0.25, 0.25, 0.25]\n",
    }.items():
        (sweeps.folder / "conf" / group).mkdir(parents=True)
        (sweeps.folder / "conf" / group / "mine.yaml").write_text(text)
    command = ["method=mine", "stage=pipeline", "epochs=1", "metric=random init top-1"]
    command += ["stage.protocol=['augmentation=mine','epochs=1','stage.test_resize=1.0']"]
    command += ["hydra.launcher.wait=false", "+hydra.launcher.additional_parameters.hold=true"]
    sweeps.root = sweeps.root.with_name("pipeline")

    launcher = ["--config-dir=conf", *CLUSTER]  # argparse wants it first
    submitted = sweeps(*command, launcher=launcher, **checkout)
    assert submitted.returncode == 0, submitted.stderr
    assert set(slurm.jobs().values()) == {"PENDING"}
    assert "pending" in sweeps.status()
    for file in sweeps.folder.glob("conf/*/mine.yaml"):
        file.write_text(file.read_text().replace("0.15", "0.9").replace("0.25", "0.75"))
    again = sweeps(*command, launcher=launcher, **checkout)
    assert "0 finished, 1 under way, 0 to start" in again.stderr
    for module in ("launch/member.py", "training/engine.py", "stages/pipeline.py"):
        (package / module).write_text("raise SystemExit('edited')\n")
    jobs = slurm.jobs()
    assert len(jobs) == 2  # the pretraining, and the evaluations
    slurm("scontrol", "release", *jobs)
    wait(lambda: not slurm.jobs())
    assert "finished" in sweeps.status()
    run = sweeps.run()
    assert (
        yaml.safe_load((run / "pretrain" / "config.yaml").read_text())["method"]["temperature"]
        == 0.15
    )
    evaluation = yaml.safe_load((run / "random-init" / "seed0" / "config.yaml").read_text())
    assert evaluation["augmentation"]["mean"] == [0.25, 0.25, 0.25]
