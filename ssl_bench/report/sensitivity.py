"""What the settings of a sweep have to do with its results.

The importance of a key is the share of the variance of results that its values explain alone. On a
complete grid it is the main effect of a functional ANOVA, as that of Hutter et al. (ICML 2014), but
without their forest, which guesses what wasn't run. Elsewhere keys that change together share what
they explain.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ssl_bench.report import tables
from ssl_bench.report.grouping import Board, same_losses
from ssl_bench.runs import units
from ssl_bench.runs.units import mean_std

LEAST = 4  # groups with a result, of which anything is said
FEW = 12  # below so many, a share is a hint at most
KEYS = 10  # axes that can be read side by side
METRICS = 12
RANGES = 4  # into which the values of a number are put if most are tried once
TOGETHER = 0.6  # Cramer's V from which two keys can't be told apart


class Share(NamedTuple):
    """How much of the variance of results a key explains."""

    share: float  # 0 ... 1; NaN: it can't be said
    chance: float  # what it would explain on average if it had no effect
    levels: int


def explained(results: np.ndarray, keys: Sequence[np.ndarray]) -> list[Share]:
    """Correlation ratio (eta squared) of finite results (N,) by each key's levels, int (N,).

    Chance is that of the F test: (levels - 1) times the variance that all keys together, by adding
    up, leave unexplained; of the whole variance, if they leave no degree of freedom. The share is
    NaN if each result has a level of its own, or if all are equal.
    """
    deviations = results - results.mean()
    total = np.square(deviations).sum()
    if total <= 1e-12 * np.square(results).sum():
        return [Share(math.nan, math.nan, len(np.unique(levels))) for levels in keys]
    told = np.hstack([levels[:, None] == np.unique(levels) for levels in keys]).astype(float)
    fitted = told @ np.linalg.lstsq(told, deviations, rcond=None)[0]
    freedom = len(results) - np.linalg.matrix_rank(told)
    left = np.square(deviations - fitted).sum() / freedom if freedom else total / (len(results) - 1)
    found = []
    for levels in keys:
        names, places, counts = np.unique(levels, return_inverse=True, return_counts=True)
        means = np.bincount(places, deviations) / counts
        alone = len(names) == len(results)
        share = math.nan if alone else float((counts * means**2).sum() / total)
        found.append(Share(share, float((len(names) - 1) * left / total), len(names)))
    return found


def levels_of(words: Sequence[str]) -> tuple[np.ndarray, bool]:
    """(a level for each value, whether they are ranges of a number).

    Values of which each is tried about once, as a random search draws them, are put into RANGES of
    equally many.
    """
    names, levels = np.unique(np.array(words, dtype=str), return_inverse=True)
    numbers = numbers_of(words)
    if numbers is None or 2 * len(names) <= len(words) or len(names) <= RANGES:
        return levels, False
    edges = np.quantile(numbers, np.linspace(0, 1, RANGES + 1)[1:-1])
    return np.searchsorted(edges, numbers, side="left"), True


def numbers_of(words: Sequence[str]) -> np.ndarray | None:
    """The values as finite numbers, float (N,); None: one isn't."""
    try:
        numbers = np.array([float(word) for word in words])
    except ValueError:
        return None
    return numbers if np.isfinite(numbers).all() else None


def together(one: np.ndarray, other: np.ndarray) -> float:
    """Cramer's V of two lists of levels, less what chance makes of it (Bergsma 2013): 0 ... 1."""
    table = np.zeros((one.max() + 1, other.max() + 1))
    np.add.at(table, (one, other), 1)
    table = table[table.any(axis=1)][:, table.any(axis=0)]
    n, (rows, columns) = len(one), table.shape
    expected = np.outer(table.sum(axis=1), table.sum(axis=0)) / n
    phi = (np.square(table - expected) / expected).sum() / n
    phi = max(0.0, phi - (rows - 1) * (columns - 1) / (n - 1))
    sides = (side - (side - 1) ** 2 / (n - 1) for side in (rows, columns))
    return math.sqrt(phi / room) if (room := min(sides) - 1) > 0 else 0.0


def of_board(board: Board) -> dict | None:
    """What the page draws of the groups of a stage; None: too few, or nothing was varied.

    {"keys": [{"key", "words": a value for each group}], "metrics": [{"key", "label", "least": is
    the least the best, "means": of each group or None, "shares": by the place of a key, the largest
    first, "notes": sentences}]}.
    """
    keys = _varied(board)
    if not keys or len(board.groups) < LEAST:
        return None
    levels = {key: levels_of(board.differing[key]) for key in keys}
    near = {key: _beside(key, levels) for key in keys}
    metrics = []
    for metric in tables.columns(board.rows):
        if metric in tables.BESIDE or ("loss" in metric and not same_losses(board.groups)):
            continue
        means = [mean_std(group.values(metric) or [math.nan])[0] for group in board.groups]
        values = units.unit(metric).scale * np.array(means)
        known = np.isfinite(values)
        if known.sum() < LEAST or np.ptp(values[known]) == 0:
            continue
        of_known = {key: (mine[known], ranges) for key, (mine, ranges) in levels.items()}
        shares, notes = _shares(values[known], of_known, near)
        if (noise := _noise(board, metric)) is not None:
            notes.append(
                f"Seeds alone account for {100 * noise:.2g} % of the variance of the rows' means."
            )
        metrics.append(
            {
                "key": metric,
                "label": units.unit(metric).label,
                "least": units.smaller_is_better(metric),
                "means": [float(f"{x:.5g}") if np.isfinite(x) else None for x in values],
                "shares": shares,
                "notes": notes,
            }
        )
    if not metrics:
        return None
    shown = [{"key": key, "words": board.differing[key]} for key in keys]
    return {"keys": shown, "metrics": metrics[:METRICS]}


def _varied(board: Board) -> list[str]:
    """The keys that most groups have; of those that tell the same groups apart, one."""
    found: dict[tuple[int, ...], str] = {}
    for key, words in board.differing.items():
        if 2 * sum(map(bool, words)) < len(words):
            continue  # a setting of a few methods alone
        first = {word: place for place, word in reversed([*enumerate(words)])}
        places = tuple(first[word] for word in words)
        if places not in found or key.endswith(".name"):
            found[places] = key
    return [*found.values()]


Levels = dict[str, tuple[np.ndarray, bool]]  # as `levels_of` gives them, for each key


def _beside(key: str, levels: Levels) -> list[str]:
    """The keys that change together with this one."""
    mine = levels[key][0]
    others = (other for other in levels if other != key)
    return [other for other in others if together(mine, levels[other][0]) > TOGETHER]


def _shares(
    results: np.ndarray, levels: Levels, near: dict[str, list[str]]
) -> tuple[list[dict], list[str]]:
    """(the share of each key, largest first, at most KEYS; sentences about all)."""
    found = []
    all_keys = explained(results, [mine for mine, _ in levels.values()])
    varied = [mine for mine, _ in levels.values() if len(np.unique(mine)) > 1]
    for place, (said, (key, (_, ranges))) in enumerate(zip(all_keys, levels.items(), strict=True)):
        if said.levels < 2:
            continue
        notes = [f"in {said.levels} ranges"] if ranges else []
        if math.isnan(said.share):
            notes.append("every value was tried only once")
        elif said.share <= said.chance:
            notes.append("not above chance")
        if near[key]:
            notes.append(f"varies together with {', '.join(near[key][:2])}")
        share = None if math.isnan(said.share) else round(said.share, 4)
        one = {"place": place, "share": share, "chance": round(said.chance, 4)}
        found.append((said.chance - (share or 0), place, one | {"note": "; ".join(notes)}))
    ordered = [one for _, _, one in sorted(found)]
    notes = []
    if len(results) < FEW:
        notes.append(f"With only {len(results)} rows, importance is no more than a hint.")
    combinations = len(np.unique(np.stack(varied), axis=1).T)
    if combinations == len(results) == math.prod(len(np.unique(mine)) for mine in varied):
        rest = max(0.0, 1 - sum(said.share for said in all_keys))
        notes.append(
            f"The grid is complete, so shares add up: the remaining {100 * rest:.0f} % are due to "
            "interactions between settings, and to seeds."
        )
    else:
        notes.append(
            "The grid is not complete: settings that vary together split what they explain."
        )
    return ordered[:KEYS], notes


def _noise(board: Board, metric: str) -> float | None:
    """The share of the variance of groups' means that is due to their seeds; None: not known."""
    values = [group.values(metric) for group in board.groups]
    several = [mean_std(of_one)[1] ** 2 / len(of_one) for of_one in values if len(of_one) > 1]
    means = np.array([mean_std(of_one)[0] for of_one in values if of_one])
    means = means[np.isfinite(means)]
    if not several or len(means) < LEAST or not (total := means.var(ddof=1)):
        return None
    return float(min(1.0, np.nanmean(several) / total))
