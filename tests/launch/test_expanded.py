"""pretrained=SWEEP: an evaluation of each finished member, in one table."""

import logging
import re
from pathlib import Path

import pytest
from commands import member
from made_runs import checkpoint, classified_from, pretrained

from ssl_bench.errors import UserError
from ssl_bench.launch.expanded import with_members
from ssl_bench.launch.launchers import _other_network
from ssl_bench.report import sweeps
from ssl_bench.runs import sweep


def test_finished_members_are_named_in_the_place_of_their_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/sweeps/it's")
    one, bare, _, pipeline = (
        member(folder, summary, f"seed={seed}")
        for seed, summary in enumerate([{"loss": 1.0}, {"loss": 1.0}, None, {"loss": 2.0}])
    )
    for run in (one.directory, pipeline.directory / "pretrain"):
        (run / "checkpoints").mkdir(parents=True)
        (run / "checkpoints" / "step0000000002.pt").touch()
    with caplog.at_level(logging.INFO, "ssl_bench"):
        words = with_members(["-m", "stage=knn", f"pretrained=runs/x,{folder}", "seed=0"])
    assert words == [
        "-m",
        "stage=knn",
        rf"pretrained=runs/x,'runs/sweeps/it\'s/{one.name}',"
        rf"'runs/sweeps/it\'s/{pipeline.name}/pretrain'",
        "seed=0",
    ]
    assert f"no checkpoint, and left out: {bare.name}" in caplog.text
    assert "2 of its 4 members" in caplog.text
    for others in (["pretrained=runs/x"], ["pretrained=null", "method=byol"], [f"runs={folder}"]):
        assert with_members(others) == others


def test_a_sweep_that_cannot_be_measured(tmp_path: Path) -> None:
    one = member(tmp_path, None, "seed=0")
    word = f"pretrained={tmp_path}"
    with pytest.raises(UserError, match="is a sweep of 1: add -m"):
        with_members(["stage=knn", word])
    with pytest.raises(UserError, match="none of its 1 members has finished"):
        with_members(["-m", "stage=knn", word])
    one.directory.mkdir()
    member(tmp_path, {"loss": 1.0}, "seed=1")
    with pytest.raises(UserError, match="none of its finished members has a checkpoint"):
        with_members(["launcher=workstation", word])


def test_a_table_names_what_tells_pretrainings_apart(tmp_path: Path) -> None:
    """And not their paths; a network of another shape is seen before any evaluation starts."""
    folder = tmp_path / "knn"
    for top1, rate in ((50.0, 0.1), (60.0, 0.2)):
        ran = pretrained(tmp_path / "moco" / f"{rate}", f"method.temperature={rate}")
        weights = checkpoint(ran, 80, str(rate).encode())
        words = ["stage=lincls", f"pretrained={weights}"]
        name = sweep.name(words)
        made = classified_from(folder / name, top1, weights)
        sweep.Member(
            folder / ".members" / f"{name}.json", words, made.config, str(tmp_path), ""
        ).save()
    told = [line.split("|")[1].strip() for line in sweeps.sweep_table(folder).splitlines()]
    assert told == ["pretrained.method.temperature", told[1], "0.2", "0.1"]
    had = ran.config["backbone"]
    assert _other_network(str(ran.directory), had) == ""
    typed = r"backbone=resnet18 backbone\.stem=\w+ backbone\.width=64"
    backbones = "ssl_bench.backbones"
    others: list[dict] = [
        {"width": 8},
        {"name": "resnet50", "_target_": f"{backbones}.resnet.resnet50"},
    ]
    others.append({"name": "vit_tiny", "_target_": f"{backbones}.vit.vit_tiny", "patch_size": 8})
    for other in others:
        assert re.fullmatch(typed, _other_network(str(ran.directory), had | other))
    # which may be the same network
    for unknown in ({"_target_": f"{backbones}.timm.timm"}, {"_target_": "mine.network"}):
        assert _other_network(str(ran.directory), had | {"name": "x", "width": 8} | unknown) == ""


def test_a_member_that_kept_its_best_state_alone_is_measured(tmp_path: Path) -> None:
    """With keep=best."""
    one = member(tmp_path, {"loss": 1.0}, "seed=0")
    (one.directory / "best").mkdir(parents=True)
    (one.directory / "best" / "step0000000002.pt").touch()
    words = with_members(["-m", "stage=knn", f"pretrained={tmp_path}"])
    assert one.name in words[-1]
