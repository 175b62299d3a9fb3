"""Where a stage runs: `process` here or in several processes, `member` of a sweep, `launchers` of sweeps and `slurm`,
`resolvers` of the configuration.
"""
