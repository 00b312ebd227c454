"""lm-eval's own command with the model `repo_jax` and our tasks known to it.

repo-lm-eval --model repo_jax --model_args run=DIR --tasks arc_easy
"""

from pathlib import Path

from repo_jax import cli
from repo_jax.errors import MissingPackageError
from repo_jax.evaluation.harness.suites import TASKS_DIR


def main() -> None:
    """Runs `lm_eval` on sys.argv, with our tasks beside its own and those of `--include_path`."""
    try:
        import lm_eval.tasks

        # lm-eval knows the models whose modules were imported.
        import repo_jax.evaluation.harness.model  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(error.name or "lm_eval", "lm-eval's command", "eval") from None
    # All of its subcommands look tasks up here. It takes one --include_path, or a config file's.
    lm_eval.tasks.TaskManager = _knowing_ours(lm_eval.tasks.TaskManager)
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


def _knowing_ours(manager: type) -> type:
    class TaskManager(manager):
        def __init__(self, *args, include_path=None, **kwargs):
            given = [include_path] if isinstance(include_path, str | Path) else include_path or []
            super().__init__(*args, include_path=[TASKS_DIR, *given], **kwargs)

    return TaskManager


def run() -> None:
    """The console script."""
    cli.run(main)


if __name__ == "__main__":
    run()
