"""Run folders that somebody made by hand, or that lost files: a line, whatever command is given
them.
"""

import json
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from commands import SMALL_IMAGES, compose
from omegaconf import OmegaConf

from ssl_bench.config import build
from ssl_bench.errors import UserError
from ssl_bench.launch.process import launch

CONFIG = yaml.safe_dump(OmegaConf.to_container(compose("dir=x"), resolve=True))
LINE = json.dumps({"step": 1, "epoch": 1.0, "loss": 1.0}) + "\n"
MADE = {
    "config": {"seed": 0},
    "images": {},
    "weights": "",
    "step": None,
    "processes": 1,
    "below": None,
}
DONE = {"config.yaml": CONFIG, "metrics.jsonl": LINE, "summary.json": '{"loss": 1.0}'}
# What lies in the folder: {name: content}
FOLDERS = {
    "config alone": {"config.yaml": CONFIG},
    "no metrics": {"config.yaml": CONFIG, "metrics.jsonl": "", "summary.json": "{}"},
    "no config": {"metrics.jsonl": LINE, "summary.json": '{"loss": 1.0}'},
    "summary alone": {"summary.json": '{"loss": 1.0}'},
    "another config": {
        "config.yaml": "a: 1\n",
        "metrics.jsonl": LINE,
        "summary.json": '{"loss": 1.0}',
    },
    "half a config": {
        "config.yaml": CONFIG[:400],
        "metrics.jsonl": LINE,
        "summary.json": '{"loss": 1.0}',
    },
    "a list for a config": {"config.yaml": "[1, 2]\n", "metrics.jsonl": LINE},
    "a null for a group": {"config.yaml": "stage: null\nseed: null\n", "metrics.jsonl": LINE},
    "a text for a summary": {
        "config.yaml": CONFIG,
        "metrics.jsonl": LINE,
        "summary.json": '"done"',
    },
    "a list for a summary": {"config.yaml": CONFIG, "metrics.jsonl": LINE, "summary.json": "[1]"},
    "texts for metrics": {"config.yaml": CONFIG, "metrics.jsonl": '{"step": "a", "epoch": null}\n'},
    "lines without an epoch": {
        "config.yaml": CONFIG,
        "metrics.jsonl": '{"step": 1}\n',
        "summary.json": '{"loss": 1}',
    },
    "texts for images": {**DONE, "inputs.json": '{"train": "x"}'},
    "images without a fingerprint": {
        **DONE,
        "inputs.json": '{"train": {}, "pretrain": {"fingerprint": 1}}',
    },
    "texts for processes": {
        **DONE,
        "environment.json": '{"world_size": "two", "gpus": 1, "cpu_threads": []}',
    },
    "half an origin": {**DONE, "origin.json": '{"weights": ""}'},
    "another origin": {**DONE, "origin.json": '{"weights": "", "step": "x", "run": {"config": 1}}'},
    "an origin at step x": {
        **DONE,
        "origin.json": json.dumps({"weights": "", "step": "x", "run": MADE}),
    },
    "an origin without a run": {
        **DONE,
        "origin.json": '{"weights": "", "step": "x", "run": {"a": 1}}',
    },
    "texts for groups": {
        **DONE,
        "config.yaml": "stage: a\nmethod: b\ndata: c\nbackbone: d\naugmentation: e\n",
    },
    "empty": {"config.yaml": "", "metrics.jsonl": "", "summary.json": ""},
    "bytes": {"config.yaml": "\udcff", "metrics.jsonl": "\udcff\n", "summary.json": "\udcff"},
}
COMMANDS = {
    "report": ["stage=report", "runs={folder}", "stage.out={out}", "stage.details=1", "device=cpu"],
    "zoo": ["stage=zoo", "runs={folder}"],
    "sync": ["stage=sync", "runs={folder}"],
    "status": ["stage=status", "runs={folder}"],
    "lincls": [
        "stage=lincls",
        "pretrained={folder}",
        "dir={out}",
        "epochs=1",
        "stage.labels_per_class=10",
        *SMALL_IMAGES,
    ],
    "predict": ["stage=predict", "pretrained={folder}", "dir={out}", "stage.images={folder}"],
    "export": ["stage=export", "pretrained={folder}", "stage.out={out}"],
    "export with numbers": [
        "stage=export",
        "pretrained={folder}",
        "stage.out={out}",
        "runs={folder}",
    ],
    "there": [
        "stage=pretrain",
        "dir={folder}",
        "method.queue_size=256",
        "epochs=1",
        "method.bn_splits=1",
        *SMALL_IMAGES,
    ],
}


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_line_or_a_result(
    command: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "folder"
    folder.mkdir()
    for file, content in FOLDERS[name].items():
        (folder / file).write_bytes(content.encode(errors="surrogateescape"))
    words = [word.format(folder=folder, out=tmp_path / "out") for word in COMMANDS[command]]
    cfg = compose(*words)
    build.check(cfg)
    with suppress(UserError):
        launch(cfg)
