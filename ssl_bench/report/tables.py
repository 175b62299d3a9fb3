"""Rows of results as Markdown, and the files that keep them.

A results file (`save`, `load`) keeps rows of `grouping`, so that a table can be made again when the
runs are gone (`fill`):

    {"rows": [{"stage": "lincls", "name": "moco_v2",
               "values": {"val_top1": [46.9, 46.8], "hours": [...]}}]}

"values" has a value for each seed. A row may also have "metric", by which it is judged; "n" and
"members", how many seeds are finished and how many there should be; "pretrainings", how many its
runs evaluate; and "runs", which identifies these (`record.evidence`). Other keys of the file are
remarks.
"""

import json
import re
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssl_bench import files
from ssl_bench.errors import UserError, unknown
from ssl_bench.runs import units
from ssl_bench.runs.units import PRETRAINING, UNITS, is_result, shown, unit

OWN_COSTS = ("hours", "images_per_second", "mfu", "memory_gb")
COSTS = (*OWN_COSTS, f"{PRETRAINING}hours", f"{PRETRAINING}images_per_second")


BESIDE = {
    "n": "how many finished runs a row has that differ only in their seeds or, where several "
    "pretrainings are evaluated, how many pretrainings.",
    "pretrainings": "how many pretrainings the runs of a row evaluate.",
}


def width() -> int:
    """The columns of the terminal; elsewhere COLUMNS, or 120."""
    return max(60, shutil.get_terminal_size((120, 0)).columns)


def wrapped(text: str, indent: str = "") -> str:
    """The text in lines of the terminal; a path isn't broken."""
    return textwrap.fill(
        plain(text),
        width(),
        initial_indent=indent,
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def columns(rows: Sequence[dict]) -> list[str]:
    """The columns of a table by default: the metrics that judge, `n`, other results, costs, and
    last what is no result: diagnostics, and what only a method knows.
    """
    metrics = (metric for row in rows for metric in row["values"] if row["values"][metric])
    known = list(dict.fromkeys(metrics))
    # beside results on val, those on the training images are of no interest
    if any(metric.startswith("val_") for metric in known):
        known = [metric for metric in known if metric not in ("loss", "accuracy")]
    order = list(UNITS)
    known.sort(key=lambda metric: order.index(metric) if metric in order else len(order))
    judges = list(dict.fromkeys(row["metric"] for row in rows if row.get("metric") in known))
    own = [metric for metric in known if not metric.startswith(PRETRAINING)]
    others = [metric for metric in own if metric not in (*judges, *COSTS)]
    results = [metric for metric in others if is_result(metric)]
    rest = [metric for metric in others if not is_result(metric)]
    several = ["pretrainings"] if any(row.get("pretrainings") for row in rows) else []
    costs = [metric for metric in COSTS if metric in known]
    return [*judges, "n", *several, *results, *costs, *rest]


def cell(row: dict, column: str) -> str:
    if column == "n":
        done = row.get("n", max(map(len, row["values"].values()), default=0))
        return f"{done}" if done == row.get("members", done) else f"{done} of {row['members']}"
    if column == "pretrainings":
        return str(row.get("pretrainings") or "")
    return shown(column, row["values"].get(column, []))


def heading(column: str) -> str:
    return column if column in BESIDE else unit(column).label


def about(column: str) -> str:
    """What a column holds; "" where that isn't known."""
    return BESIDE.get(column) or units.about(column)


def table(rows: Sequence[dict], wanted: Sequence[str]) -> str:
    """Markdown with the name of each row and these columns, mean ± std over its n seeds."""
    return markdown(*cells(rows, wanted), right=len(wanted))


def cells(rows: Sequence[dict], wanted: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """The heads and the rows of `table`."""
    lines = [[row["name"], *(cell(row, column) for column in wanted)] for row in rows]
    return ["", *map(heading, wanted)], lines


def save(path: Path, rows: Sequence[dict], **remarks: Any) -> None:
    files.write(path, json.dumps({**remarks, "rows": rows}, indent=1) + "\n")


def remarks(path: Path) -> dict[str, Any]:
    """The content of a results file without its rows."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return {key: value for key, value in content.items() if key != "rows"}


def load(path: Path) -> list[dict]:
    """The rows of a results file. UserError for any other file."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        assert all(isinstance(row["name"], str) and isinstance(row["values"], dict) for row in rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError):
        raise UserError(
            f"{path}: not a results file; `ssl-bench stage=report runs=...` writes results.json"
        ) from None
    return rows


MARK = r"(<!-- results: (\S+)((?: \w+=\S+)*) -->\n)"
BLOCK = re.compile(rf"(?ms){MARK}(.*?)(^<!-- end of results -->)")


def fill(text: str, folder: Path) -> str:
    """Markdown with its tables made anew from results files, each between two lines:

        <!-- results: FILE.json stage=lincls columns=val_top1,n,hours -->
        <!-- end of results -->

    FILE: relative to `folder`. stage: only the rows of this stage. columns: by default those of
    `columns`. UserError for a file or an option that isn't there, and for a text without a block.
    """
    if not BLOCK.search(text):
        raise UserError(
            "no table to fill: "
            "write a line <!-- results: FILE.json --> and one <!-- end of results -->"
        )

    def made(block: re.Match) -> str:
        options = dict(word.split("=", 1) for word in block[3].split())
        if others := sorted(options.keys() - {"stage", "columns"}):
            raise UserError(f"{block[2]}: {unknown('option', others[0], ['stage', 'columns'])}")
        rows, stage = load(folder / block[2]), options.get("stage")
        rows = [row for row in rows if stage in (None, row.get("stage"))]
        wanted = options["columns"].split(",") if "columns" in options else columns(rows)
        known = {"n", "pretrainings", *(metric for row in rows for metric in row["values"])}
        if missing := [column for column in wanted if column not in known]:
            raise UserError(f"{block[2]}: {unknown('column', missing[0], sorted(known))}")
        return f"{block[1]}{table(rows, wanted)}\n{block[5]}"

    return BLOCK.sub(made, text)


def markdown(header: list[str], rows: list[list[str]], right: int = 0) -> str:
    """A table that also lines up in a terminal. right: how many of the last columns align right."""
    lines = [[plain(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    left = len(header) - right
    aligns = ["<"] * left + [">"] * right
    text = []
    for line in lines:
        cells = zip(line, aligns, widths, strict=True)
        text.append(f"| {' | '.join(f'{cell:{align}{width}}' for cell, align, width in cells)} |")
    rules = ["-" * (width + 2) for width in widths[:left]]
    rules += ["-" * (width + 1) + ":" for width in widths[left:]]
    return "\n".join([text[0], f"|{'|'.join(rules)}|", *text[1:]])


def fitted(
    header: list[str], rows: list[list[str]], right: int = 0, least: int = 2
) -> tuple[str, list[str]]:
    """A table of as many first columns as the terminal has room for, and the heads of the others.

    least: so many columns stay in any case.
    """
    for kept in range(len(header), least - 1, -1):
        narrower = max(0, right - len(header) + kept)
        text = markdown(header[:kept], [row[:kept] for row in rows], narrower)
        if len(text.partition("\n")[0]) <= width():
            break
    return text, header[kept:]


def plain(text: str) -> str:
    """A text from elsewhere as a cell or a sentence of Markdown, which a terminal may show, too.

    It is put in one line, without characters that move the cursor, and its markup is escaped.
    """
    text = "".join(char if char.isprintable() else " " for char in text)
    return re.sub(r"[|<]|(?<=\])\(", r"\\\g<0>", text)
