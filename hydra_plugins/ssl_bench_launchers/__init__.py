"""Our launchers where Hydra looks for them: in this namespace alone. See `ssl_bench.launch`."""

from ssl_bench.launch import launchers, slurm


class Local(launchers.Local): ...


class Workstation(launchers.Workstation): ...


class Slurm(slurm.Slurm): ...
