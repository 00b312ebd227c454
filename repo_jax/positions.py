"""python -m repo_jax.positions: where models place the tokens of a text, and what they look at."""

from repo_jax.analysis import command

if __name__ == "__main__":
    command.run()
