"""Resolvers of conf/*.yaml: ${run_dir:...}, ${slug:...}, ${quote:...}, ${judge:...}."""

import os

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from ssl_bench.runs import identity, sweep
from ssl_bench.shell import quote


def run_dir(default: str) -> str:
    """Resolver of `dir`: the stage's own directory, or for a member of a sweep one named after its overrides."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return default
    return os.path.join(HydraConfig.get().sweep.dir, sweep.name(HydraConfig.get().overrides.task))


def judge(eval_every: int, online_images: int) -> str | None:
    """Resolver: what ranks pretrainings, where there is something that can."""
    return "probe_top1" if eval_every and online_images else None


def register() -> None:
    """Before a configuration is composed."""
    for name, resolver in {
        "slug": identity.place_slug,
        "quote": quote,
        "judge": judge,
        "run_dir": run_dir,
    }.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)
