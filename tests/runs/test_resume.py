"""A run killed at any step and started again by the same command ends as if nothing had happened,
bit for bit.
"""

import random
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from commands import interrupted
from compared import assert_identical, final
from conftest import TINY, TINY_PRETRAIN, Command
from patience import PATIENCE
from processes import on_ranks

pytestmark = pytest.mark.slow


LINCLS = [*TINY, "stage=lincls", "epochs=2", "save_every=4"]
COMMANDS = {
    "pretrain": [*TINY_PRETRAIN, "ema=0.9"],  # batch norm of MoCo is each process's own
    "lincls": LINCLS,
    "cached": [*LINCLS, "stage.features=cached", "stage.copies=1", "stage.normalize=true"],
}


def command(stage: str, devices: int) -> list[str]:
    """Of 20 steps."""
    return [*COMMANDS[stage], "eval_every=1", f"devices={devices}"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], tuple]:
    """What the run of a stage on so many processes comes to that nothing interrupts."""

    @cache
    def run(stage: str, devices: int) -> tuple[dict, list[dict]]:
        folder = tmp_path_factory.mktemp("whole")
        on_ranks([*command(stage, devices), "dir=run"], folder, devices)
        state, lines = final(folder / "run")
        assert [line["step"] for line in lines] == list(range(1, 21))
        del state["run"]
        return state, lines

    return run


def assert_same_end(run: Path, whole: tuple[dict, list[dict]]) -> None:
    state, lines = final(run)
    del state["run"]
    assert_identical(state, whole[0])
    assert lines == whole[1]


@pytest.mark.xdist_group("resume")  # for what they share
@pytest.mark.parametrize(
    ("stage", "devices"),
    [
        *((stage, 1) for stage in COMMANDS),
        *(pytest.param(stage, 2, marks=pytest.mark.exhaustive) for stage in COMMANDS),
    ],
)
def test_killed(
    ssl_bench: Command, tmp_path: Path, whole: Callable[..., tuple], stage: str, devices: int
) -> None:
    words = [*command(stage, devices), "dir=killed"]
    # Of 20; not a later one, since the run may have ended before the signal comes.
    step = random.Random(f"{stage} {devices}").randrange(1, 14)
    print("killed after step", step)
    interrupted(words, tmp_path, Path("killed"), step, signal.SIGKILL)
    assert not (tmp_path / "killed" / "summary.json").exists()
    result = ssl_bench(*words, check=True)
    if step > 5:
        assert "continuing after step" in result.stderr
    assert_same_end(tmp_path / "killed", whole(stage, devices))


@pytest.mark.xdist_group("resume")
@pytest.mark.parametrize(
    ("devices", "source"),
    [(1, "host"), pytest.param(2, "host", marks=pytest.mark.exhaustive), (1, "streamed")],
)
def test_terminated_loses_nothing(
    ssl_bench: Command, tmp_path: Path, whole: Callable[..., tuple], devices: int, source: str
) -> None:
    words = [*command("pretrain", devices), "save_every=1000", f"source={source}", "dir=stopped"]
    status = interrupted(words, tmp_path, Path("stopped"), 6, signal.SIGTERM)
    assert status == 128 + signal.SIGTERM
    (saved,) = (tmp_path / "stopped" / "checkpoints").glob("step*.pt")
    assert int(saved.stem.removeprefix("step")) >= 6
    ssl_bench(*words, check=True)
    assert_same_end(tmp_path / "stopped", whole("pretrain", devices))


def test_terminated_while_packing(ssl_bench: Command, tmp_path: Path) -> None:
    """There is no step to finish: it ends there and then, and leaves no half of a store."""
    command = [
        "data=synthetic",
        "data.num_unlabeled=20000",
        "data.workers=1",
        "data.cache=cache",
        "dir=run",
    ]
    command += ["method.queue_size=1024"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ssl_bench", *command],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if "packing" in line:
            break
    process.send_signal(signal.SIGTERM)
    said = process.stderr.read()
    assert process.wait(timeout=PATIENCE) == 128 + signal.SIGTERM
    assert said.endswith("ssl-bench: stopped by SIGTERM; the same command continues\n")
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_dir()]
    assert {path.suffix for path in left if path.name != "stores"} <= {
        ".partial"
    }  # for the same command to go on


def test_finished_is_a_no_op(ssl_bench: Command, tmp_path: Path) -> None:
    command = [*TINY_PRETRAIN, "epochs=1", "dir=run"]
    ssl_bench(*command, check=True)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert "finished already" in ssl_bench(*command, check=True).stderr
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
