"""Rebuild W&B runs from run directories: `ssl-bench stage=sync runs=DIR` or `runs=[DIR,DIR]`."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from ssl_bench import files
from ssl_bench.errors import UserError
from ssl_bench.tracking import choose_mode, rebuild


def sync(cfg: DictConfig, run: Any) -> dict[str, float]:
    """Rebuild every run at or below `cfg.runs`. UserError where there is none, and where W&B is disabled.

    `tracking=wandb` on the command line sets project, group and so on; without it each run's own settings hold.
    """
    directories = {file.parent.resolve() for path in files.places(cfg.runs) for file in path.rglob("metrics.jsonl")}
    if not directories:
        raise UserError(
            f"runs={cfg.runs}: no metrics.jsonl at or below it; name run directories: runs=DIR or runs=[DIR,DIR]"
        )
    tracking = OmegaConf.to_container(cfg.tracking, resolve=True)
    wandb_asked = tracking.pop("_target_").endswith("WandbTracker")
    if choose_mode(tracking.get("mode", "auto")) == "disabled":
        raise UserError("WANDB_MODE=disabled: there is nothing for stage=sync to do; unset it, or set it to offline")
    for directory in sorted(directories):
        rebuild(directory, tracking if wandb_asked else None)
    return {"runs": len(directories)}
