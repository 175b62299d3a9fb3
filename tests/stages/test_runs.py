"""stage=runs: the runs there are, and the checkpoints that nothing stands on."""

import os
from pathlib import Path

import hydra
import pytest
import torch
from commands import compose
from made_runs import checkpoint, classified, pretrained

from ssl_bench import files
from ssl_bench.errors import UserError
from ssl_bench.launch.process import launch
from ssl_bench.runs import layout


def shown(capsys: pytest.CaptureFixture, *words: str) -> tuple[list[str], dict[str, float]]:
    cfg = compose("stage=runs", *words)
    with hydra.initialize_config_module("ssl_bench.conf", version_base="1.3"):
        returned = launch(cfg)
    return capsys.readouterr().out.splitlines(), returned


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`plain` with an evaluation of its first state, `wide` with two states, `going` on."""
    monkeypatch.chdir(tmp_path)
    plain = pretrained(Path("runs/plain"), probe_top1=80.0)
    first = checkpoint(plain, 40, b"first")
    checkpoint(plain, 80, b"second")
    wide = pretrained(Path("runs/wide"), "backbone.width=8", "optimizer.base_lr=0.5")
    checkpoint(wide, 40, b"third")
    checkpoint(wide, 80, b"fourth")
    going = pretrained(Path("runs/going"), "schedule=constant", loss=None)
    checkpoint(going, 40, b"fifth")
    checkpoint(going, 80, b"sixth")
    measured = classified(Path("runs/plain/lincls"), 70.0, f"pretrained={first}")
    (measured.directory / layout.WEIGHTS).write_text(files.digest(first))
    return tmp_path


def test_what_there_is(here: Path, capsys: pytest.CaptureFixture) -> None:
    lines, returned = shown(capsys)
    assert returned["runs"] == 4
    assert returned["finished"] == 3
    text = "\n".join(lines)
    for line in (
        "runs/going\n    stopped ",
        "runs/plain\n    finished  probe_top1 80 % ",
        "runs/plain/lincls\n    finished  val_top1 70 % ",
    ):
        assert line in text
    wide = lines[lines.index("runs/wide") + 1]
    assert wide.endswith("backbone.width=8 optimizer.base_lr=0.5")
    assert lines[:3] == ["shared by all 3 of stage=pretrain: epochs=2", "", "runs/going"]
    assert "now" in wide
    assert "schedule=constant" in lines[lines.index("runs/going") + 1]
    assert max(map(len, lines)) <= 120


def test_what_differs_within_a_choice_and_which_run_it_goes_on_from(
    here: Path, capsys: pytest.CaptureFixture
) -> None:
    """What follows another key is said once."""
    choice = ["augmentation=digits", "augmentation.crop_scale=[0.4,1.0]", "data.image_size=16"]
    choice += ["schedule=constant", "schedule.warmup_epochs=1"]
    pretrained(Path("runs/chosen"), *choice)
    state = here / "runs/wide/checkpoints/step0000000080.pt"
    more = pretrained(Path("runs/more"), f"pretrained={state}", "continue_from=runs/wide")
    (more.directory / layout.WEIGHTS).write_text(files.digest(state))
    lost = ["pretrained=/nowhere/step0000000080.pt", "continue_from=gone"]
    pretrained(Path("runs/orphan"), *lost)
    lines, _ = shown(capsys)
    chosen, more, orphan = (
        lines[lines.index(f"runs/{name}") :] for name in ("chosen", "more", "orphan")
    )
    told = " ".join(chosen[1:4]).split()
    assert {"augmentation=digits", "augmentation.crop_scale=[0.4,", "data.image_size=16"} <= {*told}
    assert {"schedule=constant", "schedule.warmup_epochs=1"} <= {*told}
    assert not any(word.startswith("augmentation.image_size") for word in told)
    assert more[1].endswith(" continue_from=runs/wide")
    assert orphan[1].endswith(" continue_from=gone")


def test_only_what_nothing_stands_on_is_deleted(here: Path, capsys: pytest.CaptureFixture) -> None:
    """Not the states of a run that will go on, nor one that was measured, even at another path."""
    first = here / "runs/plain/checkpoints/step0000000040.pt"
    lines, _ = shown(capsys)
    assert "1 checkpoint (0.0 MB) is no longer needed: stage.prune=true deletes it" in lines
    before = {path for path in here.rglob("*.pt")}
    shown(capsys, "stage.prune=true")
    gone = before - {path for path in here.rglob("*.pt")}
    assert gone == {here / "runs/wide/checkpoints/step0000000040.pt"}
    assert first.exists()
    assert not any("stage.prune" in line for line in shown(capsys)[0])


def test_where_the_last_one_is_damaged_none_is_deleted(
    here: Path, capsys: pytest.CaptureFixture
) -> None:
    last = here / "runs/wide/checkpoints/step0000000080.pt"
    torch.save({"model": {"a": torch.zeros(1000)}}, last)
    assert any("stage.prune=true" in line for line in shown(capsys)[0])
    os.truncate(last, 1500)
    lines = shown(capsys, "stage.prune=true")[0]
    assert (here / "runs/wide/checkpoints/step0000000040.pt").exists()
    assert any(line.endswith("the checkpoints before it are kept") for line in lines)


def test_age_and_own_size(here: Path, capsys: pytest.CaptureFixture) -> None:
    for path in (here / "runs/wide").rglob("*"):
        os.utime(path, (0, path.stat().st_mtime - 3 * 86400 - 60))
    (here / "runs/plain/lincls/large").write_bytes(bytes(3_000_000))
    lines, _ = shown(capsys)
    assert "3 d" in lines[lines.index("runs/wide") + 1]
    assert "0.0 MB" in lines[lines.index("runs/plain") + 1]
    assert "3.0 MB" in lines[lines.index("runs/plain/lincls") + 1]


def test_no_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="runs=runs: no run at or below it"):
        launch(compose("stage=runs"))
