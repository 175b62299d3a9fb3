"""Stage dashboard: the panels of a W&B project, made from code."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ssl_bench import files
from ssl_bench.config.fields import Place
from ssl_bench.errors import UserError, writable
from ssl_bench.report import dashboard as panels
from ssl_bench.runs import tracking
from ssl_bench.runs.run import Run
from ssl_bench.stages import single_process

READS = ("tracking",)


@single_process
def dashboard(cfg: DictConfig, run: Run, out: Place = "dashboard.json") -> dict[str, float]:
    """Save the panels as a view of the project of `tracking` or, without a login, in `out`.

    Returns their number. UserError without the extra, if W&B can't be reached, and if `out` can't
    be written.
    """
    settings = tracking.of_wandb(OmegaConf.to_container(cfg.tracking, resolve=True)) or {}
    project, entity = settings.get("project"), settings.get("entity")
    if project is None:
        raise UserError(
            "stage=dashboard is for W&B: leave tracking=wandb, "
            "and name its project with tracking.project="
        )
    made = panels.workspace(project, entity)
    mode = tracking.choose_mode(settings["mode"])
    if mode == "online":
        print(f"dashboard: {tracking.save_workspace(made)}")
    else:
        with writable("stage.out", out):
            files.write(Path(out), panels.to_json(made))
        print(
            f"W&B is {mode} here: the dashboard is in {out}; "
            "online, after `wandb login`, the same command makes it"
        )
    return {"panels": sum(len(section.panels) for section in made.sections)}
