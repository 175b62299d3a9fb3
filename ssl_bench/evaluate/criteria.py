"""What is said of features without labels, and how well it would choose among networks.

RankMe and LiDAR are those of `health`, here of held-out images and of the features that are used
later, not of a batch's embeddings.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_bench.evaluate.health import alignment, effective_rank, lidar, uniformity

# Each with what makes it larger for the better of two networks, in the words of its paper.
BETTER = {
    "rankme": "larger",
    "alpha_req": "nearer to 1",
    "nesum": "larger",
    "uniformity": "smaller",
    "lidar": "larger",
    "alignment": "smaller",
    "align_uniform": "smaller",
    "heldout_loss": "smaller",
}
# The range of eigenvalues, by their numbers from 0 on, that alpha-ReQ's authors fit.
FITTED = (3, 100)


def of_features(features: Tensor) -> dict[str, float]:
    """Features (N, D) of as many images, unaugmented -> the criteria that need nothing else.

    Those that can't be computed are left out: all, of fewer than 3 images, or of values that aren't
    finite.
    """
    features = _exact(features)
    if len(features) < 3 or not features.isfinite().all():
        return {}
    falling = eigenvalues(features)
    values = {
        "rankme": effective_rank(features),
        "alpha_req": alpha_req(falling),
        "nesum": nesum(falling),
        "uniformity": uniformity(F.normalize(features, dim=1)),
    }
    return {key: float(value) for key, value in values.items() if value.isfinite()}


def of_views(views: Tensor) -> dict[str, float]:
    """Features (Q, N, D) of Q views of N images -> LiDAR and alignment, as `of_features`.

    alignment: mean over all pairs of an image's views, as the paper draws them.
    """
    views = _exact(views)
    if views.shape[1] < 3 or not views.isfinite().all():
        return {}
    unit = F.normalize(views, dim=2)
    pairs = [(a, b) for a in range(len(views)) for b in range(a)]
    aligned = torch.stack([alignment(unit[a], unit[b]) for a, b in pairs]).mean()
    return {"lidar": float(lidar(views)), "alignment": float(aligned)}


def _exact(features: Tensor) -> Tensor:
    """float64, where eigenvalues can be computed."""
    return (features.cpu() if features.device.type == "mps" else features).double()


def eigenvalues(features: Tensor) -> Tensor:
    """(N, D) -> the min(N, D) largest eigenvalues of their covariance, the largest first."""
    centred = features - features.mean(dim=0)
    narrow = centred if len(centred) <= centred.shape[1] else centred.T
    return torch.linalg.eigvalsh(narrow @ narrow.T / (len(centred) - 1)).clamp(min=0).flip(0)


def alpha_req(values: Tensor) -> Tensor:
    """`eigenvalues` -> the exponent a of the power law j^-a by which they fall.

    alpha-ReQ (Agrawal et al., NeurIPS 2022, section 2): the nearer to 1, the better. As the
    authors' code has it (fastssl, powerlaw.py), a line through the logarithms of the eigenvalues
    FITTED, each weighted by 1 / j. NaN for fewer than two that aren't 0.
    """
    values = values[: FITTED[1]]
    values = values[: int((values > 1e-12 * values[0].clamp(min=1e-30)).sum())]
    number = torch.arange(1, len(values) + 1, dtype=values.dtype, device=values.device)
    # a narrow network has fewer than the authors leave out
    begin = FITTED[0] if len(values) > 2 * FITTED[0] else 0
    x, y, weight = (each[begin:] for each in (-number.log(), values.log(), 1 / number))
    if len(x) < 2:
        return torch.full((), math.nan, dtype=values.dtype)
    mean_x, mean_y = ((weight * each).sum() / weight.sum() for each in (x, y))
    return (weight * (x - mean_x) * (y - mean_y)).sum() / (weight * (x - mean_x).square()).sum()


def nesum(values: Tensor) -> Tensor:
    """`eigenvalues` -> their sum by the largest: 1 to min(N, D).

    NESum (He and Ozay, ICML 2022, definition 4.1): larger is better.
    """
    return values.sum() / values[0].clamp(min=1e-30)


# -- choosing --------------------------------------------------------------------------------------


def score(name: str, value: float) -> float:
    """The value of a criterion, larger for what it takes for the better network; NaN stays."""
    better = BETTER[name]
    return {"larger": value, "smaller": -value, "nearer to 1": -abs(value - 1)}[better]


def complete(values: Mapping[str, float]) -> dict[str, float]:
    """With what follows from other criteria.

    align_uniform: the sum of alignment and uniformity, Wang and Isola's loss (arXiv:2005.10242,
    section 5) with equal weights.
    """
    known = dict(values)
    if "alignment" in known and "uniformity" in known:
        known["align_uniform"] = known["alignment"] + known["uniformity"]
    return {name: known[name] for name in BETTER if name in known}


def spearman(scores: Sequence[float], truth: Sequence[float]) -> float:
    """Spearman's rho of two lists of at least 3 numbers; NaN where one is constant or has a NaN."""
    first, second = (np.asarray(each, dtype=float) for each in (scores, truth))
    if len(first) < 3 or not np.isfinite([first, second]).all():
        return math.nan
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan
    from scipy.stats import spearmanr

    return float(spearmanr(first, second).statistic)


def regret(scores: Sequence[float], truth: Sequence[float]) -> float:
    """By how much the truth of what has the highest score falls short of the best truth.

    Ties count by their mean. NaN where no score is a number.
    """
    ranked = np.asarray(scores, dtype=float)
    if np.isnan(ranked).all():
        return math.nan
    chosen = ranked == np.nanmax(ranked)
    return float(np.max(truth) - np.asarray(truth, dtype=float)[chosen].mean())
