"""Members that differ in single values are composed as Hydra does, but its files once."""

from collections.abc import Iterator

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from ssl_bench.launch.composing import Composer, without_hydra

WORDS = [
    [],
    ["seed=3", "method=simclr", "method.temperature=0.2", "seed=4"],
    ["+data.mine=[1,2]", "~method.queue_size", "pretrained='a=b, c'"],
    ["stage=pipeline", "stage.rows={pretrained: null}", "optimizer={momentum: 0.5}"],
    ["hydra.launcher.cpus_per_task=3", "launcher=slurm", "batch_size=8", "++new=1"],
]
MISTAKES = [["sed=3"], ["method=nowhere"], ["seed=1,2"], ["method.temprature=1"], ["seed={"]]


@pytest.fixture
def loaders() -> Iterator[tuple]:
    """(Hydra's own way, ours, how often ours has asked Hydra's)."""
    with hydra.initialize_config_module("ssl_bench.conf", version_base="1.3"):
        loader = GlobalHydra.instance().hydra.config_loader
        own, asked = loader.load_configuration, []

        def counted(*args: object, **options: object) -> object:
            asked.append(args)
            return own(*args, **options)

        loader.load_configuration = counted
        Composer.install(loader)
        yield own, loader.load_configuration, asked


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_as_hydra_composes(loaders: tuple, words: list[str]) -> None:
    own, ours, _ = loaders
    for _ in range(2):  # the second one from what the first has left
        expected, made = (load("config", words, RunMode.RUN) for load in (own, ours))
        assert OmegaConf.to_yaml(made) == OmegaConf.to_yaml(expected)
        for cfg in (expected, made):
            assert OmegaConf.is_struct(cfg)
            assert not OmegaConf.is_readonly(cfg.hydra)
    assert "hydra" not in without_hydra(made)
    assert OmegaConf.is_struct(made)


@pytest.mark.parametrize("words", MISTAKES, ids=" ".join)
def test_mistakes_in_hydras_words(loaders: tuple, words: list[str]) -> None:
    said = []
    for load in loaders[:2]:
        with pytest.raises(Exception) as error:  # noqa: PT011 - whatever it is, it is the same
            load("config", words, RunMode.RUN)
        said.append((error.type, str(error.value)))
    assert said[0] == said[1]


def test_files_are_read_once(loaders: tuple) -> None:
    _, ours, asked = loaders
    seeds = [ours("config", ["method=simclr", f"seed={seed}"], RunMode.RUN) for seed in range(9)]
    assert [cfg.seed for cfg in seeds] == [*range(9)]
    assert len(asked) == 1
