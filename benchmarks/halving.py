"""Does successive halving find what the whole grid finds, and for how many of its steps?

    python benchmarks/halving.py               16 members, 3 rungs, 3 repeats: minutes on a core
    python benchmarks/halving.py --folder DIR  keeps the sweeps, and goes on with what is there

SimCLR learns handwritten digits of 8 pixels, their own size, with each of 4 rates and 4
temperatures. A repeat is a seed: of the initial weights, the order, the views and of which images
judge. First the sweep is halved; then the same command without halving runs the paused members to
their end, which gives the whole grid; last it is halved once more in another folder, from nothing.
The members are the program's own, so the first two share what is the same bit for bit.
"""

import argparse
import json
import os
from pathlib import Path

from common import folder_for, machine, publish

from ssl_bench.command import execute
from ssl_bench.launch.process import set_up_logging
from ssl_bench.report.tables import markdown
from ssl_bench.runs import halving, sweep

RESULTS = Path(__file__).parent / "results"
METRIC = "knn_top1"
GRID = (
    "optimizer.base_lr=1e-4,1e-3,4e-3,2e-2",
    "method.temperature=0.05,0.2,0.5,2.0",
)
RECIPE = (
    *("stage=pretrain", "method=simclr", "data=digits", "data.image_size=8"),
    *("augmentation=digits", "backbone.width=8", "backbone.stem=small", "batch_size=128"),
    *("optimizer=adamw", "optimizer.weight_decay=1e-3", "schedule.warmup_epochs=1"),
    *("epochs=10", f"metric={METRIC}", "eval_every=100", "log_every=1000"),
)
RULES = (
    f"{halving.KEY}.metric={METRIC}",
    f"{halving.KEY}.eta=3",
    f"{halving.KEY}.rungs=[0.2,0.5]",
)
HERE = ("data.workers=1", "device=cpu")


def events(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / halving.FILE).read_text().splitlines()]


def halved(name: str, seed: int) -> list[dict]:
    """The decisions of a sweep, which runs unless it has run."""
    folder = Path("runs/sweeps", name)
    done = folder / "halved.json"
    if not done.exists():
        execute(["-m", f"sweep={name}", f"seed={seed}", *RECIPE, *GRID, *RULES, *HERE])
        done.write_text(json.dumps(events(folder)))
    return json.loads(done.read_text())


def whole(name: str, seed: int) -> dict[str, float]:
    """{member: its metric} of the sweep without halving."""
    execute(["-m", f"sweep={name}", f"seed={seed}", *RECIPE, *GRID, *HERE])
    members = sweep.members(Path("runs/sweeps", name))
    return {member.name: (member.result() or {})[METRIC] for member in members}


def row(seed: int, decided: list[dict], grid: dict[str, float], again: list[dict] | None) -> dict:
    came = [event for event in decided if "came_to" in event]
    epochs: dict[str, int] = {}
    for event in came:
        epochs[event["member"]] = event["epoch"]
    ends = {event["member"]: event["value"] for event in came if event["came_to"] == 3}
    assert all(grid[name] == value for name, value in ends.items()), "not the same bit for bit"
    chosen, best = max(ends, key=ends.__getitem__), max(grid, key=grid.__getitem__)
    return {
        "seed": seed,
        "members": len(grid),
        "came_to": [sum(event["came_to"] == rung for event in came) for rung in (1, 2, 3)],
        "share_of_steps": sum(epochs.values()) / (10 * len(grid)),
        "chosen": chosen,
        "chosen_value": grid[chosen],
        "best": best,
        "best_value": grid[best],
        "regret": grid[best] - grid[chosen],
        "median": sorted(grid.values())[len(grid) // 2],
        "worst": min(grid.values()),
        "same_again": None if again is None else again == decided,
        "grid": grid,
        "decisions": decided,
    }


def write(rows: list[dict], out: Path) -> None:
    header = ["seed", "came to rung 1, 2, 3", "steps (%)", "chosen (%)", "best of the grid (%)"]
    header += ["regret (points)", "median (%)", "worst (%)", "again"]
    said = {True: "the same", False: "others", None: ""}
    lines = [
        [
            str(one["seed"]),
            ", ".join(map(str, one["came_to"])),
            f"{100 * one['share_of_steps']:.1f}",
            *(f"{one[key]:.1f}" for key in ("chosen_value", "best_value", "regret")),
            *(f"{one[key]:.1f}" for key in ("median", "worst")),
            said[one["same_again"]],
        ]
        for one in rows
    ]
    document = {"recipe": RECIPE, "grid": GRID, "rules": RULES, **machine(), "rows": rows}
    table = markdown(header, lines, right=2)
    publish(document, table, out)
    print(f"\n{table}\n\nwritten: {out}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="to keep the sweeps in")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS / "halving.json")
    args = parser.parse_args()
    out = args.out.absolute()
    set_up_logging()
    with folder_for(args.folder) as folder:
        os.chdir(folder)
        decided = {seed: halved(f"seed{seed}", seed) for seed in args.seeds}
        grids = {seed: whole(f"seed{seed}", seed) for seed in args.seeds}
        rows = [row(seed, decided[seed], grids[seed], None) for seed in args.seeds]
        write(rows, out)
        for number, seed in enumerate(args.seeds):
            again = halved(f"again{seed}", seed)
            rows[number] = row(seed, decided[seed], grids[seed], again)
            write(rows, out)


if __name__ == "__main__":
    main()
