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


def field(row: dict, path: Path, name: str) -> Any:
    """What a row has under a name.

    Raises:
      ConfigError: it has no such name.
    """
    if name not in row:
        raise ConfigError(f"a row of {path} has no {name}; it has {', '.join(row)}")
    return row[name]
