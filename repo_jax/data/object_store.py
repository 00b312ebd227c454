"""Token files in object stores, by URL: gs://, s3:// and whatever else fsspec reads.

A file is never copied or read whole. What is needed of it is read by byte ranges, many at a
time. A read that fails is tried again for about a minute, beside what the store's own package
does.
"""

import glob
import itertools
import random
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from repo_jax.data import token_files
from repo_jax.errors import ConfigError, MissingPackageError, TrainingError

Result = TypeVar("Result")

# Package and extra by the scheme of a URL.
_PACKAGES = {"gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}

# What their file systems are told, unless fsspec's own configuration says it: connections
# enough for a batch at once where ten are usual, and an end to waiting where there is none.
_OPTIONS = {
    "s3": {"config_kwargs": {"max_pool_connections": 64}},
    "gs": {"requests_timeout": 60.0},
    "gcs": {"requests_timeout": 60.0},
}

# Seconds before each new attempt, shortened at random so that hosts do not come back together.
_WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
_FAILURES_BEFORE_A_WORD = 3

# What no waiting cures.
_PERMANENT = (PermissionError, IsADirectoryError, ValueError, TypeError)

# Ids at each end of a file that are looked at when it is opened.
_SAMPLE = 4096


def is_url(path: str) -> bool:
    """Whether `path` names something in an object store."""
    return re.match(r"[a-z][a-z0-9+.-]+://", path) is not None


class StoredTokens:
    """A token file in an object store, or part of one; [tokens].

    A slice is such an array again. `np.asarray` reads it; `read` reads many at once.

    Attributes:
      filename: the URL.
      dtype: of the ids.
    """

    def __init__(self, filename: str, store: Any, path: str, dtype: np.dtype, part: range):
        self.filename, self.dtype = filename, dtype
        self._store, self._path, self._part = store, path, part

    def __len__(self) -> int:
        return len(self._part)

    def __getitem__(self, part: slice) -> "StoredTokens":
        part = self._part[part]
        return StoredTokens(self.filename, self._store, self._path, self.dtype, part)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        (tokens,) = read([self])
        return np.array(tokens, dtype or self.dtype)

    @property
    def _bytes(self) -> tuple[int, int]:
        return tuple(i * self.dtype.itemsize for i in (self._part.start, self._part.stop))


# Of a file: [tokens], in memory, mapped, or in an object store.
Tokens = np.ndarray | StoredTokens


def find(url: str, dtype: str) -> list[StoredTokens]:
    """The file at `url`, or those that it matches as a glob; reads nothing of them.

    Args:
      url: of a file or a glob.
      dtype: `uint16` or `uint32`.

    Raises:
      ConfigError: there are none, they cannot be read, or a size is no whole number of ids.
      MissingPackageError: the package for this kind of store is not installed.
      TrainingError: the store does not answer.
    """
    store, path = _connect(url)
    if not glob.has_magic(path):
        found = {path: _persist(url, lambda: store.info(path))}
    else:
        found = _persist(url, lambda: store.glob(path, detail=True))
        found = {name: info for name, info in sorted(found.items()) if info["type"] == "file"}
        if not found:
            raise ConfigError(f"the token files {url!r} match nothing")
    files = []
    for name, info in found.items():
        filename = store.unstrip_protocol(name)
        if info["type"] != "file":
            raise ConfigError(f"{filename} is a folder; name token files, or a glob of them")
        count = token_files.count_tokens(filename, info["size"], dtype)
        files.append(StoredTokens(filename, store, name, token_files.DTYPES[dtype], range(count)))
    return files


def check(files: Sequence[StoredTokens], vocab_size: int | None) -> None:
    """Looks at both ends of all files: their header, and ids if there is a `vocab_size`.

    Raises:
      ConfigError: a file has numpy's header or ids of `vocab_size` or more, or is gone.
      TrainingError: the store does not give one.
    """
    heads = read([file[:_SAMPLE] for file in files])
    tails = read([file[-_SAMPLE:] for file in files])
    for file, head, tail in zip(files, heads, tails, strict=True):
        token_files.check_header(file.filename, head.tobytes())
        if vocab_size is not None:
            token_files.check_ids(head, vocab_size, file.filename)
            token_files.check_ids(tail, vocab_size, file.filename)


def read(parts: Sequence[Tokens]) -> list[np.ndarray]:
    """Reads parts of files, those of one store all at once; local arrays stay as they are.

    Raises:
      ConfigError: a file is gone or may not be read.
      TrainingError: the store does not give one, again and again.
    """
    tokens = list(parts)
    missing = [i for i, part in enumerate(parts) if isinstance(part, StoredTokens)]
    for attempt in itertools.count(1):
        errors = {}
        for i, answer in zip(missing, _ask([parts[i] for i in missing]), strict=True):
            if isinstance(answer, Exception):
                errors[i] = answer
            else:
                tokens[i] = np.frombuffer(answer, parts[i].dtype)
        if not errors:
            return tokens
        missing = list(errors)
        _wait(attempt, parts[missing[0]].filename, errors[missing[0]])


def _ask(parts: Sequence[StoredTokens]) -> list[bytes | Exception]:
    """What the stores answer, once, to a request for the bytes of each part."""
    answers: list[bytes | Exception] = [b""] * len(parts)
    for store in {id(part._store): part._store for part in parts}.values():
        here = [i for i, part in enumerate(parts) if part._store is store]
        starts, ends = zip(*(parts[i]._bytes for i in here), strict=True)
        paths = [parts[i]._path for i in here]
        try:
            found = store.cat_ranges(paths, list(starts), list(ends), on_error="return")
        except Exception as error:  # each store has kinds of its own
            found = [error] * len(here)
        for i, answer, start, end in zip(here, found, starts, ends, strict=True):
            cut = not isinstance(answer, Exception) and len(answer) != end - start
            answers[i] = OSError(f"{len(answer)} of {end - start} bytes came") if cut else answer
    return answers


def _persist(url: str, ask: Callable[[], Result]) -> Result:
    """What `ask` returns, at whichever attempt."""
    for attempt in itertools.count(1):
        try:
            return ask()
        except Exception as error:  # each store has kinds of its own
            _wait(attempt, url, error)


def _wait(attempt: int, url: str, error: Exception) -> None:
    """Waits until the next attempt, or raises if there is to be none."""
    if isinstance(error, FileNotFoundError):
        raise ConfigError(f"token file {url} does not exist") from error
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, _PERMANENT):
        raise ConfigError(f"{url} cannot be read: {reason}") from error
    if attempt > len(_WAITS):
        raise TrainingError(f"{url} cannot be read, in {attempt} attempts: {reason}") from error
    if attempt == _FAILURES_BEFORE_A_WORD:
        print(
            f"{url} could not be read {attempt} times ({reason}); trying on",
            file=sys.stderr,
            flush=True,
        )
    time.sleep(_WAITS[attempt - 1] * random.uniform(0.5, 1.0))


def _connect(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    scheme = url.partition("://")[0]
    try:
        import fsspec

        configured = fsspec.config.conf.get(scheme, {})
        options = _OPTIONS.get(scheme, {}).items()
        return fsspec.url_to_fs(url, **{k: v for k, v in options if k not in configured})
    except (ImportError, ValueError) as error:
        if scheme in _PACKAGES and isinstance(error, ImportError):
            package, extra = _PACKAGES[scheme]
            raise MissingPackageError(package, f"reading {url}", extra) from None
        raise ConfigError(f"{url} is of no kind of store that can be read: {error}") from None
