"""The command line: dataclasses and YAML to options, and mistakes to one sentence."""

import difflib
import importlib.resources
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse

from repo_jax.errors import ConfigError, MissingPackageError


class Parser(jsonargparse.ArgumentParser):
    """A parser whose errors are one line without the list of all options."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints what is wrong and exits with status 2."""
        print(f"{self.prog}: error: {self._explain(message, ex)}", file=sys.stderr)
        raise SystemExit(2)

    def _explain(self, message: str, ex: Exception | None) -> str:
        while ex is not None:
            if isinstance(ex, ConfigError):
                return str(ex)
            ex = ex.__cause__ or ex.__context__
        message = " ".join(message.split())
        unknown = re.search(r"unrecognized arguments: (--[\w.-]+)", message)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(unknown[1], known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            return f"there is no option {unknown[1]}{hint} (--help lists them)"
        message = re.sub(r"Expected a <class '(\w+)'>", r"Expected a value of type \1", message)
        return message.replace("typing.", "")


def config_file(name: str) -> Path:
    """A YAML file, or the packaged config of that name (`quickstart`).

    Raises:
      ConfigError: neither exists.
    """
    path = Path(name)
    if path.is_file():
        return path
    packaged = _packaged_configs()
    stem = path.name.removesuffix(".yaml")
    if (packaged / f"{stem}.yaml").is_file():
        return packaged / f"{stem}.yaml"
    known = ", ".join(sorted(p.stem for p in packaged.glob("*.yaml")))
    raise ConfigError(f"--config {name}: there is no such file; packaged configs: {known}")


def _packaged_configs() -> Path:
    """configs/ inside an installed wheel, or beside the package in a checkout."""
    package = Path(str(importlib.resources.files("repo_jax")))
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def parse(
    config_class: type,
    prog: str,
    description: str,
    arguments: Sequence[str] | None,
    add: Callable[[Parser], None] = lambda parser: None,
) -> tuple[Any, jsonargparse.Namespace]:
    """Reads `config_class` from --config files and options, the last given winning.

    Args:
      config_class: a dataclass of `repo_jax.config`.
      prog, description: for --help.
      arguments: of the command line; None: sys.argv's.
      add: adds options that are not part of the config.

    Returns:
      The config, and the other options.
    """
    parser = Parser(prog=prog, description=description)
    parser.add_argument("--config", action="config", help="A YAML file, or a packaged config.")
    add(parser)
    parser.add_class_arguments(config_class, as_group=False)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for i, argument in enumerate(arguments):
        if argument == "--config" and i + 1 < len(arguments):
            arguments[i + 1] = str(config_file(arguments[i + 1]))
        elif argument.startswith("--config="):
            arguments[i] = f"--config={config_file(argument.partition('=')[2])}"
    options = parser.parse_args(arguments)
    made = parser.instantiate(options)
    fields = config_class.__dataclass_fields__
    config = config_class(**{name: made[name] for name in fields})
    return config, options


def run(main: Callable[[], int | None]) -> NoReturn:
    """Runs `main` and exits: a user's mistake is one sentence on stderr and status 2."""
    try:
        raise SystemExit(main() or 0)
    except (ConfigError, MissingPackageError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
