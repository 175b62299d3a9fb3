"""The fault campaign can still be run, and what it does first, holds. All of it: python
benchmarks/faults.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = Path(__file__).parents[1] / "benchmarks" / "faults.py"
FEW = ["checkpoint-flipped", "nan-loss", "picture-link", "no-such-node", "disk-full-predict"]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_handful(tmp_path: Path) -> None:
    command = [sys.executable, str(FAULTS), "--out", str(tmp_path / "faults.json"), "--only", *FEW]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["fault"]: row for row in json.loads((tmp_path / "faults.json").read_text())["rows"]}
    assert list(rows) == sorted(FEW, key=list(rows).index)
    assert all(
        row["verdict"] == "holds" or row["verdict"].startswith("not done: needs")
        for row in rows.values()
    )
    assert "damaged" in rows["checkpoint-flipped"]["said"]
    assert "didn't meet the others" in (tmp_path / "faults.md").read_text()
