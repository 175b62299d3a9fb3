"""What conf/*.yaml refers to: resolvers, like ${run_dir:...}, and the keys of hydra.launcher."""

import textwrap
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf
from omegaconf import II, DictConfig, OmegaConf

from ssl_bench.config import signatures
from ssl_bench.launch import place
from ssl_bench.runs import identity
from ssl_bench.shell import quote

HELP = 12  # columns before the choices of a group in --help


def run_dir(default: str, *, _root_: DictConfig) -> str:
    """Resolver of `dir`."""
    return place.place(default, _root_)


def judge(eval_every: int, online_images: int) -> str | None:
    """Resolver: the metric that ranks pretrainings; None where nothing that can is measured."""
    return "probe_top1" if eval_every and online_images else None


def either(value: Any, default: Any) -> Any:
    """Resolver: the value, unless it is null."""
    return default if value is None else value


def queue(size: int, *, _root_: DictConfig) -> int:
    """Resolver of a queue's size; where a data set is known to have fewer images, a power of two.

    They are those of IMAGES in its module, or of the key num_unlabeled.
    """
    data: Any = _root_.get("data") or {}
    count = data.get("num_unlabeled")
    if count is None and isinstance(target := data.get("_target_"), str):
        with suppress(ImportError, ValueError):
            count = signatures.constant(target, "IMAGES")
    if not isinstance(count, int) or not 0 < count < size:
        return size
    return 1 << (count.bit_length() - 1)


def choices(group: str) -> str:
    """Resolver of --help: the choices of a group, wrapped for a terminal of 80 columns."""
    names = GlobalHydra.instance().config_loader().get_group_options(group)
    below = " " * HELP
    return textwrap.fill(
        ", ".join(names), 80, initial_indent=below, subsequent_indent=below
    ).lstrip()


@dataclass
class HalvingConf:
    metric: str | None = None
    eta: int = 3
    rungs: list[float] | None = None


@dataclass
class LocalConf:
    _target_: str = "hydra_plugins.ssl_bench_launchers.Local"
    halving: HalvingConf = field(default_factory=HalvingConf)


@dataclass
class WorkstationConf:
    _target_: str = "hydra_plugins.ssl_bench_launchers.Workstation"
    at_once: int | None = None
    members_per_gpu: int = 1
    halving: HalvingConf = field(default_factory=HalvingConf)


@dataclass
class EvaluationConf:
    """What the job of a pipeline's evaluations is given: as its pretraining, unless typed."""

    partition: str | None = II("..partition")
    account: str | None = II("..account")
    qos: str | None = II("..qos")
    constraint: str | None = II("..constraint")
    timeout_min: int = II("..timeout_min")
    gres: str | None = II("..gres")
    cpus_per_task: int | None = II("..cpus_per_task")
    mem_gb: float | None = II("..mem_gb")


@dataclass
class SlurmConf(SlurmQueueConf):
    _target_: str = "hydra_plugins.ssl_bench_launchers.Slurm"
    wait: bool = True
    python: str | None = None
    container: list[str] = field(default_factory=list)
    env_script: str | None = None
    stage_in: list[str] = field(default_factory=list)
    stage_dir: str = "/tmp"
    teardown: list[str] = field(default_factory=list)
    srun_args: list[str] = field(default_factory=list)
    name: str = "${sweep}"
    max_num_timeout: int = 1000
    max_running: int = 256
    array_parallelism: int = II(".max_running")  # as submitit calls it
    evaluation: EvaluationConf = field(default_factory=EvaluationConf)
    halving: HalvingConf = field(default_factory=HalvingConf)
    mem_gb: float | None = None


def register() -> None:
    """Make resolvers and launchers known to Hydra, before a configuration is composed."""
    OmegaConf.register_new_resolver("slug", identity.place_slug, replace=True)
    OmegaConf.register_new_resolver("quote", quote, replace=True)
    OmegaConf.register_new_resolver("path_slug", place.path_slug, replace=True)
    OmegaConf.register_new_resolver("began", place.began, replace=True)
    OmegaConf.register_new_resolver("below", place.below, replace=True)
    OmegaConf.register_new_resolver("choices", choices, replace=True)
    OmegaConf.register_new_resolver("either", either, replace=True)
    OmegaConf.register_new_resolver("judge", judge, replace=True)
    OmegaConf.register_new_resolver("queue", queue, replace=True)
    OmegaConf.register_new_resolver("run_dir", run_dir, replace=True)
    launchers = {"local": LocalConf, "workstation": WorkstationConf, "slurm": SlurmConf}
    for choice, node in launchers.items():
        name = f"ssl_bench_{choice}"
        ConfigStore.instance().store(name, node, group="hydra/launcher", provider="ssl_bench")
