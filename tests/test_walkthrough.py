"""CONTRIBUTING's walk through a new method, in a user's own folder: its code and YAML are taken
from the page.
"""

import json
import re
from pathlib import Path

import pytest
from conftest import TINY, Command

pytestmark = pytest.mark.slow


def blocks(kind: str) -> list[str]:
    page = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    text = page.partition("## Add a method")[2].partition("\n## ")[0]
    return [
        re.sub(r"(?m)^   ", "", block)
        for block in re.findall(rf"(?s)```{kind}\n(.*?)\n   ```", text)
    ]


def test_a_method_of_ones_own(ssl_bench: Command, tmp_path: Path) -> None:
    (code,), (recipe,) = blocks("python"), blocks("yaml")
    (tmp_path / "my_module.py").write_text(code)
    (tmp_path / "my_conf" / "method").mkdir(parents=True)
    recipe = recipe.replace("ssl_bench.methods.mine.Mine", "my_module.Mine")
    (tmp_path / "my_conf" / "method" / "mine.yaml").write_text(recipe)
    command = [
        "--config-dir=my_conf",
        *TINY,
        "stage=pretrain",
        "method=mine",
        "epochs=3",
        "dir=run",
    ]
    command += ["schedule.warmup_epochs=1"]
    ssl_bench(*command, "optimizer=sgd", "optimizer.base_lr=0.3", check=True)
    assert json.loads((tmp_path / "run" / "summary.json").read_text()).keys() >= {
        "loss",
        "effective_rank",
        "knn_top1",
    }
    typo = ssl_bench(*command, "method.dimm=3")
    assert typo.returncode == 2
    assert "method.dimm: no such key; did you mean method.dim?" in typo.stderr
    sweep = [
        "-m",
        "seed=0",
        "method=mine,simsiam",
        "epochs=1",
        "schedule=cosine",
        "sweep=toy",
        "metric=knn_top1",
    ]
    table = ssl_bench("--config-dir=my_conf", *TINY, "stage=pretrain", *sweep, check=True).stdout
    assert "| mine " in table
    assert "| simsiam " in table
