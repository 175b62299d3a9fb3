"""What a person reads of a run while it runs."""

import json
import re
from pathlib import Path

import pytest
from conftest import TINY_PRETRAIN, Command
from hypothesis import given
from hypothesis import strategies as st

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
