"""Fault injection: kill, cut off, race and deceive every command, and check what is left.

`python -m tools.torture --minutes 10` (`make torture`) runs everything on a toy model, in
memory, against servers on loopback. Exit code 1 if a check failed.

`sandbox` has the commands and the toy repositories in which they run; `fork_server` and
`tracing` run `inv` in a child whose calls on the disk are recorded and can be stopped;
`checks` says what must be true afterwards. `kills`, `power`, `races` and `swaps` inject
faults, `peers` tries the same faults on other programs, `report` writes the tables.
"""
