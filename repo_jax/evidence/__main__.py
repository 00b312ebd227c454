"""python -m repo_jax.evidence."""

from repo_jax.evidence.command import run

if __name__ == "__main__":
    run()
