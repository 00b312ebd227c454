"""Training: `step.py` is pure and needs jax, flax and optax only; `loop.py` runs it.

How data flows: `loop.train` opens the data and the model, `step.make_train_step` turns a
`TrainState` and a batch into the next state, `checkpoints.py` keeps states, `metrics.py`
numbers, `run_dir.py` the config they belong to.
"""
