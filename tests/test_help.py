"""`ssl-bench --help` fits a screen, and says of a choice what it has; the shell completes them."""

import re
from pathlib import Path

import pytest
from commands import CHOICES, CONF, complaint
from conftest import Command

from ssl_bench.config import comments, manual

METHODS = [(group, choice) for group, choice in CHOICES if group == "method"]


def test_help_fits_a_screen(ssl_bench: Command) -> None:
    page = ssl_bench("--help", check=True).stdout.rstrip("\n").splitlines()
    assert 24 <= len(page) <= 40
    assert max(map(len, page)) <= 80
    text = "\n".join(page)
    for group, choice in CHOICES:
        if row := re.search(rf"^{group}= +(.*(?:\n +.*)*)", text, re.M):
            assert choice in re.split(r"\W+", row[1])
    assert text.count("stage=") > 2
    assert "docs/" in page[-1]


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_has_a_page_of_its_own(group: str, choice: str) -> None:
    page = manual.page([f"{group}={choice}"], None)
    for line in page.splitlines():
        assert len(line) <= 80 or len(line.strip(" \\").split()) == 1
    text = (CONF / group / f"{choice}.yaml").read_text()
    node, own, _ = comments.node_of(group, text)
    unsaid = {"name", "_target_", "defaults"}
    keys = {key.path.partition(".")[0] for key in own} - unsaid
    assert keys == node.keys() - unsaid
    for base in comments.below(text, comments.choices(group))[:1]:
        assert f"It builds on {group}={base}, and changes" in page
    said = " ".join(page.split())
    for key in own:
        if key.path in unsaid:
            continue
        assert re.search(rf"(^| ){re.escape(f'{group}.{key.path}=')}", said), key
        assert " ".join(key.comment.split()) in said
    assert f"ssl-bench {group}={choice} --cfg job" in page
    assert "--help" in page
    assert "every key: conf/ in the repository, or make docs" in page


def test_help_beside_choices_and_keys(ssl_bench: Command, tmp_path: Path) -> None:
    page = ssl_bench("stage=lincls", "--help", "backbone=resnet18", check=True).stdout
    assert "stage.labels_per_class=null  train on this many labelled images" in page
    assert "metric=val_top1" in page
    assert "augmentation=lincls, optimizer=lincls, schedule=step" in page
    assert "backbone.width=64" in page
    assert "It reads, of the other keys, augmentation, backbone, batch_size," in page
    both = ssl_bench("-m", "method=moco_v2,dino", "-h", check=True).stdout
    assert "method.queue_size=65536" in both
    assert "method.center_momentum=0.9" in both
    key = ssl_bench("save_every=", "--help", check=True).stdout
    assert key.startswith("save_every=1000  steps between checkpoints")
    listed = ssl_bench("method=", "--help", check=True).stdout
    assert all(f"\nmethod={choice}  " in f"\n{listed}" for _, choice in METHODS)
    wrong = complaint(ssl_bench("stage=linclss", "--help"))
    assert wrong.startswith("stage=linclss: no such choice; did you mean stage=lincls?")
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text(
        "# My method.\nname: mine\n_target_: ssl_bench.methods.simclr.SimCLR\ndim: 8  # mine\n"
    )
    own = ssl_bench(f"--config-dir={tmp_path}", "method=mine", "--help", check=True).stdout
    assert own.startswith("method=mine\nMy method.\n\nmethod.dim=8  mine\n+method.hidden_dim=")
    mistaken = {
        "built": ("defaults: [mine]\ndim: 9\n", "It builds on method=mine, and changes"),
        "gone": ("_target_: not_here.Mine\n", "method._target_=not_here.Mine: can't be imported"),
        "broken": ("name: [\n", "method=broken: its file is no YAML"),
    }
    for name, (text, said) in mistaken.items():
        (tmp_path / "method" / f"{name}.yaml").write_text(text)
        result = ssl_bench(f"--config-dir={tmp_path}", f"method={name}", "--help")
        assert said in result.stdout + result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("ssl-bench method=moco_v", ["method=moco_v1", "method=moco_v2", "method=moco_v3"]),
        ("ssl-bench -m stage=pre", ["stage=predict", "stage=pretrain"]),
        ("ssl-bench method=simclr method.temp", ["method.temperature="]),
    ],
)
def test_the_shell_completes(
    ssl_bench: Command, monkeypatch: pytest.MonkeyPatch, line: str, offered: list[str]
) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setenv("COMP_POINT", str(len(line)))
    said = ssl_bench("-sc", "query=bash", check=True).stdout.split()
    assert said[: len(offered)] == offered
