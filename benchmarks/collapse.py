"""Are collapses announced early, and is nothing announced where all is well?

    python benchmarks/collapse.py                   # all of it: about 25 minutes of a core
    python benchmarks/collapse.py --seeds 1 --only collapsing

collapsing: settings in which a method has lost what keeps images apart, or has much too high a
learning rate. Every step is logged. Onset is the first step from which on, for 25 steps, the spread
of the batch's embeddings is less than half of the largest so far, or their effective rank less than
a quarter. Announced is the first of the looks, every 20 steps as in a run with log_every=500, at
which `health.Watch` tells a collapse: over all 20 steps at which looking may begin, the latest.

healthy: every method that gives embeddings, in the settings of experiment=bench_synthetic or
bench_vit made small, from its first step on, looked at every 10 steps: how many of these runs were
warned of?

    python benchmarks/collapse.py --logs DIR ...    # also the logs of runs that are there
    python benchmarks/collapse.py --table           # the tables alone, of the results there are

Results: benchmarks/results/collapse.json, whose runs aren't repeated, and collapse.md.
"""

import argparse
import inspect
import json
import logging
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from common import machine, publish
from omegaconf import DictConfig, open_dict
from torch import nn

import ssl_bench.command  # noqa: F401 - registers resolvers and launchers
from ssl_bench.config import build
from ssl_bench.evaluate.health import LEFT_ANYWAY, LEFT_RANK, LEFT_STD, WATCHED, Watch
from ssl_bench.launch.process import launch
from ssl_bench.report.tables import markdown
from ssl_bench.runs.metrics import MetricsFile

RESULTS = Path(__file__).with_name("results") / "collapse.json"
LASTS = 25  # steps of an onset
SMALL = ["device=cpu", "eval_every=0", "batch_size=32", "schedule.warmup_epochs=1"]
TINY = {
    "bench_synthetic": ["data.image_size=8", "backbone.width=8"],
    "bench_vit": [],
}
# In so small batches, or without a warm-up, ReSSL doesn't learn: as in its benchmark.
OWN = {
    "ressl": [
        *("batch_size=128", "data.image_size=16", "backbone.width=16", "epochs=8"),
        "schedule.warmup_epochs=5",
    ],
    "wmse": ["method.whitening_size=32", "method.dim=16"],  # it divides the batch
}
METHODS = {
    "bench_synthetic": (
        *("moco_v1", "moco_v2", "moco_v3", "simclr", "byol", "swav", "simsiam", "barlow_twins"),
        *("vicreg", "dino", "lejepa", "nnclr", "dcl", "ressl", "wmse", "deepcluster_v2", "tico"),
        *("vibcreg", "mmcr", "nnbyol", "supervised"),
    ),
    "bench_vit": ("dino", "dinov2", "ibot", "ijepa", "lejepa", "moco_v3_vit", "msn", "simclr"),
}
# what is done: (method, overrides, is its predictor left out?)
COLLAPSING = {
    "BYOL without predictor": ("byol", ["method.momentum=0.9"], True),
    "NNBYOL without predictor": ("nnbyol", [], True),
    "VICReg without variance": ("vicreg", ["method.std_coeff=0", "method.cov_coeff=0"], False),
    "VIbCReg without variance": ("vibcreg", ["method.std_coeff=0", "method.cov_coeff=0"], False),
    "TiCo without contrast": ("tico", ["method.rho=0"], False),
    "MoCo v2, rate x 2,500": ("moco_v2", ["optimizer.base_lr=10"], False),
    "MoCo v1, rate x 2,500": ("moco_v1", ["optimizer.base_lr=10"], False),
    "ReSSL, rate x 2,500": ("ressl", ["optimizer.base_lr=10"], False),
    "SimSiam, rate x 250": ("simsiam", ["optimizer.base_lr=1"], False),
    "BYOL, rate x 250": ("byol", ["optimizer.base_lr=1"], False),
}


class Warnings(logging.Handler):
    """Keeps the warnings of collapses and teachers."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "collaps" in text or "stands still" in text:
            self.lines.append(text)


def composed(experiment: str, method: str, seed: int, *words: str) -> DictConfig:
    """The pretraining of an experiment's pipeline, small."""
    words = (f"experiment={experiment}", f"method={method}", f"seed={seed}", *SMALL, *words)
    with hydra.initialize_config_module("ssl_bench.conf", version_base="1.3"):
        cfg = hydra.compose("config", list(words))
        stage = hydra.compose("config", ["stage=pretrain"]).stage
    with open_dict(cfg):
        cfg.stage, cfg.metric = stage, None
    return cfg


@contextmanager
def without_predictor(method: type) -> Iterator[None]:
    plain = method.__init__

    def made(self: nn.Module, *args: Any, **options: Any) -> None:
        plain(self, *args, **options)
        self.predictor = nn.Identity()

    made.__signature__ = inspect.signature(plain)
    method.__init__ = made
    try:
        yield
    finally:
        method.__init__ = plain


def trained(cfg: DictConfig) -> tuple[list[dict[str, float]], list[str]]:
    """The lines of a run, and what it warned of."""
    heard, logger = Warnings(), logging.getLogger("ssl_bench")
    logger.addHandler(heard)
    with tempfile.TemporaryDirectory() as folder:
        cfg.dir = f"{folder}/run"
        try:
            launch(cfg)
        finally:
            logger.removeHandler(heard)
        lines = MetricsFile.read(Path(cfg.dir) / "metrics.jsonl")
    return [line for line in lines if "embedding_std" in line], heard.lines


def onset(lines: list[dict[str, float]]) -> int | None:
    """The step at which a collapse begins; None: there is none. lines: of each step."""
    low, most = [], {"embedding_std": 0.0, "effective_rank": 0.0}
    for line in lines:
        most = {key: max(value, line[key]) for key, value in most.items()}
        std, rank = (line[key] / most[key] for key in most)
        low.append(std < 0.5 or rank < 0.25)
    for place in range(len(low) - LASTS + 1):
        if all(low[place : place + LASTS]):
            return int(lines[place]["step"])
    return None


def announced(lines: list[dict[str, float]]) -> int | None:
    """The latest step at which it is told, over all steps at which looking may begin."""
    latest = 0
    for first in range(WATCHED):
        watch = Watch()
        looks = [lines[0], *lines[first + 1 :: WATCHED]]
        told = (line["step"] for line in looks if watch(line, line["epoch"] - 1e-9))
        if (step := next(told, None)) is None:
            return None
        latest = max(latest, int(step))
    return latest


def collapse(name: str, seed: int) -> dict[str, Any]:
    method, words, headless = COLLAPSING[name]
    tiny = TINY["bench_synthetic"]
    cfg = composed("bench_synthetic", method, seed, *tiny, "epochs=3", "log_every=1", *words)
    made = build.locate(cfg.method._target_, "method")
    if headless:
        with without_predictor(made):
            lines, warned = trained(cfg)
    else:
        lines, warned = trained(cfg)
    began, told = onset(lines), announced(lines)
    lag = told - began if told and began else None
    why = next((line.rpartition("; ")[2] for line in warned if "collapsing: " in line), "")
    return {"onset": began, "announced": told, "steps": lag, "told": why, "warned": warned}


def healthy(experiment: str, method: str, seed: int) -> dict[str, Any]:
    own = OWN.get(method, []) if experiment == "bench_synthetic" else []
    cfg = composed(*(experiment, method, seed, *TINY[experiment], "epochs=2", "log_every=10", *own))
    lines, warned = trained(cfg)
    return {"warned": warned, "looks": len(lines) + 1, **left(lines)}


def left(lines: list[dict[str, float]]) -> dict[str, float]:
    """What was left at least of the largest spread and rank so far."""
    least = {}
    for key in ("embedding_std", "effective_rank"):
        most, least[key] = 0.0, 1.0
        for line in lines:
            most = max(most, line[key])
            least[key] = min(least[key], line[key] / most)
    return least


def logged(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The runs of a folder: what `Watch` tells of the lines that they logged."""
    for path in sorted(folder.rglob("metrics.jsonl")):
        every = MetricsFile.read(path)
        lines = [line for line in every if "embedding_std" in line]
        if not lines or path.parent.name != "pretrain":
            continue
        watch, told = Watch(), {}
        for line in lines:
            for what, said in watch(line, line["epoch"] - 1e-9).items():
                told.setdefault(what, f"step {line['step']:.0f}: {said}")
        row = {"warned": list(told.values()), "looks": len(lines), **left(lines)}
        if probes := [line["probe_top1"] for line in every if "probe_top1" in line]:
            row["probe_top1"] = probes
        yield path.parent.parent.name, row


def write(results: dict[str, Any]) -> None:
    results["machine"] = machine()
    results["rules"] = {
        "LEFT_STD": LEFT_STD,
        "LEFT_ANYWAY": LEFT_ANYWAY,
        "LEFT_RANK": LEFT_RANK,
        "WATCHED": WATCHED,
    }
    publish(results, tables(results), RESULTS)


def tables(results: dict[str, Any]) -> str:
    """The text of collapse.md."""
    rows = [
        [name, *(str(row[key] or "not always") for key in ("onset", "announced", "steps"))]
        for name, row in results["collapsing"].items()
    ]
    parts = [
        "# How early a collapse is announced",
        "`python benchmarks/collapse.py`, on digits of 8 pixels in batches of 32, with a ResNet-18 "
        "of an eighth of the width. A collapse begins (onset) when, for 25 steps, the spread of "
        "the batch's embeddings is below half of its largest value so far, or their effective rank "
        "below a quarter. The run checks every 20 steps; announced is the step of the first check "
        "that shows the collapse, for the least favourable of the 20 possible phases.",
        markdown(["", "onset", "announced", "steps between"], rows, right=3),
        "## False alarms",
        "The methods that give embeddings, in small versions of the settings of `bench_synthetic` "
        "and `bench_vit` (ReSSL keeps the batch and the warm-up of its benchmark, without which it "
        "doesn't learn), for their first 80 steps, checked every 10. The last columns are the "
        "smallest spread and effective rank over all seeds, as shares of the largest so far. A "
        f"warning comes if the spread falls below {LEFT_STD:g} (or {LEFT_ANYWAY:g}, if the loss "
        f"doesn't fall) or the rank below {LEFT_RANK:g}.",
    ]
    named: dict[str, list[dict[str, Any]]] = {}
    for name, row in results["healthy"].items():
        named.setdefault(name.rpartition(" ")[0], []).append(row)
    cells = [
        [
            name.replace("bench_vit ", "ViT: ").removeprefix("bench_synthetic "),
            str(len(several)),
            str(sum(bool(row["warned"]) for row in several)),
            *(f"{min(r[key] for r in several):.2f}" for key in ("embedding_std", "effective_rank")),
        ]
        for name, several in named.items()
    ]
    header = ["", "seeds", "warnings", "smallest spread", "smallest rank"]
    parts.append(markdown(header, cells, right=4))
    for folder, runs in results["logs"].items():
        parts += [f"## The logs of {folder}", of_logs(runs)]
    return "\n\n".join(parts) + "\n"


def of_logs(runs: dict[str, dict[str, Any]]) -> str:
    """What the lines of whole runs, as they were logged, would have warned of."""
    warned = {name: row for name, row in runs.items() if row["warned"]}
    text = f"{len(runs)} whole runs, of which {len(warned) or 'none'} would have been warned of."
    probed = [
        (bool(row["warned"]), row["probe_top1"]) for row in runs.values() if "probe_top1" in row
    ]
    lost = [max(values) - values[-1] for told, values in probed if told]
    kept = [max(values) - values[-1] for told, values in probed if not told]
    if lost and kept:
        text += (
            f" The linear probe of these ends {min(lost):.0f} to {max(lost):.0f} points below its "
            f"best, that of the others {min(kept):.0f} to {max(kept):.0f}."
        )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", choices=("collapsing", "healthy"))
    parser.add_argument("--logs", type=Path, nargs="*", default=[])
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for kind in ("collapsing", "healthy", "logs"):
        results.setdefault(kind, {})
    for folder in args.logs:
        results["logs"][folder.name] = dict(logged(folder))
        write(results)
    if args.table:
        write(results)
    if args.logs or args.table:
        return
    if args.only != "healthy":
        for name in COLLAPSING:
            if name not in results["collapsing"]:
                results["collapsing"][name] = collapse(name, 0)
                write(results)
    pairs = [(experiment, method) for experiment, names in METHODS.items() for method in names]
    for seed in range(args.seeds if args.only != "collapsing" else 0):
        for experiment, method in pairs:
            name = f"{experiment} {method} {seed}"
            if name not in results["healthy"]:
                results["healthy"][name] = healthy(experiment, method, seed)
                write(results)
    lags = {name: row["steps"] for name, row in results["collapsing"].items()}
    late = [name for name, steps in lags.items() if steps is None or steps > 50]
    false = [name for name, row in results["healthy"].items() if row["warned"]]
    print(f"{len(lags)} collapses, not told within 50 steps: {late or 'none'}")
    print(f"{len(results['healthy'])} healthy runs, warned of: {false or 'none'}")
    early = {COLLAPSING[name][0] for name in lags if name not in late}
    sys.exit(bool(len(early) < 8 or false))


if __name__ == "__main__":
    main()
