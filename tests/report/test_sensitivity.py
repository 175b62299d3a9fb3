"""What settings have to do with results: shares of variance, what chance makes, what is said."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from made_runs import classified, pretrained

from ssl_bench.report import grouping, sensitivity
from ssl_bench.runs import record


def grid(*sides: int) -> list[np.ndarray]:
    return [*np.array([*product(*map(range, sides))]).T]


def test_shares_of_a_complete_grid_add_up() -> None:
    """2 a + 3 b has effects that are known: the variance of each term."""
    a, b = grid(3, 4)
    one, other = sensitivity.explained(2.0 * a + 3.0 * b, [a, b])
    variances = 4 * np.var(range(3)), 9 * np.var(range(4))
    assert one.share == pytest.approx(variances[0] / sum(variances))
    assert one.share + other.share == pytest.approx(1)
    assert (one.levels, other.levels) == (3, 4)
    both = sensitivity.explained((a - 1.0) * (b - 1.5), [a, b])  # together alone
    assert [said.share for said in both] == pytest.approx([0, 0])


def test_a_key_without_effect_explains_what_chance_says() -> None:
    """On average over draws, beside a key that has an effect."""
    rng = np.random.default_rng(0)
    a, b = grid(4, 5)
    draws = [sensitivity.explained(a + rng.normal(size=20), [b, a])[0] for _ in range(300)]
    shares, chances = ([one[i] for one in draws] for i in (0, 1))
    assert np.mean(shares) == pytest.approx(np.mean(chances), rel=0.1)
    assert np.mean(chances) < 4 / 19 / 1.5  # not that of the whole variance
    saturated = sensitivity.explained(np.arange(4.0), [np.arange(4), np.array([0, 0, 1, 1])])
    assert np.isnan(saturated[0].share)
    assert saturated[1].chance == pytest.approx(1 / 3)


def test_values_that_are_tried_once_are_put_into_ranges() -> None:
    numbers = [str(10.0**-i) for i in range(12)]
    levels, ranges = sensitivity.levels_of(numbers)
    assert ranges
    assert np.bincount(levels).tolist() == [3, 3, 3, 3]
    assert sensitivity.levels_of(["a", "b", "c", "d", "e", "f"])[1] is False
    assert sensitivity.levels_of(["1", "2"] * 5)[1] is False
    assert sensitivity.levels_of(["1", "null", "2", "3", "4", "5"])[1] is False


def test_keys_that_change_together() -> None:
    a, b = grid(3, 4)
    assert sensitivity.together(a, a) == pytest.approx(1)
    assert sensitivity.together(a, b) == 0
    assert sensitivity.together(a, np.zeros(12, dtype=int)) == 0


def of(folder: Path) -> dict | None:
    (board,) = grouping.boards(record.find([folder]))
    return sensitivity.of_board(board)


def test_what_is_said_of_a_sweep(tmp_path: Path) -> None:
    for lr, size, seed in product((1, 2, 3), (64, 128), (0, 1)):
        words = [f"optimizer.base_lr={lr}", f"batch_size={size}", f"seed={seed}"]
        classified(tmp_path / f"{lr}{size}{seed}", 50.0 + 4 * lr + size / 640 + seed / 10, *words)
    said = of(tmp_path)
    metric = said["metrics"][0]
    keys = [said["keys"][one["place"]]["key"] for one in metric["shares"]]
    assert (metric["key"], metric["least"]) == ("val_top1", False)
    assert keys == ["optimizer.base_lr", "batch_size"]
    assert metric["shares"][0]["share"] > 0.99
    assert "With only 6 rows, importance is no more than a hint." in metric["notes"]
    assert metric["notes"][1].startswith(
        "The grid is complete, so shares add up: the remaining 0 %"
    )
    assert metric["notes"][2].startswith("Seeds alone account for 0.0")
    assert metric["means"][0] == pytest.approx(62.25)


def test_losses_that_mean_other_things_are_left_out(tmp_path: Path) -> None:
    for i, temperature in enumerate((0.1, 0.2, 0.3, 0.4)):
        words = [f"method.temperature={temperature}"]
        pretrained(tmp_path / f"{i}", *words, loss=1.0 + i, knn_top1=50.0 + i)
    assert [one["key"] for one in of(tmp_path)["metrics"]] == ["knn_top1"]


def test_nothing_is_said_of_a_few_or_of_what_is_alike(tmp_path: Path) -> None:
    for seed in range(5):
        classified(tmp_path / f"{seed}", 50.0 + seed, f"seed={seed}")
    assert of(tmp_path) is None
    for lr in (2, 3):
        classified(tmp_path / f"lr{lr}", 50.0, f"optimizer.base_lr={lr}")
    assert of(tmp_path) is None
