"""Does re-positioning help? Small models on tasks made here, with seeds and intervals.

`python -m repo_jax.evidence --suite laptop` trains and tests every method on every task with
every seed, and writes what came out. How it goes: `suite.py` says what is run, `tasks/` make
the examples, `methods.py` the models, `cell.py` trains and tests one of them, `runner.py` all;
`summary.py`, `figures.py` and `report.py` make tables and plots of the results.
"""
