"""What a person reads of a run while it runs."""

import io
import json
import logging
import re
from pathlib import Path

import pytest
from conftest import TINY_PRETRAIN, Command
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ssl_bench import console, terminal
from ssl_bench.runs import units

LINES = st.dictionaries(
    st.sampled_from([*units.UNITS, "epoch", "num_chosen", "mean_distance"]),
    st.floats(allow_nan=True, allow_infinity=True),
)


@given(LINES, st.integers(0, 200))
def test_a_headline_fits(line: dict[str, float], width: int) -> None:
    shown = units.headline(line, width)
    assert len(shown) <= width
    assert "\n" not in shown


def test_a_headline_begins_with_the_result() -> None:
    line = {"embedding_std": 0.1, "loss": 2.5, "lr": 0.03, "val_top1": 61.234}
    assert units.headline(line, 100) == "val_top1 61.23 %  loss 2.5  lr 0.03"
    assert units.headline(line, 20) == "val_top1 61.23 %"
    assert units.headline({"num_chosen": 5}, 100) == "num_chosen 5"


@pytest.mark.parametrize("columns", [80, 160])
def test_the_lines_of_a_training(
    ssl_bench: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    """Each fits the console; the log and the metrics have all; the directory comes last."""
    monkeypatch.setenv("COLUMNS", str(columns))
    said = ssl_bench(*TINY_PRETRAIN, "log_every=1", "dir=run", check=True).stderr.splitlines()
    steps = [line for line in said if re.match(r"\S+ step ", line)]
    rows = [json.loads(row) for row in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(steps) == len(rows) > 1
    assert max(map(len, steps)) <= min(columns, 120)
    assert all(" loss " in line for line in steps[:-1])  # the last one has accuracies
    assert all(re.search(r"  left \d:\d\d:\d\d$", line) for line in steps[:-1])
    assert re.search(r"  took \d:\d\d:\d\d$", steps[-1])
    assert said[-1].endswith("finished: run")
    log = [line for line in (tmp_path / "run/log.txt").read_text().splitlines() if " step " in line]
    for line, row in zip(log, rows, strict=True):
        assert all(f"  {key} " in line for key in row if key != "step")


def test_the_line_of_a_result(ssl_bench: Command, tmp_path: Path) -> None:
    """A stage that doesn't train has no steps."""
    words = ["stage=knn", "data=digits", "backbone=pixels", "dir=run"]
    said = ssl_bench(*words, check=True).stderr.splitlines()
    assert re.search(r"result:  val_top1 \d\d\.?\d* %  val_top5 ", said[-2])
    assert not [line for line in said if " step " in line]


def said_on_terminal(monkeypatch: pytest.MonkeyPatch, width: int, *records: tuple) -> list[str]:
    """What a terminal of that width shows of records: (level, text, extra) each."""
    stream = io.StringIO()
    monkeypatch.setattr(console, "on_terminal", lambda: True)
    shown = Console(file=stream, width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr(terminal, "terminal", shown)
    terminal._heads.clear()
    logger = logging.Logger("other")
    logger.addHandler(console.Handler())
    for level, text, extra in records:
        logger.log(level, text, extra=extra)
    return stream.getvalue().splitlines()


@given(cells=st.dictionaries(st.text("abc %", min_size=1), st.text("0123."), max_size=12))
@pytest.mark.parametrize("width", [20, 80, 160])
def test_rows_fit_under_their_heads(cells: dict[str, str], width: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        twice = [(logging.INFO, "whole", {"cells": cells})] * 2
        lines = said_on_terminal(patch, width, *twice)
    assert len(lines) in (0, 3)  # the heads once; none where not one column fits
    assert all(len(line) <= width for line in lines)


def test_what_a_terminal_shows_of_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"brief": "step 1", "cells": {"step": "1", "loss": "2.5"}}
    panel = {"title": "pretrain", "cells": {"data": "digits", "empty": ""}}
    lines = said_on_terminal(
        monkeypatch,
        40,
        (logging.INFO, "a whole line", row),
        (logging.INFO, "not shown", {"brief": "step 2", "cells": {}}),  # the bar says it
        (logging.WARNING, "collapsed", {}),
        (logging.INFO, "a whole line", row),
        (logging.INFO, "of digits", panel),
        (logging.INFO, "2 of 9", {"heading": True}),
    )
    text = "\n".join(lines)
    assert "whole line" not in text
    assert "not shown" not in text
    assert [line.split() for line in lines].count(["step", "loss"]) == 2  # anew after the warning
    assert re.search(r"\d\d:\d\d:\d\d collapsed", text)
    assert "│ data  digits" in text
    assert "empty" not in text
    assert lines[-1].startswith("2 of 9 ---")


@pytest.mark.parametrize(
    ("verbosity", "said"),
    [
        ("quiet", ["warned", "done"]),
        ("normal", ["begun", "step 1", "warned", "done"]),
        ("full", ["begun", "step 1  loss 2.5  memory 1", "warned", "done"]),
    ],
)
def test_verbosity(verbosity: str, said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("ssl_bench")
    logger.handlers, logger.propagate = [console.Handler()], False
    logger.setLevel(logging.INFO)
    console.choose(verbosity)
    logger.info("begun")
    logger.info("step 1  loss 2.5  memory 1", extra={"brief": "step 1"})
    logger.warning("warned")
    logger.info("done", extra={"result": True})
    assert [line[9:] for line in capsys.readouterr().err.splitlines()] == said


@pytest.mark.parametrize(
    ("verbosity", "said"),
    [("normal", ["warned", "done"]), ("full", ["step 1", "warned", "result", "done"])],
)
def test_what_is_set_aside(
    verbosity: str, said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Within, even where one is within another, or one ends with an error."""
    logger = logging.getLogger("ssl_bench")
    logger.handlers, logger.propagate = [console.Handler()], False
    logger.setLevel(logging.INFO)
    try:
        with console.aside():
            with console.aside():
                console.choose(verbosity)  # as a run does that begins
                logger.info("step 1")
            logger.warning("warned")
            logger.info("result", extra={"result": True})
            raise KeyError
    except KeyError:
        pass
    logger.info("done")
    assert [line[9:] for line in capsys.readouterr().err.splitlines()] == said


def test_quiet(ssl_bench: Command, tmp_path: Path) -> None:
    words = ["stage=knn", "data=digits", "backbone=pixels", "dir=run", "verbosity=quiet"]
    said = ssl_bench(*words, check=True).stderr.splitlines()
    assert [line.split()[1] for line in said] == ["result:", "finished:"]
    assert "images" in (tmp_path / "run/log.txt").read_text()


def test_a_bar_where_there_is_no_terminal(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(console, "LOG_SECONDS", -1)
    with console.Bar(3000, "packing") as bar:
        bar.add(1000)
    assert re.fullmatch(
        r"packing: 1,000/3,000 images  \S+/s  \d:\d\d:\d\d left", caplog.messages[0]
    )
    assert len(caplog.messages) == 1


def test_slow_steps_are_not_silent(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line a minute, unless a step has just logged one."""
    caplog.set_level("INFO")
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with console.Bar(10, "pretrain", unit="steps", silence=60) as bar:
        for now[0] in (40, 80, 120):
            if now[0] == 80:
                bar.say("step 1")
            bar.add()
            assert not caplog.messages
        now[0] = 160
        bar.add()
    assert caplog.messages == ["pretrain: 4/10 steps  0.025/s  0:04:00 left"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (3661.4, "1:01:01"), (90061, "1 d 1:01:01"), (-1, "0:00:00")],
)
def test_duration(seconds: float, text: str) -> None:
    assert console.duration(seconds) == text
