"""The original project's job: its sbatch header to the letter, its prologue, its container."""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from slurm.cluster import Cluster
from slurm.conftest import Sweeps, ended
from slurm.test_interruptions import (
    AT,
    LONG,
    PACE,
    assert_as_if_nothing_happened,
    continued_after,
    whole,
)

__all__ = ["whole"]  # a fixture

HEADER = [
    "--gres=gpu:2",
    "--partition=n1s16-t4-2",
    "--account=dl17",
    "--time=20:00:00",
    "--output=moco%j.out",
    "--error=moco%j.err",
    "--exclusive",
    "--requeue",
]

# Records its arguments and executes what follows the image, where Slurm's programs can't be found.
SINGULARITY = """#!/bin/bash
printf '%s\\n' "$@" > {folder}/arguments-$SLURM_PROCID
while [ "$1" != image.sif ]; do shift; done
shift
export PATH={folder}/inside
exec "$@"
"""


def test_the_header_is_shown() -> None:
    command = [
        sys.executable,
        "-m",
        "ssl_bench",
        "launcher=nyu_t4x2",
        "--cfg",
        "hydra",
        "-p",
        "hydra.launcher",
    ]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    lines = {line.strip().replace("'", "") for line in shown}
    for option in HEADER:
        key, _, value = option.removeprefix("--").partition("=")
        assert f"{key}: {value or 'true'}" in lines


def test_the_job(sweeps: Sweeps, slurm: Cluster, whole: Callable[..., tuple]) -> None:
    """Two tasks in a container, with data that was copied to the node; warned, requeued from
    outside, resumed.
    """
    folder = sweeps.folder
    (folder / "inside").mkdir()
    for program in ("bash", "sh", "env", "git", "uname", "dirname"):
        (folder / "inside" / program).symlink_to(shutil.which(program))
    (folder / "bin").mkdir()
    (folder / "bin" / "singularity").write_text(SINGULARITY.format(folder=folder))
    (folder / "bin" / "singularity").chmod(0o755)
    (folder / "env.sh").write_text(
        f"PATH={Path(sys.executable).parent}:$PATH\nexport SOURCED=yes\n"
    )
    (folder / "student_dataset.sqsh").write_text("images\n")
    (folder / "mine_too.py").write_text(
        "import os\nassert os.environ['SOURCED'] == 'yes'\nfrom mine import Mine\n"
    )
    words = [
        *LONG,
        "device=cpu",  # its GPUs are /dev/null
        "method._target_=mine_too.Mine",
        f"hydra.launcher.stage_in=[{folder}/student_dataset.sqsh]",
        f"hydra.launcher.stage_dir={folder}/node",
        f"hydra.launcher.env_script='source {folder}/env.sh; type conda || true'",
    ]
    path = f"{folder}/bin:{slurm.env['PATH']}"
    # Checked where it is submitted, too.
    process = sweeps.start(*words, launcher=["launcher=nyu_t4x2"], PATH=path, SOURCED="yes", **PACE)
    job = sweeps.wait_for_step(AT, process)
    (script,) = sweeps.root.glob(".submitit/*/*_submission.sh")
    for option in HEADER:
        assert f"#SBATCH {option}" in script.read_text().splitlines()
    assert (folder / "node" / "student_dataset.sqsh").read_text() == "images\n"
    for rank in range(2):
        arguments = (folder / f"arguments-{rank}").read_text().splitlines()
        said = (
            "exec --nv --bind /scratch --overlay conda.sqsh:ro --overlay "
            "/tmp/student_dataset.sqsh:ro image.sif"
        )
        assert arguments[: len(shlex.split(said))] == shlex.split(said)
        assert arguments[len(shlex.split(said)) :][:2] == ["/bin/bash", "-c"]
    slurm("scancel", "--signal=USR2", job)
    result = ended(process)
    assert result.returncode == 0, result.stderr
    (saved,) = continued_after(sweeps.run())
    assert saved >= AT
    assert_as_if_nothing_happened(sweeps.run(), whole("devices=2"))
    assert (folder / f"moco{job}.out").exists()
