"""`ssl-bench --help` fits a screen; the shell completes our choices."""

import re

import pytest
from commands import CHOICES
from conftest import Command


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
