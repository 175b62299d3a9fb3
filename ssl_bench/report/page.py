"""report.html, one file that needs no other, from groups of runs and what their checkpoints say.

page.html is its template (Jinja); page.css, page.js and page.sweep.js are put into it, and uPlot,
which draws the curves: https://github.com/leeoniya/uPlot, MIT, 50 kB. `Page` is what a page says;
`board` serves it while runs go on.
"""

import base64
import io
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import ssl_bench
from ssl_bench.report import curves, grouping, sensitivity, tables
from ssl_bench.report.figure import project
from ssl_bench.report.grouping import Board, Group
from ssl_bench.runs import units
from ssl_bench.runs.record import Ran
from ssl_bench.runs.units import mean_std

# {digest: (a file, the names of the groups that left such a picture)}
Pictures = dict[str, tuple[Path, list[str]]]
LEARNT = {
    "attention": "what the class token attends to in the last block",
    "patches": "the first three principal components of the patch tokens, as red, green and blue: "
    "similar patches have similar colours (Oquab et al., arXiv:2304.07193)",
    "reconstruction": "how masked patches are reconstructed",
}
WHILE_IT_LEARNS = ("knn_top1", "probe_top1")  # results of a pretraining, before all others
TECHNICAL: tuple[str, ...] = ("lr", "grad_norm", "images_per_second", "mfu", "data_wait")
TECHNICAL += ("memory_gb", "k", "temperature")  # the last two as the exam of `knn` chose them
QUERIES = 8  # images whose neighbours are shown
NEIGHBOURS = 8
MAP_IMAGES = 1000  # points of a map
THUMB = 40  # pixels of an image that a point stands for
CELLS = 20  # classes up to which a confusion matrix shows numbers; beyond, it is a picture
BLOCKS = 128  # pixels a side of that picture: one for each class, or for several
PAIRS = 12  # confusions listed beside a matrix
WRONG = 24  # wrongly classified images shown of a group
SIDE = 96  # pixels a side to which small pictures are enlarged, and larger ones made smaller


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
    confidences: dict[Ran, np.ndarray] = field(default_factory=dict)  # (N,) float32: of predictions
    # of each run: float64 (3, bins) of images, their summed confidence, how many are right; the
    # expected calibration error in percent
    calibration: dict[Ran, tuple[np.ndarray, float]] = field(default_factory=dict)

    def class_name(self, label: int) -> str:
        if label < 0:
            return "unlabelled"
        return self.classes[label] if label < len(self.classes) else str(label)


# The sections that change while runs go on.
LIVE = ("summary", "notes", "leaderboard", "differences", "runs")


def render(
    heading: str,
    runs: Sequence[Ran],
    boards: Sequence[Board],
    details: Sequence[Detail],
    pictures: dict[str, Pictures],
    notes: Sequence[str],
) -> str:
    """The page as one file.

    pictures: those of augmented views, "views", and of what was learnt (LEARNT). notes: sentences
    at its top.
    """
    predicting = [detail for detail in details if detail.predictions]
    with_features = [detail for detail in details if detail.features is not None]
    sheets: dict[str, str] = {}
    of_networks = {
        "remarks": [(detail.group.name, note) for detail in details for note in detail.notes],
        "confusions": [_confusion(detail) for detail in predicting],
        "classes": _classes(predicting),
        "wrong": [one for detail in predicting if (one := _wrong(detail))],
        "calibrations": [_calibration(detail) for detail in details if detail.calibration],
        "neighbours": [_neighbours(detail) for detail in with_features],
        "maps": [_map(detail, sheets) for detail in with_features],
        "sheets": sheets,
        "views": _shown(pictures.get("views", {})),
        "learnt": [
            {**one, "what": what}
            for kind, what in LEARNT.items()
            for one in _shown(pictures.get(kind, {}))
        ],
    }
    return Page(heading, runs, boards, notes).html(charts(boards), **of_networks)


@dataclass
class Page:
    """What a page says of runs, without their networks."""

    heading: str
    runs: Sequence[Ran]
    boards: Sequence[Board]
    notes: Sequence[str]
    live: bool = False  # is it served, and asks for what is new?

    def html(self, data: dict, **of_networks: Any) -> str:
        """The page. data: `charts`. of_networks: what `render` says of them."""
        nothing = dict.fromkeys(
            (
                *("remarks", "confusions", "wrong", "calibrations", "neighbours", "maps"),
                *("views", "learnt"),
            ),
            (),
        )
        values = {**nothing, "classes": None, "sheets": {}, **of_networks}
        values["sweeps"] = any(board["sweep"] for board in data["boards"])
        return _template().render(self._values() | values | {"data": script(data)})

    def sections(self) -> dict[str, str]:
        """{id: HTML} of those sections that change while runs go on."""
        template, values = _template(), self._values()
        context = template.new_context({**values, "remarks": ()})
        return {name: "".join(template.blocks[name](context)) for name in LIVE}

    def _values(self) -> dict[str, Any]:
        folder = Path(__file__).parent
        names = ("page.css", "page.js", "page.sweep.js", "uplot.css", "uplot.js")
        return {
            "title": self.heading,
            "files": {name: (folder / name).read_text(encoding="utf-8") for name in names},
            "made": f"{time.strftime('%Y-%m-%d %H:%M')}, ssl_bench {ssl_bench.__version__}",
            "live": self.live,
            "notes": self.notes,
            "num_runs": len(self.runs),
            "num_finished": sum(ran.summary is not None for ran in self.runs),
            "boards": (shown := [_board(board) for board in self.boards if board.has_results]),
            "about": _about(shown),
            "curves": any(ran.lines for ran in self.runs),
            "differences": [_differences(board) for board in self.boards if len(board.groups) > 1],
            "thumb": THUMB,
            "runs": (rows := _runs(self.boards, self.runs)),
            "runs_least": all(row["least"] for row in rows["rows"]),
        }


@cache
def _template() -> Any:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    ).get_template("page.html")


def script(data: Any) -> str:
    """JSON that may stand in a script element: names come from elsewhere."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


# -- tables and curves -----------------------------------------------------------------------------


def _board(board: Board) -> dict:
    order = tables.columns(board.rows)
    best = ""
    if board.ranked:
        best = units.shown(board.metric, board.groups[0].values(board.metric))
    return {
        "id": board.stage,
        "title": board.title,
        "metric": units.unit(board.metric).label,
        "unranked": not board.ranked and len(board.groups) > 1,
        "best": best,
        "columns": [
            {"key": key, "label": tables.heading(key), "least": _least_first(key)} for key in order
        ],
        "rows": _lines(board, order),
        "by": [{"key": one.key, "rows": _lines(one.board, order)} for one in board.pooled],
    }


def _about(boards: Sequence[dict]) -> dict[str, tuple[str, str]]:
    """{column: its label, what it is} of those columns of leaderboards that have an explanation."""
    columns = {one["key"]: one["label"] for board in boards for one in board["columns"]}
    told = {key: (label, tables.about(key)) for key, label in columns.items()}
    return {key: one for key, one in told.items() if one[1]}


def _lines(board: Board, columns: Sequence[str]) -> list[dict]:
    """The rows of a leaderboard."""
    lines = []
    for group, row in zip(board.groups, board.rows, strict=True):
        cells = []
        for column in columns:
            values = row["values"].get(column, [])
            order = mean_std(values)[0] if values else row.get(column)
            cells.append({"text": tables.cell(row, column), "order": order})
        lines.append({"name": group.name, "n": row["n"], "cells": cells})
    return lines


def _least_first(column: str) -> bool:
    """Is the least the best of this column? A first click puts the best on top."""
    own = column.removeprefix(units.PRETRAINING)
    return units.smaller_is_better(own) or own in ("hours", "memory_gb", "data_wait")


def charts(boards: Sequence[Board], known: dict[tuple, dict] | None = None) -> dict:
    """What page.js draws: the panels of each stage, the curves of each group, and of those that
    are pooled by a key; `sweep`: what its settings have to do with its results.

    known: keeps curves for the next call, since most runs are the same then.
    """
    known = {} if known is None else known
    before = dict(known)
    known.clear()
    count, logged = 0, [_logged(board) for board in boards]
    for board, keys in zip(boards, logged, strict=True):
        pooled = sum(len(one.board.groups) for one in board.pooled)
        count += (len(board.groups) + pooled) * len(keys)
    points = curves.points_for(count)

    def drawn(board: Board, group: Group, words: Iterable[str]) -> dict:
        key = (points, *((ran, ran.source) for ran in group.runs))
        known[key] = before[key] if key in before else curves.of_group(group, points)
        unit = units.unit(board.metric)
        values = [unit.scale * value for value in group.values(board.metric)]
        return {
            "name": group.name,
            "n": len(group.samples),
            "words": " ".join(words),
            "values": [value for value in values if np.isfinite(value)],
            "shown": units.shown(board.metric, group.values(board.metric)),
            "curves": known[key],
        }

    found = []
    for board, keys in zip(boards, logged, strict=True):
        words: dict[Group, dict[str, None]] = {}
        for place, group in enumerate(board.groups):
            settings = [f"{key}={values[place]}" for key, values in board.differing.items()]
            states = [ran.state.name for ran in group.runs]
            words[group] = dict.fromkeys([group.stage, *states, *settings])
        by = []
        for one in board.pooled:
            groups = []
            for group, members in zip(one.board.groups, one.members, strict=True):
                # what all of them are: a filter mustn't show one for a part of its runs
                common = [
                    word for word in words[members[0]] if all(word in words[m] for m in members)
                ]
                names = [member.name for member in members]
                groups.append(drawn(board, group, common) | {"members": names})
            by.append({"key": one.key, "also": one.also, "groups": groups})
        found.append(
            {
                "id": board.stage,
                "title": board.title,
                "metric": units.unit(board.metric).label if board.ranked else "",
                "panels": _panels(board, keys),
                "groups": [drawn(board, group, words[group]) for group in board.groups],
                "by": by,
                "sweep": sensitivity.of_board(board),
            }
        )
    return {"boards": found}


def every_group(board: dict) -> Iterator[tuple[tuple[str, str, str], dict]]:
    """(what names it, the group) of all groups of a board of `charts`, the pooled ones too."""
    for key, groups in [
        ("", board["groups"]),
        *((one["key"], one["groups"]) for one in board["by"]),
    ]:
        for group in groups:
            yield (board["id"], key, group["name"]), group


def _logged(board: Board) -> set[str]:
    """What the runs of a stage log."""
    lines = (line for group in board.groups for ran in group.runs for line in ran.lines)
    return {key for line in lines for key in line} - set(curves.BESIDE)


def _panels(board: Board, keys: set[str]) -> list[dict]:
    """The charts of a stage: results, its metric first, health, and technical values.

    keys: what its runs log.
    """
    order = [board.metric, *units.UNITS]

    def place(key: str) -> tuple[int, str]:
        return order.index(key) if key in order else len(order), key

    # beside results on val, those on the training images are technical
    has_val = any(key.startswith("val_") for key in keys)
    training = [key for key in ("loss", "accuracy") if key in keys and has_val]
    own = (*WHILE_IT_LEARNS, *units.DIAGNOSTICS)  # these say what they are
    others = sorted(keys - {*own, *TECHNICAL, *training}, key=place)
    kinds = {
        "results": [*(key for key in WHILE_IT_LEARNS if key in keys), *others],
        "health": [key for key in units.DIAGNOSTICS if key in keys],
        "technical": [*training, *(key for key in TECHNICAL if key in keys)],
    }
    panels = []
    for kind, key in ((kind, key) for kind, wanted in kinds.items() for key in wanted):
        label, note = units.unit(key).label, units.about(key) if key in own else ""
        panel = {"kind": kind, "key": key, "label": label, "title": label, "note": note}
        names: dict[str, list[str]] = {}
        # a loss can't be compared between methods: a panel for each
        if key == "loss" and board.stage == "pretrain":
            for group in board.groups:
                names.setdefault(group.runs[0].name, []).append(group.name)
        if len(names) < 2:
            panels.append(panel)
        for name, mine in names.items() if len(names) > 1 else ():
            panels.append(panel | {"title": f"{label}: {name}", "only": mine})
    return panels


def _differences(board: Board) -> dict:
    names = [group.name for group in board.groups]
    return {"id": board.stage, "title": board.title, "names": names, "rows": board.differing}


def _runs(boards: Sequence[Board], runs: Sequence[Ran]) -> dict:
    """The rows of the table of runs, and the folder that their places are relative to."""
    names = {ran: group.name for board in boards for group in board.groups for ran in group.runs}
    older = grouping.repeated(ran for ran in runs if not ran.holds_runs)
    names |= {ran: names[newest] for ran, newest in older.items()}
    lines = []
    top = _common([ran.directory for ran in runs])
    for ran in runs:
        metric = ran.config.get("metric") or ""
        last = ran.lines[-1] if ran.lines else {}
        values = ran.values if ran.summary is not None else last
        metric = metric if metric in values else "loss"
        value, hours = values.get(metric), ran.values.get("hours")
        result = ""
        if value is not None:
            result = f"{units.unit(metric).label} {units.shown(metric, [value])}"
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
                "order": value if value is None or np.isfinite(value) else None,
                "least": units.smaller_is_better(metric),
                "hours": "" if hours is None else units.shown("hours", [hours]),
                "device": ran.device,
                "started": (ran.environment.get("started") or "")[:16].replace("T", " "),
                "commit": commit + dirty,
                "directory": str(ran.directory),
                "place": str(ran.directory.relative_to(top) if top.parts else ran.directory),
            }
        )
    return {"top": str(top) if top.parts else "", "rows": lines}


def _common(directories: Sequence[Path]) -> Path:
    """The folder that all lie in; "." where there is none, or it is the current one."""
    known = [*map(str, {directory.parent for directory in directories})]
    try:
        return Path(os.path.commonpath(known))
    except ValueError:  # none, or some are absolute
        return Path()


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


def _wrong(detail: Detail) -> dict | None:
    """The images that most runs get wrong, those with the surest answers first; None: no image."""
    runs = [ran for ran in detail.predictions if ran in detail.confidences]
    if detail.image is None or not runs:
        return None
    said = np.stack([detail.predictions[ran] for ran in runs])  # (runs, N)
    sure = np.stack([detail.confidences[ran] for ran in runs])
    wrong = (said != detail.labels) & (detail.labels >= 0)
    times = wrong.sum(axis=0)
    doubt = np.where(wrong, sure, 0).sum(axis=0) / np.maximum(times, 1)
    found = np.lexsort((-doubt, -times))
    tiles = []
    for place in found[times[found] > 0][:WRONG]:
        answers = said[wrong[:, place], place]
        names, counts = np.unique(answers, return_counts=True)
        image = _at_most(detail.image(int(place)), SIDE)
        tiles.append(
            {
                "src": _encode(image),
                "width": image.shape[1] * max(1, SIDE // max(image.shape[:2])),
                "true": detail.class_name(int(detail.labels[place])),
                "predicted": detail.class_name(int(names[counts.argmax()])),
                "sure": f"{100 * doubt[place]:.0f}",
                "times": int(times[place]),
            }
        )
    if not tiles:
        return None
    count = int((times > 0).sum())
    return {"name": detail.group.name, "runs": len(runs), "count": count, "tiles": tiles}


def _at_most(image: np.ndarray, side: int) -> np.ndarray:
    """uint8 (h, w, 3), made smaller if a side has more pixels than that."""
    if max(image.shape[:2]) <= side:
        return image
    from PIL import Image

    small = Image.fromarray(image)
    small.thumbnail((side, side))
    return np.asarray(small)


def _calibration(detail: Detail) -> dict:
    """Reliability of all runs of a group together, and the mean of their errors."""
    bins = sum(bins for bins, _ in detail.calibration.values())
    errors = {ran: error for ran, (_, error) in detail.calibration.items()}
    votes = ", votes of neighbours" if detail.group.stage == "knn" else ""
    return {
        "name": f"{detail.group.name}{votes}",
        "runs": len(errors),
        "error": units.shown("val_ece", detail.group.by_sample(errors)),
        "accuracy": 100 * bins[2].sum() / bins[0].sum(),
        "confidence": 100 * bins[1].sum() / bins[0].sum(),
        "bins": [[float(f"{x:.5g}") for x in one] for one in bins],
    }


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
    name = detail.class_name(label) if label >= 0 else ""
    title = f"class {name}" if name else f"image {place}"
    if query is None:
        kind = "query"
    else:
        title = f"{title}, cosine {cosine:.2f}"
        kind = "same" if label == detail.labels[query] else "other"
        kind = kind if label >= 0 else ""
    src = _encode(detail.image(place))
    return {"src": src, "kind": kind, "title": title, "class": name}


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
