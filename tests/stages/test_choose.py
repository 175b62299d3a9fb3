"""stage=choose: which pretraining to take without labels, and how well that would have chosen."""

import json
import shutil
from pathlib import Path

import hydra
import numpy as np
import pytest
from commands import compose
from PIL import Image
from small_methods import overrides

from ssl_bench.errors import UserError
from ssl_bench.evaluate.criteria import BETTER
from ssl_bench.launch.process import launch
from ssl_bench.runs import layout
from ssl_bench.stages.choose import shortened

SMALL = ["data.image_size=8", "augmentation.image_size=8", "augmentation.blur_p=0"]
SMALL += ["batch_size=128", "epochs=1", "eval_every=1", "stage.online_images=100"]
RATES = ("0.003", "0.03", "0.3")


def shown(capsys: pytest.CaptureFixture, *words: str) -> tuple[str, dict[str, float]]:
    cfg = compose("stage=choose", "device=cpu", "stage.images=128", "stage.views=2", *words)
    with hydra.initialize_config_module("ssl_bench.conf", version_base="1.3"):
        returned = launch(cfg)
    return capsys.readouterr().out, returned


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rates of MoCo, each with a kNN classification, and what isn't to be chosen from."""
    folder = tmp_path_factory.mktemp("sweep")
    for rate in RATES:
        words = [*SMALL, f"optimizer.base_lr={rate}", "save_every=6", f"dir={folder}/{rate}"]
        launch(compose(*overrides("moco_v2", *words)))
        evaluation = [f"pretrained={folder}/{rate}", "stage.k=[5]", "stage.temperatures=[0.1]"]
        words = ["data.image_size=8", "backbone.width=8", "backbone.stem=small", "device=cpu"]
        launch(compose("stage=knn", *words, *evaluation, f"dir={folder}/{rate}/knn"))
    launch(compose(*overrides("random", f"dir={folder}/random", *SMALL[:1])))
    return folder


@pytest.mark.slow
@pytest.mark.xdist_group("choose")
def test_settings_and_checkpoints_are_ranked(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    text, returned = shown(capsys, f"runs={sweep}", f"stage.out={tmp_path}", "stage.by=nesum")
    content = json.loads((tmp_path / "choice.json").read_text())
    rows = content["rows"]
    assert returned["checkpoints"] == len(rows) == 6  # two states of each; none of the random one
    assert all(set(row["criteria"]) == set(BETTER) for row in rows)
    best = max(rows, key=lambda row: row["criteria"]["nesum"])
    assert f"# The choice by nesum: {best['name']}" in text
    assert f"pretrained={best['checkpoint']}" in text
    assert "heldout_loss can't be compared" not in text  # the rate isn't part of the loss
    # by evaluations, over settings; by what the runs have logged, over all checkpoints
    judged = [row for row in rows if "knn val_top1" in row["labels"]]
    assert [row["step"] for row in judged] == [10, 10, 10]
    truth = [row["labels"]["knn val_top1"] for row in judged]
    summaries = [json.loads((sweep / rate / "knn" / layout.SUMMARY).read_text()) for rate in RATES]
    assert sorted(truth) == sorted(one["val_top1"] for one in summaries)
    chosen = max(judged, key=lambda row: row["criteria"]["nesum"])
    expected = max(truth) - chosen["labels"]["knn val_top1"]
    assert returned["regret (knn val_top1)"] == pytest.approx(expected)
    assert -1 <= returned["rho (knn val_top1)"] <= 1
    # what was measured isn't measured again
    content["rows"][0]["criteria"]["rankme"] = 1234.0
    (tmp_path / "choice.json").write_text(json.dumps(content))
    text, _ = shown(capsys, f"runs={sweep}", f"stage.out={tmp_path}")
    assert "1.23e+03" in text
    text, _ = shown(capsys, f"runs={sweep}", f"stage.out={tmp_path}", "stage.images=100")
    assert "1.23e+03" not in text
    assert "heldout_loss" not in text  # of batches as large as they were there are none


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "measured"), [("best", True), ("backbone", False)])
def test_what_little_is_kept_is_ranked(
    tmp_path: Path, capsys: pytest.CaptureFixture, keep: str, measured: bool
) -> None:
    """A best state is one like others; a backbone alone has no loss."""
    run = tmp_path / "run"
    words = [*SMALL, f"keep={keep}", "save_best=probe_top1", f"dir={run}"]
    launch(compose(*overrides("moco_v2", *words)))
    text, returned = shown(capsys, f"runs={run}")
    (row,) = json.loads((run / "choice.json").read_text())["rows"]
    assert returned["checkpoints"] == 1
    (path,) = layout.states(run)
    assert f"pretrained={path}" in text
    assert ("heldout_loss" in row["criteria"]) == measured
    assert set(BETTER) - set(row["criteria"]) <= {"heldout_loss"}


@pytest.mark.slow
@pytest.mark.xdist_group("choose")
def test_what_can_not_choose_is_told(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for words, told in (
        ([], "runs= needs a value"),
        ([f"runs={sweep}/random"], "no pretraining without labels that has a checkpoint"),
        ([f"runs={sweep}", "stage.by=lidar", "stage.views=1"], "compares 2 or more"),
        ([f"runs={sweep}", "metric=val_top7", f"stage.out={tmp_path}"], "no run here has it"),
    ):
        with pytest.raises(UserError, match=told):
            shown(capsys, *words)
    # a single run: nothing is known of how well this chooses
    text, _ = shown(capsys, f"runs={sweep}/0.03", "stage.last=true", f"stage.out={tmp_path}")
    assert "how well this chooses isn't known" in text
    other = tmp_path / "other"
    words = [*SMALL, "augmentation.crop_scale=[0.9,1]", f"dir={other}"]
    launch(compose(*overrides("moco_v2", *words)))
    text, _ = shown(capsys, f"runs=[{sweep},{other}]", "stage.last=true", f"stage.out={tmp_path}")
    assert "heldout_loss can't be compared here" in text
    assert "lidar and alignment are of each run's own views" in text


@pytest.mark.slow
def test_what_can_not_be_read_is_left_out_and_data_without_labels_will_do(
    tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    """Images that are gone, or a method of a module that isn't here, end no other run's choice."""
    rng = np.random.default_rng(0)
    for name in ("there", "gone"):
        (tmp_path / name).mkdir()
        for number in range(128):
            pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
        words = [*SMALL, "data=folder", f"data.root={tmp_path}/{name}", "method.queue_size=128"]
        launch(compose(*overrides("moco_v2", *words, f"dir={tmp_path}/runs/{name}")))
    shutil.rmtree(tmp_path / "gone")
    other = tmp_path / "runs" / "other"
    shutil.copytree(tmp_path / "runs" / "there", other, ignore=lambda *_: ["SHA256SUMS"])
    config = (other / layout.CONFIG).read_text()
    method = "ssl_bench.methods.moco.MoCo"
    assert method in config
    (other / layout.CONFIG).write_text(config.replace(method, "not_here.MoCo"))
    text, returned = shown(capsys, f"runs={tmp_path}/runs")
    assert returned["checkpoints"] == 1
    assert f"pretrained={tmp_path}/runs/there" in text
    left_out = [line for line in caplog.messages if line.startswith("left out: ")]
    assert any(f"{tmp_path}/runs/gone: " in line for line in left_out)
    assert any(f"{other}: " in line and "not_here" in line for line in left_out)
    with pytest.raises(UserError, match=f"{tmp_path}/gone"):
        shown(capsys, f"runs={tmp_path}/runs/gone")


def test_a_long_table_is_shortened() -> None:
    text = "# A\n\n" + "\n".join(["| a |", "|---|", *(f"| {i} |" for i in range(40))]) + "\n\nend\n"
    lines = shortened(text).split("\n")
    assert lines[-4:] == ["| 29 |", "and 10 more in choice.md", "", "end"]
    assert shortened("| a |\n|---|\n| 1 |\n\nend\n") == "| a |\n|---|\n| 1 |\n\nend"
