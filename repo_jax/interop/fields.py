"""Typed reading of a config written by someone else."""

from typing import Any

from repo_jax.errors import ConfigError

_REQUIRED = object()


class Fields:
    """The fields of a config of the file `where`; a wrong one is a ConfigError naming it.

    A field that is null counts as missing.
    """

    def __init__(self, data: dict[str, Any], where: str):
        self.data = data
        self.where = where

    def __contains__(self, name: str) -> bool:
        """Whether the field has a value."""
        return self.data.get(name) is not None

    def error(self, name: str, right: str) -> ConfigError:
        """What to raise about the value that `name` has."""
        return ConfigError(f"{self.where}: {name} is {self.data.get(name)!r}; {right}")

    def get(self, name: str, default: Any = _REQUIRED) -> Any:
        """The value, or the default where there is one."""
        if name in self:
            return self.data[name]
        if default is _REQUIRED:
            raise ConfigError(f"{self.where}: {name} is missing")
        return default

    def must_be(self, name: str, value: Any, default: Any) -> None:
        """Refuses another value; `default` is what a missing field means to its writer."""
        if self.get(name, default) != value:
            raise self.error(name, f"only {value!r} is supported")

    def integer(self, name: str, default: Any = _REQUIRED) -> Any:
        """A whole number."""
        value = self.get(name, default)
        if value is not default and (isinstance(value, bool) or not isinstance(value, int)):
            raise self.error(name, "it must be a whole number")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> Any:
        """A number, as float; also as text, which is how YAML 1.1 reads 1e-6."""
        value = self.get(name, default)
        if value is default:
            return value
        try:
            if isinstance(value, bool):
                raise TypeError
            return float(value)
        except (TypeError, ValueError):
            raise self.error(name, "it must be a number") from None

    def integers(self, name: str) -> tuple[int, ...]:
        """One whole number, a list of them, or nothing."""
        value = self.get(name, ())
        values = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
            raise self.error(name, "it must be a whole number or a list of them")
        return tuple(values)

    def section(self, name: str) -> "Fields":
        """A nested object; empty where it is missing."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise self.error(name, "it must be an object")
        return Fields(value, f"{self.where}: {name}")
