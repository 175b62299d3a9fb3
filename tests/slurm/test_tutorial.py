"""The tutorial "From laptop to cluster", its shell blocks typed as they stand, on a smaller
WHAT.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY_PRETRAIN
from patience import wait

from slurm.conftest import Sweeps

PAGE = (Path(__file__).parents[2] / "docs" / "tutorials" / "cluster.md").read_text()


@pytest.mark.exhaustive
def test_from_laptop_to_cluster(sweeps: Sweeps) -> None:
    blocks = re.findall(r"^( *)```sh\n(.*?)^ *```", PAGE, re.DOTALL | re.MULTILINE)
    script = "".join(
        re.sub(f"^{indent}", "", block, flags=re.MULTILINE) for indent, block in blocks
    )
    tiny = " ".join([*TINY_PRETRAIN, "epochs=1", "device=cpu"])
    script, replaced = re.subn(
        "data=dl21 .* backbone=resnet50 method.temperature=0.1,0.2",
        f"{tiny} method.temperature=0.1",
        script,
    )
    assert (len(blocks), replaced) == (2, 1)
    script = script.replace("module load cuda", "echo cuda")
    program = f'ssl-bench() {{ "{sys.executable}" -m ssl_bench "$@"; }}\n'
    result = subprocess.run(
        ["bash", "-ec", program + script],
        cwd=sweeps.folder,
        env=sweeps.slurm.env,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    wait(lambda: not sweeps.slurm.jobs())  # those that were left
    sweeps.root = sweeps.root.with_name("temperature")
    assert len(list(sweeps.root.glob("*/summary.json"))) == 5
    assert result.stderr.count("to start") == 5
    assert "1 finished, 0 under way, 1 to start" in result.stderr
    row = sweeps.status().splitlines()[-1]
    assert "5" in [cell.strip() for cell in row.split("|")]
