"""Speed and memory of the library against plain JAX, in times taken by turns within one run.

`python -m experiments.benchmark` is the command. Each measurement gives rows of raw numbers, which
go into a JSON; `report` makes tables of them, and `targets` says what they reach.
"""
