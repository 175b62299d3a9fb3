"""A sweep in a folder of any name: what lies beside it stays, and its job runs once."""

from pathlib import Path

import pytest
from patience import wait

from slurm.cluster import Cluster
from slurm.conftest import Sweeps, ended


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        pytest.param("r9 with space", "file", marks=pytest.mark.exhaustive),
        ("r9; a'$b\"", "folder"),
    ],
)
def test_a_folder_of_any_name(slurm: Cluster, tmp_path: Path, name: str, beside: str) -> None:
    """Cut at what a shell would cut it at, it is something of the user's: removed, or there for
    every requeue.
    """
    other = tmp_path / "r9"
    other.mkdir() if beside == "folder" else other.write_text("mine\n")
    sweeps = Sweeps(slurm, tmp_path / name)
    process = sweeps.start("epochs=1")
    wait(lambda: list(sweeps.root.glob("*/summary.json")))
    job = sweeps.job()
    try:
        wait(lambda: job not in slurm.jobs())
        result = ended(process)
    finally:
        slurm("scancel", job)
    assert result.returncode == 0, result.stderr
    assert other.exists()
    assert slurm("sacct", "-n", "-D", "-X", "-P", "-o", "State", "-j", job).split() == ["COMPLETED"]
