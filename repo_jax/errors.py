"""What a user's mistake raises."""


class ConfigError(ValueError):
    """A mistake in what the user asked for: an option, a file, a checkpoint.

    Its message is one sentence that names the option or file, the value found and what
    would be right. The command line prints it alone, without a traceback, and exits with
    status 2.
    """


class MissingPackageError(ImportError):
    """An optional package is needed for what was asked and is not installed.

    Its message says what to install: the extra that brings the package, or where none does the
    package itself.
    """

    def __init__(self, package: str, purpose: str, extra: str | None):
        install = f"'repo-jax[{extra}]'" if extra else package
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed; "
            f"run: pip install {install}"
        )


class TrainingError(RuntimeError):
    """Training cannot go on, by no mistake in the configuration.

    Its message is one sentence; the command line prints it alone and exits with status 1.
    """
