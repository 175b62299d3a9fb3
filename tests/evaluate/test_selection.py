"""Strategies: each is its paper's algorithm, however lazily it looks at distances."""

from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssl_bench.evaluate import selection

STRATEGIES = {
    "random": selection.random,
    "k_center": selection.k_center,
    "kmeans_plusplus": selection.kmeans_plusplus,
    "typiclust": lambda *args: selection.typiclust(*args, budget=3),
}
NONE = torch.empty(0, 3, dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(count: int, seed: int = 0, dim: int = 3) -> Tensor:
    return torch.randn(count, dim, generator=seeded(seed), dtype=torch.float64)


def distances(a: Tensor, b: Tensor) -> np.ndarray:
    return (a[:, None] - b[None]).square().sum(dim=2).numpy()


@pytest.fixture
def lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few at once that what is out of date matters, in tests of few points."""
    for name, value in {"AHEAD": 5, "DRAWS": 4, "ROWS": 7, "CENTRES": 3}.items():
        monkeypatch.setattr(selection, name, value)


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=25)
@given(
    count=st.integers(1, 40),
    doubles=st.integers(0, 20),
    labelled=st.integers(0, 10),
    seed=st.integers(0, 99),
)
def test_each_row_once_and_the_same_again(
    strategy: str, count: int, doubles: int, labelled: int, seed: int
) -> None:
    pool = torch.cat([points(count, seed), points(count, seed)[:doubles]])
    covered = pool[:labelled] + (seed % 2)  # on the pool, or beside it
    order = list(STRATEGIES[strategy](pool, covered, seeded(seed)))
    assert sorted(order) == list(range(len(pool)))
    assert order == list(STRATEGIES[strategy](pool, covered, seeded(seed)))


@pytest.mark.usefixtures("lazy")
@pytest.mark.parametrize("labelled", [0, 6])
@pytest.mark.parametrize("seed", range(5))
def test_k_center_is_always_the_farthest(labelled: int, seed: int) -> None:
    pool, covered = points(60, seed), points(labelled, seed + 100)
    order = list(islice(selection.k_center(pool, covered, seeded(seed)), 40))
    expected = order[:1] if not labelled else []
    while len(expected) < 40:
        centres = torch.cat([covered, pool[expected]])
        expected.append(int(distances(pool, centres).min(axis=1).argmax()))
    assert order == expected


@pytest.mark.usefixtures("lazy")
@pytest.mark.parametrize("labelled", [0, 2])
def test_kmeans_plusplus_draws_by_the_squared_distance(labelled: int) -> None:
    """How often each pair comes first and second, and each triple: as often as its probability
    says.
    """
    pool, covered, tries = points(6, 4), points(labelled, 5), 4000
    found: dict[tuple[int, ...], int] = {}
    for seed in range(tries):
        triple = tuple(islice(selection.kmeans_plusplus(pool, covered, seeded(seed)), 3))
        found[triple] = found.get(triple, 0) + 1

    def weights(chosen: list[int]) -> np.ndarray:
        centres = torch.cat([covered, pool[chosen]])
        share = distances(pool, centres).min(axis=1) if len(centres) else np.ones(len(pool))
        return share / share.sum()

    for triple in np.ndindex(6, 6, 6):
        p = np.prod([weights(list(triple[:i]))[triple[i]] for i in range(3)])
        assert abs(found.get(triple, 0) - tries * p) <= 4.5 * np.sqrt(tries * p * (1 - p)) + 1e-9, (
            triple
        )


def blobs(*centres: float, count: int = 30) -> Tensor:
    """Round a centre each, on a line; the first point of each lies in its middle."""
    cloud = points(count, 1) * 0.1
    cloud[0] = 0
    return torch.cat([cloud + torch.tensor([x, 0, 0]) for x in centres])


def test_typiclust_asks_for_the_middle_of_the_clusters_without_labels() -> None:
    pool = torch.cat([blobs(0, 10, 20), blobs(30, count=40)])
    covered = torch.tensor([[10.0, 0.05, 0]], dtype=torch.float64)
    order = list(selection.typiclust(pool, covered, seeded(), budget=3))
    assert {row // 30 for row in order[:3]} == {0, 2, 3}
    assert order[0] >= 90  # the largest first
    for row in order[:3]:
        # the clouds reach to 0.3
        assert pool[row, 0] == pytest.approx(10.0 * min(row // 30, 3), abs=0.1)
    assert 30 <= order[3] < 60 or order[3] >= 90  # then again one of those with one label


def test_typiclust_of_few_clusters_goes_round() -> None:
    pool = blobs(0, 10)
    order = list(islice(selection.typiclust(pool, NONE, seeded(), budget=20, max_clusters=2), 20))
    assert [row // 30 for row in order] == [order[0] // 30, 1 - order[0] // 30] * 10
    assert pool[order[:2]].norm(dim=1).sort().values.tolist() == pytest.approx([0, 10], abs=0.15)


def test_what_is_left_of_a_cluster_comes_last() -> None:
    pool = torch.cat([blobs(0, count=60), blobs(500, count=selection.SMALLEST)])
    order = list(selection.typiclust(pool, NONE, seeded(), budget=5))
    assert all(row >= 60 for row in order[-selection.SMALLEST :])


def test_typicality_is_the_inverse_of_the_mean_distance() -> None:
    x, of = points(70, 3), torch.arange(70) % 2
    of[69] = 2  # alone
    found = selection.typicality(x, of)
    for row in (0, 1, 44):
        near = np.sort(np.sqrt(distances(x[row : row + 1], x[of == of[row]])[0]))[
            1 : selection.NEIGHBOURS + 1
        ]
        assert found[row] == pytest.approx(1 / (near.mean() + 1e-5), rel=1e-3)
    assert found[69] == pytest.approx(1e5)


def test_margin() -> None:
    logits = torch.tensor([[2.0, 2.0, -9.0], [5.0, 0.0, 0.0]]).log_softmax(dim=1)
    assert selection.margin(logits).tolist() == pytest.approx([0, (np.e**5 - 1) / (np.e**5 + 2)])


@pytest.mark.usefixtures("lazy")
@settings(max_examples=20)
@given(count=st.integers(1, 30), centres=st.integers(1, 12), seed=st.integers(0, 99))
def test_distances_in_blocks(count: int, centres: int, seed: int) -> None:
    x, y = points(count, seed), points(centres, seed + 1)
    np.testing.assert_allclose(
        selection.nearest_distances(x, y), distances(x, y).min(axis=1), atol=1e-12
    )
    assert selection.nearest_distances(x, y[:0]).isinf().all()


def test_projection_keeps_the_distances_of_unit_vectors() -> None:
    """Of features that lie in 4 of 32 dimensions, 4 components hold everything; float16 costs a
    thousandth.
    """
    features = (points(300, 0, 4) @ points(4, 1, 32)).numpy()
    unit = torch.from_numpy(features / np.linalg.norm(features, axis=1, keepdims=True))
    project = selection.Projection(features.astype(np.float16), 4, 0, torch.device("cpu"))
    assert project.explained == pytest.approx(1, abs=1e-4)
    found = project(features.astype(np.float16))
    assert found.shape == (300, 4)
    np.testing.assert_allclose(torch.cdist(found, found), torch.cdist(unit, unit), atol=2e-3)
    np.testing.assert_allclose(
        selection.Projection(features, 0, 0, torch.device("cpu"))(features), unit, rtol=1e-5
    )
    assert selection.Projection(features, 2, 0, torch.device("cpu")).explained < 0.99


@pytest.mark.parametrize("strategy", ["k_center", "kmeans_plusplus"])
def test_it_does_not_look_at_every_point_for_every_centre(
    strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = torch.randn(20_000, 16, generator=seeded())
    passes = []
    lower: Callable = selection.lower
    monkeypatch.setattr(selection, "lower", lambda *args: (passes.append(1), lower(*args))[1])
    chosen: Iterator[int] = getattr(selection, strategy)(pool, pool[:0], seeded())
    list(islice(chosen, 1000))
    assert len(passes) < 40
