"""Files of runs and sweeps that somebody has edited: a line or a result, never a traceback."""

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from commands import compose
from made_runs import checkpoint, classified_from, make_run, pretrained
from omegaconf import OmegaConf

from ssl_bench.errors import UserError
from ssl_bench.launch.process import launch
from ssl_bench.runs import identity
from ssl_bench.runs.sweep import Member

SWEEP = Path("runs/sweeps/mine")
INSTEAD = (None, "a", -1, 0, True, [], {}, [1, "a"], {"a": 1}, float("nan"))
COMMANDS = {
    "status": ["stage=status", f"runs={SWEEP}"],
    "report": ["stage=report", "runs=runs", "stage.out=out", "stage.details=1", "device=cpu"],
    "runs": ["stage=runs", "runs=runs"],
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep: a member that has finished, one that was stopped early, a pipeline between its two
    parts and one whose pretraining failed, one that has paused; and an evaluation of the first.
    """
    monkeypatch.chdir(tmp_path)
    first = member("seed=0", "epochs=2")
    pretrained(first.directory, probe_top1=80.0)
    (first.directory / "inputs.json").write_text('{"train": {"fingerprint": "ab", "images": 3}}')
    state = checkpoint(pretrained(Path("runs/other")), 80, b"first")
    classified_from(Path("runs/other/lincls"), 70.0, state)
    identity.remember(state, Path("runs/other/lincls"))
    member("seed=1", "patience=1", "epochs=9")
    pretrained(SWEEP / "seed-1", "patience=1", "epochs=9", "seed=1", probe_top1=80.0)
    going = member("seed=2", "until=1", "epochs=2")
    (SWEEP / ".members" / "seed-2.starts").write_text('{"saved": [], "in_vain": 1}')
    going.job = "7"
    going.fail("out of luck")
    going.save()
    pretrained(SWEEP / "seed-2", "until=1", "seed=2", loss=None)
    checkpoint_of(SWEEP / "seed-2")
    for name, loss in {"seed=3": 3.0, "seed=4": None}.items():
        member(name, "stage=pipeline", "epochs=2")
        part = member(name, "stage=pretrain", "epochs=2", end=".pretrain")
        pretrained(part.directory, name, loss=loss)
        if loss is None:
            part.fail("diverged at step 2", diverged=True)
    make_run(SWEEP / "seed-3" / "lincls", ["stage=lincls"], [{"epoch": 1, "loss": 1}], None)
    return tmp_path


def checkpoint_of(directory: Path) -> None:
    (directory / "checkpoints").mkdir()
    (directory / "checkpoints" / "step0000000080.pt").write_bytes(b"state")


def member(*words: str, end: str = "") -> Member:
    name = words[0].replace("=", "-") + end
    place = SWEEP / name.replace(".", "/")
    config = OmegaConf.to_container(compose(*words, f"dir={place}"), resolve=True)
    made = Member(SWEEP / ".members" / f"{name}.json", [*words], config, str(Path.cwd()), "")
    made.save()
    return made


def mutilations(path: Path) -> Iterator[tuple[str, str]]:
    """(what was done, the text) of a file: each key missing or another value, two levels down, and
    what isn't the format at all.
    """
    text = path.read_text()
    yield from [("empty", ""), ("a text", '"a"\n'), ("a list", "[1]\n"), ("half", text[:-9])]
    if path.suffix == ".jsonl":
        lines = text.splitlines()
        for what, line in mutilated(json.loads(lines[0])):
            yield f"first line: {what}", "\n".join([json.dumps(line), *lines[1:], ""])
            yield f"last line: {what}", "\n".join([*lines[:-1], json.dumps(line), ""])
        return
    dump, load = json.dumps, json.loads
    if path.suffix == ".yaml":
        dump, load = yaml.safe_dump, yaml.safe_load
    for what, content in mutilated(load(text)):
        yield what, dump(content)


def mutilated(content: dict[str, Any]) -> Iterator[tuple[str, dict]]:
    for key in content:
        yield f"no {key}", {name: one for name, one in content.items() if name != key}
        for instead in INSTEAD:
            yield f"{key} is {instead!r}", content | {key: copy.deepcopy(instead)}


def everywhere() -> list[tuple[Path, str, str]]:
    kinds = (".json", ".jsonl", ".yaml", ".failed", ".starts")
    paths = sorted(path for path in Path("runs").rglob("*") if path.suffix in kinds)
    return [(path, *one) for path in paths for one in mutilations(path)]


def does(command: str) -> str:
    """ "": it has a result; else its line, or what its traceback would end with."""
    cfg = compose(*COMMANDS[command])
    with hydra.initialize_config_module("ssl_bench.conf", version_base="1.3"):
        try:
            launch(cfg)
        except UserError as error:
            return str(error)
    return ""


MEMBER, RUN = ".members/seed-1.json", "seed-1"
# {what was done: (the file in the sweep, its content by that before, a part of status' line)}
EDITED = {
    "a config with a dir alone": (
        MEMBER,
        lambda old: old | {"config": {"dir": "x"}},
        "not a member",
    ),
    "epochs in words": (
        MEMBER,
        lambda old: old | {"config": old["config"] | {"epochs": "two"}},
        "not a member",
    ),
    "a number for a job": (MEMBER, lambda old: old | {"job": {}}, "not a member"),
    "epoch 0": (f"{RUN}/metrics.jsonl", lambda old: {"step": 0, "epoch": 0}, "line 1 is not"),
    "a text for a result": (f"{RUN}/summary.json", lambda old: {"probe_top1": "a"}, "is damaged"),
    "a failure without a reason": (
        ".members/seed-2.failed",
        lambda old: {"job": "7"},
        "is damaged",
    ),
    "a list of failures": (".members/seed-2.failed", lambda old: ["a"], "is damaged"),
}


@pytest.mark.parametrize("what", EDITED)
def test_what_was_edited_is_named(here: Path, what: str) -> None:
    name, edit, said = EDITED[what]
    path = SWEEP / name
    first = path.read_text().splitlines()[0] if path.suffix == ".jsonl" else path.read_text()
    path.write_text(json.dumps(edit(json.loads(first))) + "\n")
    line = does("status")
    assert said in line
    assert name in line
    assert "\n" not in line


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_line_or_a_result(here: Path, command: str) -> None:
    """Of all that could be done to the files, eight, the same ones each time."""
    assert does(command) == ""
    for path, what, text in random.Random(0).sample(everywhere(), 8):
        before = path.read_text()
        path.write_text(text)
        try:
            assert "\n" not in does(command)
        except Exception as error:
            raise AssertionError(f"{path}: {what}") from error
        path.write_text(before)
