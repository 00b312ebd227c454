"""The command line: dataclasses and YAML to options, and mistakes to one sentence."""

import contextlib
import dataclasses
import difflib
import functools
import importlib.resources
import itertools
import logging
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import yaml

from repo_jax.errors import ConfigError, MissingPackageError, TrainingError


class Parser(jsonargparse.ArgumentParser):
    """A parser whose errors are one line without the list of all options.

    An option is known by its whole name only: the beginning of one may be a misspelt other.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, **kwargs)

    def spelt(self, arguments: Sequence[str]) -> list[str]:
        """Arguments as we spell them: options may have hyphens, and true may be left out."""
        ours = []
        for argument, following in itertools.pairwise([*arguments, "--"]):
            name, equals, value = argument.partition("=")
            name = name[:2] + name[2:].replace("-", "_")
            action = self._option_string_actions.get(name) if name.startswith("--") else None
            ours.append(name + equals + value if action else argument)
            is_flag = getattr(action, "_typehint", None) is bool and not equals
            ours += ["true"] if is_flag and following.startswith("--") else []
        return ours

    def take_texts_as_written(self) -> None:
        """Has options that are a text or null keep `# a` and `~`, which YAML reads as null.

        `null` itself still unsets what a file has.
        """
        for action in self._actions:
            if set(typing.get_args(getattr(action, "_typehint", None))) == {str, type(None)}:
                action._check_type = functools.partial(_text, action._check_type)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Says what is wrong; `run` prints it and exits with status 2."""
        raise ConfigError(self._explain(message, ex)) from None

    def _explain(self, message: str, ex: Exception | None) -> str:
        while ex is not None:
            if isinstance(ex, ConfigError):
                return str(ex)
            ex = ex.__cause__ or ex.__context__
        message = " ".join(message.split())
        if unknown := _UNKNOWN.search(message):
            return self._no_such_option(".".join(filter(None, unknown.groups())))
        if stray := re.search(r"unrecognized arguments: (\S+)", message):
            hint = "; a list is written '[a, b]'" if self._takes_config() else ""
            return f"the argument {stray[1]!r} belongs to no option{hint}"
        if "arguments are required: " in message and self._takes_config():
            return f"{message}; give options, or a --config file that has them"
        if wrong := _WRONG_TYPE.search(message):
            return f"{wrong[1]} is {wrong[3]}; it must be {_readable(wrong[2])}"
        if wrong := _WRONG_UNION.search(message):
            return f"{wrong[1]} is {wrong[3]}; it must be {_readable(wrong[2])}"
        return message

    def _takes_config(self) -> bool:
        return "--config" in self._option_string_actions

    def _no_such_option(self, name: str) -> str:
        known = [option for action in self._actions for option in action.option_strings]
        (near,) = difflib.get_close_matches(f"--{name.removeprefix('--')}", known, n=1) or [""]
        if not name.startswith("--"):  # of a YAML file
            near = near.removeprefix("--")
        hint = f"; did you mean {near}?" if near else ""
        return f"there is no option {name}{hint} (--help lists them)"


def _text(check: Callable, value: Any, **how: Any) -> Any:
    return value if isinstance(value, str) and value != "null" else check(value, **how)


# What jsonargparse says, and the parts of it that a user needs.
_UNKNOWN = re.compile(
    r"unrecognized arguments: (--[\w.-]+)|Option '([\w.]+)' is not accepted|"
    r"Group '([\w.]+)' does not accept option '([\w.]+)'"
)
_WRONG_TYPE = re.compile(r'^Parser key "([\w.]+)": Expected a (.+?)\. Got value: (.*)$')
_WRONG_UNION = re.compile(
    r'^Parser key "([\w.]+)": Does not validate .* Subtypes: \[(.*?)\] Errors: .* '
    r"Given value: (.*)$"
)


def _readable(types: str) -> str:
    types = re.sub(r"(?:value of type )?<class '(?:\w+\.)*(\w+)'>", r"\1", types)
    types = types.replace("typing.", "").replace(", ...]", "]")
    types = re.sub(r"Literal\[([^]]*)\]", r"one of \1", types)
    types = re.sub(r"\btuple\b", "list", types).replace("dict", "mapping")
    return types.replace(", NoneType", " or null")


def config_file(name: str) -> Path:
    """A YAML file, or the packaged config of that name (`quickstart`).

    Raises:
      ConfigError: neither exists.
    """
    path = Path(name)
    if path.is_file():
        return path
    packaged = packaged_configs()
    stem = path.name.removesuffix(".yaml")
    if (packaged / f"{stem}.yaml").is_file():
        return packaged / f"{stem}.yaml"
    known = ", ".join(sorted(p.stem for p in packaged.glob("*.yaml")))
    raise ConfigError(f"--config {name}: there is no such file; packaged configs: {known}")


def _check_yaml(file: Path, config_class: type) -> None:
    try:
        sections = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {file} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).replace('in "<unicode string>", ', "").split())
        raise ConfigError(f"--config {file} is not YAML: {reason}") from None
    if not isinstance(sections, dict):
        raise ConfigError(f"--config {file} has no options in it; a line is `name: value`")
    for name, field in config_class.__dataclass_fields__.items():
        section = sections.get(name, {})
        if dataclasses.is_dataclass(field.type) and not isinstance(section, dict):
            value = "empty" if section is None else section
            raise ConfigError(
                f"{name} in {file} is {value}; it is a section, with options under it"
            )


def read_text(option: str, path: str) -> str:
    """The content of a text file that an option names.

    Raises:
      ConfigError: it cannot be read, is not UTF-8, or is empty.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option} {path} cannot be read as text: {error}") from None
    if not text:
        raise ConfigError(f"{option} {path} is empty; it must have at least one character")
    return text


def check_new(option: str, path: Path, *, overwrite: bool, kind: str = "file") -> None:
    """Refuses to replace what is there, unless that is asked for.

    Args:
      option: that names the output.
      path: what will be written.
      overwrite: it may be replaced.
      kind: what the option names, a file or a folder of several.

    Raises:
      ConfigError: `path` exists.
    """
    if not overwrite and os.path.lexists(path):
        raise ConfigError(f"{option}: {path} exists; name a new {kind}, or give --overwrite true")


def check_file(option: str, path: Path, *, overwrite: bool) -> None:
    """Refuses a file that could not be written after long work; makes nothing.

    Args:
      option: that names the output.
      path: the file; its folder need not be there.
      overwrite: it may be replaced.

    Raises:
      ConfigError: it exists, is a folder, or cannot be made.
    """
    if os.path.isdir(path):
        raise ConfigError(f"{option} {path} is a folder; name a file")
    check_new(option, path, overwrite=overwrite)
    check_folder(option, path.parent)


def check_folder(option: str, folder: Path) -> None:
    """Refuses a folder that cannot be made, or not be written to; makes nothing.

    Raises:
      ConfigError: so it is.
    """
    folder = folder.absolute()
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not os.path.isdir(there):
        raise ConfigError(f"{option}: {there} is no folder; name a place where files can be made")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{option}: {there} may not be written to; name a place where files can be made"
        )


@contextlib.contextmanager
def writing(option: str) -> Iterator[None]:
    """Makes of what goes wrong with the files of an option a mistake of the user's.

    Raises:
      ConfigError: in place of an OSError inside.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{option} {error.filename} cannot be written: {error.strerror}"
        ) from None


def packaged_configs() -> Path:
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
      arguments: of the command line; None: sys.argv's. Options may
        have hyphens, and `true` may be left out.
      add: adds options that are not part of the config.

    Returns:
      The config, and the other options.
    """
    parser = Parser(prog=prog, description=description)
    parser.add_argument("--config", action="config", help="A YAML file, or a packaged config.")
    add(parser)
    parser.add_class_arguments(config_class, as_group=False)
    parser.take_texts_as_written()
    arguments = parser.spelt(list(sys.argv[1:] if arguments is None else arguments))
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name != "--config" or not (equals or i + 1 < len(arguments)):
            continue
        file = config_file(value if equals else arguments[i + 1])
        _check_yaml(file, config_class)
        if equals:
            arguments[i] = f"--config={file}"
        else:
            arguments[i + 1] = str(file)
    options = parser.parse_args(arguments)
    fields = config_class.__dataclass_fields__
    try:
        made = parser.instantiate(options)
    except ValueError as error:  # jsonargparse wraps what an optional section raises
        parser.error(str(error), error)
    config = config_class(**{name: made[name] for name in fields})
    return config, options


def run(main: Callable[[], object]) -> NoReturn:
    """Runs `main` and exits: a user's mistake is one sentence on stderr and status 2."""
    # Orbax and Grain warn of ordinary things.
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        main()
        raise SystemExit(0)
    except (ConfigError, MissingPackageError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1 if isinstance(error, TrainingError) else 2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
