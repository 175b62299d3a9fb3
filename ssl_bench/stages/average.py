"""Stage average: the mean of the last checkpoints of a run."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
from omegaconf import DictConfig
from pydantic import Field
from torch import Tensor

from ssl_bench import files
from ssl_bench.errors import UserError
from ssl_bench.runs import layout, weights
from ssl_bench.runs.run import Run
from ssl_bench.shell import override
from ssl_bench.stages import _labels, single_process

log = logging.getLogger(__name__)

READS = ("dir", "sweep", "metric", "tracking", "device", "pretrained")


@single_process
def average(cfg: DictConfig, run: Run, last: Annotated[int, Field(ge=2)]) -> dict[str, float]:
    """Save the mean of the tensors of the `last` newest checkpoints (Izmailov et al. 2018, SWA).

    cfg.pretrained: the newest of them. Running statistics of batch norm are averaged, too; whole
    numbers are those of the newest. Returns how many there were and the first and last step.
    UserError if the run has kept fewer.
    """
    if cfg.pretrained is None:
        raise UserError("stage=average needs a run: type pretrained=RUN, a run directory")
    newest = Path(cfg.pretrained)
    kept = [path for path in layout.complete(newest.parents[1]) if path.name <= newest.name]
    if len(kept) < last:
        fewer = f"type stage.last={len(kept)}, or " if len(kept) > 1 else "another run, or "
        raise UserError(
            f"stage.last={last}: {newest.parents[1]} has kept {len(kept)} checkpoint"
            f"{'s' if len(kept) > 1 else ''}: {fewer}train one with {override('keep', last)} and "
            "save_every= of a few hundred steps"
        )
    chosen = kept[:last][::-1]
    mean = mean_of(chosen)
    _labels.seen_by(cfg.pretrained).record(run)
    steps = [layout.step_of(path) for path in chosen]
    log.info("the mean of %s checkpoints, of steps %s", last, ", ".join(f"{s:,}" for s in steps))
    if names := weights.class_names(newest):
        files.write(run.directory / weights.CLASSES, json.dumps({"classes": names}) + "\n")
    sums = {path.name: files.digest(path) for path in chosen}
    files.write(run.directory / layout.AVERAGED, json.dumps(sums, indent=2) + "\n")
    run.save(steps[-1], model=SimpleNamespace(state_dict=lambda: mean))
    return {"checkpoints": last, "first_step": steps[0], "last_step": steps[-1]}


def mean_of(paths: Sequence[Path]) -> dict[str, Tensor]:
    """The mean of the models in checkpoints, summed in float64; the last is the newest."""
    total: dict[str, Tensor] = {}
    newest: Mapping[str, Tensor] = {}
    for path in paths:
        newest = _model(weights.read(path), path)
        for key, value in newest.items():
            if value.is_floating_point():
                total[key] = total.get(key, torch.zeros((), dtype=torch.float64)) + value.double()
    return {
        key: (total[key] / len(paths)).to(value.dtype) if key in total else value
        for key, value in newest.items()
    }


def _model(content: Any, path: Path) -> Mapping[str, Tensor]:
    if not isinstance(content, Mapping) or not isinstance(content.get("model"), Mapping):
        raise UserError(f"{path}: holds no model of a training")
    return content["model"]
