"""python -m repo_jax.plan: what a run would cost on hardware that is not there."""

from repo_jax.planning import command

if __name__ == "__main__":
    command.run()
