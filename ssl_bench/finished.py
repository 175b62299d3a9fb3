"""Finished runs on disk: what they were, and what they came to."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ssl_bench import build, checkpoint, report
from ssl_bench.errors import UserError

RECIPE = ("method", "backbone", "data", "augmentation", "optimizer", "schedule")
RECIPE += ("epochs", "batch_size", "precision", "seed")
PLACES = ("_target_", "root", "cache", "workers")  # keys of a recipe that are about this machine or this program


class Result(NamedTuple):
    directory: Path
    config: dict[str, Any]
    summary: dict[str, float]

    @property
    def stage(self) -> str:
        return self.config["stage"]["name"]

    @property
    def weights(self) -> Path | None:
        """Its newest checkpoint, where that holds a network."""
        return None if self.stage == "predict" else next(iter(checkpoint.complete(self.directory)), None)


def find(runs: str | Sequence[str] | None) -> list[Result]:
    """The finished runs at or below these directories. UserError for a directory that has none."""
    found = {}
    for place in [runs] if isinstance(runs, str) else runs or []:
        files = sorted(Path(place).expanduser().rglob("summary.json"))
        files = [file for file in files if file.with_name("config.yaml").is_file()]
        if not files:
            raise UserError(
                f"runs={place}: no finished run at or below it; name run directories: runs=DIR or runs=[DIR,DIR]"
            )
        for file in files:
            found[file.parent.resolve()] = _read(file.parent)
    return list(found.values())


def of(weights: Path) -> Result | None:
    """The finished run that wrote this checkpoint."""
    directory = weights.absolute().parent.parent
    finished = weights.absolute().parent.name == "checkpoints" and (directory / "summary.json").is_file()
    return _read(directory) if finished else None


def _read(directory: Path) -> Result:
    config = yaml.safe_load((directory / "config.yaml").read_text())
    return Result(directory, config, json.loads((directory / "summary.json").read_text()))


def measuring(runs: Iterable[Result], weights: Path) -> list[Result]:
    """Those that measured the backbone in this file, and have a top-1."""
    return [
        result
        for result in runs
        if "val_top1" in result.summary
        and result.config.get("pretrained")
        and Path(result.config["pretrained"]).resolve() == weights.resolve()
    ]


def groups(runs: Iterable[Result]) -> list[list[Result]]:
    """Those that differ by their seed only, together."""
    alike: dict[str, list[Result]] = {}
    for result in runs:
        same = {key: value for key, value in build.identity(result.config).items() if key not in ("seed", "pretrained")}
        alike.setdefault(json.dumps(same, sort_keys=True), []).append(result)
    return list(alike.values())


def table(runs: Iterable[Result]) -> str:
    """Markdown: a row for each evaluation, mean ± std of top-1 and top-5 over its seeds; "" for none."""
    lines = []
    for members in groups(runs):
        scores = [mean_std(members, key) for key in ("val_top1", "val_top5")]
        first = members[0]
        lines.append([first.stage, first.config["data"]["name"], labels(first), *scores, f"{len(members)}"])
    header = ["evaluation", "data", "labels", "top-1 (%)", "top-5 (%)", "runs"]
    return report.markdown(header, lines, right=3) if lines else ""


def labels(result: Result) -> str:
    stage = result.config["stage"]
    if stage.get("labels_per_class"):
        return f"{stage['labels_per_class']} a class"
    return f"{100 * stage['label_fraction']:g} %" if stage.get("label_fraction") else "all"


def recipe(config: dict[str, Any]) -> dict[str, Any]:
    """What another person needs of a configuration."""
    return {key: _portable(config[key]) for key in RECIPE if config.get(key) is not None}


def _portable(node: Any) -> Any:
    return {key: value for key, value in node.items() if key not in PLACES} if isinstance(node, dict) else node


def mean_std(members: Sequence[Result], metric: str) -> str:
    mean, std = report.mean_std([member.summary[metric] for member in members])
    return f"{mean:.1f}" + (f" ± {std:.1f}" if len(members) > 1 else "")
