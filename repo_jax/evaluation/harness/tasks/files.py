"""Reading a user's copies of data sets."""

import json
from pathlib import Path
from typing import Any

from repo_jax.errors import ConfigError


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
      ConfigError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None


def field(row: dict, path: Path, *names: str) -> Any:
    """The first of `names` that a row has.

    Raises:
      ConfigError: it has none of them.
    """
    for name in names:
        if name in row:
            return row[name]
    raise ConfigError(f"a row of {path} has no {' or '.join(names)}; it has {', '.join(row)}")
