"""What a stage is handed."""

from pathlib import Path

import pytest
import yaml
from commands import compose
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import nn

from ssl_bench.launch.process import launch
from ssl_bench.runs import weights
from ssl_bench.runs.checkpoint import Checkpoint
from ssl_bench.runs.run import Run


def late(cfg: DictConfig, run: Run) -> dict[str, str]:
    """The pretraining saves once more before its weights are loaded."""
    Checkpoint(Path("pretraining"), "run").save(2, model=nn.Linear(1, 1))
    return {"loaded": str(weights.find(cfg.pretrained))}


def test_the_weights_noted_are_those_that_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = Checkpoint(Path("pretraining"), "run").save(1, model=nn.Linear(1, 1))
    cfg = compose("stage=knn", "pretrained=pretraining")
    with open_dict(cfg):
        cfg.stage = {"name": "late", "_target_": f"{__name__}.late"}
    before = OmegaConf.to_yaml(cfg)
    assert launch(cfg) == {"loaded": str(first)}
    assert yaml.safe_load(Path(cfg.dir, "config.yaml").read_text())["pretrained"] == str(first)
    assert OmegaConf.to_yaml(cfg) == before
