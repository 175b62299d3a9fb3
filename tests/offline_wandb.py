"""What an offline run of W&B holds, by W&B's own reader."""

import json
import subprocess
import sys
from pathlib import Path

from patience import PATIENCE


def records(folder: Path) -> list[dict]:
    """Every record of an offline run, through W&B's own reader."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    text = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=PATIENCE
    ).stdout
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def folders(path: Path) -> list[Path]:
    return sorted((path / "wandb").glob("offline-run-*"))


def kind(recorded, name):
    return [record[name] for record in recorded if record["type"] == name]


def history(recorded):
    """step -> the metrics that were logged."""
    items = [record["item"] for record in kind(recorded, "history")]
    return {
        item["_step"]: {k: v for k, v in item.items() if not k.startswith("_")} for item in items
    }
