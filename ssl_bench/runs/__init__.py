"""A run and what it leaves: `run` opens and closes it, `identity` says what it is, `layout` what
lies where, `record` reads it back; `checkpoint`, `metrics`, `tracking`, `units`; `sweep`; `weights`
from elsewhere, those `published`.
"""
