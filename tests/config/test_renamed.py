"""Runs, sweeps and exports of before a move are read after it."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from commands import compose
from conftest import TINY, TINY_PRETRAIN

from ssl_bench import files
from ssl_bench.config import build, renamed
from ssl_bench.launch import member
from ssl_bench.launch.process import launch
from ssl_bench.runs import layout, record
from ssl_bench.runs.sweep import Member

AFTER = {new: old for old, new in renamed.BEFORE.items()}


def as_before(node: object) -> object:
    """A configuration as it was written before: each constructor by its former place."""
    if isinstance(node, dict):
        return {
            key: AFTER.get(value, value) if key == "_target_" else as_before(value)
            for key, value in node.items()
        }
    return [as_before(item) for item in node] if isinstance(node, list) else node


def age(run: Path) -> None:
    config = as_before(yaml.safe_load((run / "config.yaml").read_text()))
    assert "ssl_bench.data.formats.Digits" in str(config)
    files.write(run / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    if (run / files.SUMS).exists():
        files.seal(run, files.sums_of(run, layout.own(run)))


@pytest.mark.parametrize("old", renamed.BEFORE)
def test_each_former_place_has_a_constructor(old: str) -> None:
    assert callable(build.locate(old, "node"))
    assert not {renamed.BEFORE[old]} & renamed.BEFORE.keys()  # in one step


@pytest.mark.slow
def test_a_run_goes_on_is_measured_and_reported(tmp_path: Path) -> None:
    command, run = [*TINY_PRETRAIN, f"dir={tmp_path}/moco/seed0"], tmp_path / "moco/seed0"
    launch(compose(*command))
    last = layout.complete(run)[0]
    before = torch.load(last, weights_only=True)["model"]
    for file in (run / "summary.json", last):
        file.unlink()
    age(run)  # of a run that was stopped before its end
    launch(compose(*command))
    after = torch.load(last, weights_only=True)["model"]
    assert all(torch.equal(before[key], after[key]) for key in before)

    age(run)
    words = [*TINY, "stage=lincls", f"pretrained={run}", "epochs=1", f"dir={tmp_path}/lincls/seed0"]
    launch(compose(*words))
    age(tmp_path / "lincls/seed0")
    assert launch(compose(*words)) == json.loads(
        (tmp_path / "lincls/seed0/summary.json").read_text()
    )
    launch(compose("stage=export", f"pretrained={run}", f"stage.out={tmp_path}/export"))
    launch(compose("stage=report", f"runs={tmp_path}"))
    assert "moco" in (tmp_path / "results.md").read_text()
    assert [ran.summary is not None for ran in record.find([tmp_path])] == [True, True]


def test_a_member_of_a_sweep_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = build.OmegaConf.to_container(
        compose(*TINY_PRETRAIN, "epochs=1", f"dir={tmp_path}/seed0"), resolve=True
    )
    made = Member(
        tmp_path / ".members/seed0.json", [], as_before(config), str(tmp_path), str(tmp_path)
    )
    made.save()
    member.attempt(Member.load(made.file))
    assert made.result()
