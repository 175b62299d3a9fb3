"""Run directories as runs leave them, without running anything."""

import json
from collections.abc import Iterable
from pathlib import Path

import yaml
from commands import compose
from omegaconf import OmegaConf

from ssl_bench import files
from ssl_bench.runs import layout
from ssl_bench.runs.record import Ran


def make_run(
    directory: Path, overrides: Iterable[str], lines: Iterable[dict], summary: dict | None
) -> Ran:
    """config.yaml as `overrides` compose it, metrics.jsonl, environment.json, and summary.json if
    it is finished.
    """
    directory.mkdir(parents=True)
    config = OmegaConf.to_container(compose(*overrides, f"dir={directory}"), resolve=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    (directory / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": 1, **line}) + "\n" for line in lines)
    )
    (directory / "environment.json").write_text(
        json.dumps({"gpus": [], "cpu_threads": 2, "world_size": 1})
    )
    if summary is not None:
        (directory / "summary.json").write_text(json.dumps(summary))
    return Ran.read(directory)


def pretrained(directory: Path, *overrides: str, loss: float | None = 3.0, **values: float) -> Ran:
    """Two epochs of 360,000 images each at 100 images/s; finished if it has a loss. values: of the
    last line, too.
    """
    lines = [
        {"step": 40, "epoch": 1, "loss": 5.0, "images_seen": 360_000, "images_per_second": 100},
        {
            "step": 80,
            "epoch": 2,
            "loss": 3.0,
            "images_seen": 720_000,
            "images_per_second": 100,
            **values,
        },
    ]
    return make_run(
        directory,
        ["stage=pretrain", "epochs=2", *overrides],
        lines,
        loss and {"loss": loss, **values},
    )


def classified(directory: Path, top1: float | None, *overrides: str) -> Ran:
    lines = [
        {
            "epoch": 1,
            "loss": 0.5,
            "images_seen": 100,
            "images_per_second": 50,
            "val_top1": top1 or 1.0,
        }
    ]
    return make_run(
        directory, ["stage=lincls", "epochs=1", *overrides], lines, top1 and {"val_top1": top1}
    )


def checkpoint(ran: Ran, step: int, content: bytes) -> Path:
    """One with this content."""
    path = ran.directory / "checkpoints" / f"step{step:010d}.pt"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def classified_from(
    directory: Path, top1: float, weights: Path, *overrides: str, place: str | None = None
) -> Ran:
    """As `classified`, of the content of this file, which the run was given as `place`."""
    ran = classified(directory, top1, f"pretrained={place or weights}", *overrides)
    (directory / layout.WEIGHTS).write_text(files.digest(weights))
    return Ran.read(ran.directory)
