"""Charts as SVG for a page, with its font and colours, and a tooltip for each line.

Colours are CSS variables: `--s0` ... `--s7` of series, `--ink` of text, `--rule` of axes, `--grid`
of the lines behind.
"""

import io
import re
from collections.abc import Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple
from xml.etree import ElementTree

import numpy as np

from ssl_bench.report.figure import GREY, INK, LINES, STYLE
from ssl_bench.runs.units import mean_std, shown, unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = (*LINES, "#1f8f8f", "#9b6a3c")
DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)))  # for more series than there are colours
LIMIT = len(COLOURS) * len(DASHES)  # how many series can be told apart
POINTS = 200  # points of a line; a screen shows no more
VARIABLES = {INK: "--ink", GREY: "--rule", STYLE["grid.color"]: "--grid"}
VARIABLES |= {colour: f"--s{i}" for i, colour in enumerate(COLOURS)}
WIDTH = 4.4  # inches of 72 units; some 400 pixels on the page
_STYLE = STYLE | {"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "ssl_bench"}
_SVG = "http://www.w3.org/2000/svg"


class Series(NamedTuple):
    """A group of runs in a chart.

    number: chooses its colour and dashes, the same on the whole page. curves: (points, 2) of each
    sample, x ascending. values: the final value of each sample with a finished run.
    """

    name: str
    number: int
    curves: list[np.ndarray]
    values: Sequence[float] = ()


def band(curves: Sequence[np.ndarray]) -> np.ndarray:
    """Curves (points, 2), x ascending -> (M, 3): each x, and `mean_std` of the curves there."""
    x = np.unique(np.concatenate([curve[:, 0] for curve in curves]))
    values = np.stack([np.interp(x, *curve.T, left=np.nan, right=np.nan) for curve in curves])
    spread = [mean_std(column[np.isfinite(column)].tolist()) for column in values.T]
    return np.column_stack([x, spread])


def smooth(points: np.ndarray) -> np.ndarray:
    """(M, 3) -> at most POINTS rows of its running mean, over a thirtieth of the rows."""
    if (window := len(points) // 30) > 1:
        points = np.lib.stride_tricks.sliding_window_view(points, window, axis=0).mean(axis=-1)
    return points[np.linspace(0, len(points) - 1, min(len(points), POINTS)).round().astype(int)]


def lines(metric: str, series: Sequence[Series], x: str = "epoch") -> str:
    """SVG with a line for each series: the mean of its samples, in a band of ± one sample std."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    scale, titles = unit(metric).scale, {}
    with _style():
        page = Figure(figsize=(WIDTH, 2.5), layout="constrained")
        axes = page.subplots()
        for name, number, curves, values in series:
            points = smooth(band([curve * (1, scale) for curve in curves]))
            look = {"color": COLOURS[number % len(COLOURS)], "gid": f"series-{number}"}
            at, means, stds = points.T
            there = np.isfinite(stds)
            low, high = _within(metric, points)
            axes.fill_between(at, low, high, where=there, alpha=0.18, linewidth=0, **look)
            marker = "o" if len(points) == 1 else None
            dashes = DASHES[number // len(COLOURS) % len(DASHES)]
            axes.plot(at, means, linewidth=1.8, linestyle=dashes, marker=marker, **look)
            last = max(curve[-1, 0] for curve in curves)
            finals = values or [curve[-1, 1] for curve in curves]
            count = f"n = {len(finals)}"
            titles[number] = f"{name}: {shown(metric, finals)}, {count}, at {x} {last:g}"
        axes.set_xlabel(x)
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
        return _svg(page, f"{unit(metric).label} against {x}. {'; '.join(titles.values())}", titles)


def dots(metric: str, rows: Sequence[tuple[str, int, list[float]]]) -> str:
    """SVG with a line for each row: a dot for each sample, and their mean ± std.

    rows: (name, number as in Series, a value for each sample).
    """
    from matplotlib.figure import Figure

    scale = unit(metric).scale
    with _style():
        page = Figure(figsize=(2 * WIDTH, 0.55 + 0.3 * len(rows)), layout="constrained")
        axes = page.subplots()
        titles = {}
        for y, (name, number, values) in enumerate(rows):
            scaled = [scale * value for value in values]
            mean, std = mean_std(scaled)
            look = {"color": COLOURS[number % len(COLOURS)], "gid": f"series-{number}"}
            if len(values) > 1:
                axes.plot([mean - std, mean + std], [y, y], alpha=0.35, linewidth=7, **look)
                axes.plot([mean, mean], [y - 0.28, y + 0.28], linewidth=2.4, **look)
            axes.plot(scaled, [y] * len(values), "o", markersize=4.5, **look)
            text = shown(metric, values)
            titles[number] = f"{name}: {text}, n = {len(values)}"
            place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
            axes.annotate(text, (1, y), (12, 0), va="center", annotation_clip=False, **place)
        axes.set_yticks(range(len(rows)), [_short(name) for name, *_ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.margins(x=0.04)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        axes.set_xlabel(unit(metric).label)
        description = f"{unit(metric).label} of each sample. {'; '.join(titles.values())}"
        return _svg(page, description, titles)


def _within(metric: str, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The edges of a band, kept to possible values: not below 0 if no value is, nor above 100 %."""
    low, high = points[:, 1] - points[:, 2], points[:, 1] + points[:, 2]
    if (points[:, 1] >= 0).all():
        low = np.maximum(low, 0)
    return low, np.minimum(high, 100) if "%" in unit(metric).label else high


def _style():
    import matplotlib

    return matplotlib.rc_context(_STYLE)


def _short(name: str) -> str:
    return name if len(name) <= 42 else name[:40] + "…"


def _svg(page: "Figure", description: str, titles: dict[int, str]) -> str:
    """What matplotlib draws, fit for a page.

    Fonts and colours become the page's, styles are dropped, and ids are made unlike those of other
    charts. titles: {number of a series: its tooltip}.
    """
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    page.savefig(file, format="svg", transparent=True, metadata=nothing)
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    text = file.getvalue()
    root = ElementTree.fromstring(text)
    prefix = "c" + blake2b((description + text).encode(), digest_size=5).hexdigest()
    needed = set(re.findall(r'(?:href="|url\()#([\w-]+)', text))
    for parent in list(root.iter()):
        for child in list(parent):
            # a style element would hold for the whole page
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    for node in root.iter():
        name = node.attrib.pop("id", "")
        if name in needed:
            node.set("id", f"{prefix}-{name}")
        elif series := re.fullmatch(r"series-(\d+)", name):
            node.set("class", "series")
            node.set("data-series", series[1])
            title = ElementTree.Element(f"{{{_SVG}}}title")
            title.text = titles[int(series[1])]
            node.insert(0, title)
        for key, value in node.attrib.items():
            if key == "style":
                value = re.sub(r"font-family: [^;]+;? ?", "", value)
                value = re.sub(r"#[0-9a-f]{6}", lambda colour: _variable(colour[0]), value)
            elif key.endswith("href"):
                value = value.replace("#", f"#{prefix}-")
            node.set(key, value.replace("url(#", f"url(#{prefix}-"))
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": description}
    return ElementTree.tostring(root, encoding="unicode")


def _variable(colour: str) -> str:
    return f"var({VARIABLES[colour]})" if colour in VARIABLES else colour
