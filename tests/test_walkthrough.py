"""The tutorial on a method of one's own, in a user's folder, with its code and its YAML."""

import json
import re
from pathlib import Path

import pytest
from conftest import TINY, Command

pytestmark = pytest.mark.slow


def block(kind: str) -> str:
    page = (Path(__file__).parents[1] / "docs" / "tutorials" / "method.md").read_text()
    (text,) = re.findall(rf"(?s)```{kind}\n(.*?)\n```", page)
    return text


def test_a_method_of_ones_own(ssl_bench: Command, tmp_path: Path) -> None:
    (tmp_path / "my_module.py").write_text(block("python"))
    (tmp_path / "my_conf" / "method").mkdir(parents=True)
    (tmp_path / "my_conf" / "method" / "mine.yaml").write_text(block("yaml"))
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
