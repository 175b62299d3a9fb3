"""Stages: functions `(cfg, run, **options) -> metrics`. The options are the keys of `cfg.stage`."""
