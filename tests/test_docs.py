"""What the README tells people to type is right."""

import re
import shlex
from pathlib import Path

import pytest
from commands import CHOICES, compose
from omegaconf import OmegaConf

from ssl_bench.config import build, typed

README = (Path(__file__).parents[1] / "README.md").read_text()
# `ssl-bench ...` in fenced blocks (not transcripts, which begin with $) and in running text
COMMANDS = sorted(
    set(re.findall(r"^ *ssl-bench (.+)$", README, re.M))
    | set(re.findall(r"`ssl-bench ([^`]+)`", README))
)


@pytest.fixture
def my_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a reader of these commands has written."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_module.py").write_text(
        "class MyImages(list):\n    def __init__(self, root: str, split: str) -> None: ...\n"
    )


@pytest.mark.usefixtures("my_module")
@pytest.mark.parametrize("command", COMMANDS)
def test_command_composes(command: str) -> None:
    if "--help" in command or "--config-dir" in command:
        return
    words = [
        word
        for word in shlex.split(command, comments=True)
        if word[0] not in "-$" and word != "job"
    ]
    words = [re.sub(r"=([^\[,]+),.*", r"=\1", word) for word in words]
    cfg = compose(*words)
    build.check(cfg)
    assert not typed.in_vain(OmegaConf.to_container(cfg), words)


def test_every_choice_is_named() -> None:
    """In its group's own row: another group may have a choice of that name."""
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", README, re.M))
    for group, choice in CHOICES:
        assert f"`{choice}`" in rows[group], f"{group}={choice}"
