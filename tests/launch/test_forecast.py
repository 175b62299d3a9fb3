"""What a sweep is said to cost, and what it does cost."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import compose, member
from omegaconf import OmegaConf

from ssl_bench.config import build
from ssl_bench.launch import forecast
from ssl_bench.runs import metrics, sweep
from ssl_bench.runs.checkpoint import Checkpoint
from ssl_bench.training.average import Average


def resolved(*words: str) -> dict:
    return OmegaConf.to_container(compose(*words, "dir=/x"), resolve=True)


@pytest.mark.parametrize("method", ["moco_v2", "barlow_twins", "dino"])
def test_the_disk_is_that_of_a_state(tmp_path: Path, method: str) -> None:
    """Of SGD with momentum, LARS and AdamW; some weights aren't trained."""
    words = ("stage=pretrain", f"method={method}", "backbone.width=16", "ema=0.9")
    config = resolved(*words)
    model = build.construct(config["method"], backbone=build.construct(config["backbone"]))
    groups = model.param_groups()
    optimizer = build.construct(config["optimizer"], params=groups, batch_size=256)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    state = {"model": model, "optimizer": optimizer, "ema": Average(model, 0.9)}
    for keep, count in ((1, 1), (3, 3), ("last", 1)):
        saved = Checkpoint(tmp_path / "run", "", keep).save(1, **state)
        running, left = forecast.state_bytes(config | {"keep": keep})
        size = saved.stat().st_size
        assert left / count == pytest.approx(size, rel=0.05)
        assert running / left == {1: 1, 3: 1, "last": 2}[keep]
    small = Checkpoint(tmp_path / "run", "", "backbone")
    (path,) = small.final().values()
    _, left = forecast.state_bytes(config | {"keep": "backbone"})
    assert left == pytest.approx(path.stat().st_size, rel=0.05)


def test_what_cannot_be_known_is_not_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert forecast.state_bytes(resolved("stage=lincls", "pretrained=x")) is None
    assert forecast.state_bytes(resolved("stage=pretrain", "method=distill")) is None
    with caplog.at_level(logging.INFO, "ssl_bench"):
        forecast.tell_disk([member(tmp_path / "sweep", None)], tmp_path)
    assert not caplog.records


def test_a_full_disk_is_said_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = member(tmp_path / "sweep", None)
    one.config = resolved("stage=pretrain")
    monkeypatch.setattr(forecast.shutil, "disk_usage", lambda _: type("Disk", (), {"free": 10**8}))
    with caplog.at_level(logging.INFO, "ssl_bench"):
        forecast.tell_disk([one] * 4, tmp_path)
    said, warned = (r.getMessage() for r in caplog.records if r.name == forecast.__name__)
    assert said.startswith("4 members leave about ")
    assert said.endswith(" GB of states (keep=2); 0.1 GB is free")
    assert warned.endswith("more than the 0.1 GB that is free: type keep=backbone, or keep=last")


def test_a_pipeline_of_two_stages_is_counted_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = member(tmp_path / "sweep", None)
    whole.config = resolved("stage=pipeline")
    first = replace(whole, file=whole.file.with_name(f"{whole.name}{sweep.FIRST}.json"))
    first.config = resolved("stage=pretrain")
    first.save()
    with caplog.at_level(logging.INFO, "ssl_bench"):
        forecast.tell_disk([first, whole] * 2, tmp_path)
    (said,) = (r.getMessage() for r in caplog.records if r.name == forecast.__name__)
    assert said.startswith("2 members leave about ")
    assert forecast.Clock([first, whole] * 2, 1, at_most=False).members == [first] * 2


def test_the_time_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """100 images an epoch at 50 a second, twice on two GPUs, one of them twice as long."""
    words = (["seed=0"], ["seed=1"], ["seed=2", "epochs=4"])
    several = [member(tmp_path / "sweep", None, *some) for some in words]
    for one in several:
        one.config["devices"] = 1
    clock = forecast.Clock(several, 2, at_most=True)
    with caplog.at_level(logging.INFO, "ssl_bench"):
        clock.look(several, ["0", "1"], now=True)  # nobody has logged anything
        several[0].directory.mkdir(parents=True)
        file = metrics.MetricsFile(several[0].directory / "metrics.jsonl")
        file.log(3, {"epoch": 0.5, "images_seen": 50, "images_per_second": 50.0})
        clock.look(several, ["0", "1"])  # too early
        for _ in range(2):
            clock.look(several, ["0", "1"], now=True)
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.endswith(": 0:00:04 a member, at most 0:00:08 for all 3, 2 at once; 0.0 GPU hours")
