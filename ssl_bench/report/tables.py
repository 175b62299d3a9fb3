"""Rows of results as Markdown, and the files that keep them.

A results file (`save`, `load`) keeps rows of `grouping`, so that a table can be made again where
the runs are gone (`fill`): {"rows": [{"stage": "lincls", "name": "moco_v2", "values": {"val_top1":
[46.9, 46.8], "hours": [...]}}]}, a value a seed; a row may also have "metric", which it is judged
by, "n" and "members", how many seeds are finished and how many there should be, "pretrainings", how
many its runs stand on, and "runs", what these are (`record.evidence`). Other keys of the file are
remarks.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssl_bench import files
from ssl_bench.errors import UserError, unknown
from ssl_bench.runs.units import PRETRAINING, UNITS, shown, unit

COSTS = (
    "hours",
    "images_per_second",
    "memory_gb",
    f"{PRETRAINING}hours",
    f"{PRETRAINING}images_per_second",
)


def columns(rows: Sequence[dict]) -> list[str]:
    """The metrics worth a column: the one they are judged by, results, `n`, costs. Others can be
    asked for.
    """
    known = list(
        dict.fromkeys(metric for row in rows for metric, values in row["values"].items() if values)
    )
    # what it learnt by is of no interest then
    if any(metric.startswith("val_") for metric in known):
        known = [metric for metric in known if metric not in ("loss", "accuracy")]
    order = list(UNITS)
    known.sort(key=lambda metric: order.index(metric) if metric in order else len(order))
    judges = list(dict.fromkeys(row["metric"] for row in rows if row.get("metric") in known))
    own = [metric for metric in known if not metric.startswith(PRETRAINING)]
    results = [metric for metric in own if metric not in (*judges, *COSTS)]
    several = ["pretrainings"] if any(row.get("pretrainings") for row in rows) else []
    return [*judges, *results, "n", *several, *(metric for metric in COSTS if metric in known)]


def cell(row: dict, column: str) -> str:
    if column == "n":
        done = row.get("n", max(map(len, row["values"].values()), default=0))
        return f"{done}" if done == row.get("members", done) else f"{done} of {row['members']}"
    if column == "pretrainings":
        return str(row.get("pretrainings") or "")
    return shown(column, row["values"].get(column, []))


def heading(column: str) -> str:
    return column if column in ("n", "pretrainings") else unit(column).label


def table(rows: Sequence[dict], wanted: Sequence[str]) -> str:
    """Markdown: the name of each row and these columns, mean ± std over its n seeds."""
    header = ["", *map(heading, wanted)]
    return markdown(
        header,
        [[row["name"], *(cell(row, column) for column in wanted)] for row in rows],
        len(wanted),
    )


def save(path: Path, rows: Sequence[dict], **remarks: Any) -> None:
    files.write(path, json.dumps({**remarks, "rows": rows}, indent=1) + "\n")


def remarks(path: Path) -> dict[str, Any]:
    """What a results file says besides its rows."""
    return {
        key: value
        for key, value in json.loads(path.read_text(encoding="utf-8")).items()
        if key != "rows"
    }


def load(path: Path) -> list[dict]:
    """The rows of a results file. UserError unless it is one."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        assert all(isinstance(row["name"], str) and isinstance(row["values"], dict) for row in rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError):
        raise UserError(
            f"{path}: not a results file; `ssl-bench stage=report runs=...` writes results.json"
        ) from None
    return rows


BLOCK = re.compile(
    r"(?ms)(<!-- results: (\S+)((?: \w+=\S+)*) -->\n)(.*?)(^<!-- end of results -->)"
)


def fill(text: str, folder: Path) -> str:
    """Markdown with its tables made anew from results files, each between two lines:

        <!-- results: FILE.json stage=lincls columns=val_top1,n,hours -->
        <!-- end of results -->

    FILE: relative to `folder`. stage: rows of this stage only. columns: all that `columns` finds,
    if left out. UserError for a file or an option that isn't there, and for a text without a block.
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
        rows = [
            row
            for row in load(folder / block[2])
            if options.get("stage") in (None, row.get("stage"))
        ]
        wanted = options["columns"].split(",") if "columns" in options else columns(rows)
        known = {"n", "pretrainings", *(metric for row in rows for metric in row["values"])}
        if missing := [column for column in wanted if column not in known]:
            raise UserError(f"{block[2]}: {unknown('column', missing[0], sorted(known))}")
        return f"{block[1]}{table(rows, wanted)}\n{block[5]}"

    return BLOCK.sub(made, text)


def markdown(header: list[str], rows: list[list[str]], right: int = 0) -> str:
    """A table that also lines up in a terminal. right: how many columns at the end are aligned to
    the right.
    """
    lines = [[plain(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    left = len(header) - right
    text = [
        "| "
        + " | ".join(f"{cell:{'<' if i < left else '>'}{widths[i]}}" for i, cell in enumerate(line))
        + " |"
        for line in lines
    ]
    rule = "|".join(
        "-" * (width + 2) if i < left else "-" * (width + 1) + ":" for i, width in enumerate(widths)
    )
    return "\n".join([text[0], f"|{rule}|", *text[1:]])


def plain(text: str) -> str:
    """A text that may come from elsewhere, as a cell or a sentence of Markdown, which a terminal
    shows as well: in one line, without markup that would be more than this text, or characters that
    move the cursor.
    """
    text = "".join(char if char.isprintable() else " " for char in text)
    return re.sub(r"[|<]|(?<=\])\(", r"\\\g<0>", text)
