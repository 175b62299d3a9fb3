"""What a run does with its folder, beside what the command shows."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml

from ssl_bench.errors import UserError
from ssl_bench.run import Run
from ssl_bench.tracking import NoTracker


def run(directory: Path, seed: int) -> Run:
    return Run({"dir": str(directory), "seed": seed}, torch.device("cpu"), NoTracker)


def test_who_comes_second_does_not_take_the_firsts_result_for_its_own(tmp_path: Path) -> None:
    """Not even where the first had saved nothing yet when the second came."""
    with ThreadPoolExecutor(1) as thread:
        with run(tmp_path / "run", seed=0) as first:
            second = thread.submit(run(tmp_path / "run", seed=1).__enter__)
            time.sleep(0.5)
            assert not second.done()
            first.finish({"loss": 1.0})
        with pytest.raises(UserError, match="another configuration: seed was 0, is 1"):
            second.result(timeout=30)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["seed"] == 0


@pytest.mark.parametrize("name", ["summary.json", "config.yaml"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    with run(tmp_path / "run", seed=0) as first:
        first.finish({"loss": 1.0})
    (tmp_path / "run" / name).write_text("{")
    with pytest.raises(UserError, match=f"{name} is damaged: put it back, or delete it"):
        run(tmp_path / "run", seed=0).__enter__()
