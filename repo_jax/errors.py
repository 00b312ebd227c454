"""What a user's mistake raises."""


class ConfigError(ValueError):
    """A mistake in what the user asked for: an option, a file, a checkpoint.

    Its message is one sentence that names the option or file, the value found and what
    would be right. The command line prints it alone, without a traceback, and exits with
    status 2.
    """


class MissingPackageError(ImportError):
    """An optional package is needed for what was asked and is not installed."""

    def __init__(self, package: str, purpose: str, extra: str):
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed; "
            f"run: pip install 'repo-jax[{extra}]'"
        )


class TrainingError(RuntimeError):
    """Training cannot go on, by no mistake in the configuration.

    Its message is one sentence; the command line prints it alone and exits with status 1.
    """
