"""lm-eval's own command with the model `repo_jax` and our tasks known to it.

python -m repo_jax.evaluation.harness --model repo_jax --model_args run=DIR --tasks arc_easy
"""

import sys

from repo_jax import cli
from repo_jax.errors import MissingPackageError
from repo_jax.evaluation.harness.suites import TASKS_DIR


def main() -> None:
    """Runs `lm_eval` on sys.argv; `--include_path` is our tasks unless it is given."""
    try:
        from lm_eval.__main__ import cli_evaluate

        # lm-eval knows the models whose modules were imported.
        import repo_jax.evaluation.harness.model  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(error.name or "lm_eval", "lm-eval's command", "eval") from None
    if "--tasks" in sys.argv and "--include_path" not in sys.argv:
        sys.argv += ["--include_path", str(TASKS_DIR)]
    cli_evaluate()


if __name__ == "__main__":
    cli.run(main)
