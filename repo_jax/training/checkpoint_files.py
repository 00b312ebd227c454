"""Where the checkpoints of a run are, and what is beside the arrays of each."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from repo_jax.errors import ConfigError, MissingPackageError, TrainingError

# Packages and extras by the scheme of an object store's URL.
_STORES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}

# Errors that say nothing about a checkpoint: others may read it, or the same process later.
_ELSEWHERE = (PermissionError, ConnectionError, TimeoutError, MemoryError, ImportError)
_ELSEWHERE_WORDS = re.compile(
    "PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED"
)


class DamagedCheckpoint(Exception):
    """A checkpoint is not what was saved; the message says what is wrong with it."""


def checkpoint_folder(run_dir: Path, checkpoint_dir: str | None = None) -> epath.Path:
    """Where the checkpoints of a run are: `checkpoint_dir`, a folder or gs:// or s3://, if given.

    Raises:
      ConfigError: it is in a kind of store that checkpoints cannot be in.
      MissingPackageError: an object store needs a package that is not installed.
    """
    if checkpoint_dir is None:
        return epath.Path((Path(run_dir) / "checkpoints").absolute())
    scheme, separator, _ = checkpoint_dir.partition("://")
    if not separator:
        return epath.Path(Path(checkpoint_dir).expanduser().absolute())
    if scheme not in _STORES:
        raise ConfigError(
            f"training.checkpoint_dir is {checkpoint_dir}; it must be a folder, or start with "
            + " or ".join(f"{name}://" for name in _STORES)
        )
    package, extra = _STORES[scheme]
    try:
        __import__(package)
    except ImportError:
        raise MissingPackageError(package, f"training.checkpoint_dir {scheme}://", extra) from None
    return epath.Path(checkpoint_dir)


def saved_steps(folder: epath.Path) -> list[int]:
    """The steps of the checkpoints in a folder, those that are still written left out."""
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []


def read_record(folder: epath.Path, step: int) -> dict[str, Any]:
    """What `Checkpoints.save` was given beside arrays; no validation is due after `add_loss`.

    Raises:
      DamagedCheckpoint: it cannot be read, or is not what was saved.
    """
    with reading():
        stored = ocp.JsonCheckpointHandler().restore(folder / str(step) / "data")
        scored = loss_file(folder, step).exists()
    record = {name: value for name, value in stored.items() if name != "digest"}
    if stored.get("digest") != digest(record):
        raise DamagedCheckpoint("data is not what was saved")
    if scored and "validation_due" in record:
        record["validation_due"] = False
    return record


def loss_file(folder: epath.Path, step: int) -> epath.Path:
    """Where Orbax's manager keeps what it is told to compare checkpoints by."""
    return folder / str(step) / "metrics" / "metrics"


def digest(record: dict[str, Any]) -> str:
    """A hash of what is beside arrays, for it to be saved with."""
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=8).hexdigest()


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Turns what reading raises into `DamagedCheckpoint`, unless it says nothing about the data."""
    try:
        yield
    except (ConfigError, MissingPackageError):
        raise
    except Exception as error:
        why = reason(error)
        if isinstance(error, _ELSEWHERE) or _ELSEWHERE_WORDS.search(why):
            raise TrainingError(f"a checkpoint cannot be read: {why}") from error
        raise DamagedCheckpoint(why) from error


def reason(error: BaseException) -> str:
    """What the innermost error says, on one line, the operating system's words if it has some."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}"
    text = " ".join(str(error).split())
    if number := re.search(r"os_error_code='(\d+)'", text):
        return os.strerror(int(number[1]))
    text = re.sub(r" \[\w+=.*", "", text)
    return text or type(error).__name__
