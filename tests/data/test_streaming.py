"""Commands that stream, where something is wrong: little shared memory, a killed worker, images
that don't come.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from commands import mounted
from compared import assert_identical, final
from conftest import TINY_PRETRAIN, Command
from patience import PATIENCE, count_lines, wait
from processes import on_ranks

from ssl_bench.data.source import permutation

pytestmark = pytest.mark.slow

STREAMED = [*TINY_PRETRAIN, "source=streamed", "data.workers=2", "eval_every=0"]
IMAGES = 1297  # of digits, to learn from


def start(folder: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "ssl_bench", *words]
    return subprocess.Popen(
        command,
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def assert_same_end(one: Path, other: Path) -> None:
    ends = final(one), final(other)
    for state, _ in ends:
        state.pop("run")
    assert_identical(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


def test_shared_memory_is_not_needed(ssl_bench: Command, tmp_path: Path) -> None:
    """A container has 64 MB of it; here 1 MB, less than a batch."""
    words = ["augmentation.image_size=16", "data.image_size=64", "epochs=1"]  # 1.5 MB a batch
    ssl_bench(*TINY_PRETRAIN, "eval_every=0", *words, "source=host", "dir=host", check=True)
    with_little = mounted("/dev/shm", "1m")
    command = [sys.executable, "-m", "ssl_bench", *STREAMED, *words, "dir=streamed"]
    result = subprocess.run(
        [*with_little, *command], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE
    )
    assert result.returncode == 0, result.stderr
    assert_same_end(tmp_path / "host", tmp_path / "streamed")


STALLING = """
import os, time
from dataclasses import replace
from ssl_bench.data.formats.digits import Digits


class Stalling:
    def __init__(self, read, index):
        self.read, self.index = read, index

    def __call__(self, index):
        while index == self.index and os.path.exists("stall"):
            time.sleep(0.1)
        return self.read(index)


class Mine(Digits):
    def split(self, name):
        found = super().split(name)
        return replace(found, read=Stalling(found.read, INDEX))
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The run on so many processes that nothing stops."""

    @cache
    def run(devices: int) -> Path:
        folder = tmp_path_factory.mktemp("whole")
        words = ["eval_every=0", "source=host", "epochs=1", f"devices={devices}"]
        on_ranks([*TINY_PRETRAIN, *words, "dir=run"], folder, devices)
        return folder / "run"

    return run


@pytest.mark.xdist_group("stalled")  # for what they share
@pytest.mark.parametrize(
    ("devices", "rank"),
    [
        (2, 1),
        *(pytest.param(*more, marks=pytest.mark.exhaustive) for more in ((1, 0), (2, 0))),
    ],
)
def test_stopped_while_no_images_come(
    tmp_path: Path, whole: Callable[[int], Path], devices: int, rank: int
) -> None:
    """It ends all the same. One process, or the first of several, has saved the last step that was
    whole; where it is another one whose images don't come, the first is within a step, and those
    since the last save are repeated.
    """
    index = int(permutation(0, 0, IMAGES)[4 * 128 + rank * 64 + 5])  # of the fifth step
    (tmp_path / "mine.py").write_text(STALLING.replace("INDEX", str(index)))
    words = ["data._target_=mine.Mine", f"devices={devices}", "save_every=3", "epochs=1"]
    words += [f"data.workers={2 // devices}"]  # of each process
    (tmp_path / "stall").touch()
    process = start(tmp_path, *STREAMED, *words, "dir=stopped")
    wait(lambda: count_lines(tmp_path / "stopped" / "metrics.jsonl") >= 4, process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("ssl-bench: stopped by SIGTERM")
    saved = max((tmp_path / "stopped" / "checkpoints").glob("step*.pt"))
    assert torch.load(saved, weights_only=True)["step"] == (4 if rank == 0 else 3)
    (tmp_path / "stall").unlink()
    on_ranks([*STREAMED, *words, "dir=stopped"], tmp_path, devices)
    assert_same_end(whole(devices), tmp_path / "stopped")


def test_a_killed_worker_is_told(tmp_path: Path) -> None:
    process = start(tmp_path, *STREAMED, "epochs=50", "dir=run")
    wait(lambda: count_lines(tmp_path / "run" / "metrics.jsonl") >= 2, process)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "ssl_bench.data.pool"], capture_output=True
    )
    os.kill(int(children.stdout.split()[0]), signal.SIGKILL)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2, said
    assert "Traceback" not in said
    assert re.search(r"\nssl-bench: a data worker ended with status -9 [^\n]*\n$", said)
