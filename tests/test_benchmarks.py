"""benchmarks/speed.py runs and measures what it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SPEED = Path(__file__).parents[1] / "benchmarks" / "speed.py"


@pytest.mark.slow
def test_quick(tmp_path: Path) -> None:
    command = [sys.executable, str(SPEED), "--quick", "--repeats", "2", "--device", "cpu", "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # a busy machine would slow down more threads a hundred times
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "speed_cpu.json").read_text())

    (row,) = result["contenders"]["rows"]
    assert {len(repeats) for repeats in row["repeats"].values()} == {2}
    rates = {name: found["median"] for name, found in row["images_per_second"].items()}
    assert row["ratio"]["plain"] == pytest.approx(rates["ours"] / rates["plain"])
    for found in (*row["repeats"]["ours"], *result["by_batch"]):  # from outside, and as the program has it
        inside, outside = found["logged_images_per_second"], found["images_per_second"]
        if isinstance(outside, dict):
            inside, outside = max(inside), outside["max"]
        assert inside == pytest.approx(outside, rel=0.3)

    (step,) = result["parts"]
    flops = step["flops"]
    assert flops["forward, query"] == flops["forward, key"] > 0
    assert 1.5 < flops["backward"] / flops["forward, query"] < 2.1
    assert flops["EMA of the key encoder"] == flops["augment two views"] == flops["SGD"] == 0
    assert all(seconds > 0 for seconds in step["seconds"].values())
    assert [row["images"] for row in result["by_size"]] == [4200, 5000]
    assert "| resnet18, batch 16 |" in (tmp_path / "speed_cpu.md").read_text()
    assert (tmp_path / "speed_cpu.png").stat().st_size > 10_000
    assert "aten::mm" in (tmp_path / "profile_cpu.txt").read_text()
