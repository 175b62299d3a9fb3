"""The workstation's launcher follows a plan, with processes that only write what a member would."""

import json
import os
import sys
import tempfile
from pathlib import Path

import pytest
from commands import member
from omegaconf import OmegaConf

from ssl_bench.launch.launchers import Workstation
from ssl_bench.runs import halving, sweep

# It takes a moment, and tells how many run at once.
PROCESS = """#!{python} -S
import json, os, sys, time
from pathlib import Path
file = Path(sys.argv[3])
one = json.loads(file.read_text())
config = one["config"]
run = Path(one["cwd"], config["dir"])
running = Path("running")
running.mkdir(exist_ok=True)
(running / str(os.getpid())).touch()
with open("seen", "a") as seen:
    seen.write(f"{{len(os.listdir(running))}}\\n")
time.sleep(0.3)
(run / "checkpoints").mkdir(parents=True, exist_ok=True)
(run / "checkpoints" / "step0000000001.pt").touch()
(run / "config.yaml").write_text(json.dumps(config))
until = config.get("until") or config["epochs"]
rate = config["optimizer"]["base_lr"]
lines = [{{"step": n, "epoch": float(n), "knn_top1": rate + n}} for n in range(1, until + 1)]
(run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
if until == config["epochs"]:
    (run / "summary.json").write_text(json.dumps({{"knn_top1": rate + until}}))
(running / str(os.getpid())).unlink()
"""


@pytest.mark.parametrize("metric", [None, "knn_top1"])
def test_two_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str | None) -> None:
    """All to their end; or of six two to the second rung, the better one of these to the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # leases of its own
    program = tmp_path / "python"
    program.write_text(PROCESS.format(python=sys.executable))
    program.chmod(0o755)
    words = [[f"optimizer.base_lr={n}", "epochs=9"] for n in range(6)]
    todo = [member(tmp_path / "sweep", None, *some) for some in words]
    monkeypatch.setattr(sys, "executable", str(program))
    rules = {"metric": metric, "eta": 3, "rungs": None}
    launcher = Workstation(2, halving=rules)
    launcher.config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path / "sweep")}}})
    launcher._run(todo, [])
    members = sweep.members(tmp_path / "sweep")
    done = {one.overrides[0][-1]: one.lines[-1]["epoch"] for one in members}
    assert max(map(int, Path("seen").read_text().split())) <= 2
    assert not os.listdir("running")
    if metric is None:
        assert done == dict.fromkeys("012345", 9.0)
        return
    assert done == {"0": 1.0, "1": 1.0, "2": 1.0, "3": 1.0, "4": 3.0, "5": 9.0}
    events = (tmp_path / "sweep" / halving.FILE).read_text().splitlines()
    assert [json.loads(event) for event in events][-1]["came_to"] == 3
