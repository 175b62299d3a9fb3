"""Where a stage runs.

`process` runs one here or in several processes, `member` as a member of a sweep. `launchers` start
sweeps on this machine, `slurm` on a cluster. `resolvers` holds what conf/*.yaml refers to.
"""
