"""How far confidence is from how often it is right (Guo et al., arXiv:1706.04599)."""

import json
from typing import Any

import torch
from torch import Tensor

BINS = 15  # of equal width, as in the paper


def binned(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Probabilities (N, C), labels (N,) -> float64 (3, BINS), on the CPU: sums over the images.

    Bin m has those whose largest probability is in ((m - 1) / BINS, m / BINS]: how many they are,
    the sum of these probabilities, and how many are right. Sums of several batches add up.
    """
    confidence, predicted = probabilities.max(dim=1)
    # on the CPU, which adds in one order, and in float64 wherever they come from
    right, confidence = (predicted == labels).cpu().double(), confidence.cpu().double()
    place = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    rows = torch.stack([torch.ones_like(confidence), confidence, right])
    return rows.new_zeros(3, BINS).index_add_(1, place, rows)


ROWS = ("images", "confidence", "right")  # of `binned`


def dumped(bins: Tensor) -> str:
    return json.dumps(dict(zip(ROWS, bins.tolist(), strict=True)))


def loaded(content: dict[str, Any]) -> Tensor:
    """The bins that `dumped` wrote. ValueError for anything else."""
    try:
        bins = torch.tensor([content[row] for row in ROWS], dtype=torch.float64)
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"no bins of confidence: {error}") from None
    if bins.shape != (3, BINS) or not (bins.isfinite() & (bins >= 0)).all() or bins[0].sum() == 0:
        raise ValueError("no bins of confidence")
    return bins


def expected_error(bins: Tensor) -> float:
    """Expected calibration error, in percent, of what `binned` has summed up.

    The mean distance of confidence and accuracy in a bin, weighted by the images in it.
    """
    count, confidence, right = bins
    return 100 * ((confidence - right).abs().sum() / count.sum()).item()
