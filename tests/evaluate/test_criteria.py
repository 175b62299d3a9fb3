"""Criteria without labels, against their papers' formulas written out in numpy."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl_bench.evaluate import criteria
from ssl_bench.evaluate.health import alignment, lidar


def features(images: int, dim: int, decay: float = 0.7) -> np.ndarray:
    """With a mean, and a spectrum that falls by a power."""
    rng = np.random.default_rng(0)
    scales = np.arange(1, dim + 1) ** -decay
    rotation = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    return (rng.normal(size=(images, dim)) * scales) @ rotation + rng.normal(size=dim)


@pytest.mark.parametrize(("images", "dim"), [(200, 24), (30, 60), (400, 150)])
def test_criteria_are_the_papers_formulas(images: int, dim: int) -> None:
    """Each as its paper writes it down, or as the authors' code computes it: alpha-ReQ's weighted
    normal equations from the fourth eigenvalue to the hundredth, NESum and RankMe as in the library
    of Tsitsulin et al. (google-research, graph_embedding), Wang and Isola's two losses.
    """
    given = features(images, dim)
    found = criteria.of_features(torch.from_numpy(given))

    singular = np.linalg.svd(given, compute_uv=False)
    shares = singular / singular.sum()
    assert found["rankme"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-6)

    values = np.linalg.eigvalsh(np.cov(given.T))[::-1]
    assert found["nesum"] == pytest.approx((values / values[0]).sum(), rel=1e-9)

    values = values[: min(dim, images - 1)]  # the others are 0
    rank = np.arange(4, min(100, len(values)) + 1)
    design = np.stack([-np.log(rank), np.ones(len(rank))], axis=1)
    weighted = design / rank[:, None]
    fit = np.linalg.solve(design.T @ weighted, weighted.T @ np.log(values[3:100]))
    assert found["alpha_req"] == pytest.approx(fit[0], rel=1e-7)

    unit = given / np.linalg.norm(given, axis=1, keepdims=True)
    pairs = [np.exp(-2 * ((a - b) ** 2).sum()) for i, a in enumerate(unit) for b in unit[:i]]
    assert found["uniformity"] == pytest.approx(np.log(np.mean(pairs)), rel=1e-9)


def test_criteria_are_what_published_programs_compute() -> None:
    """criteria.npz: features (160, 24), four views of 60 images (4, 60, 12), and what was computed
    of them by the authors' programs: alpha-ReQ's (fastssl, utils/powerlaw.py), Wang and Isola's
    (align_uniform); RankMe and NESum by Tsitsulin et al.'s (google-research, graph_embedding),
    LiDAR by stable-pretraining's, whose covariance within images is the unbiased one.
    """
    known = np.load(Path(__file__).with_name("criteria.npz"))
    found = criteria.of_features(torch.from_numpy(known["features"]))
    for name in ("rankme", "nesum", "alpha_req", "uniformity"):
        assert found[name] == pytest.approx(known[name].item(), rel=1e-7), name
    views = torch.from_numpy(known["views"])
    first, second = torch.nn.functional.normalize(views, dim=2)[:2]
    assert alignment(first, second).item() == pytest.approx(known["alignment"].item(), rel=1e-9)
    unbiased = 1 - 1 / len(views)  # the same but for a factor, which goes into delta
    assert lidar(views, 1e-4 * unbiased).item() == pytest.approx(known["lidar"].item(), rel=1e-6)


def test_criteria_of_views() -> None:
    rng = np.random.default_rng(1)
    views = features(50, 12) + 0.2 * rng.normal(size=(3, 50, 12))
    found = criteria.of_views(torch.from_numpy(views))
    unit = views / np.linalg.norm(views, axis=2, keepdims=True)
    pairs = [((unit[a] - unit[b]) ** 2).sum(axis=1).mean() for a, b in ((0, 1), (0, 2), (1, 2))]
    assert found["alignment"] == pytest.approx(np.mean(pairs), rel=1e-9)
    assert found["lidar"] == pytest.approx(lidar(torch.from_numpy(views)).item(), rel=1e-6)


def test_a_power_law_is_found() -> None:
    """Orthogonal directions with variances j^-1.3, and a network of less than ten dimensions."""
    for dim in (120, 6):
        basis = np.linalg.qr(np.random.default_rng(0).normal(size=(400, dim)))[0]
        centred = basis - basis.mean(axis=0)
        centred = np.linalg.qr(centred)[0] * np.arange(1, dim + 1) ** -0.65
        values = criteria.eigenvalues(torch.from_numpy(centred))
        assert criteria.alpha_req(values).item() == pytest.approx(1.3, abs=1e-6)


def test_collapsed_features_have_criteria() -> None:
    """Nothing is divided by 0: such a network is to be ranked last, not to end the command."""
    found = criteria.of_features(torch.ones(20, 8))
    assert found["rankme"] == pytest.approx(1)
    assert found["nesum"] == 0
    assert "alpha_req" not in found
    assert found["uniformity"] == pytest.approx(0)
    assert criteria.of_features(torch.ones(2, 8)) == {}
    assert criteria.of_features(torch.full((20, 8), math.inf)) == {}
    assert criteria.of_views(torch.full((2, 20, 8), math.nan)) == {}


def test_which_value_is_better() -> None:
    assert criteria.score("rankme", 5.0) > criteria.score("rankme", 4.0)
    assert criteria.score("heldout_loss", 1.0) > criteria.score("heldout_loss", 2.0)
    assert criteria.score("alpha_req", 1.1) > criteria.score("alpha_req", 0.8)
    known = criteria.complete({"uniformity": -2.0, "alignment": 0.5, "rankme": 3.0})
    assert known == {"rankme": 3.0, "uniformity": -2.0, "alignment": 0.5, "align_uniform": -1.5}


def test_rho_and_regret() -> None:
    truth = [50.0, 70.0, 90.0, 60.0]
    assert criteria.spearman([1, 3, 4, 2], truth) == pytest.approx(1)
    assert criteria.spearman([4, 2, 1, 3], truth) == pytest.approx(-1)
    # ranks 2.5, 2.5, 4, 1 beside 1, 3, 4, 2
    expected = np.corrcoef([2.5, 2.5, 4, 1], [1, 3, 4, 2])[0, 1]
    assert criteria.spearman([3, 3, 4, 2], truth) == pytest.approx(expected)
    assert math.isnan(criteria.spearman([1, 1, 1, 1], truth))
    assert math.isnan(criteria.spearman([1, math.nan, 2, 3], truth))
    assert criteria.regret([1, 4, 2, 3], truth) == pytest.approx(20)
    assert criteria.regret([1, 4, 4, 3], truth) == pytest.approx(10)  # by the mean of both
    assert criteria.regret([1, math.nan, 2, 3], truth) == pytest.approx(30)
