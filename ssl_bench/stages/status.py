"""Stage status: what became of the members of a sweep, and the table of their results."""

from pathlib import Path

from omegaconf import DictConfig

from ssl_bench import sweep
from ssl_bench.errors import UserError
from ssl_bench.run import Run


def status(cfg: DictConfig, run: Run) -> dict[str, float]:
    """Show the sweeps `cfg.runs` (a folder or a list); each gets its table.md and table.csv. Returns counts of states.

    UserError where there is no sweep.
    """
    counts: dict[str, float] = {}
    for path in [cfg.runs] if isinstance(cfg.runs, str) else cfg.runs or [None]:
        members = sweep.members(Path(path)) if path else []
        if not members:
            raise UserError(f"runs={path}: no sweep there; name the folder of one, like runs=runs/sweeps/pretrain")
        states = sweep.states(members)
        print(sweep.overview(members, states))
        if shown := sweep.write_table(Path(path), members, cfg.metric):
            print(f"\n{shown}")
        for state in states:
            counts[state.name] = counts.get(state.name, 0) + 1
    return counts


status.single_process = True
