"""The tutorial on methods of one's own, in a user's folder, with its code and its YAML."""

import json
import re
from pathlib import Path

import pytest
from conftest import TINY, Command

pytestmark = pytest.mark.slow


def blocks(kind: str) -> list[str]:
    page = (Path(__file__).parents[1] / "docs" / "tutorials" / "method.md").read_text()
    return re.findall(rf"(?s)```{kind}\n(.*?)\n```", page)


@pytest.fixture
def written(tmp_path: Path) -> None:
    """The files that the tutorial has a reader write."""
    (tmp_path / "my_module.py").write_text("\n".join(blocks("python")))
    (tmp_path / "my_conf" / "method").mkdir(parents=True)
    for text in blocks("yaml"):
        name = re.findall(r"^  name: (.*)$", text, re.M)[0]
        (tmp_path / "my_conf" / "method" / f"{name}.yaml").write_text(text)


@pytest.mark.usefixtures("written")
def test_a_momentum_method_of_ones_own(ssl_bench: Command, tmp_path: Path) -> None:
    command = ["--config-dir=my_conf", *TINY, "stage=pretrain", "method=mine_with_momentum"]
    ssl_bench(*command, "epochs=1", "dir=run", check=True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary.keys() >= {"loss", "accuracy", "effective_rank", "knn_top1"}
    refused = ssl_bench(*command, "epochs=1", "accumulate=2")
    assert "its queue takes the keys of the whole batch at once" in refused.stderr
    refused = ssl_bench(*command, "epochs=1", "method.queue_size=100000")
    assert "method.queue_size=100000: choose at most " in refused.stderr


@pytest.mark.usefixtures("written")
def test_a_method_of_ones_own(ssl_bench: Command, tmp_path: Path) -> None:
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
