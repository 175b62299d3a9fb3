"""Which YAML files of a folder are choices: what a sweep keeps, and what may name constructors."""

from pathlib import Path

import pytest
import yaml
from commands import CHOICES, CONF

from ssl_bench.config import build, choices
from ssl_bench.config.choices import yaml_below
from ssl_bench.runs import layout


def test_all_our_choices_are_kept() -> None:
    """In a checkout our launchers are behind a link."""
    kept = {path.relative_to(CONF).as_posix() for path in yaml_below(CONF, outside=True)}
    assert {f"{group}/{choice}.yaml" for group, choice in CHOICES} <= kept
    assert {file.relative_to(CONF).as_posix() for file in CONF.rglob("*.yaml")} <= kept
    assert layout.METRICS in choices.MARKS


def write(path: Path, text: str = "a: 1\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_choices_are_kept_and_the_rest_of_a_project_is_not(tmp_path: Path) -> None:
    """--config-dir=. has the project in it: runs, with copies of their own, images, a venv."""
    here = tmp_path / "project"
    kept = [
        "config.yaml",
        "backbone/of_mine/one.yaml",
        "hydra/sweeper/sampler/one.yaml",
        "method/mine.yaml",
        "mine/base.yaml",
        "optimizer/own.yaml",
        "shared/views.yaml",
        "settings/bench/mine.yaml",
        "typed/one.yaml",
    ]
    others = [
        "runs/moco/seed0/config.yaml",
        "runs/sweeps/pretrain/.members/conf-12345678/method/moco_v2.yaml",
        "data/cached/config.yaml",
        "experiment/sweep/.members/conf-12345678/method/moco_v2.yaml",
        "experiment/other/multirun.yaml",
        "method/notes.md",
        "venv/lib/site-packages/some/method/theirs.yaml",
        ".hidden/own.yaml",
        ".git/hook.yaml",
    ]
    for name in (*kept, *others):
        write(here / name)
    (here / "data/cached/metrics.jsonl").touch()
    write(
        here / "method/mine.yaml",
        "defaults: [/mine/base, {override /shared@augmentation: views}, _self_, ../..]\n",
    )
    write(tmp_path / "elsewhere" / "theirs.yaml")
    (here / "stage").symlink_to(tmp_path / "elsewhere")
    (here / "optimizer/own.yaml").unlink()
    (here / "optimizer").rmdir()
    (here / "optimizer").symlink_to(here / ".hidden")  # within the folder
    (here / "schedule").symlink_to(here)
    found = sorted(str(path.relative_to(here)) for path in yaml_below(here, ["typed"]))
    assert found == sorted(kept)
    assert here / "stage" / "theirs.yaml" in list(yaml_below(here, outside=True))


def test_a_run_in_the_folder_of_choices_names_no_constructor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may come from elsewhere: --config-dir=. mustn't have the program call what it says."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "method/mine.yaml", "_target_: mine.Mine\n")
    write(tmp_path / "runs/moco/config.yaml", yaml.safe_dump({"method": {"_target_": "os.system"}}))
    assert build._targets_below(tmp_path) == {("method", "mine.Mine")}
