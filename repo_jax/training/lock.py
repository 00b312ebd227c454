"""A lock on a folder, so that no two processes write one run."""

import contextlib
import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from repo_jax.errors import ConfigError

NAME = "lock"


@contextlib.contextmanager
def hold(folder: Path, option: str = "--run_dir") -> Iterator[None]:
    """Holds the lock of `folder`. The kernel lets it go when the process ends, however it ends.

    The file goes when the lock is given back, so that a start that is refused leaves nothing;
    that of a process that was killed stays, and bars no one. Where the file system has no locks,
    a line on standard error says so.

    Args:
      folder: which.
      option: names it, for what is said to the user.

    Raises:
      ConfigError: another process holds it.
    """
    path = folder / NAME
    while True:
        with path.open("a+") as file:
            _lock(file, folder, option)
            if not _is_at(file, path):
                continue  # its last holder removed it between our opening and our locking it
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is_at(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock(file: TextIO, folder: Path, option: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        raise ConfigError(
            f"{folder} is being written by {holder}; wait for it, stop it, or name another {option}"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
        print(
            f"{folder} is on a file system without locks ({error.strerror}): see to it that "
            "no other process writes it",
            file=sys.stderr,
        )
