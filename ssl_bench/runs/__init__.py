"""A run and the files that it leaves.

`run` opens and closes a run, `identity` says what decides its result, `layout` where its files lie;
`record` reads it back. `checkpoint`, `metrics` and `tracking` write its results, `units` says how
they are shown. `sweep` holds the members of a sweep. `weights` reads networks, and writes them for
other programs; `published` lists those that their authors have published.
"""
