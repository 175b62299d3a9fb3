"""How metrics are named, scaled and shown, and how several values become a mean ± std."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Unit(NamedTuple):
    """How a metric is shown: its heading, the factor for its values, the format of its mean."""

    label: str
    scale: float = 1
    form: str = ".4g"

    @property
    def name(self) -> str:
        """The heading without (%), where each value has it."""
        return self.label.removesuffix(" (%)")


# In the order of columns; other metrics come after these. The heading is the name that one types
# (metric=probe_top1), in the rows of a terminal, in lines, in tables and on pages.
UNITS = {
    "val_top1": Unit("val_top1 (%)", form=".1f"),
    "val_top5": Unit("val_top5 (%)", form=".1f"),
    "val_loss": Unit("val_loss", form=".3f"),
    "val_ece": Unit("val_ece (%)", form=".1f"),
    "holdout_top1": Unit("holdout_top1 (%)", form=".1f"),
    "knn_top1": Unit("knn_top1 (%)", form=".1f"),
    "probe_top1": Unit("probe_top1 (%)", form=".1f"),
    "loss": Unit("loss", form=".3f"),
    "accuracy": Unit("accuracy (%)", 100, ".1f"),
    "embedding_std": Unit("embedding_std", form=".3f"),
    "effective_rank": Unit("effective_rank", form=".1f"),
    "lidar": Unit("lidar", form=".1f"),
    "alignment": Unit("alignment", form=".3f"),
    "uniformity": Unit("uniformity", form=".3f"),
    "features_rankme": Unit("features_rankme", form=".1f"),
    "features_alpha_req": Unit("features_alpha_req", form=".2f"),
    "features_nesum": Unit("features_nesum", form=".1f"),
    "features_uniformity": Unit("features_uniformity", form=".3f"),
    "hours": Unit("hours", form=".3f"),
    "images_per_second": Unit("images/s", form=",.0f"),
    "mfu": Unit("mfu (%)", 100, ".1f"),
    "memory_gb": Unit("memory_gb", form=".2f"),
    "lr": Unit("lr", form=".3g"),
    "grad_norm": Unit("grad_norm"),
    "data_wait": Unit("data_wait (%)", 100, ".1f"),
}
# What a metric is, which values are good, and who proposed it.
WANG = "(Wang & Isola, arXiv:2005.10242)"
ABOUT = {
    "val_top1": "accuracy on the val split. Higher is better.",
    "val_top5": "share of val images whose class is among the five most likely. Higher is better.",
    "val_loss": "loss of the predictions on the val split. Lower is better.",
    "val_ece": "how far confidence is from accuracy on the val split, on average over 15 bins. "
    "Lower is better (Guo et al., arXiv:1706.04599).",
    "holdout_top1": "accuracy on training images that were held out to choose settings. "
    "Higher is better.",
    "knn_top1": "accuracy on held-out training images by their nearest neighbours, measured during "
    "pretraining. Higher is better.",
    "probe_top1": "accuracy on held-out training images by a linear (ridge) classifier, measured "
    "during pretraining. Higher is better.",
    "loss": "training loss. Lower is better, but only between runs with the same method, "
    "augmentation and batch size.",
    "accuracy": "on training batches: of the classifier or, in contrastive pretraining, how often "
    "the positive scores above every negative, which is near 0 at first if the queue is long. "
    "Higher is better.",
    "embedding_std": "spread of the normalised embeddings: 1 if they are spread evenly, 0 if they "
    "have collapsed. Higher is better (Chen & He, arXiv:2011.10566).",
    "effective_rank": "RankMe of the embeddings: how many directions they use. Higher is better "
    "(Garrido et al., arXiv:2210.02885).",
    "lidar": "how many directions tell images apart better than they tell views of one image "
    "apart. Higher is better (Thilak et al., arXiv:2312.04000).",
    "alignment": f"mean squared distance between two views of an image. Lower is better {WANG}.",
    "uniformity": f"how crowded the embeddings of different images are. Lower is better {WANG}.",
    "features_rankme": "how many directions the backbone's features use. Higher is better "
    "(Garrido et al., arXiv:2210.02885).",
    "features_alpha_req": "exponent by which the eigenvalues of the features' covariance fall. "
    "Nearer to 1 is better (Agrawal et al., NeurIPS 2022).",
    "features_nesum": "sum of the eigenvalues of the features' covariance, divided by the largest. "
    "Higher is better (He & Ozay, ICML 2022).",
    "features_uniformity": f"how crowded the features of images are. Lower is better {WANG}.",
    "hours": "time of training and of the evaluations during it, without packing images.",
    "images_per_second": "training speed: the median of the log.",
    "mfu": "model FLOPs utilization: the model's operations per second, as a share of the rate of "
    "a large matrix product on this device. Higher is better (Chowdhery et al., arXiv:2204.02311).",
    "memory_gb": "peak memory: allocated on the GPU or, on a CPU, used by the process.",
    "lr": "learning rate of the step.",
    "grad_norm": "norm of all gradients together, clipped if the optimizer clips.",
    "data_wait": "share of the time that is spent waiting for images.",
}
# What is measured of features without labels: it helps to judge a run, and isn't its result.
DIAGNOSTICS: tuple[str, ...] = ("embedding_std", "effective_rank", "lidar", "alignment")
DIAGNOSTICS += ("uniformity", "features_rankme", "features_alpha_req", "features_nesum")
DIAGNOSTICS += ("features_uniformity",)
# What a line of a console says of a step, in this order, as far as its width allows.
HEADLINE = (
    *("val_top1", "val_top5", "knn_top1", "probe_top1", "holdout_top1", "loss", "accuracy"),
    *("lr", "images_per_second"),
)
# The columns of a terminal's rows, in their order.
ROW = (
    *("loss", "accuracy", "knn_top1", "probe_top1", "holdout_top1", "val_top1", "val_top5"),
    *("lr", "images_per_second"),
)
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
TOP = re.compile(r"top-?\d$")  # accuracies
PRETRAINING = "pretraining_"  # prefix of the metrics of the pretraining that was evaluated


def unit(metric: str) -> Unit:
    if metric.startswith(PRETRAINING):
        own = unit(metric.removeprefix(PRETRAINING))
        return own._replace(label=f"pretraining {own.label}")
    form = ".1f" if TOP.search(metric) else ".4g"
    return UNITS.get(metric) or Unit(metric, form=form)


def about(metric: str) -> str:
    """What the metric is and which values are good; "" where that isn't known."""
    own = metric.removeprefix(PRETRAINING)
    said = ABOUT.get(own, "")
    return f"of the pretraining: {said}" if said and own != metric else said


def is_result(metric: str) -> bool:
    """Is it about how well a task is done, rather than a diagnostic or a term of a method's own?"""
    known = metric in UNITS or metric.startswith("val_") or bool(TOP.search(metric))
    return known and metric not in DIAGNOSTICS


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

    Of a pipeline its rows; all of a line in which nothing is of HEADLINE.
    """
    rows = [key for key in line if key.endswith(" top-1")]
    keys = rows or [key for key in HEADLINE if key in line] or list(line)
    words, length = [], 0
    for key in keys:
        word = f"{unit(key).name} {spoken(key, line[key])}"
        length += len(word) + 2
        if length > width:
            break
        words.append(word)
    return "  ".join(words)


def cells(line: Mapping[str, float]) -> dict[str, str]:
    """{heading: value} of a row of a terminal."""
    return {
        unit(key).name: f"{line[key]:.2g}" if key == "lr" else spoken(key, line[key])
        for key in ROW
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
