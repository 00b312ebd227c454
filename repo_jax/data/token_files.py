"""Token files: little-endian ids and nothing else, read by memory mapping.

The layout of OLMo's training data, whose files are named .npy and yet have no header.
"""

import contextlib
import errno
import math
import os
import resource
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from repo_jax.errors import ConfigError

DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}

_NUMPY = b"\x93NUMPY"

# Files of up to so many tokens have all ids checked when they are opened. Of longer ones some
# blocks are: a run may open hundreds of them, on every host.
_CHECKED_WHOLE = 2**24
_BLOCK = 2**16
_BLOCKS_OF_LONG_FILES = 16


def smallest_dtype(vocab_size: int) -> str:
    """`uint16` where all ids below `vocab_size` fit, else `uint32`."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def open_tokens(path: str | Path, dtype: str, vocab_size: int | None = None) -> np.ndarray:
    """Maps a token file into memory, without reading it.

    Args:
      path: the file.
      dtype: `uint16` or `uint32`.
      vocab_size: ids must be below it; None: they are not checked.

    Returns:
      [tokens], read-only; nothing is read from disk before it is indexed.

    Raises:
      ConfigError: the file is missing, empty or cut short, has numpy's header, or has ids
        of `vocab_size` or more. Of long files only samples are checked.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"token file {path} does not exist")
    count_tokens(path, path.stat().st_size, dtype)
    with path.open("rb") as file:
        check_header(path, file.read(len(_NUMPY)))
    tokens = np.memmap(path, DTYPES[dtype], mode="r")
    if vocab_size is not None:
        whole = len(tokens) <= _CHECKED_WHOLE
        blocks = math.ceil(len(tokens) / _BLOCK) if whole else _BLOCKS_OF_LONG_FILES
        for start in np.linspace(0, max(0, len(tokens) - _BLOCK), blocks).astype(int):
            check_ids(tokens[start : start + _BLOCK], vocab_size, str(path))
    return tokens


# Files, sockets and devices that a process has open besides token files.
_OTHER_FILES = 512


@contextlib.contextmanager
def opening(count: int) -> Iterator[None]:
    """Lets `count` token files be opened inside: a file that is mapped counts as an open one.

    Raises:
      ConfigError: this process may not open so many.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # where the system has a limit of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    try:
        yield
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        raise ConfigError(
            f"{count} token files cannot be open at once, since a process may have {limit} open "
            "files here; raise that limit (ulimit -Hn), or join files"
        ) from None


def count_tokens(path: str | Path, size: int, dtype: str) -> int:
    """Tokens in a file of `size` bytes; ConfigError for none, or no whole number of them."""
    itemsize = DTYPES[dtype].itemsize
    if size == 0:
        raise ConfigError(f"token file {path} is empty")
    if size % itemsize:
        raise ConfigError(
            f"token file {path} has {size} bytes, which is no multiple of {itemsize} "
            f"({dtype}); it is cut short or of another dtype"
        )
    return size // itemsize


def check_header(path: str | Path, start: bytes) -> None:
    """Raises ConfigError if a file that starts so is in numpy's format."""
    if start.startswith(_NUMPY):
        raise ConfigError(
            f"token file {path} is in numpy's format; token files have no header: write "
            "the array with its tofile()"
        )


def check_ids(tokens: np.ndarray, vocab_size: int, where: str) -> None:
    """Raises ConfigError if an id is `vocab_size` or more; `where` names the file."""
    largest = int(tokens.max(initial=0))
    if largest >= vocab_size:
        raise ConfigError(
            f"{where} has the token id {largest}; the vocabulary has {vocab_size} entries, or "
            "the file is not of the given dtype"
        )


class TokenWriter:
    """Writes a token file as a stream; a context manager.

    The file appears under its name when the block ends well, complete; after an exception
    nothing is left.

    Args:
      path: must not exist.
      dtype: `uint16` or `uint32`.

    Raises:
      ConfigError: `path` exists, on entry or at the end.
    """

    def __init__(self, path: str | Path, dtype: str):
        self._path = Path(path)
        self._dtype = DTYPES[dtype]
        self._partial = self._path.with_name(f".{self._path.name}.{secrets.token_hex(4)}")
        self.tokens = 0

    def __enter__(self) -> Self:
        """Opens a file of a temporary name beside `path`."""
        self._refuse_existing()
        self._file = self._partial.open("xb")
        return self

    def write(self, ids: Sequence[int] | np.ndarray) -> None:
        """Appends ids; OverflowError for one that does not fit the dtype."""
        ids = np.asarray(ids, np.int64)
        if len(ids) and not 0 <= ids.min() <= ids.max() <= np.iinfo(self._dtype).max:
            raise OverflowError(f"ids {ids.min()} to {ids.max()} do not fit {self._dtype}")
        self._file.write(ids.astype(self._dtype).tobytes())
        self.tokens += len(ids)

    def __exit__(self, kind, error, traceback) -> None:
        """Gives the file its name, or removes it after an exception."""
        self._file.close()
        try:
            if kind is None:
                self._refuse_existing()
                os.rename(self._partial, self._path)
        finally:
            self._partial.unlink(missing_ok=True)

    def _refuse_existing(self) -> None:
        if self._path.exists():
            raise ConfigError(f"token file {self._path} already exists and is not overwritten")
