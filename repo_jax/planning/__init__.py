"""What a run would cost on hardware that is not there: `python -m repo_jax.plan`.

How data flows: `targets.py` makes the devices of a topology; `plan.py` compiles the run's train
step for them and puts together what it finds: `hlo.py` reads the compiled program and counts how
often each instruction runs, `cost.py` says what each costs, `kernels.py` those that the compiler
counts as nothing, `links.py` how long data are on the way; `report.py` writes it down.
"""
