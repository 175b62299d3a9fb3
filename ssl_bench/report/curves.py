"""Curves of groups of runs as plain numbers, which the page draws (page.js, with uPlot).

Values are scaled as `units` show them, and rounded to five digits.
"""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np

from ssl_bench.report.grouping import Group
from ssl_bench.runs import units
from ssl_bench.runs.record import Ran

POINTS = 200  # points of a line at most; a screen shows no more
VALUES = 600_000  # numbers of all curves of a page at most, so that hundreds of runs still open
BESIDE = ("step", "epoch", "images_seen")  # the axes; hours are derived


def points_for(curves: int) -> int:
    """How many points a curve may have on a page with so many."""
    return int(np.clip(VALUES // max(curves, 1), 30, POINTS))


def band(curves: Sequence[np.ndarray]) -> np.ndarray:
    """Curves (points, 2), x ascending -> (M, 3): each x, mean and sample std (n - 1) there.

    The std is NaN where fewer than two curves reach.
    """
    x = np.unique(np.concatenate([curve[:, 0] for curve in curves]))
    values = np.stack([np.interp(x, *curve.T, left=np.nan, right=np.nan) for curve in curves])
    count = np.isfinite(values).sum(axis=0)
    mean = np.nansum(values, axis=0) / count
    squares = np.nansum((values - mean) ** 2, axis=0)
    std = np.sqrt(np.divide(squares, count - 1, out=np.full(len(x), np.nan), where=count > 1))
    return np.column_stack([x, mean, std])


def thin(rows: np.ndarray, points: int) -> np.ndarray:
    """(M, C) -> at most `points` rows, each the mean of as many neighbours; the last row stays."""
    if len(rows) <= points:
        return rows
    starts = np.linspace(0, len(rows) - 1, points)[:-1].round().astype(int)
    counts = np.diff(starts, append=len(rows) - 1)[:, None]
    return np.vstack([np.add.reduceat(rows[:-1], starts) / counts, rows[-1]])


# {run: {metric: `of_run`}}: a run is part of several groups where a page pools them by keys.
_known: WeakKeyDictionary[Ran, dict[str, np.ndarray]] = WeakKeyDictionary()


def of_run(ran: Ran, key: str) -> np.ndarray:
    """(points, 2): epoch and value of each line that has this metric, if finite."""
    known = _known.setdefault(ran, {})
    if key not in known:
        known[key] = _read(ran, key)
    return known[key]


def _read(ran: Ran, key: str) -> np.ndarray:
    pairs = [(line["epoch"], line[key]) for line in ran.lines if key in line and "epoch" in line]
    points = np.array(pairs, dtype=float).reshape(-1, 2)
    points = points[np.isfinite(points).all(axis=1)]
    # an evaluation at the end of an epoch may be logged twice: the later line counts
    last = np.append(np.diff(points[:, 0]) > 0, True)[: len(points)]
    return points[last]


def axes(ran: Ran, points: int) -> list[list[float | None]]:
    """Rows of epoch, step, images, hours (None: not known): the page reads an axis off them.

    Hours are of training, without the packing of images, as in the tables.
    """
    rows, seconds, seen = [], 0.0, 0.0
    if ran.lines and ran.config.get("continue_from"):
        seen = ran.lines[0].get("images_seen", 0.0)
    for line in ran.lines:
        if "epoch" not in line:
            continue
        if (rate := line.get("images_per_second")) and "images_seen" in line:
            seconds += (line["images_seen"] - seen) / rate
            seen = line["images_seen"]
        images = line.get("images_seen", np.nan)
        rows.append([line["epoch"], line["step"], images, seconds / 3600 if seconds else np.nan])
    table = np.array(rows, dtype=float).reshape(-1, 4)
    ends = np.linspace(0, len(table) - 1, min(len(table), points)).round().astype(int)
    return [_plain(row) for row in table[np.unique(ends)]] if len(table) else []


def of_group(group: Group, points: int) -> dict:
    """{"axes": as `axes` of its longest run, "grids": lists of epochs that curves share,
    "values": {metric: [place among the grids, means, stds or None]}}.
    """
    grids: dict[tuple, int] = {}
    values = {}
    keys = dict.fromkeys(key for ran in group.runs for line in ran.lines for key in line)
    for key in (key for key in keys if key not in BESIDE):
        curves = []
        for sample in group.samples:
            having = [curve for ran in sample if len(curve := of_run(ran, key))]
            if having:
                curves.append(band(having)[:, :2] if len(having) > 1 else having[0])
        if not curves:
            continue
        rows = thin(band(curves) * (1, *2 * [units.unit(key).scale]), points)
        grid = tuple(_plain(rows[:, 0]))
        spread = _plain(rows[:, 2]) if np.isfinite(rows[:, 2]).any() else None
        values[key] = [grids.setdefault(grid, len(grids)), _plain(rows[:, 1]), spread]
    longest = max(group.runs, key=lambda ran: len(ran.lines))
    return {"axes": axes(longest, points), "grids": [*map(list, grids)], "values": values}


def _plain(numbers: np.ndarray) -> list[float | None]:
    """Five digits of each; None for what is no number."""
    return [float(f"{x:.5g}") if np.isfinite(x) else None for x in numbers.tolist()]
