"""The metric that a training is watched by: its best state, and when it has ceased to get better.

All of it follows from the run's configuration and its logged lines, so a restart needs no counter.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ssl_bench.errors import UserError, meant, several
from ssl_bench.runs import units

DIRECTIONS = {"max": False, "min": True}  # how a direction is said, and whether it is downwards


class Watched(NamedTuple):
    """A metric, and whether less of it is better."""

    metric: str
    smaller: bool

    def better(self, value: float, than: float | None) -> bool:
        """Is a value better than another one? What isn't a number is never better."""
        if math.isnan(value):
            return False
        return than is None or (value < than if self.smaller else value > than)


class Look(NamedTuple):
    """What the watched metric was when it was looked at."""

    step: int
    epoch: float
    value: float


def watched(config: Mapping[str, Any]) -> Watched | None:
    """What the configuration has a training watched by; None: by nothing. UserError."""
    if (name := config.get("save_best")) is not None:
        return named("save_best", name)
    if config.get("patience") is None:
        return None
    if config.get("metric") is None:
        raise UserError("patience= needs a metric to wait for: type save_best=knn_top1, say")
    return named("metric", config["metric"])


def named(key: str, name: str) -> Watched:
    """A metric by its name, or by max:NAME or min:NAME. UserError where its direction isn't known.

    key: of the configuration, what was typed for it.
    """
    direction, mark, metric = name.partition(":")
    if mark and direction in DIRECTIONS and metric:
        return Watched(metric, DIRECTIONS[direction])
    if mark or not units.has_direction(name):
        known = [metric for metric in units.UNITS if units.has_direction(metric)]
        near = meant(metric if mark else name, known, f"{key}=")
        raise UserError(
            f"{key}={name}: it isn't known whether more or less of it is better: {near}"
            f"{'Choose' if near else 'choose'} from {', '.join(known)}, or type {key}=max:NAME or "
            f"{key}=min:NAME for another value that is logged"
        )
    return Watched(name, units.smaller_is_better(name))


def looks(config: Mapping[str, Any], lines: Iterable[Mapping[str, float]]) -> list[Look]:
    """The values of the watched metric at the evaluations so far, in their order.

    Only at those that the configuration asks for (`eval_every`), and at the end: a pause evaluates
    as well, and must decide nothing.
    """
    if (what := watched(config)) is None:
        return []
    every, found = config.get("eval_every"), []
    for line in lines:
        if what.metric not in line or not float(line.get("epoch", math.nan)).is_integer():
            continue
        epoch = int(line["epoch"])
        if epoch == config["epochs"] or (every and epoch % every == 0):
            found.append(Look(int(line["step"]), epoch, line[what.metric]))
    return found


def best(config: Mapping[str, Any], lines: Iterable[Mapping[str, float]]) -> Look | None:
    """The first of the best looks; None: there is none that is a number."""
    what, found = watched(config), None
    for look in looks(config, lines):
        if what and what.better(look.value, found and found.value):
            found = look
    return found


def exhausted(config: Mapping[str, Any], lines: list[dict[str, float]]) -> str:
    """Why `patience` ends the run at its last look, in words; "": it doesn't."""
    what, patience = watched(config), config.get("patience")
    seen = looks(config, lines)
    if what is None or patience is None or not seen:
        return ""
    top, began = best(config, lines), 0.0
    if config.get("continue_from"):
        began = lines[0].get("epoch", 0.0)
    if seen[-1].epoch - (top.epoch if top else began) < patience:
        return ""
    value = f"{units.spoken(what.metric, top.value)} (epoch {top.epoch:g})" if top else "NaN"
    return f"no better {what.metric} than {value} for {several(patience, 'epoch')}"


def ended_early(config: Mapping[str, Any], lines: list[dict[str, float]]) -> str:
    """That and why a finished run was stopped early, in words; "": it wasn't."""
    if not lines or config.get("patience") is None or not lines[-1].get("epoch"):
        return ""
    step, epoch, epochs = int(lines[-1]["step"]), lines[-1]["epoch"], config["epochs"]
    if epoch >= epochs:
        return ""
    total = round(step * epochs / epoch)
    return f"stopped early at step {step:,} of {total:,}: {exhausted(config, lines)}"
