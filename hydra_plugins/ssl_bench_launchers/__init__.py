"""Our launchers where Hydra looks for them: in this namespace alone. See `ssl_bench.launch`."""

from hydra.core.config_store import ConfigStore

from ssl_bench.launch import launchers, slurm


class Local(launchers.Local): ...


class Workstation(launchers.Workstation): ...


class Slurm(slurm.Slurm): ...


for choice, node in {
    "local": launchers.LocalConf,
    "workstation": launchers.WorkstationConf,
    "slurm": slurm.SlurmConf,
}.items():
    ConfigStore.instance().store("ssl_bench_" + choice, node, group="hydra/launcher", provider="ssl_bench")
