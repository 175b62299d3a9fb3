"""A Slurm of our own for the session, and the command as a user of a cluster types it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TINY_PRETRAIN
from patience import wait

from slurm import cluster

# A user's own method, in the folder where she starts: MoCo, slow until it is interrupted (as often
# as PACED_STARTS says, and with something saved: on a busy machine a warning may come before the
# first step), and with mishaps.
MINE = """
import os, time
from pathlib import Path
import numpy as np
from ssl_bench.methods.moco import MoCo

def once(name):
    try:
        return bool(open(name, "x"))
    except FileExistsError:
        return False

class Mine(MoCo):
    def forward(self, views, labels=None):
        starts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        saved = next(Path().glob("runs/*/*/*/checkpoints/*.pt"), None)
        if starts < int(os.environ.get("PACED_STARTS", 1)) or not saved:
            time.sleep(float(os.environ.get("PAUSE", 0)))
        if os.environ.get("FAIL") == "one" and once("failed-once"):
            raise RuntimeError("out of luck")
        if os.environ.get("FAIL") == "rank1" and os.environ["SLURM_PROCID"] == "1":
            raise RuntimeError("out of luck")
        if os.environ.get("STUCK") and saved and once("stuck-once"):
            time.sleep(600)
        if os.environ.get("GREEDY"):
            held = bytearray(os.urandom(1 << 20)) * 700  # each page of it is written to
            time.sleep(600)
        return super().forward(views, labels)

class Endless:
    # images that take longer to read than a job has
    def __len__(self):
        return 1000

    def __getitem__(self, index):
        time.sleep(1 if "SLURM_JOB_ID" in os.environ else 0)
        return np.full((16, 16, 3), index % 256, np.uint8)
"""

# No GPU is taken, so that members share the node.
CLUSTER = ["launcher=slurm", "hydra.launcher.gres=null", "hydra.launcher.cpus_per_task=1"]


# the groups are read by another such hook, and the order by a third
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.xdist_group("slurm"))  # one cluster


@pytest.fixture(scope="session")
def slurm() -> Iterator[cluster.Cluster]:
    if missing := cluster.missing():
        pytest.skip(
            f"Slurm isn't installed ({', '.join(missing)}): apt-get install munge slurmctld slurmd "
            "slurm-client"
        )
    throwaway = cluster.Cluster(Path(f"/tmp/slurm-{os.getpid()}"))
    yield throwaway
    throwaway.stop()


class Sweeps:
    """Sweeps in a folder of their own."""

    def __init__(self, slurm: cluster.Cluster, folder: Path) -> None:
        self.slurm, self.folder = slurm, folder
        folder.mkdir(exist_ok=True)
        self.root = folder / "runs" / "sweeps" / "pretrain"
        # the processes of its jobs, for pgrep
        self.task = f"^{sys.executable} -u -m submitit.core._submit {folder}/"
        (folder / "mine.py").write_text(MINE)

    def start(self, *words: str, launcher: list[str] = CLUSTER, **env: str) -> subprocess.Popen:
        words = (*launcher, *TINY_PRETRAIN, "method._target_=mine.Mine", *words)
        return subprocess.Popen(
            [sys.executable, "-m", "ssl_bench", *words],
            cwd=self.folder,
            env=self.slurm.env | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # a shell's background processes, and what they start, ignore Ctrl-C
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def __call__(
        self, *words: str, launcher: list[str] = CLUSTER, **env: str
    ) -> subprocess.CompletedProcess:
        return ended(self.start(*words, launcher=launcher, **env))

    def status(self) -> str:
        command = [sys.executable, "-m", "ssl_bench", "stage=status", f"runs={self.root}"]
        result = subprocess.run(
            command, cwd=self.folder, env=self.slurm.env, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    def records(self) -> list[Path]:
        """The files of the members, without the pretrainings of pipelines."""
        files = self.root.glob(".members/*.json")
        return [file for file in files if not file.stem.endswith(".pretrain")]

    def run(self) -> Path:
        """The directory of the only member."""
        (record,) = self.records()
        return self.root / record.stem

    def steps(self) -> int:
        """What the only member has logged."""
        if not self.records() or not (path := self.run() / "metrics.jsonl").exists():
            return 0
        return path.read_bytes().count(b"\n")

    def saved(self) -> int:
        """The step of its last checkpoint."""
        steps = (
            int(path.stem.removeprefix("step")) for path in self.run().glob("checkpoints/step*.pt")
        )
        return max(steps, default=0)

    def wait_for_step(self, step: int, process: subprocess.Popen) -> str:
        """Until the only member has logged so many; returns its job."""
        wait(lambda: self.steps() >= step, process)
        return self.job()

    def job(self) -> str:
        """Of the only member."""
        (record,) = self.records()
        return json.loads(record.read_text())["job"]


def ended(process: subprocess.Popen) -> subprocess.CompletedProcess:
    out, err = process.communicate(timeout=600)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture
def sweeps(slurm: cluster.Cluster, tmp_path: Path) -> Iterator[Sweeps]:
    yield Sweeps(slurm, tmp_path)
    if jobs := slurm.jobs():  # of a test that failed
        slurm("scancel", *jobs)
        wait(lambda: not slurm.jobs())
