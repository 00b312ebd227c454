"""Answers to requests on disk, so that an evaluation which was stopped goes on."""

import hashlib
import json
import sqlite3
from pathlib import Path
from typing import Any

from repo_jax.errors import ConfigError


class RequestCache:
    """Answers by what was asked of which model; each is kept as soon as it is known.

    JSON in SQLite: unlike lm-eval's own cache it unpickles nothing, and its keys name the model.

    Args:
      path: the file; made if it is not there.

    Raises:
      ConfigError: the file is something else, or cannot be made.
    """

    def __init__(self, path: str | Path):
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, isolation_level=None)
            # A commit then costs no wait for the disk, and outlives the process.
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer)")
        except (OSError, sqlite3.DatabaseError) as error:
            raise ConfigError(f"{path} is no cache of requests: {error}") from None

    def get(self, *key: Any) -> Any:
        """The answer, or None."""
        found = self._db.execute("SELECT answer FROM answers WHERE key = ?", (_digest(key),))
        row = found.fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, *key: Any, answer: Any) -> None:
        """Keeps an answer."""
        row = (_digest(key), json.dumps(answer))
        self._db.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", row)

    def __len__(self) -> int:
        return self._db.execute("SELECT COUNT(*) FROM answers").fetchone()[0]


def _digest(key: Any) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
