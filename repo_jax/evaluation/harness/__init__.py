"""Tasks, through lm-eval: the model, the paper's suites, honest scores, comparisons.

Importing this package needs no lm-eval; `model` and `run` do.
"""
