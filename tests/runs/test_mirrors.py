"""TensorBoard and MLflow have what metrics.jsonl has: read back by their own code."""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
from commands import compose
from conftest import TINY_PRETRAIN, Command
from omegaconf import OmegaConf
from PIL import Image

from ssl_bench.runs.metrics import MetricsFile
from ssl_bench.runs.mirrors import MLflowTracker, Several, TensorBoardTracker
from ssl_bench.runs.tracking import Tracker, of_wandb

CONFIG = {"stage": {"name": "pretrain"}, "seed": 0, "deep": {"api_key": "hunter2", "lr": 0.1}}


def of_tensorboard(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {
        name: [(one.step, one.value) for one in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def of_mlflow(run: Path, uri: str) -> dict[str, list[tuple[int, float]]]:
    from mlflow.tracking import MlflowClient

    client, name = MlflowClient(uri), (run / "mlflow_id").read_text().strip()
    return {
        key: [(one.step, one.value) for one in client.get_metric_history(name, key)]
        for key in client.get_run(name).data.metrics
    }


def logged(run: Path) -> dict[str, list[tuple[int, float]]]:
    """metrics.jsonl in that form."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in MetricsFile.read(run / "metrics.jsonl"):
        step = line.pop("step")
        for key, value in line.items():
            name = key if key in ("epoch", "images_seen") else f"pretrain/{key}"
            found.setdefault(name, []).append((step, value))
    return found


def in_float32(values: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """As TensorBoard keeps them."""
    return [(step, float(np.float32(value))) for step, value in values]


@pytest.fixture(autouse=True)
def _artifacts_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow has them in a folder of the one it is started from."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.mark.slow
def test_they_have_what_the_metrics_have(ssl_bench: Command, tmp_path: Path, uri: str) -> None:
    words = [
        "tracking=several",
        "tracking.names=[tensorboard,mlflow]",
        f"tracking.mlflow.uri={uri}",
    ]
    ssl_bench(*TINY_PRETRAIN, *words, "dir=run", check=True)
    run, expected = tmp_path / "run", logged(tmp_path / "run")
    from_tensorboard = of_tensorboard(run)
    assert from_tensorboard.keys() == expected.keys()
    for name, values in expected.items():
        assert from_tensorboard[name] == in_float32(values)
    assert of_mlflow(run, uri) == expected
    assert not (run / "wandb").exists()


@pytest.mark.parametrize("kind", ["tensorboard", "mlflow"])
def test_steps_that_are_done_again_count_once(kind: str, tmp_path: Path, uri: str) -> None:
    """A killed run goes on from its last checkpoint."""
    Image.new("RGB", (4, 3)).save(tmp_path / "views.png")
    given = {"directory": tmp_path, "config": CONFIG}
    for steps, status in ((range(1, 6), None), (range(4, 9), "finished")):
        tracker: Tracker = (
            TensorBoardTracker(**given) if kind == "tensorboard" else MLflowTracker(uri, **given)
        )
        for step in steps:
            tracker.log(step, {"loss": 1 / step, "epoch": step / 2})
        tracker.log_image(steps[0], "views", tmp_path / "views.png")
        if status or kind == "tensorboard":  # whose writer holds lines back
            tracker.close(status or "preempted", {"loss": 1 / 8, "val_top1": 50.0})
    found = of_tensorboard(tmp_path) if kind == "tensorboard" else of_mlflow(tmp_path, uri)
    steps = range(1, 9)
    assert found["epoch"] == [(step, step / 2) for step in steps]
    losses = [(step, 1 / step) for step in steps]
    assert found["pretrain/loss"] == (in_float32(losses) if kind == "tensorboard" else losses)
    if kind == "mlflow":
        from mlflow.tracking import MlflowClient

        run = MlflowClient(uri).get_run((tmp_path / "mlflow_id").read_text().strip())
        assert run.info.status == "FINISHED"
        assert found["pretrain/val_top1"] == [(8, 50.0)]  # of the summary alone: at the last step
        assert run.data.params["deep.lr"] == "0.1"
        assert "hunter2" not in json.dumps(run.data.params)


def test_what_fails_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = MLflowTracker("nonsense://", directory=tmp_path, config=CONFIG)
    tracker.log(1, {"loss": math.nan})
    tracker.close("finished", {})
    (said,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert said.startswith("MLflow stopped: ")


def test_a_key_of_one_of_several_is_checked_before_the_start(ssl_bench: Command) -> None:
    words = ["tracking=several", "tracking.mlflow.experimant=x"]
    result = ssl_bench(*TINY_PRETRAIN, *words)
    assert result.returncode == 2
    assert "tracking.mlflow.experimant" in result.stderr
    result = ssl_bench(*TINY_PRETRAIN, "tracking=several", "tracking.names=[wandb,comet]")
    assert result.returncode == 2
    assert "tracking.names.1" in result.stderr


def test_without_its_package(ssl_bench: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    missing = ("tensorboard", "mlflow")
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name in missing else find(name)
    )
    for word in ("tracking=mlflow", "tracking=several"):
        result = ssl_bench(*TINY_PRETRAIN[:-1], word)
        assert result.returncode == 2
        assert "pip install 'ssl_bench[" in result.stderr.splitlines()[-1]


def test_a_file_does_not_choose_what_is_made(tmp_path: Path) -> None:
    options = OmegaConf.to_container(compose("tracking=several").tracking)
    options |= {"names": ["tensorboard"], "tensorboard": {"_target_": "os.system"}}
    del options["_target_"]
    Several(**options, directory=tmp_path, config=CONFIG).log(1, {"loss": 1.0})
    assert [*tmp_path.glob("tensorboard/events*")]


def test_the_settings_of_wandb_among_several() -> None:
    assert of_wandb({"_target_": "ssl_bench.runs.tracking.NoTracker"}) is None
    several = {"_target_": "Several", "names": ["wandb"], "wandb": {"project": "mine"}}
    assert of_wandb(several) == {"project": "mine"}
    assert of_wandb(several | {"names": ["mlflow"]}) is None
