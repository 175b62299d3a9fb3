"""report.html, one file that needs no other, from groups of runs and what their checkpoints say.

page.html is its template (Jinja); page.css and page.js are put into it.
"""

import base64
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import ssl_bench
from ssl_bench.report import charts, grouping, tables
from ssl_bench.report.figure import project
from ssl_bench.report.grouping import Board, Group
from ssl_bench.runs import units
from ssl_bench.runs.record import Ran
from ssl_bench.runs.units import mean_std

# Which values are healthy, and the papers that measure it so.
HEALTH = {
    "embedding_std": "1 where embeddings are spread evenly, 0 where they have collapsed "
    "(Chen & He, arXiv:2011.10566)",
    "effective_rank": "directions that the embeddings use: more is richer "
    "(Garrido et al., arXiv:2210.02885)",
    "lidar": "directions in which images differ more than views of one do: more is richer "
    "(Thilak et al., arXiv:2312.04000)",
    "alignment": "distance of two views of an image: smaller is closer "
    "(Wang & Isola, arXiv:2005.10242)",
    "uniformity": "crowding of different images: smaller is more even "
    "(Wang & Isola, arXiv:2005.10242)",
    "knn_top1": "of held-out training images, by their neighbours, while it learns",
    "probe_top1": "of held-out training images, by a linear classifier, while it learns",
}
# {digest: (a file, the names of the groups that left such a picture)}
Pictures = dict[str, tuple[Path, list[str]]]
LEARNT = {
    "attention": "what the class token attends to in the last block",
    "patches": "the first three principal components of patches as red, green and blue, "
    "alike where tokens are (Oquab et al., arXiv:2304.07193)",
    "reconstruction": "what is painted where patches are masked",
}
TECHNICAL = ("lr", "grad_norm", "images_per_second", "data_wait", "memory_gb")
QUERIES = 8  # images whose neighbours are shown
NEIGHBOURS = 8
MAP_IMAGES = 1000  # points of a map
THUMB = 40  # pixels of an image that a point stands for
CELLS = 20  # classes up to which a confusion matrix shows numbers; beyond, it is a picture
BLOCKS = 128  # pixels a side of that picture: one for each class, or for several
PAIRS = 12  # confusions listed beside a matrix


@dataclass
class Detail:
    """What the checkpoints of a group say of the N images of a split."""

    group: Group
    split: str = ""
    labels: np.ndarray | None = None  # (N,) int64, -1 where unlabelled
    classes: Sequence[str] = ()  # their names
    features: np.ndarray | None = None  # (N, D) float32, of the first run
    predictions: dict[Ran, np.ndarray] = field(default_factory=dict)  # (N,) int64 of each run
    image: Callable[[int], np.ndarray] | None = None  # place among the N -> uint8 (S, S, 3)
    images_id: str = ""  # equal for details of the same images
    notes: list[str] = field(default_factory=list)  # what is left out, and why

    def class_name(self, label: int) -> str:
        if label < 0:
            return "unlabelled"
        return self.classes[label] if label < len(self.classes) else str(label)


def render(
    heading: str,
    runs: Sequence[Ran],
    boards: Sequence[Board],
    details: Sequence[Detail],
    pictures: dict[str, Pictures],
    notes: Sequence[str],
) -> str:
    """The page.

    pictures: those of augmented views, "views", and of what was learnt (LEARNT). notes: sentences
    at its top.
    """
    import jinja2

    folder = Path(__file__).parent
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    ).get_template("page.html")
    names = dict.fromkeys(group.name for board in boards for group in board.groups)
    numbers = {name: i for i, name in enumerate(names)}
    predicting = [detail for detail in details if detail.predictions]
    with_features = [detail for detail in details if detail.features is not None]
    sheets: dict[str, str] = {}
    return template.render(
        title=heading,
        css=(folder / "page.css").read_text(encoding="utf-8"),
        js=(folder / "page.js").read_text(encoding="utf-8"),
        made=f"{time.strftime('%Y-%m-%d %H:%M')}, ssl_bench {ssl_bench.__version__}",
        notes=notes,
        num_runs=len(runs),
        num_finished=sum(ran.summary is not None for ran in runs),
        boards=[_board(board, numbers) for board in boards if board.has_results],
        curves=list(filter(None, (_curves(board, numbers) for board in boards))),
        remarks=[(detail.group.name, note) for detail in details for note in detail.notes],
        confusions=[_confusion(detail) for detail in predicting],
        classes=_classes(predicting),
        neighbours=[_neighbours(detail) for detail in with_features],
        maps=[_map(detail, sheets) for detail in with_features],
        sheets=sheets,
        thumb=THUMB,
        views=_shown(pictures.get("views", {})),
        learnt=[
            {**one, "what": what}
            for kind, what in LEARNT.items()
            for one in _shown(pictures.get(kind, {}))
        ],
        differences=[_differences(board) for board in boards if len(board.groups) > 1],
        runs=_runs(boards, runs),
        num_colours=len(charts.COLOURS),
    )


# -- tables and curves -----------------------------------------------------------------------------


def _board(board: Board, numbers: dict[str, int]) -> dict:
    rows = board.rows
    columns = tables.columns(rows)
    lines = []
    for group, row in zip(board.groups, rows, strict=True):
        cells = []
        for column in columns:
            values = row["values"].get(column, [])
            order = mean_std(values)[0] if values else row.get(column)
            cells.append({"text": tables.cell(row, column), "order": order})
        number = numbers[group.name]
        lines.append({"name": group.name, "number": number, "n": row["n"], "cells": cells})
    finite = {group.name: _finite(group.values(board.metric)) for group in board.groups}
    drawn = [(name, numbers[name], values) for name, values in finite.items() if values]
    best, chart, undrawn = "", None, 0
    if board.ranked:
        best = units.shown(board.metric, board.groups[0].values(board.metric))
        chart = charts.dots(board.metric, drawn[: charts.LIMIT]) if len(drawn) > 1 else None
        undrawn = max(0, len(drawn) - charts.LIMIT)
    return {
        "id": board.stage,
        "title": board.title,
        "metric": units.unit(board.metric).label,
        "unranked": not board.ranked and len(board.groups) > 1,
        "best": best,
        "columns": [tables.heading(column) for column in columns],
        "rows": lines,
        "chart": chart,
        "undrawn": undrawn,
    }


def _finite(values: list[float]) -> list[float]:
    return [value for value in values if np.isfinite(value)]


def _curves(board: Board, numbers: dict[str, int]) -> dict | None:
    """The panels of a stage: results, its metric first, health, and technical values."""
    groups = [group for group in board.groups if any(ran.lines for ran in group.runs)]
    drawn = groups[: charts.LIMIT]
    methods = {group.name: group.runs[0].name for group in drawn}
    keys = {key for group in drawn for ran in group.runs for line in ran.lines for key in line}
    keys -= {"step", "epoch", "images_seen"}
    order = [board.metric, *units.UNITS]

    def place(key: str) -> tuple[int, str]:
        return order.index(key) if key in order else len(order), key

    # beside results on val, those on the training images are technical
    has_val = any(key.startswith("val_") for key in keys)
    training = [key for key in ("loss", "accuracy") if key in keys and has_val]
    others = sorted(keys - {*HEALTH, *TECHNICAL, *training}, key=place)
    health = [key for key in HEALTH if key in keys]
    judged = [key for key in health if key.endswith("top1")]  # results rather than health
    kinds = {
        "results": [*judged, *others],
        "health": [key for key in health if key not in judged],
        "technical": [*training, *(key for key in TECHNICAL if key in keys)],
    }
    panels = {kind: [] for kind in kinds}
    for kind, key in ((kind, key) for kind, wanted in kinds.items() for key in wanted):
        series = [one for group in drawn if (one := _series(group, key, numbers)).curves]
        parts = {"": series}
        # a loss can't be compared between methods: a panel for each
        if key == "loss" and board.stage == "pretrain":
            names = dict.fromkeys(methods.values())
            parts = {name: [one for one in series if methods[one.name] == name] for name in names}
        for name, part in parts.items():
            label, note = units.unit(key).label, HEALTH.get(key, "")
            title = f"{label}: {name}" if len(parts) > 1 else label
            if part:
                svg = charts.lines(key, part)
                panels[kind].append({"title": title, "note": note, "svg": svg})
    if not any(panels.values()):
        return None
    return {
        "id": board.stage,
        "title": board.title,
        "legend": [{"name": g.name, "number": numbers[g.name], "n": len(g.samples)} for g in drawn],
        "undrawn": len(groups) - len(drawn),
        **panels,
    }


def _series(group: Group, key: str, numbers: dict[str, int]) -> charts.Series:
    curves = []
    for sample in group.samples:
        having = [points for ran in sample if len(points := _points(ran, key))]
        if having:
            curves.append(charts.band(having)[:, :2])
    return charts.Series(group.name, numbers[group.name], curves, _finite(group.values(key)))


def _points(ran: Ran, key: str) -> np.ndarray:
    """(points, 2): epoch and value of each line that has this metric, if finite."""
    pairs = [(line["epoch"], line[key]) for line in ran.lines if key in line]
    points = np.array(pairs, dtype=float).reshape(-1, 2)
    return points[np.isfinite(points).all(axis=1)]


def _differences(board: Board) -> dict:
    rows = grouping.differences([group.runs[0] for group in board.groups])
    names = [group.name for group in board.groups]
    return {"id": board.stage, "title": board.title, "names": names, "rows": rows}


def _runs(boards: Sequence[Board], runs: Sequence[Ran]) -> list[dict]:
    names = {ran: group.name for board in boards for group in board.groups for ran in group.runs}
    older = grouping.repeated(ran for ran in runs if not ran.holds_runs)
    names |= {ran: names[newest] for ran, newest in older.items()}
    lines = []
    for ran in runs:
        metric = ran.config.get("metric") or ""
        value, hours = ran.values.get(metric), ran.values.get("hours")
        result = ""
        if value is not None:
            result = f"{units.unit(metric).label} {units.shown(metric, [value])}"
        last = ran.lines[-1] if ran.lines else {}
        commit = (ran.environment.get("git_commit") or "")[:7]
        dirty = "+" if ran.environment.get("git_dirty") else ""
        lines.append(
            {
                "name": names.get(ran, ran.name),
                "stage": ran.stage,
                "seed": ran.seed,
                "state": ran.state.name,
                "note": " ".join(ran.state.note.split()),
                "epoch": f"{last.get('epoch', 0):g} of {ran.config['epochs']}" if last else "",
                "result": result,
                "order": value,
                "hours": "" if hours is None else units.shown("hours", [hours]),
                "device": ran.device,
                "started": (ran.environment.get("started") or "")[:16].replace("T", " "),
                "commit": commit + dirty,
                "directory": str(ran.directory),
            }
        )
    return lines


# -- what the checkpoints say ----------------------------------------------------------------------


def _confusion(detail: Detail) -> dict:
    present = np.unique(np.concatenate([detail.labels, *detail.predictions.values()]))
    size = len(present)
    counts = np.zeros((size, size))
    rows = np.searchsorted(present, detail.labels)
    for predicted in detail.predictions.values():
        np.add.at(counts, (rows, np.searchsorted(present, predicted)), 1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    names = [detail.class_name(label) for label in present]
    wrong = np.where(np.eye(size, dtype=bool), 0, counts)
    pairs = []
    for place in np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]:
        i, j = np.unravel_index(place, wrong.shape)
        if wrong[i, j]:
            pair = {"true": names[i], "predicted": names[j]}
            pairs.append(pair | {"share": shares[i, j], "count": int(counts[i, j])})
    return {
        "name": detail.group.name,
        "runs": len(detail.predictions),
        "images": len(detail.labels),
        "names": names,
        "shares": shares.tolist() if size <= CELLS else None,
        "picture": None if size <= CELLS else _encode(_shade(shares)),
        "pairs": pairs,
    }


def _shade(shares: np.ndarray) -> np.ndarray:
    """(C, C) of 0 ... 1 -> uint8 (B, B, 4), B at most BLOCKS: the largest of a block as opacity."""
    side = -(-len(shares) // BLOCKS)  # classes of a block
    padded = np.pad(shares, (0, -len(shares) % side))
    count = len(padded) // side
    blocks = padded.reshape(count, side, count, side).max(axis=(1, 3))
    shade = np.full((*blocks.shape, 4), (58, 123, 200, 0), dtype=np.uint8)
    # the square root, or the few wrong ones of each class would not be seen
    shade[..., 3] = (255 * np.sqrt(blocks)).round()
    return shade


def _classes(details: Sequence[Detail]) -> dict | None:
    """Accuracy on each class, a column for each group; groups of the first one's images alone."""
    if not details:
        return None
    same = [detail for detail in details if detail.images_id == details[0].images_id]
    labels, rows = same[0].labels, []
    for label in np.unique(labels):
        mine = labels == label
        cells = []
        for detail in same:
            items = detail.predictions.items()
            right = {ran: 100 * float((said[mine] == label).mean()) for ran, said in items}
            values = detail.group.by_sample(right)
            cells.append({"text": units.shown("val_top1", values), "mean": mean_std(values)[0]})
        row = {"name": same[0].class_name(label), "order": int(label), "count": int(mine.sum())}
        rows.append(row | {"cells": cells})
    return {"names": [detail.group.name for detail in same], "rows": rows}


def _neighbours(detail: Detail) -> dict:
    """The nearest images, by cosine, to QUERIES images: the first ones of classes, or others."""
    first = np.unique(detail.labels, return_index=True)[1]  # the first image of each class
    if len(first) < QUERIES:
        rest = np.setdiff1d(np.arange(len(detail.labels)), first)
        first = np.sort(np.concatenate([first, rest[: QUERIES - len(first)]]))
    queries = first[np.linspace(0, len(first) - 1, min(QUERIES, len(first))).round().astype(int)]
    lengths = np.linalg.norm(detail.features, axis=1, keepdims=True)
    features = detail.features / np.maximum(lengths, 1e-12)
    rows = []
    for query in queries:
        near = features @ features[query]
        near[query] = -np.inf  # not the image itself
        found = np.argsort(-near, kind="stable")[: min(NEIGHBOURS, len(near) - 1)]
        rows.append([_tile(detail, query), *(_tile(detail, i, query, near[i]) for i in found)])
    named = {"name": detail.group.name, "split": detail.split}
    return named | {"rows": rows, "labelled": bool((detail.labels >= 0).all())}


def _tile(detail: Detail, place: int, query: int | None = None, cosine: float = 1.0) -> dict:
    """An image among the neighbours of `query`; None: it is the query."""
    label = int(detail.labels[place])
    title = f"class {detail.class_name(label)}" if label >= 0 else f"image {place}"
    if query is None:
        kind = "query"
    else:
        title = f"{title}, cosine {cosine:.2f}"
        kind = "same" if label == detail.labels[query] else "other"
        kind = kind if label >= 0 else ""
    return {"src": _encode(detail.image(place)), "kind": kind, "title": title}


def _map(detail: Detail, sheets: dict[str, str]) -> dict:
    """A map of the features: points in 0 ... 100, coloured by class.

    sheets: {images_id: a picture of all images on a map}, which maps of the same images share.
    """
    rng = np.random.default_rng(0)
    count = min(MAP_IMAGES, len(detail.labels))
    chosen = np.sort(rng.choice(len(detail.labels), count, replace=False))
    kind, points = project(detail.features[chosen])
    points = (points - points.min(axis=0)) / np.maximum(np.ptp(points, axis=0), 1e-12)
    if detail.images_id not in sheets:
        sheets[detail.images_id] = _sheet([detail.image(place) for place in chosen])
    present = np.unique(detail.labels[chosen])
    classes = []
    for i, label in enumerate(present):
        mine = np.flatnonzero(detail.labels[chosen] == label)
        hue = f"{360 * i / len(present) + 20:.0f}"
        shades = (f"oklch({light} 0.14 {hue})" for light in ((0.52, 0.78), (0.66, 0.64))[i % 2])
        classes.append(
            {
                "name": detail.class_name(label),
                "colour": f"light-dark({', '.join(shades)})",
                "points": [(*(100 * points[place]).tolist(), int(place)) for place in mine],
            }
        )
    return {
        "name": detail.group.name,
        "kind": kind,
        "count": count,
        "sheet": list(sheets).index(detail.images_id),
        "columns": _columns(count),
        "classes": classes,
        "legend": len(classes) <= CELLS,
    }


def _columns(count: int) -> int:
    return int(np.ceil(np.sqrt(count)))


def _sheet(images: Sequence[np.ndarray]) -> str:
    """All images, small, in one picture, row by row."""
    from PIL import Image

    columns = _columns(len(images))
    sheet = Image.new("RGB", (columns * THUMB, -(-len(images) // columns) * THUMB))
    for i, image in enumerate(images):
        corner = (i % columns * THUMB, i // columns * THUMB)
        sheet.paste(Image.fromarray(image).resize((THUMB, THUMB)), corner)
    return _data(sheet, quality=70)


# -- pictures --------------------------------------------------------------------------------------


def _shown(pictures: Pictures) -> list[dict]:
    return [{"names": names, "src": _embed(path)} for path, names in pictures.values()]


def _encode(image: np.ndarray) -> str:
    """uint8 (S, S, 3 or 4) -> data URI, lossless if it is small or has transparency."""
    from PIL import Image

    lossless = len(image) <= 32 or image.shape[-1] == 4
    options = {"lossless": True} if lossless else {"quality": 85}
    return _data(Image.fromarray(image), **options)


def _embed(path: Path) -> str:
    from PIL import Image

    with Image.open(path) as image:
        return _data(image, quality=90)


def _data(image: Any, **options: Any) -> str:
    file = io.BytesIO()
    image.save(file, "WEBP", **options)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
