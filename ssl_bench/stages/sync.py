"""Rebuild W&B runs from run directories: `ssl-bench stage=sync runs=DIR` or `runs=[DIR,DIR]`."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from ssl_bench import files
from ssl_bench.errors import UserError
from ssl_bench.runs import layout
from ssl_bench.runs.tracking import choose_mode, of_wandb, rebuild

READS = ("runs", "tracking")


def sync(cfg: DictConfig, run: Any) -> dict[str, float]:
    """Rebuild every run at or below `cfg.runs`; returns their number.

    `tracking=wandb` on the command line sets project, group and so on; without it the settings of
    each run hold. UserError if there is no run, if W&B is disabled, and at the end for runs that
    could not be rebuilt.
    """
    paths = files.places(cfg.runs)
    found = [file.parent for path in paths for file in path.rglob(layout.METRICS)]
    directories = {directory.resolve() for directory in found}
    if not directories:
        raise UserError(
            f"runs={cfg.runs}: no metrics.jsonl at or below it; "
            "name run directories: runs=DIR or runs=[DIR,DIR]"
        )
    asked = of_wandb(OmegaConf.to_container(cfg.tracking, resolve=True))
    settings = asked and {key: value for key, value in asked.items() if key != "_target_"}
    if choose_mode((settings or {}).get("mode", "auto")) == "disabled":
        raise UserError(
            "WANDB_MODE=disabled: there is nothing for stage=sync to do; "
            "unset it, or set it to offline"
        )
    failed = []
    for directory in sorted(directories):
        try:
            rebuild(directory, settings)
        except OSError as error:
            failed.append(f"{directory}: can't be written ({error.strerror})")
        except UserError as error:
            failed.append(str(error))
    if failed:
        counts = f"{len(failed)} of {len(directories)} runs"
        raise UserError("\n".join([f"{counts} are not rebuilt:", *failed]))
    return {"runs": len(directories)}
