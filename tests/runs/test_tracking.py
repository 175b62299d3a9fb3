"""metrics.jsonl survives kills; W&B mirrors it offline, never asks, is rebuilt whole from it."""

import json
import logging
import math
import os
import re
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import wandb
from commands import compose
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import checkpoint, pretrained
from offline_wandb import folders, history, kind, records
from omegaconf import OmegaConf

from ssl_bench.config import build
from ssl_bench.errors import UserError
from ssl_bench.launch.process import launch
from ssl_bench.runs.metrics import MetricsFile
from ssl_bench.runs.run import Run
from ssl_bench.runs.tracking import NoTracker, WandbTracker, rebuild
from ssl_bench.stages.sync import sync


@pytest.fixture
def metrics(tmp_path):
    return MetricsFile(tmp_path / "metrics.jsonl")


@given(
    rows=st.lists(
        st.dictionaries(st.text(max_size=5).filter(lambda k: k != "step"), st.floats()), max_size=5
    )
)
@settings(max_examples=50)
def test_metrics_read_back_exactly(rows, tmp_path_factory):
    metrics = MetricsFile(tmp_path_factory.mktemp("m") / "metrics.jsonl")
    for step, row in enumerate(rows):
        metrics.log(step, row)
    expected = [{"step": step} | row for step, row in enumerate(rows)]
    # repr: NaN is not equal to itself
    assert repr(MetricsFile.read(metrics.path)) == repr(expected)


def test_metrics_take_any_scalar(metrics):
    torch = pytest.importorskip("torch")
    metrics.log(3, {"loss": torch.tensor(0.5), "seen": 7, "bad": math.nan, "worse": -math.inf})
    row = MetricsFile.read(metrics.path)[0]
    assert row["loss"] == 0.5
    assert isinstance(row["seen"], int)
    assert math.isnan(row["bad"])
    assert row["worse"] == -math.inf


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_kill_at_any_byte_loses_only_the_last_line(metrics, cut):
    for step in range(3):
        metrics.log(step, {"loss": 0.25})
    data = metrics.path.read_bytes()
    metrics.path.write_bytes(data[:-cut])
    assert [row["step"] for row in MetricsFile.read(metrics.path)] == [0, 1]
    again = MetricsFile(metrics.path)
    again.log(2, {"loss": 0.25})
    assert metrics.path.read_bytes() == data


def test_truncate_keeps_up_to_the_step_and_appends_after(metrics):
    for step in range(6):
        metrics.log(step, {"loss": step})
    metrics.truncate(3)
    metrics.log(4, {"loss": -1})
    assert [(row["step"], row["loss"]) for row in MetricsFile.read(metrics.path)] == [
        *((i, i) for i in range(4)),
        (4, -1),
    ]
    assert [file.name for file in metrics.path.parent.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "broken", [b'{"step": 1, "lo\n', b"[1]\n", b'{"loss": 1}\n', b"\n", b"\xff\n"]
)
def test_a_broken_line_in_the_middle_is_named(metrics, broken):
    metrics.path.write_bytes(b'{"step": 0}\n' + broken + b'{"step": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        MetricsFile.read(metrics.path)


def test_no_tracker_does_nothing(tmp_path):
    tracker = NoTracker(directory=tmp_path, config={})
    tracker.log(0, {"loss": 1.0})
    tracker.log_image(0, "views", tmp_path / "absent.png")
    tracker.log_checkpoint_file(tmp_path / "absent.pt")
    tracker.close("finished", {})
    assert not list(tmp_path.iterdir())


@pytest.fixture(autouse=True)
def no_login(tmp_path, monkeypatch):
    """A user who never logged in: nothing in the environment, the home directory or netrc."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home/.config"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home/netrc"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "home/cache"))
    yield
    wandb.finish()
    wandb.teardown()  # W&B keeps mode and key for the process


CONFIG = {
    "seed": 3,
    "stage": {"name": "pretrain"},
    "method": {"name": "moco_v2", "queue_size": 64, "mask_token": True},
    "backbone": {"name": "resnet18"},
    "data": {"name": "digits"},
    "hub": [{"api_key": "hunter2", "auth_token": "hunter2"}],
    "tracking": {
        "_target_": "ssl_bench.runs.tracking.WandbTracker",
        "project": "mine",
        "tags": ["a", "b"],
    },
}


@pytest.fixture
def run_dir(tmp_path):
    path = tmp_path / "moco-tiny" / "seed3"
    path.mkdir(parents=True)
    return path


def picture(path, shade):
    from PIL import Image

    Image.new("RGB", (4, 4), (shade, 0, 0)).save(path)
    return path


def test_offline_run_holds_everything(run_dir):
    tracker = WandbTracker(tags=("a",), log_checkpoint=True, directory=run_dir, config=CONFIG)
    for step in (10, 20):
        tracker.log(step, {"loss": 1 / step, "epoch": step / 10, "images_seen": step * 4})
    tracker.log_image(20, "views", picture(run_dir / "views.png", 200))
    (run_dir / "last.pt").write_bytes(b"weights")
    tracker.log_checkpoint_file(run_dir / "last.pt")
    tracker.close("finished", {"top1": 0.75})

    (folder,) = folders(run_dir)
    recorded = records(folder)
    rows = history(recorded)
    assert sorted(rows) == [10, 20]
    assert rows[10] == {"pretrain/loss": 0.1, "epoch": 1, "images_seen": 40}
    assert rows[20]["images_seen"] == 80
    assert (folder / "files" / rows[20]["pretrain/views.path"]).read_bytes() == (
        run_dir / "views.png"
    ).read_bytes()
    (run,) = kind(recorded, "run")
    assert run["run_id"] == (run_dir / "wandb_id").read_text().strip()
    what = re.fullmatch(r"(moco_v2-resnet18-digits)-([0-9a-f]{6})", run["run_group"])
    assert (run["project"], run["job_type"]) == ("ssl_bench", "pretrain")
    assert run["display_name"] == f"{what[1]} {what[2]} seed 3"
    assert run["tags"] == ["pretrain", "moco_v2", "resnet18", "digits", "a"]
    assert "hunter2" not in json.dumps(recorded)
    assert '"seed"' in json.dumps(run["config"])
    assert "epoch" in {metric.get("step_metric") for metric in kind(recorded, "metric")}
    assert [exit.get("exit_code", 0) for exit in kind(recorded, "exit")] == [0]
    assert kind(recorded, "artifact")[0]["type"] == "model"
    assert b"weights" in [
        file.read_bytes() for file in (run_dir / "wandb/artifacts/staging").iterdir()
    ]
    assert "WANDB_DATA_DIR" not in os.environ


def test_members_of_a_sweep_are_separate_runs(tmp_path, monkeypatch):
    for seed in (0, 1):
        directory = tmp_path / "sweep" / f"seed{seed}"
        # the first is left open
        WandbTracker(directory=directory, config={"seed": seed}).log(1, {"seed": seed})
        assert len(folders(directory)) == 1
    monkeypatch.setenv("WANDB_API_KEY", "short")
    # looked for in spite of the open run
    with pytest.raises(UserError, match="WANDB_API_KEY invalid"):
        WandbTracker(directory=tmp_path, config={})
    assert (tmp_path / "sweep/seed0/wandb_id").read_text() != (
        tmp_path / "sweep/seed1/wandb_id"
    ).read_text()


def restarted(run_dir):
    """A run killed after step 50 (torn line and all), restarted from step 30, finished at 60;
    mirrored all along.
    """
    (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(CONFIG))
    for start, stop, status in [(10, 60, "failed"), (40, 70, "finished")]:
        metrics = MetricsFile(run_dir / "metrics.jsonl")
        metrics.truncate(start - 10)
        tracker = WandbTracker(directory=run_dir, config=CONFIG)
        for step in range(start, stop, 10):
            for sink in (metrics, tracker):
                sink.log(step, {"loss": 1 / step, "epoch": step / 10})
        tracker.close(status, {})
        metrics.close()
        if status == "failed":
            with open(run_dir / "metrics.jsonl", "ab") as file:
                file.write(b'{"step": 60, "lo')
    (run_dir / "summary.json").write_text(json.dumps({"top1": 0.5}))
    picture(run_dir / "overview.png", 90)


def test_a_restarted_run_is_rebuilt_whole(run_dir):
    restarted(run_dir)
    before = folders(run_dir)
    run_id = (run_dir / "wandb_id").read_text()
    kept = {
        file: file.read_bytes()
        for file in run_dir.rglob("*")
        if file.is_file()
        and not file.is_symlink()
        # W&B's service writes on in these after a run has ended, when it likes
        and "logs" not in file.parts
        and file.suffix != ".wandb"
    }
    told = [history(records(folder)) for folder in before]
    assert len(before) == 2
    assert sorted(history(records(before[0]))) != sorted(history(records(before[1])))

    for _ in range(2):  # again: still one complete folder
        assert sync(
            OmegaConf.create(
                {"runs": str(run_dir.parent), "tracking": {"_target_": "a.NoTracker"}}
            ),
            None,
        ) == {"runs": 1}
        (folder,) = folders(run_dir / "wandb-synced")
    recorded = records(folder)
    steps = [record["item"]["_step"] for record in kind(recorded, "history")]
    assert steps == [10, 20, 30, 40, 50, 60]
    rows = history(recorded)
    assert all(rows[step]["pretrain/loss"] == 1 / step for step in steps)
    assert (folder / "files" / rows[60]["pretrain/overview.path"]).read_bytes() == (
        run_dir / "overview.png"
    ).read_bytes()
    (run,) = kind(recorded, "run")
    assert (run["run_id"], run["project"], run["tags"]) == (
        run_id.strip(),
        "mine",
        ["pretrain", "moco_v2", "resnet18", "digits", "a", "b"],
    )
    (begun,) = kind(records(before[0]), "run")
    assert all(run[key] == begun[key] for key in ("job_type", "display_name", "run_group"))
    assert "top1" in json.dumps(kind(recorded, "summary"))
    assert "hunter2" not in json.dumps(recorded)
    assert [exit.get("exit_code", 0) for exit in kind(recorded, "exit")] == [0]
    assert not kind(recorded, "stats")
    assert [file for file, data in kept.items() if file.read_bytes() != data] == []
    assert [history(records(folder)) for folder in before] == told


def test_sync_takes_lists_and_the_tracking_of_its_own_command(tmp_path):
    for name in "ab":
        directory = tmp_path / name / "seed0"
        directory.mkdir(parents=True)
        MetricsFile(directory / "metrics.jsonl").log(1, {"loss": 2.0})
    tracking = {
        "_target_": "ssl_bench.runs.tracking.WandbTracker",
        "project": "other",
        "tags": ["x"],
    }
    runs = [str(tmp_path / "a"), str(tmp_path / "b/seed0")]
    assert sync(OmegaConf.create({"runs": runs, "tracking": tracking}), None) == {"runs": 2}
    (folder,) = folders(tmp_path / "b/seed0/wandb-synced")
    recorded = records(folder)
    assert (kind(recorded, "run")[0]["project"], kind(recorded, "run")[0]["tags"][-1:]) == (
        "other",
        ["x"],
    )
    assert "job_type" not in kind(recorded, "run")[0]
    assert kind(recorded, "exit")[0]["exit_code"] == 1  # no summary.json: it never finished


def test_runs_that_cannot_be_rebuilt_do_not_stop_the_others(tmp_path):
    for name in ("a damaged", "b unwritable", "c odd", "d good"):
        directory = tmp_path / name / "seed0"
        directory.mkdir(parents=True)
        MetricsFile(directory / "metrics.jsonl").log(1, {"loss": 2.0})
    (tmp_path / "a damaged/seed0/metrics.jsonl").write_text("{\n")
    (tmp_path / "b unwritable/seed0/wandb-synced").write_text("in the place of a folder")
    (tmp_path / "c odd/seed0/summary.json").write_text("{")
    with pytest.raises(UserError) as caught:
        sync(
            OmegaConf.create({"runs": str(tmp_path), "tracking": {"_target_": "a.NoTracker"}}), None
        )
    said = str(caught.value).splitlines()
    assert said[0] == "3 of 4 runs are not rebuilt:"
    assert "a damaged/seed0/metrics.jsonl, line 1 is not a JSON object" in said[1]
    assert said[2].endswith("b unwritable/seed0: can't be written (File exists)")
    assert "c odd/seed0/summary.json is damaged" in said[3]
    assert len(folders(tmp_path / "d good/seed0/wandb-synced")) == 1


def test_sync_without_runs_is_a_user_error(tmp_path):
    cfg = OmegaConf.create(
        {"runs": str(tmp_path), "tracking": {"_target_": "ssl_bench.runs.tracking.NoTracker"}}
    )
    with pytest.raises(UserError, match="no metrics"):
        sync(cfg, None)


def test_a_dead_mirror_does_not_stop_the_run(run_dir, caplog):
    tracker = WandbTracker(directory=run_dir, config={})
    tracker.log_image(1, "views", run_dir / "absent.png")
    tracker.log(2, {"loss": 1.0})
    tracker.close("finished", {})
    assert [record.levelname for record in caplog.records if "stage=sync" in record.message] == [
        "WARNING"
    ]


@pytest.mark.parametrize(
    ("mode", "environment", "message"),
    [
        ("online", {}, "tracking.mode=online, but W&B has no API key"),
        ("auto", {"WANDB_MODE": "online"}, "WANDB_MODE=online, but W&B has no API key"),
        ("auto", {"WANDB_MODE": "onlin"}, "WANDB_MODE=onlin is unknown"),
        ("auto", {"WANDB_API_KEY": "short"}, "WANDB_API_KEY invalid"),
    ],
)
def test_login_mistakes_are_one_line(run_dir, monkeypatch, mode, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message) as caught:
        WandbTracker(mode=mode, directory=run_dir, config={})
    assert "\n" not in str(caught.value)


def test_an_earlier_run_offline_does_not_answer_for_the_login(run_dir, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    WandbTracker(directory=run_dir, config={}).close("finished", {})
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(UserError, match="WANDB_API_KEY invalid"):
        WandbTracker(directory=run_dir, config={})


def test_what_was_offline_says_how_to_send_it(run_dir, caplog):
    caplog.set_level(logging.INFO, "ssl_bench")
    restarted(run_dir)
    assert caplog.messages[-1].endswith(
        f"once you are logged in, type: ssl-bench stage=sync runs={run_dir}"
    )
    rebuild(run_dir)
    (folder,) = folders(run_dir / "wandb-synced")
    assert caplog.messages[-1].endswith(f"once you are logged in, type: wandb sync {folder}")


def test_disabled_is_no_tracking(run_dir, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    caplog.set_level(logging.INFO, "ssl_bench")
    before = set(run_dir.iterdir())
    tracker = WandbTracker(directory=run_dir, config=CONFIG, log_checkpoint=True)
    tracker.log(1, {"loss": 1.0})
    tracker.log_image(1, "views", run_dir / "absent.png")
    tracker.log_checkpoint_file(run_dir / "absent.pt")
    tracker.close("finished", {"top1": 0.5})
    assert set(run_dir.iterdir()) == before
    assert [record.message for record in caplog.records] == [
        "WANDB_MODE=disabled: not tracked, as with tracking=local"
    ]


def test_sync_deletes_nothing_where_wandb_is_disabled(run_dir, monkeypatch):
    MetricsFile(run_dir / "metrics.jsonl").log(1, {"loss": 2.0})
    (run_dir / "wandb-synced").mkdir()
    (run_dir / "wandb-synced" / "former").write_text("")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with pytest.raises(
        UserError, match="WANDB_MODE=disabled: there is nothing for stage=sync to do; unset it"
    ):
        sync(
            OmegaConf.create({"runs": str(run_dir), "tracking": {"_target_": "a.NoTracker"}}), None
        )
    assert (run_dir / "wandb-synced" / "former").exists()


@pytest.mark.parametrize("stage", ["knn", "lincls", "select", "pretrain"])
def test_a_login_is_asked_for_before_the_work(tmp_path, monkeypatch, stage):
    monkeypatch.setattr(
        "ssl_bench.runs.run.Run.uses", lambda *_: pytest.fail("the images were opened")
    )
    command = [f"stage={stage}", "tracking=wandb", "tracking.mode=online", f"dir={tmp_path}/run"]
    with pytest.raises(UserError, match=r"tracking\.mode=online, but W&B has no API key"):
        launch(compose(*command))
    assert not (tmp_path / "run").exists()


def tracked(directory: Path, *overrides: str) -> dict:
    """What a run of this command says of itself to W&B: its record, and its configuration as plain
    data.
    """
    words = ["tracking=wandb", "tracking.mode=offline", f"dir={directory}", *overrides]
    config = OmegaConf.to_container(compose(*words), resolve=True)
    make = partial(build.construct, config["tracking"], directory=directory, config=config)
    with Run(config, torch.device("cpu"), make) as run:
        for _ in run.progress([1], 0, 1):
            run.log(1, {"loss": 1.0, "epoch": 1.0, "val_top1": 9.0})
        run.finish({"val_top1": 5.0})
    (folder,) = folders(directory)
    recorded = records(folder)
    (record,) = kind(recorded, "run")
    return record | {
        "values": record["config"]["update"],
        "summary": json.dumps(kind(recorded, "summary")),
    }


@pytest.mark.slow
def test_what_a_run_is_on_a_dashboard(tmp_path: Path) -> None:
    """Classifiers of two methods are two groups, seeds of one experiment are one; no two runs have
    one name.
    """
    said = {}
    for method in ("moco_v2", "vicreg"):
        for seed in (0, 1):
            made = tmp_path / f"{method}{seed}" / "pretrain"
            weights = checkpoint(
                pretrained(made, f"method={method}", f"seed={seed}"), 80, f"{method}{seed}".encode()
            )
            for draw in (0, 1):
                words = [
                    "stage=lincls",
                    "stage.labels_per_class=10",
                    f"pretrained={weights}",
                    f"seed={draw}",
                ]
                place = tmp_path / f"{method}{seed}" / "pretrained" / f"seed{draw}"
                said[method, seed, draw] = tracked(place, *words, "tracking.tags=[mine]")
    assert len({run["display_name"] for run in said.values()}) == len(said)
    groups = {
        method: {run["run_group"] for (name, *_), run in said.items() if name == method}
        for method, *_ in said
    }
    assert [len(group) for group in groups.values()] == [1, 1]
    assert len(set.union(*groups.values())) == 2
    one = said["vicreg", 1, 0]
    assert re.fullmatch(
        r"vicreg-resnet18-digits-lincls-10-labels-a-class-[0-9a-f]{6}", one["run_group"]
    )
    assert re.fullmatch(
        r"vicreg-resnet18-digits-lincls-10-labels-a-class [0-9a-f]{6} seed 0 on seed 1",
        one["display_name"],
    )
    assert one["job_type"] == "lincls"
    assert one["tags"] == ["lincls", "vicreg", "resnet18", "digits", "mine"]
    assert (
        one["values"]["pretraining"]["method"]["name"],
        one["values"]["pretraining"]["seed"],
    ) == ("vicreg", 1)
    assert re.fullmatch("[0-9a-f]{40}", one["git"]["commit"])
    assert "best/loss" in one["summary"]
    # the maximum over epochs of what it is measured on
    assert "best/val_top1" not in one["summary"]

    home = tmp_path / "vicreg1"
    home.rename(tmp_path / "moved")
    rebuild(tmp_path / "moved" / "pretrained" / "seed0")
    (folder,) = folders(tmp_path / "moved" / "pretrained" / "seed0" / "wandb-synced")
    (again,) = kind(records(folder), "run")
    for key in ("run_group", "display_name", "job_type", "tags", "git"):
        assert again[key] == one[key], key


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("project", "a/b", "W&B takes no '/' there"),
        ("project", "what?", "W&B takes no '?' there"),
        ("project", "x" * 129, "W&B takes 1 to 128 characters, and these are 129"),
        ("entity", "me and you", "W&B takes no ' ' there"),
        ("group", "x" * 129, "W&B takes 1 to 128 characters, and these are 129"),
        ("name", "''", "W&B takes 1 to 128 characters, and these are 0"),
        ("tags", f"[fine,{'x' * 65}]", "W&B takes 1 to 64 characters, and these are 65"),
        ("tags", "['']", "W&B takes 1 to 64 characters, and these are 0"),
    ],
)
@pytest.mark.parametrize("stage", ["pretrain", "dashboard"])
def test_what_wandb_would_refuse_is_refused_before_anything_starts(
    key: str, value: str, said: str, stage: str
) -> None:
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        build.check(compose(f"stage={stage}", "tracking=wandb", f"tracking.{key}={value}"))
    assert str(caught.value).startswith(f"tracking.{key}")
    assert "\n" not in str(caught.value)


@settings(max_examples=30)
@given(st.text(max_size=140), st.lists(st.text(max_size=70), max_size=3))
def test_what_is_let_through_wandb_takes(name: str, tags: list[str]) -> None:
    """By its own validation."""
    import wandb

    node = {"_target_": "ssl_bench.runs.tracking.WandbTracker", "project": name, "tags": tags}
    if not build._problems(
        build._schema(node["_target_"], "tracking", ("directory", "config")), node, "", {}
    ):
        wandb.Settings(project=name, run_tags=tags)


def test_any_names_are_fit_for_wandb(tmp_path: Path) -> None:
    """Data, methods and backbones of one's own: an artifact, a tag and a group are made of them."""
    long = "x/y:z " * 40
    record = tracked(
        tmp_path / "run" / "seed0",
        "stage=pretrain",
        *(f"{group}.name='{long}'" for group in ("data", "method")),
    )
    assert all(0 < len(record[key]) <= 128 for key in ("run_group", "display_name"))
    assert all(0 < len(tag) <= 64 for tag in record["tags"])


def test_a_tracker_that_cannot_begin_does_not_cost_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """knn, cached lincls and select log once, at the end."""

    def refuse(**_: object) -> None:
        raise ValueError("not such a name\nat all")

    monkeypatch.setattr("wandb.init", refuse)
    config = OmegaConf.to_container(
        compose("stage=knn", "tracking=wandb", f"dir={tmp_path}/run"), resolve=True
    )
    make = partial(build.construct, config["tracking"], directory=tmp_path / "run", config=config)
    with Run(config, torch.device("cpu"), make) as run:
        for _ in run.progress([1], 0, 1):
            run.log(1, {"val_top1": 9.0})
        run.finish({"val_top1": 9.0})
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == {"val_top1": 9.0}
    assert MetricsFile.read(tmp_path / "run" / "metrics.jsonl") == [{"step": 1, "val_top1": 9.0}]
    assert (
        f"W&B can't be used (not such a name); later: ssl-bench stage=sync runs={tmp_path}/run"
        in caplog.text
    )


SCRIPT = """
import sys, time, logging
from pathlib import Path
from ssl_bench.runs.tracking import WandbTracker
logging.basicConfig(format="%(message)s")
tracker = WandbTracker(directory=Path(sys.argv[1]), config={})
tracker.log(1, {"loss": 1.0})
tracker.close("finished", {})
"""


def run_in_a_terminal(run_dir, limit, **environment):
    """Output and seconds of a tracked run whose stdin, stdout and stderr are a terminal nobody
    types at.
    """
    ours, theirs = os.openpty()
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(run_dir)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | environment,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        assert process.wait(limit) == 0
    finally:
        process.kill()
    seconds = time.monotonic() - start
    os.set_blocking(ours, False)
    try:
        output = os.read(ours, 10000).decode()
    except OSError:  # nothing was printed
        output = ""
    os.close(ours)
    return output, seconds


def test_no_prompt_and_no_noise_without_a_login(run_dir):
    output, _ = run_in_a_terminal(run_dir, limit=30)
    assert output == ""
    assert sorted(history(records(folders(run_dir)[0]))) == [1]


@pytest.mark.slow
@pytest.mark.parametrize("listening", [False, True], ids=["refused", "silent"])
def test_online_without_network_goes_on_offline(run_dir, listening):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listening:
            server.listen()  # takes connections, never answers
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        output, _ = run_in_a_terminal(run_dir, limit=60, WANDB_BASE_URL=url, WANDB_API_KEY="0" * 40)
    assert output.count("\n") == 1
    assert "tracked offline" in output
    assert sorted(history(records(folders(run_dir)[0]))) == [1]


def test_rebuild_needs_no_config(run_dir):
    MetricsFile(run_dir / "metrics.jsonl")
    rebuild(run_dir)
    assert len(folders(run_dir / "wandb-synced")) == 1
