"""What a sweep keeps of the YAML files."""

from pathlib import Path

from commands import CHOICES, CONF

from ssl_bench.launch.launchers import yaml_below


def test_all_our_choices_are_kept() -> None:
    """In a checkout our launchers are behind a link."""
    kept = {path.relative_to(CONF).as_posix() for path in yaml_below(CONF, outside=True)}
    assert {f"{group}/{choice}.yaml" for group, choice in CHOICES} <= kept


def test_choices_are_kept_and_runs_are_not(tmp_path: Path) -> None:
    """--config-dir=. has the runs of the project in it, with copies of their own."""
    here = tmp_path / "project"
    for name in (
        "config.yaml",
        "method/mine.yaml",
        "deep/er/one.yaml",
        "runs/moco/seed0/config.yaml",
        "runs/moco/seed0/lincls-digits/seed0/config.yaml",
        "runs/sweeps/pretrain/.members/conf-12345678/method/moco_v2.yaml",
        "runs/sweeps/pretrain/one/config.yaml",
        "runs/sweeps/other/multirun.yaml",
        ".git/hook.yaml",
        "notes/readme.md",
    ):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text("a: 1\n")
    (here / "runs/moco/seed0/metrics.jsonl").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "theirs.yaml").write_text("a: 1\n")
    (here / "out").symlink_to(tmp_path / "elsewhere")
    (here / "again").symlink_to(here)
    (here / "zlinked").symlink_to(here / "method")
    found = sorted(str(path.relative_to(here)) for path in yaml_below(here))
    assert found == ["config.yaml", "deep/er/one.yaml", "method/mine.yaml"]
    assert here / "out" / "theirs.yaml" in list(yaml_below(here, outside=True))
    # a link within the folder, to what isn't seen otherwise
    (here / ".hidden").mkdir()
    (here / ".hidden" / "own.yaml").write_text("a: 1\n")
    (here / "optimizer").symlink_to(here / ".hidden")
    assert here / "optimizer" / "own.yaml" in list(yaml_below(here))
