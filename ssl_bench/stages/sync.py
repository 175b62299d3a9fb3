"""Rebuild W&B runs from run directories: `ssl-bench stage=sync runs=DIR` or `runs=[DIR,DIR]`."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from ssl_bench import files
from ssl_bench.errors import UserError
from ssl_bench.tracking import rebuild


def sync(cfg: DictConfig, run: Any) -> dict[str, float]:
    """Rebuild every run at or below `cfg.runs`. UserError where there is none.

    `tracking=wandb` on the command line sets project, group and so on; without it each run's own settings hold.
    """
    directories = {file.parent.resolve() for path in files.places(cfg.runs) for file in path.rglob("metrics.jsonl")}
    if not directories:
        raise UserError(
            f"runs={cfg.runs}: no metrics.jsonl at or below it; name run directories: runs=DIR or runs=[DIR,DIR]"
        )
    tracking = OmegaConf.to_container(cfg.tracking, resolve=True)
    wandb_asked = tracking.pop("_target_").endswith("WandbTracker")
    for directory in sorted(directories):
        rebuild(directory, tracking if wandb_asked else None)
    return {"runs": len(directories)}
