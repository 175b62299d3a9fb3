"""What runs log to W&B, read back from their offline folders, and the dashboard, whose panels show
what is there.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
from commands import compose
from conftest import TINY, TINY_PRETRAIN
from offline_wandb import folders, history, kind, records
from patience import PATIENCE
from PIL import Image
from pydantic import TypeAdapter

import ssl_bench
from ssl_bench.errors import UserError
from ssl_bench.launch.process import launch
from ssl_bench.report import dashboard
from ssl_bench.runs import layout, tracking

pytestmark = pytest.mark.xdist_group("dashboard")  # one worker makes the runs that they share

ws = pytest.importorskip("wandb_workspaces.workspaces")
AXES = {"epoch", "images_seen"}


class Recorded:
    """An offline run, through W&B's own reader."""

    def __init__(self, directory: Path) -> None:
        self.directory, (self.folder,) = directory, folders(directory)
        self.id = (directory / "wandb_id").read_text().strip()
        self.records = records(self.folder)
        self.rows = history(self.records)
        command = [
            sys.executable,
            "-m",
            "wandb",
            "leet",
            "inspect",
            "--summary",
            "--json",
            str(self.folder),
        ]
        whole = json.loads(
            subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE).stdout
        )
        self.config, self.summary, self.state = whole["config"], whole["summary"], whole["state"]

    def artifacts(self, used: bool) -> dict[str, tuple[str, str]]:
        """name -> (type, digest) of those that the run came from, or that it made."""
        found = [
            item
            for item in kind(self.records, "artifact")
            if bool(item.get("use_after_commit")) == used
        ]
        return {item["name"]: (item["type"], item["digest"]) for item in found}


@pytest.fixture(scope="module", autouse=True)
def _forget_wandb() -> Iterator[None]:
    """W&B keeps what it found out about the login for the process."""
    yield
    wandb.teardown()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recorded]:
    """A pretraining, classifiers of its features, a choice of images to label."""
    root, tracked = tmp_path_factory.mktemp("runs"), ["tracking=wandb", "tracking.mode=offline"]
    launch(compose(*TINY_PRETRAIN, *tracked, "log_every=7", f"dir={root}/pretrain/seed0"))
    others = [*tracked, f"pretrained={root}/pretrain/seed0"]
    grid = [
        "stage=lincls",
        "stage.features=cached",
        "stage.lrs=[0.1,1]",
        "epochs=3",
        "eval_every=1",
    ]
    launch(compose(*TINY, *others, *grid, "log_every=7", f"dir={root}/lincls/seed0"))
    launch(compose(*TINY, *others, "stage=select", "stage.budget=9", f"dir={root}/select/seed0"))
    return {name: Recorded(root / name / "seed0") for name in ("pretrain", "lincls", "select")}


def test_history_has_the_names_of_the_stage_and_both_axes(runs: dict[str, Recorded]) -> None:
    for name in ("pretrain", "lincls"):
        run = runs[name]
        lines = [
            json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()
        ]
        for line in lines:
            row = run.rows[line.pop("step")]
            assert row.keys() >= AXES
            assert {
                key: row[key if key in AXES else f"{name}/{key}"] for key in line
            } == pytest.approx(line)
    seen = [row["images_seen"] for row in runs["pretrain"].rows.values() if "pretrain/loss" in row]
    assert seen == [896, 1792, 2560]
    assert "lincls/holdout_top1" in runs["lincls"].rows[10]  # an evaluation between two log lines


def test_config_and_summary(runs: dict[str, Recorded]) -> None:
    for name, run in runs.items():
        assert (run.state, run.config["stage"]["name"]) == ("finished", name)
        result = json.loads((run.directory / "summary.json").read_text())
        shown = {key: run.summary[key if key in AXES else f"{name}/{key}"] for key in result}
        assert shown == pytest.approx(result)
    lines = [
        json.loads(line)
        for line in (runs["lincls"].directory / "metrics.jsonl").read_text().splitlines()
    ]
    held = [line["holdout_top1"] for line in lines if "holdout_top1" in line]
    assert len(held) == 3
    assert runs["lincls"].summary["lincls/best/holdout_top1"] == max(held)
    losses = [
        row["pretrain/loss"] for row in runs["pretrain"].rows.values() if "pretrain/loss" in row
    ]
    assert runs["pretrain"].summary["pretrain/best/loss"] == min(losses)
    assert not [key for key in runs["pretrain"].summary if "best/lr" in key or "best/grad" in key]


def test_images_and_tables(runs: dict[str, Recorded]) -> None:
    for name, image in (("pretrain", "views"), ("select", "chosen")):
        (path,) = {
            row[key]
            for row in runs[name].rows.values()
            for key in row
            if key == f"{name}/{image}.path"
        }
        assert (runs[name].folder / "files" / path).read_bytes() == (
            runs[name].directory / f"{image}.png"
        ).read_bytes()
    for name, table, columns, count in (
        ("lincls", "grid", ["lr", "weight_decay", "holdout_top1", "holdout_loss"], 4),
        ("select", "chosen", ["index", "image"], 9),
    ):
        entry = runs[name].summary[f"{name}/tables/{table}"]
        content = json.loads((runs[name].folder / "files" / entry["path"]).read_text())
        assert (content["columns"], len(content["data"])) == (columns, count)
        assert isinstance(content["data"][0][0], int | float)
    assert not [key for key in runs["select"].summary if "request" in key]


def test_lineage(runs: dict[str, Recorded]) -> None:
    """What one run made and another came from has one name and content: to W&B, one artifact."""
    pretrain, lincls, select = runs["pretrain"], runs["lincls"], runs["select"]
    weights = f"weights-{pretrain.id}"
    # by `online`
    assert pretrain.artifacts(used=True).keys() == {"data-digits-pretrain", "data-digits-train"}
    assert pretrain.artifacts(used=False).keys() == {weights, f"result-{pretrain.id}"}
    assert lincls.artifacts(used=True).keys() == {"data-digits-train", "data-digits-val", weights}
    assert f"result-{lincls.id}" in lincls.artifacts(used=False)
    assert pretrain.artifacts(used=False)[weights] == lincls.artifacts(used=True)[weights]
    assert pretrain.artifacts(used=False)[weights][0] == "model"
    same = pretrain.artifacts(used=True)["data-digits-pretrain"]
    assert select.artifacts(used=True)["data-digits-pretrain"] == same
    assert weights in select.artifacts(used=True)


def test_predictions(runs: dict[str, Recorded], tmp_path: Path) -> None:
    """A table of them, and what they came from; what predict saves as it goes are no weights."""
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "photos" / "black.png")
    words = [
        f"pretrained={runs['pretrain'].directory}",
        f"stage.images={tmp_path}/photos",
        "data.workers=1",
    ]
    launch(
        compose(
            "stage=predict",
            "tracking=wandb",
            "tracking.mode=offline",
            *words,
            f"dir={tmp_path}/run/seed0",
        )
    )
    run = Recorded(tmp_path / "run" / "seed0")
    assert (run.state, run.summary["predict/images"]) == ("finished", 1)
    assert "predict/tables/images" in run.summary
    assert f"weights-{runs['pretrain'].id}" in run.artifacts(used=True)
    assert [name for name in run.artifacts(used=False) if not name.startswith("run-")] == [
        f"result-{run.id}"
    ]


def test_weights_from_elsewhere_are_known_by_their_content(tmp_path: Path) -> None:
    digests = []
    for number, content in enumerate([b"one", b"two", b"one"]):
        (tmp_path / "moco v2.pth.tar").write_bytes(content)
        directory = tmp_path / f"run{number}"
        tracker = tracking.WandbTracker(
            mode="offline",
            directory=directory,
            config={"pretrained": str(tmp_path / "moco v2.pth.tar")},
        )
        tracker.close("finished", {})
        digests.append(Recorded(directory).artifacts(used=True)["weights-moco-v2.pth"])
    assert digests[0] == digests[2] != digests[1]


def test_a_rebuilt_run_has_the_lineage_too(runs: dict[str, Recorded]) -> None:
    lincls = runs["lincls"]
    tracking.rebuild(lincls.directory, {"mode": "offline"})
    (folder,) = folders(lincls.directory / "wandb-synced")
    again = [(item["name"], item["digest"]) for item in kind(records(folder), "artifact")]
    before = [(item["name"], item["digest"]) for item in kind(lincls.records, "artifact")]
    # the names of tables are made up each time
    steady = [item for item in again if not item[0].startswith("run-")]
    assert sorted(steady) == sorted(item for item in before if not item[0].startswith("run-"))
    assert "lincls/tables/grid._type" in {
        key for row in history(records(folder)).values() for key in row
    }


def test_lineage_that_fails_does_not_leave_the_run_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "_artifact", lambda *args: 1 / 0)
    tracker = tracking.WandbTracker(mode="offline", directory=tmp_path / "run", config={})
    tracker.close("finished", {"top1": 3.0})
    run = Recorded(tmp_path / "run")
    assert (run.state, run.summary["top1"]) == ("finished", 3.0)
    assert "W&B stopped (ZeroDivisionError" in caplog.text


# -- the dashboard ---------------------------------------------------------------------------------


def shown(made: "ws.Workspace") -> dict[str, set[str]]:
    """The names that panels show: of the history's metrics, of the summary, of media."""
    names: dict[str, set[str]] = {"history": set(), "summary": set(), "media": set()}
    for panel in (panel for section in made.sections for panel in section.panels):
        names["history"] |= {panel.x, *panel.y} if type(panel).__name__ == "LinePlot" else set()
        names["summary"] |= set(getattr(panel, "metrics", [])) | {
            getattr(panel, "table_name", None)
        } - {None}
        names["media"] |= set(getattr(panel, "media_keys", []))
    names["summary"] |= {
        column.removeprefix("summary:")
        for column in made.runset_settings.pinned_columns
        if column.startswith("summary:")
    }
    return names


def test_every_panel_shows_what_is_logged(runs: dict[str, Recorded]) -> None:
    names = shown(dashboard.workspace("mine", "me"))
    logged = {
        key.removesuffix(".path")
        for run in runs.values()
        for row in run.rows.values()
        for key in row
    }
    results = {key for run in runs.values() for key in run.summary}
    ours = tuple(f"{stage}/" for stage in runs)
    for place, there in (("history", logged), ("summary", results), ("media", logged)):
        wanted = {name for name in names[place] if name.startswith(ours) or name in AXES}
        wanted -= {f"pretrain/{name}" for name in layout.LEARNT}  # transformers alone leave these
        assert wanted <= there, place
        assert len(wanted) > 1, place
    stages = {
        path.stem for path in (Path(ssl_bench.__file__).parent / "conf" / "stage").glob("*.yaml")
    }
    others = {name.partition("/")[0] for name in set().union(*names.values()) if "/" in name}
    assert others <= stages | {"knn", "finetune"}


def test_without_a_login_it_is_written_down(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "dashboard.json"
    result = launch(
        compose(
            "stage=dashboard", "tracking.project=mine", "tracking.entity=me", f"stage.out={out}"
        )
    )
    assert f"the dashboard is in {out}" in capsys.readouterr().out
    read = TypeAdapter(ws.Workspace).validate_json(out.read_text())
    assert (read.project, read.entity) == ("mine", "me")
    assert shown(read) == shown(dashboard.workspace("mine", "me"))
    assert result == {"panels": sum(len(section.panels) for section in read.sections)}
    assert dashboard.to_json(read) == out.read_text()


def test_with_a_login_it_is_saved(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    saved = []
    monkeypatch.setattr(tracking, "choose_mode", lambda mode: "online")
    monkeypatch.setattr(ws.Workspace, "save", lambda self: saved.append(self))
    monkeypatch.setattr(ws.Workspace, "url", "https://wandb.ai/me/mine?nw=1")
    launch(compose("stage=dashboard", "tracking.project=mine", "tracking.entity=me"))
    assert [(made.project, made.entity) for made in saved] == [("mine", "me")]
    assert "dashboard: https://wandb.ai/me/mine" in capsys.readouterr().out

    def refuse(self: "ws.Workspace") -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(ws.Workspace, "save", refuse)
    with pytest.raises(
        UserError, match=r"^W&B made no dashboard \(no route\): check tracking.entity and [\w.]+$"
    ):
        launch(compose("stage=dashboard", "tracking.project=mine", "tracking.entity=me"))


def test_mistakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"leave tracking=wandb"):
        launch(compose("stage=dashboard", "tracking=local", f"stage.out={tmp_path}/x.json"))
    with pytest.raises(
        UserError,
        match=r"no/x\.json: can't be written \(No such file or directory\); choose another",
    ):
        launch(compose("stage=dashboard", f"stage.out={tmp_path}/no/x.json"))
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(UserError, match=r"type pip install 'ssl_bench\[dashboard\]'"):
        launch(compose("stage=dashboard", f"stage.out={tmp_path}/x.json"))
    assert not list(tmp_path.iterdir())
