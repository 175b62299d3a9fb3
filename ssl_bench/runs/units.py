"""How metrics are named, scaled and shown, and how several values become a mean ± std."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Unit(NamedTuple):
    """How a metric is shown: its name, the factor for its values, the format of its mean."""

    label: str
    scale: float = 1
    form: str = ".4g"


# In the order of columns; other metrics come after these.
UNITS = {
    "val_top1": Unit("top-1 (%)", form=".1f"),
    "val_top5": Unit("top-5 (%)", form=".1f"),
    "val_loss": Unit("cross-entropy", form=".3f"),
    "val_ece": Unit("calibration error (%)", form=".1f"),
    "holdout_top1": Unit("held-out top-1 (%)", form=".1f"),
    "knn_top1": Unit("kNN top-1 (%)", form=".1f"),
    "probe_top1": Unit("probe top-1 (%)", form=".1f"),
    "loss": Unit("loss", form=".3f"),
    "accuracy": Unit("accuracy (%)", 100, ".1f"),
    "embedding_std": Unit("std of embeddings", form=".3f"),
    "effective_rank": Unit("effective rank", form=".1f"),
    "lidar": Unit("LiDAR", form=".1f"),
    "alignment": Unit("alignment", form=".3f"),
    "uniformity": Unit("uniformity", form=".3f"),
    "features_rankme": Unit("RankMe of features", form=".1f"),
    "features_alpha_req": Unit("alpha-ReQ of features", form=".2f"),
    "features_nesum": Unit("NESum of features", form=".1f"),
    "features_uniformity": Unit("uniformity of features", form=".3f"),
    "hours": Unit("hours", form=".3f"),
    "images_per_second": Unit("images/s", form=",.0f"),
    "mfu": Unit("MFU (%)", 100, ".1f"),
    "memory_gb": Unit("memory (GB)", form=".2f"),
    "lr": Unit("learning rate", form=".3g"),
    "grad_norm": Unit("gradient norm"),
    "data_wait": Unit("time spent waiting for data (%)", 100, ".1f"),
}
# What a line of a console says of a step, in this order, as far as its width allows.
HEADLINE = (
    *("val_top1", "val_top5", "knn_top1", "probe_top1", "holdout_top1", "loss", "accuracy"),
    *("lr", "images_per_second"),
)
# Heads and order of their columns in the rows of a terminal.
HEADS = {
    "loss": "loss",
    "accuracy": "accuracy",
    "lr": "lr",
    "images_per_second": "images/s",
    "knn_top1": "kNN %",
    "probe_top1": "probe %",
    "holdout_top1": "held-out %",
    "val_top1": "top-1 %",
    "val_top5": "top-5 %",
}
# Neither more nor less of these is better, of what was learnt: costs, settings, and an exponent
# that should be near 1.
NEITHER: tuple[str, ...] = (
    "hours",
    "images_per_second",
    "memory_gb",
    "lr",
    "grad_norm",
    "data_wait",
)
NEITHER += ("features_alpha_req",)
PRETRAINING = "pretraining_"  # prefix of the metrics of the pretraining that was evaluated


def unit(metric: str) -> Unit:
    if metric.startswith(PRETRAINING):
        own = unit(metric.removeprefix(PRETRAINING))
        return own._replace(label=f"pretraining {own.label}")
    form = ".1f" if re.search(r"top-?\d$", metric) else ".4g"
    return UNITS.get(metric) or Unit(metric.replace("_", " "), form=form)


def shown(metric: str, values: Sequence[float]) -> str:
    """Mean ± sample standard deviation as people read this metric; "" for no values."""
    if not values:
        return ""
    _, scale, form = unit(metric)
    mean, std = mean_std([scale * value for value in values])
    if math.isnan(std):
        return f"{mean:{form}}"
    return f"{mean:{form}} ± {std:{'.2g' if form.endswith('g') else form}}"


def spoken(metric: str, value: float) -> str:
    """One value as people read it in a line: shares are percent, as in tables."""
    label, scale, _ = unit(metric)
    value *= scale
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{text} %" if label.endswith("(%)") else text


def headline(line: Mapping[str, float], width: int) -> str:
    """What a person follows of a line of metrics, at most `width` characters.

    All of a line in which nothing is of HEADLINE.
    """
    keys = [key for key in HEADLINE if key in line] or list(line)
    words, length = [], 0
    for key in keys:
        word = f"{key} {spoken(key, line[key])}"
        length += len(word) + 2
        if length > width:
            break
        words.append(word)
    return "  ".join(words)


def cells(line: Mapping[str, float]) -> dict[str, str]:
    """{head: value} of a row of a terminal."""
    return {
        head: f"{line[key]:.3g}" if key == "lr" else spoken(key, line[key]).removesuffix(" %")
        for key, head in HEADS.items()
        if key in line
    }


def mean_std(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1); the latter is NaN for a single value."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    return mean, math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1))


def smaller_is_better(metric: str) -> bool:
    return "loss" in metric or metric.endswith(("uniformity", "alignment", "_ece"))


def has_direction(metric: str) -> bool:
    """Is it known whether more or less of a metric is better?"""
    return "loss" in metric or (metric in UNITS and metric not in NEITHER)
