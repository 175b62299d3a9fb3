"""A run killed at any step and started again by the same command ends as if nothing had happened,
bit for bit.
"""

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import interrupted
from compared import assert_identical, final
from conftest import TINY, TINY_PRETRAIN, Command

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("stage", ["pretrain", "lincls", "cached"])
def test_killed(ssl_bench: Command, tmp_path: Path, stage: str, devices: int) -> None:
    lincls = [
        *TINY,
        "stage=lincls",
        "epochs=2",
        "save_every=4",
        "eval_every=1",
        f"devices={devices}",
    ]
    command = {
        # batch norm of MoCo is each process's own
        "pretrain": [*TINY_PRETRAIN, f"devices={devices}", "eval_every=1", "ema=0.9"],
        "lincls": lincls,
        "cached": [*lincls, "stage.features=cached", "stage.copies=1", "stage.normalize=true"],
    }[stage]
    ssl_bench(*command, "dir=whole", check=True)
    # Of 20; not a later one, since the run may have ended before the signal comes.
    step = random.Random(f"{stage} {devices}").randrange(1, 14)
    print("killed after step", step)
    interrupted([*command, "dir=killed"], tmp_path, Path("killed"), step, signal.SIGKILL)
    assert not (tmp_path / "killed" / "summary.json").exists()
    result = ssl_bench(*command, "dir=killed", check=True)
    if step > 5:
        assert "continuing after step" in result.stderr
    whole, killed = final(tmp_path / "whole"), final(tmp_path / "killed")
    assert [line["step"] for line in whole[1]] == list(range(1, 21))
    whole[0].pop("run"), killed[0].pop("run")
    assert_identical(whole[0], killed[0])
    assert whole[1] == killed[1]


@pytest.mark.parametrize(("devices", "source"), [(1, "host"), (2, "host"), (1, "streamed")])
def test_terminated_loses_nothing(
    ssl_bench: Command, tmp_path: Path, devices: int, source: str
) -> None:
    command = [
        *TINY_PRETRAIN,
        "save_every=1000",
        "epochs=4",
        f"devices={devices}",
        f"source={source}",
    ]
    ssl_bench(*command, "dir=whole", check=True)
    status = interrupted([*command, "dir=stopped"], tmp_path, Path("stopped"), 6, signal.SIGTERM)
    assert status == 128 + signal.SIGTERM
    (saved,) = (tmp_path / "stopped" / "checkpoints").glob("step*.pt")
    assert int(saved.stem.removeprefix("step")) >= 6
    ssl_bench(*command, "dir=stopped", check=True)
    whole, stopped = final(tmp_path / "whole"), final(tmp_path / "stopped")
    whole[0].pop("run"), stopped[0].pop("run")
    assert_identical(whole[0], stopped[0])
    assert whole[1] == stopped[1]


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
    assert process.wait(timeout=10) == 128 + signal.SIGTERM
    assert said.endswith("ssl-bench: stopped by SIGTERM; the same command continues\n")
    assert not [
        path for path in (tmp_path / "cache").rglob("*") if path.is_dir() and path.name != "stores"
    ]


def test_finished_is_a_no_op(ssl_bench: Command, tmp_path: Path) -> None:
    command = [*TINY_PRETRAIN, "epochs=1", "dir=run"]
    ssl_bench(*command, check=True)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert "finished already" in ssl_bench(*command, check=True).stderr
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
