"""Stage status: the states of the members of a sweep, and the table of their results."""

from pathlib import Path

from omegaconf import DictConfig

from ssl_bench import files
from ssl_bench.errors import UserError, unknown
from ssl_bench.report import sweeps
from ssl_bench.runs import sweep
from ssl_bench.runs.run import Run
from ssl_bench.shell import override
from ssl_bench.stages import single_process

READS = ("runs", "metric")


@single_process
def status(cfg: DictConfig, run: Run) -> dict[str, float]:
    """Show the sweeps `cfg.runs` and write their table.md and table.csv. Returns counts of states.

    UserError for a folder that isn't a sweep.
    """
    counts: dict[str, float] = {}
    paths: list[Path | None] = [*files.places(cfg.runs)] or [None]
    for path in paths:
        members = sweep.members(path) if path else []
        if not members:
            near = path or Path("runs/sweeps")
            found = sorted({*near.glob("*/.members"), *near.parent.glob("*/.members")})
            hint = ", like runs=runs/sweeps/lincls"
            if found:
                hint = ": " + ", ".join(override("runs", folder.parent) for folder in found)
            raise UserError(f"runs={path}: no sweep there; name the folder of one{hint}")
        known = list(dict.fromkeys(key for member in members for key in member.result() or {}))
        if known and cfg.metric and cfg.metric not in known:
            valid = [f"metric={key}" for key in known]
            raise UserError(unknown("value", f"metric={cfg.metric}", valid))
        parts = sweep.with_firsts(members)
        states = dict(zip((part.name for part in parts), sweep.states(parts), strict=True))
        if len(paths) > 1:
            print(f"\n{path}\n")
        print(sweeps.overview(parts, [*states.values()], cfg.metric))
        if shown := sweeps.sweep_table(path, cfg.metric):
            print(f"\n{shown}")
        for state in (states[member.name] for member in members):
            counts[state.name] = counts.get(state.name, 0) + 1
    return counts
