"""Where a stage runs: `process` here or in several processes, `member` of a sweep, `launchers` of
sweeps and `slurm`; `resolvers`, what conf/*.yaml refers to.
"""
