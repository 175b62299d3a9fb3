"""Results of a pipeline for people: a Markdown table and one PNG, from numbers and arrays."""

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

from ssl_bench.report.tables import markdown
from ssl_bench.runs.units import mean_std

# Figures are drawn without a window. In a terminal of a notebook this variable names the notebook's
# backend, with which `import matplotlib` fails.
os.environ["MPLBACKEND"] = "agg"

GREY, INK = "#b4bac2", "#30353b"
LINES = ("#2563a8", "#d9772b", "#7d8894", "#3b9455", "#8a5fb0", "#c2454f")
TSNE_LIMIT = 2000  # images: about 6 s; its time grows faster than their number
STYLE = {
    "font.size": 11,
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": "#e6e8eb",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "text.parse_math": False,  # a name may hold a $
}


def table(rows: dict[str, list[float]], metric: str, percent: bool = True) -> str:
    """Markdown that also lines up in a terminal: name | mean ± std (n), largest mean first.

    rows: a value for each seed or draw. percent: are they percentages, shown with one decimal
    instead of three?
    """
    header = ["", f"{metric} (%)" if percent else metric]
    cells = [[name, _format(values, percent)] for name, values in _best_first(rows)]
    return markdown(header, cells, right=1)


def overview(path: str | Path, *args: Any, **kwargs: Any) -> None:
    """Write `figure(...)`, with these arguments, as a PNG of 1600 x 1000 pixels."""
    figure(*args, **kwargs).savefig(path, format="png")


def figure(
    title: str,
    curves: dict[str, list[dict[str, float]]],
    views: "torch.Tensor | None",
    features: np.ndarray,
    labels: np.ndarray,
    rows: dict[str, list[float]],
) -> "Figure":
    """Curves, accuracies, augmented views and a map of the features on one page.

    curves: {name: lines of metrics.jsonl}. Lines with `val_top1` (percent) are those of a
    classification; it is drawn against `epoch`, in the colour of its row. Others are those of a
    pretraining: `loss` is drawn and, if it is there, `accuracy` (fraction of positives picked).
    views: uint8 (1 + V, N, 3, S, S), the N images, then their V views; None leaves the panel out.
    features: (M, D), labels: (M,) classes. rows: {name: percentages, one for each draw}.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        page = Figure(figsize=(16, 10), dpi=100, layout="constrained")
        page.get_layout_engine().set(w_pad=0.12, h_pad=0.12, wspace=0.04, hspace=0.05)
        page.suptitle(title, fontsize=17, fontweight="bold")
        names = [name for name, _ in _best_first(rows)]
        colours = dict(zip(names, _cycle(LINES, len(rows)), strict=True))
        panels = _split(curves)
        grid = page.add_gridspec(2, 1, height_ratios=(1, 1.15))
        top = grid[0].subgridspec(1, len(panels) + 1, width_ratios=(*(1 for _ in panels), 2))
        bottom = grid[1].subgridspec(1, 1 if views is None else 2)
        for i, (title, label, lines) in enumerate(panels):
            _curves(page.add_subplot(top[i]), title, label, lines, colours)
        _accuracies(page.add_subplot(top[-1]), rows, colours)
        if views is not None:
            _views(page.add_subplot(bottom[0]), views)
        _features(page.add_subplot(bottom[-1]), features, labels)
    return page


def _split(
    curves: dict[str, list[dict[str, float]]],
) -> list[tuple[str, str, dict[str, np.ndarray]]]:
    """(title, y label, {name: (points, 2)}) of each panel that has something to show."""
    probes = {name for name, rows in curves.items() if any("val_top1" in row for row in rows)}
    panels = []
    for title, label, key, scale, names in (
        ("Pretraining", "loss", "loss", 1, curves.keys() - probes),
        ("Positive picked", "accuracy (%)", "accuracy", 100, curves.keys() - probes),
        ("Classification", "top-1 (%)", "val_top1", 1, probes),
    ):
        lines = {}
        for name, rows in curves.items():
            if name in names:
                known = (row for row in rows if {key, "epoch"} <= row.keys())
                points = [(row["epoch"], scale * row[key]) for row in known]
                lines[name] = np.array(points).reshape(-1, 2)
        if any(map(len, lines.values())):
            panels.append((title, label, lines))
    return panels


def _curves(
    axes: "Axes", title: str, label: str, lines: dict[str, np.ndarray], colours: dict[str, str]
) -> None:
    for (name, points), other in zip(lines.items(), _cycle(LINES, len(lines)), strict=True):
        _line(axes, points, name, colours.get(name, other))
    axes.set(title=title, xlabel="epoch", ylabel=label)
    axes.grid(axis="y")
    if "%" in label:
        axes.set_ylim(0, 102)
    if len(lines) > 1:
        axes.legend(fontsize=9.5)


def _line(axes: "Axes", points: np.ndarray, name: str, colour: str) -> None:
    """Draw a curve; one of many points is drawn pale, under its running mean."""
    window = max(1, len(points) // 30)
    if window > 1:
        axes.plot(points[:, 0], points[:, 1], color=colour, alpha=0.25, linewidth=1)
        centre = np.lib.stride_tricks.sliding_window_view(points, window, axis=0)
        points = centre.mean(axis=-1)
    marker = "o" if len(points) == 1 else None
    axes.plot(points[:, 0], points[:, 1], color=colour, linewidth=2, label=name, marker=marker)


def _accuracies(axes: "Axes", rows: dict[str, list[float]], colours: dict[str, str]) -> None:
    ranked = _best_first(rows)
    draws = max(len(values) for _, values in ranked)
    for y, (name, values) in enumerate(ranked):
        mean, std = mean_std(values)
        axes.barh(y, mean, height=0.55, color=colours[name])
        axes.errorbar(mean, y, xerr=std, color=INK, capsize=5, linewidth=1.5)
        # at different heights, or equal draws would hide one another
        heights = np.linspace(y - 0.15, y + 0.15, len(values) + 2)[1:-1]
        axes.plot(values, heights, "o", color="white", markeredgecolor=INK, markersize=6)
        right = max(mean + (0 if math.isnan(std) else std), *values)
        at, colour = (0, "white") if mean > 40 else (right, INK)  # in the bar, if that has room
        place = {"xytext": (10, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(_format(values), (at, y), color=colour, fontweight="bold", **place)
    axes.set_yticks(range(len(ranked)), [name for name, _ in ranked])
    axes.set_ylim(len(ranked) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    axes.set_xticks(range(0, 101, 20))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    spread = f": mean ± std, dots: {draws} draws" if draws > 1 else ""
    axes.set(xlabel=f"top-1 (%){spread}", title="Linear on frozen features")


def _views(axes: "Axes", views: "torch.Tensor") -> None:
    num_views, num_images, _, size, _ = views.shape

    def misfit(blocks: int) -> float:
        """How far a sheet of this many blocks, one above the other, is from 3 : 2."""
        width, height = math.ceil(num_images / blocks), blocks * num_views
        return abs(math.log(width / (height * 1.5)))

    blocks = min(range(1, num_images + 1), key=misfit)
    # as many as fill the panel, rather than all of them small
    columns = min(math.ceil(num_images / blocks), math.ceil(1.5 * blocks * num_views))
    num_images = min(num_images, blocks * columns)
    pitch = size + max(1, size // 16)
    tops = [row * pitch + (row // num_views) * size // 4 for row in range(blocks * num_views)]
    sheet = np.full((tops[-1] + size, columns * pitch, 3), 255, dtype=np.uint8)
    for v in range(num_views):
        for n in range(num_images):
            top, left = tops[n // columns * num_views + v], n % columns * pitch
            sheet[top : top + size, left : left + size] = views[v, n].permute(1, 2, 0).cpu().numpy()
    axes.imshow(sheet, interpolation="nearest")
    axes.set_anchor("NW")
    names = ["image", *(f"view {v}" for v in range(1, num_views))]
    axes.set_yticks([top + size / 2 for top in tops], names * blocks)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("Images and the views the network is shown")


def _features(axes: "Axes", features: np.ndarray, labels: np.ndarray) -> None:
    import matplotlib

    name, points = project(features)
    classes = np.unique(labels)
    palette = matplotlib.colormaps["tab10" if len(classes) <= 10 else "tab20"].colors
    for label, colour in zip(classes, _cycle(palette, len(classes)), strict=True):
        x, y = points[labels == label].T
        axes.scatter(x, y, s=14, color=[colour], alpha=0.8, linewidths=0, label=str(label))
    axes.set(xticks=[], yticks=[], xlabel=f"{name} 1", ylabel=f"{name} 2")
    axes.set_title(f"Features of {len(features):,} images, coloured by class")
    if len(classes) <= 20:  # more would repeat colours
        place = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
        axes.legend(title="class", markerscale=2, ncols=1 + (len(classes) > 12), **place)


def project(features: np.ndarray) -> tuple[str, np.ndarray]:
    """(M, D) -> the name of the map and (M, 2): t-SNE up to TSNE_LIMIT rows, PCA beyond.

    The same features give the same map.
    """
    if len(features) > TSNE_LIMIT:
        from sklearn.decomposition import PCA

        return "PCA", PCA(2, random_state=0).fit_transform(features)
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    perplexity = min(30, (len(features) - 1) / 3)  # sklearn wants fewer neighbours than rows
    tsne = TSNE(2, perplexity=perplexity, init="pca", random_state=0)
    # its threads spin while they wait: on a shared machine, seconds become half a minute
    with threadpool_limits(1):
        return "t-SNE", tsne.fit_transform(features)


def _best_first(rows: dict[str, list[float]]) -> list[tuple[str, list[float]]]:
    return sorted(rows.items(), key=lambda row: -mean_std(row[1])[0])


def _format(values: list[float], percent: bool = True) -> str:
    digits = 1 if percent else 3
    mean, std = mean_std(values)
    spread = "" if math.isnan(std) else f" ± {std:.{digits}f}"
    return f"{mean:.{digits}f}{spread} ({len(values)})"


def _cycle(colours: tuple, count: int) -> list:
    return [colours[i % len(colours)] for i in range(count)]
