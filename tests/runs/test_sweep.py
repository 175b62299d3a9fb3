"""Sweeps on this machine: names, tables, several members at once, and an optimiser that chooses
them.
"""

import csv
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import pytest
import yaml
from commands import compose, member
from conftest import TINY_PRETRAIN, Command
from patience import PATIENCE, count_lines, wait

from ssl_bench.data import synthetic
from ssl_bench.errors import UserError
from ssl_bench.launch import launchers
from ssl_bench.launch.process import launch
from ssl_bench.launch.slurm import _stage
from ssl_bench.report import sweeps
from ssl_bench.runs import code, sweep

# Says what it was given, and takes its time.
MINE = """
import os, time
from pathlib import Path
from ssl_bench.methods.moco import MoCo

class Mine(MoCo):
    def forward(self, views, labels=None):
        given = [os.environ["CUDA_VISIBLE_DEVICES"], os.environ["OMP_NUM_THREADS"]]
        given += sorted(os.sched_getaffinity(0))
        Path(f"given-{os.getpid()}").write_text(" ".join(map(str, given)))
        time.sleep(float(os.environ.get("PAUSE", 0)))
        return super().forward(views, labels)
"""


def test_name_says_what_not_where() -> None:
    name = sweep.name(["method=moco_v2", "seed=1"])
    assert name.startswith("method-moco_v2-seed-1-")
    where = [
        "launcher=slurm",
        "sweep=mine",
        "tracking=wandb",
        "tracking.mode=offline",
        "data.root=/x",
        "save_every=9",
    ]
    assert sweep.name(["seed=1", *where, "method=moco_v2"]).endswith(name[-8:])
    assert sweep.name(["method=moco_v2", "seed=2"])[-8:] != name[-8:]
    long = sweep.name([f"method.key{i}=a/b c" for i in range(50)])
    assert re.fullmatch(r"\w[\w.-]{10,99}", long)


def test_what_is_swept_is_in_a_name_that_is_cut() -> None:
    """Also where it is typed first, and where it is a long value; names with room stay as typed."""
    shared = ["optimizer.weight_decay=0.000123", "schedule.warmup_epochs=1", "batch_size=128"]
    shared += ["method.temperature=0.123456", "data.image_size=12"]
    for seed in ("seed=1", "seed=2"):
        words = sweep.swept_last([seed, *shared], shared)
        assert words == [*shared, seed]
        assert sweep.name(words)[:-9].endswith(seed.replace("=", "-"))
        assert sweep.name(words)[-8:] == sweep.name([seed, *shared])[-8:]
        assert sweep.swept_last([seed, "batch_size=128"], shared) == [seed, "batch_size=128"]
        # other commands of the sweep may have another method
        other = [*shared[:2], "method=simclr", *shared[2:]]
        assert "-method-simclr-seed-" in sweep.name(sweep.swept_last([seed, *other], other))
        twice = [seed, *shared, "seed=3"]
        assert sweep.swept_last(twice, [*shared, "seed=3"]) == twice
    rates = ",".join(f"{0.1 * i:.6f}" for i in range(1, 20))
    long = [sweep.name([f"stage.lrs=[{first},{rates},{last}]"]) for first, last in ("37", "73")]
    assert [name[:6] for name in long] == ["lrs--3", "lrs--7"]
    assert [name[-10] for name in long] == ["7", "3"]
    assert max(map(len, long)) <= sweep.NAMED + 9


def overview_table(members: list[sweep.Member], metric: str | None = None) -> str:
    return sweeps.overview(members, sweep.states(members), metric).split("\n\n")[1]


def test_many_members_fit_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts, who is who, where it runs and for how long, and equal reasons once."""
    monkeypatch.chdir(tmp_path)
    long = ["data.root=/a/" + 30 * "long", "optimizer.base_lr=0.3", "stage=pretrain"]
    several = [
        member(tmp_path / "sweep", None, *long, f"method.temperature={rate}", f"seed={seed}")
        for rate in (0.1, 0.2)
        for seed in range(12)
    ]
    for one in several[:2]:
        one.directory.mkdir()
        (one.directory / "environment.json").write_text('{"host": "node-7"}')
        (one.directory / "metrics.jsonl").write_text(
            '{"step": 500, "epoch": 0.5, "loss": 2.5, "images_seen": 100, "images_per_second": 2}\n'
        )
    for one in several[2:9]:
        one.fail(f"{30 * 'the disk is full, '}and so on")
        one.file.with_suffix(".log").touch()
    several[0].job = "123_4"
    states = sweep.states(several)
    states[:2] = [sweep.State("running"), sweep.State("running")]
    text = sweeps.overview(several, states)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    assert lines[0] == "24 members: 2 running, 7 failed, 15 waiting"
    first = several[0].name[-8:]
    heads, shown, *_, last = cells(text.split("\n\n")[1])
    told = ["temperature", "seed", "state", "step", "loss", "job", "node", "left"]
    assert heads == ["", *told]
    told = ["0.1", "0", "running", "500/2,000", "2.5", "123_4", "node-7", "0:02:30"]
    assert shown == [first, *told]
    assert last[1:3] == ["0.2", "11"]  # not after 1
    assert " ".join(text.split()).count("the disk is full") == 30
    assert lines[-2] == "  " + ", ".join(one.name[-8:] for one in several[2:9])
    assert lines[-1] == f"  see {several[2].output}"


def test_a_pipeline_shows_how_far_its_newest_part_is(tmp_path: Path) -> None:
    """It trains nothing itself: what it has begun, and whether it can go on, is in its parts."""
    one = member(tmp_path / "sweep", None, "seed=0", metric="pretrained top-1")
    assert cells(overview_table([one]))[1][2:] == ["waiting"]
    for number, (name, epochs) in enumerate(
        {"pretrain": 10, "pretrained/seed0": 4}.items(), start=1
    ):
        part = one.directory / name
        (part / "checkpoints").mkdir(parents=True)
        (part / "checkpoints" / "step0000000002.pt").write_bytes(b"")
        (part / "config.yaml").write_text(f"epochs: {epochs}\n")
        (part / "metrics.jsonl").write_text('{"step": 5, "epoch": 1.0, "loss": 2.0}\n')
        os.utime(part / "metrics.jsonl", (number, number))
        (row,) = cells(overview_table([one]))[1:]
        assert row[2:4] == ["stopped", f"{name}: 5/{5 * epochs}"]


def test_shares_are_percent_as_in_tables(tmp_path: Path) -> None:
    one = member(tmp_path / "sweep", {"accuracy": 0.92, "loss": 5.0}, "seed=0")
    for metric, said in {"accuracy": "92 %", "loss": "5"}.items():
        heads, line = cells(overview_table([one], metric))
        assert (heads[-1], line[-1]) == (metric, said)


def test_table(tmp_path: Path) -> None:
    """A value that is the default and one that was asked for are the same; who isn't finished is
    counted.
    """
    folder = tmp_path / "sweep"
    for seed, losses in enumerate([(3.0, 1.0, 2.0), (4.0, 1.5, None)]):
        for rate, loss in zip((0.1, 0.2, 0.3), losses, strict=True):
            words = [] if rate == 0.2 else [f"optimizer.base_lr={rate}"]
            member(
                folder,
                loss and {"loss": loss, "top1": 10 * loss},
                "launcher=slurm",
                *words,
                f"seed={seed}",
            )
    member(folder, None, "optimizer.base_lr=0.4", "seed=0")
    text = sweeps.sweep_table(folder)
    assert cells(text) == [
        ["optimizer.base_lr", "loss", "n"],
        ["0.2", "1.250 ± 0.354", "2"],
        ["0.3", "2.000", "1 of 2"],
        ["0.1", "3.500 ± 0.707", "2"],
        ["0.4", "", "0 of 1"],
    ]
    with open(folder / "table.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["optimizer.base_lr"] for row in rows] == ["0.2", "0.3", "0.1", "0.4"]
    assert float(rows[0]["loss std"]) == pytest.approx(0.5 / 2**0.5)
    sweeps.sweep_table(folder, "top1")
    with open(folder / "table.csv") as file:
        assert [row["optimizer.base_lr"] for row in csv.DictReader(file)] == [
            "0.1",
            "0.3",
            "0.2",
            "0.4",
        ]


def cells(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if "--" not in line
    ]


def test_what_is_the_same_counts_once(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    for words in (
        ["seed=0"],
        ["optimizer.base_lr=0.2"],
        ["optimizer.base_lr=0.20", "seed=0"],
        ["seed=1"],
    ):
        member(folder, {"loss": 1.0 + (words == ["seed=1"])}, *words)
    # nor does what isn't finished, where the same is
    member(folder, None, "seed=0", "optimizer.base_lr=0.2")
    assert cells(sweeps.sweep_table(folder)) == [["loss", "n"], ["1.500 ± 0.707", "2"]]


def test_an_edited_file_is_another_row(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    for seed, rate in enumerate((0.2, 0.2, 0.7)):
        made = member(folder, None, f"seed={seed}")
        made.config["optimizer"]["base_lr"] = rate
        made.save()
        made.directory.mkdir(parents=True)
        (made.directory / "metrics.jsonl").write_text("")
        (made.directory / "config.yaml").write_text(yaml.safe_dump(made.config))
        (made.directory / "summary.json").write_text(json.dumps({"loss": 1.0 + seed}))
    assert cells(sweeps.sweep_table(folder)) == [
        ["optimizer.base_lr", "loss", "n"],
        ["0.2", "1.500 ± 0.707", "2"],
        ["0.7", "3.000", "1"],
    ]


def test_a_moved_sweep(tmp_path: Path) -> None:
    member(tmp_path / "sweep", {"loss": 1.0}, "seed=0")
    (tmp_path / "laptop").mkdir()
    (tmp_path / "sweep").rename(tmp_path / "laptop" / "sweep")
    (moved,) = sweep.members(tmp_path / "laptop" / "sweep")
    assert sweep.states([moved]) == [sweep.State("finished")]


def test_the_first_rank_says_why(tmp_path: Path) -> None:
    """Several at once: one of them is heard, and never half of it."""
    for attempt in range(20):
        one = member(tmp_path / "sweep", None, f"seed={attempt}")
        with ThreadPoolExecutor(4) as ranks:
            list(ranks.map(one.fail, [f"rank {rank}" for rank in range(4)]))
        assert re.fullmatch(r"rank \d", one.failure)


def test_running_whatever_failed_before(tmp_path: Path) -> None:
    one = member(tmp_path / "sweep", None, "seed=0")
    one.directory.mkdir(parents=True)
    one.fail("out of luck")
    with filelock.FileLock(one.lock):
        assert sweep.states([one]) == [sweep.State("running")]
    assert sweep.states([one])[0].name == "failed"


@pytest.mark.slow
def test_a_sweep_that_grows(ssl_bench: Command, tmp_path: Path) -> None:
    """What was the default is no other member when it is typed; an edit meanwhile is told."""
    (tmp_path / "mine" / "method").mkdir(parents=True)
    mine = tmp_path / "mine" / "method" / "mine.yaml"
    mine.write_text("# @package _global_\ndefaults: [moco_v2]\nmethod: {name: mine}\n")
    words = ["--config-dir", "mine", "-m", *TINY_PRETRAIN, "epochs=1", "method=mine", "sweep=grows"]
    ssl_bench(*words, "method.temperature=0.1,0.2", check=True)
    grown = ssl_bench(*words, "method.temperature=0.1,0.2", "seed=0,1", check=True)
    assert "2 finished, 0 under way, 2 to start" in grown.stderr
    with open(tmp_path / "runs" / "sweeps" / "grows" / "table.csv") as file:
        assert [row["finished"] for row in csv.DictReader(file)] == ["2", "2"]
    mine.write_text(mine.read_text() + "optimizer: {base_lr: 0.5}\n")
    edited = ssl_bench(*words, "method.temperature=0.1,0.2", "seed=0,1,2")
    assert edited.returncode == 2
    told = edited.stderr.splitlines()[-1]
    assert (
        "was run with another configuration: optimizer.base_lr was 0.03, is 0.5. "
        "Choose another sweep=" in told
    )
    status = ssl_bench("stage=status", "runs=runs/sweeps/grows", check=True).stdout
    assert status.startswith("4 members: 4 finished\n")


@pytest.mark.parametrize(
    ("choice", "key"),
    [
        ("method.temperature=0.1,0.2", "method.temperature"),
        ("method=moco_v2,simclr", "augmentation."),
        ("augmentation=moco_v1,moco_v2", "augmentation."),
        ("batch_size=64,128", "batch_size"),
    ],
)
def test_losses_that_cannot_be_compared_rank_no_sweep(
    ssl_bench: Command, choice: str, key: str
) -> None:
    words = [
        word for word in TINY_PRETRAIN if not word.startswith(("method", choice.partition("=")[0]))
    ]
    result = ssl_bench("-m", *words, "sweep=x", "metric=loss", "schedule.warmup_epochs=0", choice)
    assert result.returncode == 2
    said = result.stderr.splitlines()[-1]
    assert said.startswith(f"ssl-bench: metric=loss would rank runs that differ in {key}")
    assert "type metric=probe_top1, by labelled images" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["hydra.sweeper.direction=minimize"],
            "hydra.sweeper.direction=minimize would find the worst probe_top1: type",
        ),
        (
            ["metric=loss"],
            "metric=loss would rank runs that differ in method.temperature, "
            "and their losses are of",
        ),
        (
            ["eval_every=0"],
            "metric=null: a search needs what to find: type one of the values of stage=pretrain",
        ),
    ],
)
def test_a_search_for_what_is_not_better(ssl_bench: Command, words: list[str], said: str) -> None:
    pytest.importorskip(
        "hydra_plugins.hydra_optuna_sweeper", reason="pip install hydra-optuna-sweeper"
    )
    search = [
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=1",
        "method.temperature=interval(0.05,0.5)",
    ]
    result = ssl_bench("-m", *TINY_PRETRAIN, "sweep=x", *search, *words)
    assert result.returncode == 2
    assert said in result.stderr


def test_values_that_make_no_runs(ssl_bench: Command) -> None:
    result = ssl_bench(
        "-m", *TINY_PRETRAIN, "sweep=x", "source=host,streamed", "precision=fp32,bf16"
    )
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(
        "ssl-bench: source: no run is named by that, so several"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["hydra.launcher.timeout_min=2"],
            "hydra.launcher.timeout_min=2 leaves none before Slurm's warning, 120 s",
        ),
        (
            ["hydra.launcher.tasks_per_node=3"],
            "can't be divided among the 3 processes of hydra.launcher.nodes and",
        ),
        (
            ["hydra.launcher.tasks_per_node=2", "method.bn_splits=128"],
            "method.bn_splits=128 does not divide the 64 images of a process",
        ),
        (["pretrained=runs/nothing"], "pretrained=runs/nothing: no such file or run directory"),
        (
            ["method=distill", "schedule.warmup_epochs=0", "method.teacher=runs/nothing"],
            "method.teacher=runs/nothing: no such file or run directory",
        ),
    ],
)
def test_what_a_job_could_not_do(ssl_bench: Command, words: list[str], said: str) -> None:
    tiny = [word for word in TINY_PRETRAIN if not ("distill" in str(words) and "queue" in word)]
    result = ssl_bench("launcher=slurm", *tiny, *words)
    assert result.returncode == 2
    assert said in result.stderr.splitlines()[-1]


@pytest.mark.slow
def test_other_images_are_other_runs(ssl_bench: Command, tmp_path: Path) -> None:
    for name, images in (("one", 40), ("two", 50)):
        synthetic.write_dl21(tmp_path / name, 40, images, 20, num_classes=4)
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    words = ["data=dl21", "data.image_size=16", "backbone.width=8", "backbone.stem=small"]
    words += ["stage=knn", "batch_size=20", "stage.k=[3]", "dir=run"]
    ssl_bench(*words, "data.root=one", check=True)
    finished = ssl_bench(*words, "data.root=copy", check=True)
    assert "is finished already" in finished.stderr
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["root"] == "copy"
    other = ssl_bench(*words, "data.root=two")
    assert other.returncode == 2
    assert other.stderr.splitlines()[-1] == (
        "ssl-bench: dir=run holds a run of other images: its split 'train' had 40, "
        "the 50 now are not the same. Choose another dir=, or delete it"
    )


def test_the_overview_is_as_wide_as_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = [member(tmp_path / "sweep", None, f"method.name={'long' * 60}{i}") for i in "ab"]
    widths = {}
    for columns in ("", "90", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        widths[columns] = {*map(len, overview_table(several).splitlines())}
    assert widths == {"": {120}, "90": {90}, "200": {200}}


def test_a_result_of_another_configuration_is_none(tmp_path: Path) -> None:
    done = member(tmp_path / "sweep", {"loss": 1.0}, "seed=0")
    assert done.result() == {"loss": 1.0}
    done.config["epochs"] = 3
    assert done.result() is None


def test_status_needs_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"^runs= is missing; name the folder of a sweep, like runs="
    ):
        launch(compose("stage=status"))
    member(tmp_path / "sweep", {"loss": 1.0}, "seed=0")
    (tmp_path / "refused/.members").mkdir(parents=True)  # by a command that was refused
    with pytest.raises(
        UserError, match=r"^runs=sweeep: no sweep there; name the folder of one: runs=sweep$"
    ):
        launch(compose("stage=status", "runs=sweeep"))
    with pytest.raises(UserError, match=r"^metric=los: no such value; did you mean metric=loss"):
        launch(compose("stage=status", "runs=sweep", "metric=los"))


def test_status_of_several_sweeps(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    member(tmp_path / "one", {"loss": 1.0, "top1": 50.0}, "seed=0")
    member(tmp_path / "two", None, "seed=0").fail("out of luck")
    (tmp_path / "two" / ".submitit" / "7").mkdir(parents=True)
    of_a_job = member(tmp_path / "two", None, "seed=1")
    of_a_job.job = "7"
    of_a_job.save()
    of_a_job.fail("again")
    launch(compose("stage=status", f"runs=[{tmp_path}/one,{tmp_path}/two]", "metric=top1"))
    text = capsys.readouterr().out
    assert re.search(r"/one\n\n1 member: 1 finished\n\n.*\n.*\n.*\| finished \| 50 +\|", text)
    one, two = (made.name[-8:] for made in sweep.members(tmp_path / "two"))
    assert f"failed: out of luck\n  {one}\nfailed: again\n  {two}\n" in text
    assert f"\n  see {tmp_path}/two/.submitit/7\n" in text


@pytest.mark.slow
def test_members_must_not_share_a_directory(ssl_bench: Command, tmp_path: Path) -> None:
    result = ssl_bench(*TINY_PRETRAIN, "-m", "seed=0,1", "dir=run")
    assert result.returncode == 2
    assert f"dir={tmp_path}/run is that of several members" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_only_what_is_missing_is_done_again(ssl_bench: Command, tmp_path: Path) -> None:
    command = [*TINY_PRETRAIN, "epochs=1", "-m", "accumulate=3,2"]
    assert "0 finished, 0 under way, 2 to start" in ssl_bench(*command).stderr
    again = ssl_bench(*command)
    assert "1 finished, 0 under way, 1 to start" in again.stderr
    reported = r"1 of 2 members are not finished; .*:\n\S+: failed: accumulate=3 does not divide"
    assert re.search(reported, again.stderr)
    assert "Error executing job" not in again.stderr  # Hydra's, with every override
    status = ssl_bench("stage=status", "runs=runs/sweeps/pretrain", check=True).stdout
    assert re.search(r"\nfailed: accumulate=3 does not divide", status)
    assert re.search(r"\| finished \| 10/10 +\| [\d.]+ % ", status)
    assert (tmp_path / "runs/sweeps/pretrain/table.md").read_text() in status


def test_members_that_diverged_or_were_dropped_wait_until_they_are_asked_for(
    ssl_bench: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any other that has failed starts again with the same command."""
    started = []

    def attempt(member: sweep.Member) -> None:
        started.append(seed := member.config["seed"])
        member.fail(f"seed {seed} failed", diverged=seed < 2)

    monkeypatch.setattr("ssl_bench.launch.member.attempt", attempt)
    words = ["stage=knn", "data=digits", "backbone=pixels", "sweep=x", "seed=0,1,2"]
    assert "3 of 3 members are not finished; the same" in ssl_bench("-m", *words).stderr
    folder = tmp_path / "runs/sweeps/x"
    names = [sweep.name([*words[:-1], f"seed={seed}"]) for seed in range(3)]
    monkeypatch.chdir(tmp_path)
    status = ["stage=status", "runs=runs/sweeps/x"]
    assert launch(compose(*status)) == {"diverged": 2, "failed": 1}
    counts = launch(compose(*status, f"stage.drop={names[2][-8:]}", f"stage.again={names[1]}"))
    assert counts == {"diverged": 1, "waiting": 1, "dropped": 1}
    assert (folder / ".members" / f"{names[2]}.dropped").exists()
    again = ssl_bench("-m", *words)
    assert started == [0, 1, 2, 1]
    assert f"{names[0]} seed 0 failed, and would again. To start it all the same: stage=status" in (
        again.stderr
    )
    assert f"{names[2]} was dropped. To start it" in again.stderr
    assert "2 of 3 members are not finished; the same command runs only those that have not" in (
        again.stderr
    )
    assert launch(compose(*status, "stage.again=[dropped,*]")) == {"waiting": 3}


def test_the_state_of_a_pretraining_chooses_its_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """And is said once. One that has finished is no reason to drop what is to follow it."""
    monkeypatch.chdir(tmp_path)
    folder, status = tmp_path / "sweep", ["stage=status", "runs=sweep"]
    for seed in range(3):
        one = member(folder, None, f"seed={seed}")
        first = sweep.Member(
            one.file.with_name(f"{one.name}{sweep.FIRST}.json"),
            *(one.overrides, one.config),
            "",
            "",
        )
        first.config = one.config | {"dir": f"sweep/{one.name}/pretrain"}
        first.save()
        if seed:
            first.fail("diverged at step 2", diverged=True)
            continue
        first.directory.mkdir(parents=True)
        (first.directory / "summary.json").write_text('{"loss": 1.0}')
        (first.directory / "config.yaml").write_text(yaml.safe_dump(first.config))
    launch(compose(*status))
    told = capsys.readouterr().out
    assert "\ndiverged at step 2\n" in told
    assert "\nnot reached: its pretraining diverged at step 2\n" in told
    with pytest.raises(UserError, match="finished: no such member"):
        launch(compose(*status, "stage.drop=finished"))
    assert launch(compose(*status, "stage.again=diverged")) == {"waiting": 3}
    first.fail("diverged at step 2", diverged=True)
    assert launch(compose(*status, "stage.drop=diverged")) == {"waiting": 2, "dropped": 1}


def test_what_diverged_with_other_settings_is_another_matter(tmp_path: Path) -> None:
    one = member(tmp_path, None, "seed=0")
    one.fail("diverged at step 3", diverged=True)
    assert (one.diverged, sweep.states([one])[0].name) == (True, "diverged")
    one.config["optimizer"]["base_lr"] = 0.1  # its YAML file was edited
    assert not one.diverged


def test_what_collapsed_goes_on_where_that_only_warns(tmp_path: Path) -> None:
    one = member(tmp_path, None, "seed=0", "on_collapse=stop")
    one.fail("stopped at step 20", diverged=True, collapsed=True)
    assert (one.diverged, sweep.states([one])[0].name) == (True, "diverged")
    one.config["on_collapse"] = "warn"
    assert not one.diverged


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["stage.drop=seed-7*"], "stage.drop=seed-7*: no such member; "),
        (["stage.again=seed-1*"], "is finished: it is for members that were dropped"),
        (["stage.drop=[seed-1*,seed-0*]"], "is running: end its process first"),
    ],
)
def test_members_that_cannot_be_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    one, _ = member(tmp_path, None, "seed=0"), member(tmp_path, {"loss": 1.0}, "seed=1")
    one.directory.mkdir()
    with filelock.FileLock(one.lock), pytest.raises(UserError, match=re.escape(says)):
        launch(compose("stage=status", "runs=.", *words))
    assert len(sweep.members(tmp_path)) == 2


@pytest.mark.slow
def test_workstation(ssl_bench: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at once, each with its GPU and its cores; SIGTERM saves them, and the same command
    continues.
    """
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # GPUs of this test alone
    monkeypatch.setattr(tempfile, "tempdir", None)
    (tmp_path / "mine.py").write_text(MINE)
    command = [
        "launcher=workstation",
        "device=cpu",
        *TINY_PRETRAIN,
        "method._target_=mine.Mine",
        "save_every=1000",
        "eval_every=0",
    ]
    command += ["seed=0,1,2"]
    started = subprocess.Popen(
        [sys.executable, "-m", "ssl_bench", *command],
        cwd=tmp_path,
        env=os.environ | {"PAUSE": "2"},
    )
    runs = tmp_path / "runs" / "sweeps" / "pretrain"
    wait(lambda: sum(count_lines(path) >= 2 for path in runs.glob("*/metrics.jsonl")) == 2, started)
    status = ssl_bench("stage=status", f"runs={runs}", check=True).stdout
    assert (status.count("| running "), status.count("| waiting ")) == (2, 1)
    started.send_signal(signal.SIGTERM)
    assert started.wait(60) == 128 + signal.SIGTERM
    assert len(list(runs.glob("*/checkpoints/step*.pt"))) == 2
    given = [path.read_text().split() for path in tmp_path.glob("given-*")]
    assert sorted(gpu for gpu, *_ in given) == ["3", "5"]
    cores = os.sched_getaffinity(0)
    share = max(1, len(cores) // 2)
    assert {threads for _, threads, *_ in given} == {str(share)}
    assert {len(mine) for _, _, *mine in given} == {share}
    assert len({core for _, _, *mine in given for core in mine}) == min(len(cores), 2 * share)

    ssl_bench(*command, check=True)
    assert len(list(runs.glob("*/summary.json"))) == 3
    assert sum("continuing after step" in path.read_text() for path in runs.glob("*/log.txt")) == 2


@pytest.mark.slow
def test_members_have_the_code_of_when_they_were_launched(tmp_path: Path) -> None:
    """Though the checkout is edited while they wait, is the working directory, and is the first
    that Python looks through.
    """
    package = tmp_path / "ssl_bench"
    shutil.copytree(code.PACKAGE, package)
    words = ["launcher=workstation", "hydra.launcher.at_once=1", *TINY_PRETRAIN]
    words += ["method._target_=ssl_bench.methods.moco.MoCo", "epochs=1", "eval_every=0", "seed=0,1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ssl_bench", *words],
        cwd=tmp_path,
        env=os.environ | {"TMPDIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""},
        stderr=subprocess.PIPE,
        text=True,
    )
    said = ""
    while "started: " not in said:
        said += process.stderr.readline()
        assert process.poll() is None, said
    (package / "launch" / "member.py").write_text("raise SystemExit('edited')\n")
    (package / "training" / "engine.py").write_text("raise SystemExit('edited')\n")
    said += process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 0, said
    files = [*tmp_path.glob("runs/sweeps/pretrain/*/environment.json")]
    assert [json.loads(file.read_text())["code"] for file in files] == 2 * [code.digest()]


# A member's process, of which a test sees where it runs.
HOLDS = """#!/bin/sh
echo "$CUDA_VISIBLE_DEVICES" > "{folder}/began-$$"
while [ -e "{folder}/hold" ]; do sleep 0.05; done
"""


def test_members_that_outlive_their_launcher_keep_their_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher is killed: the next one starts nothing on a GPU until its member has ended."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5/x")
    program = tmp_path / "program"
    program.write_text(HOLDS.format(folder=tmp_path))
    program.chmod(0o755)
    (tmp_path / "hold").touch()
    monkeypatch.setattr(sys, "executable", str(program))
    members = [member(tmp_path / "sweep", None, f"seed={seed}") for seed in range(4)]

    def run(todo: list[sweep.Member]) -> None:
        launchers.Workstation(at_once=None)._run(todo, [])

    def begun(count: int) -> list[str]:
        def gpus() -> list[str]:
            said = [path.read_text().strip() for path in tmp_path.glob("began-*")]
            return sorted(filter(None, said))

        wait(lambda: len(gpus()) >= count)
        return gpus()

    first = multiprocessing.get_context("fork").Process(target=run, args=[members[:3]])
    first.start()
    assert begun(2) == ["3", "GPU-5/x"]
    first.kill()
    first.join()
    later = threading.Timer(1.0, (tmp_path / "hold").unlink)
    later.start()
    began = time.monotonic()
    run(members[2:])
    assert time.monotonic() - began > 1
    assert len(begun(4)) == 4


def test_members_share_a_gpu_if_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each GPU has a member before any has two, and no more than that."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    program = tmp_path / "program"
    program.write_text(HOLDS.format(folder=tmp_path))
    program.chmod(0o755)
    (tmp_path / "hold").touch()
    monkeypatch.setattr(sys, "executable", str(program))
    members = [member(tmp_path / "sweep", None, f"seed={seed}") for seed in range(5)]
    packed = launchers.Workstation(at_once=None, members_per_gpu=2)
    running = threading.Thread(target=packed._run, args=[members, []])
    running.start()
    wait(lambda: sum(bool(path.read_text()) for path in tmp_path.glob("began-*")) >= 4)
    time.sleep(0.5)  # a fifth would come now
    begun = [path.read_text().strip() for path in tmp_path.glob("began-*")]
    assert sorted(begun) == ["3", "3", "5", "5"]
    (tmp_path / "hold").unlink()
    running.join(60)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match="members_per_gpu=2: there is no GPU here"):
        packed._run(members, [])


def test_an_archive_is_copied_once_to_each_node(tmp_path: Path) -> None:
    def stage() -> subprocess.CompletedProcess:
        script = (
            "srun() { shift 4; "
            + '"$@"; }; '
            + _stage(f"{tmp_path}/images.sqsh", f"{tmp_path}/node")
        )
        env = os.environ | {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1"}
        return subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True)

    copy = tmp_path / "node" / "images.sqsh"
    missing = stage()
    assert (missing.returncode, copy.exists()) == (1, False)
    assert "images.sqsh': No such file" in missing.stderr
    for text in ("images", "images once more"):
        (tmp_path / "images.sqsh").write_text(text)
        assert stage().returncode == 0
        assert copy.read_text() == text
        first = copy.stat().st_ino
        assert stage().returncode == 0
        assert copy.stat().st_ino == first
    assert [path.name for path in copy.parent.iterdir()] == ["images.sqsh"]


@pytest.mark.slow
def test_an_archive_that_is_not_there(ssl_bench: Command) -> None:
    result = ssl_bench("launcher=nyu_t4x2", *TINY_PRETRAIN)
    assert result.returncode == 2
    assert (
        "hydra.launcher.stage_in: no file student_dataset.sqsh; give the path"
        in result.stderr.splitlines()[-1]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("space", "trials"),
    [
        ("interval(0.05,0.5)", 2),
        pytest.param("choice(0.1,0.2)", 3, marks=pytest.mark.exhaustive),
    ],
)
def test_search(ssl_bench: Command, tmp_path: Path, space: str, trials: int) -> None:
    """Optuna chooses by the metric that the stage returns, and finds what the table finds; it may
    ask for one twice.
    """
    pytest.importorskip(
        "hydra_plugins.hydra_optuna_sweeper", reason="pip install hydra-optuna-sweeper"
    )
    sweeper = [
        "hydra/sweeper=optuna",
        f"hydra.sweeper.n_trials={2 * trials}",
        f"hydra.sweeper.n_jobs={trials}",
    ]
    # six draws of two values miss one, without a seed, once in 32 times
    sweeper += ["hydra.sweeper.sampler.seed=0"]
    words = [*TINY_PRETRAIN, "epochs=1", "sweep=search", "hydra.sweeper.direction=maximize"]
    ssl_bench("-m", *words, *sweeper, f"method.temperature={space}", check=True)
    folder = tmp_path / "runs" / "sweeps" / "search"
    with open(folder / "table.csv") as file:
        rows = list(csv.DictReader(file))
    best = yaml.safe_load((folder / "optimization_results.yaml").read_text())
    runs = [path.parent.name for path in folder.glob("*/summary.json")]
    assert len(rows) == len(runs) == (4 if space.startswith("interval") else 2)
    assert all("temperature-0." in run for run in runs)
    assert float(rows[0]["probe_top1 mean"]) == best["best_value"]
    tied = [row for row in rows if row["probe_top1 mean"] == rows[0]["probe_top1 mean"]]
    temperatures = [float(row["method.temperature"]) for row in tied]
    assert best["best_params"]["method.temperature"] in temperatures


def test_a_signal_at_the_end_of_a_member_stops_the_sweep(
    ssl_bench: Command, tmp_path: Path
) -> None:
    """Its result is known, so that it ends well: the next one doesn't start."""

    class Late(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if vars(record).get("result"):
                logging.getLogger("ssl_bench").removeHandler(self)
                signal.raise_signal(signal.SIGTERM)

    def setup(**_: object) -> None:
        logger = logging.getLogger("ssl_bench")
        logger.addHandler(Late())
        logger.setLevel(logging.INFO)

    words = ["-m", "stage=knn", "data=digits", "backbone=pixels", "seed=0,1", "tracking=local"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ssl_bench.command.set_up_logging", setup)
        result = ssl_bench(*words)
    assert result.returncode == 128 + signal.SIGTERM, result.stderr
    assert "stopped by SIGTERM" in result.stderr
    summaries = [*tmp_path.rglob("summary.json")]
    assert len(summaries) == 1
    assert ssl_bench(*words).returncode == 0
    assert len([*tmp_path.rglob("summary.json")]) == 2
