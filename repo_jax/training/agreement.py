"""What the processes of a run must have alike, lest they train on without noticing."""

import contextlib
import dataclasses
import json
import secrets
import socket
from pathlib import Path
from typing import Any

import jax
from etils import epath

from repo_jax import distributed
from repo_jax.config import TrainConfig, to_dict
from repo_jax.data import Data
from repo_jax.errors import ConfigError
from repo_jax.training.checkpoint_files import checkpoint_folder


def check_options(config: TrainConfig) -> None:
    """Raises ConfigError in all processes unless all have the same options.

    But for those that say how data are read: machines may keep their cache elsewhere.
    """
    options = to_dict(config)
    del options["data"]["cache_dir"], options["data"]["prefetch"]
    first, *others = distributed.exchange(options)
    for process, theirs in enumerate(others, start=1):
        if not _alike(theirs, first):
            name, there, here = _difference(theirs, first)
            raise ConfigError(
                f"{name} is {there!r} in process {process}, but {here!r} in process 0; start "
                "all processes with the same options"
            )


def _alike(one: Any, other: Any) -> bool:
    """Whether two values are equal, the order of their keys included: patterns are tried in it."""
    return json.dumps(one) == json.dumps(other)


def _difference(one: Any, other: Any, name: str = "") -> tuple[str, Any, Any]:
    """The first option that differs, and both its values."""
    if isinstance(one, dict) and isinstance(other, dict) and list(one) == list(other):
        key = next(key for key in one if not _alike(one[key], other[key]))
        return _difference(one[key], other[key], f"{name}.{key}" if name else key)
    return name, one, other


def check_data(data: Data) -> None:
    """Raises ConfigError in all processes unless all have the same tokens, see `fingerprint`."""
    if jax.process_count() == 1:
        return
    held_out = dataclasses.replace(data, train=data.validation, source_of=())
    facts = lambda part: [part.fingerprint, sum(map(len, part.train)), len(part.train)]
    mine = lambda: {"train on": facts(data), "validate on": facts(held_out)}
    first, *others = distributed.exchange([socket.gethostname(), distributed.everywhere(mine)])
    for process, (host, theirs) in enumerate(others, start=1):
        for what, (fingerprint, tokens, files) in theirs.items():
            its_fingerprint, its_tokens, its_files = first[1][what]
            if fingerprint != its_fingerprint:
                raise ConfigError(
                    f"the tokens to {what} of process {process} on {host} ({tokens:,} in {files} "
                    f"files) are not those of process 0 on {first[0]} ({its_tokens:,} in "
                    f"{its_files} files); bring the same files to every machine"
                )


def check_folder(run_dir: Path, checkpoint_dir: str | None) -> None:
    """Raises ConfigError in all processes unless all see where checkpoints are to be written.

    Args:
      run_dir, checkpoint_dir: as of `checkpoint_folder`; the first is there.
    """
    if jax.process_count() == 1:
        return
    folder = distributed.everywhere(lambda: checkpoint_folder(run_dir, checkpoint_dir))
    up, name = distributed.on_main(lambda: _leave_file(folder))
    probe = (folder, *folder.parents)[up] / name
    try:
        seen = distributed.everywhere(probe.exists)
        told = distributed.exchange([socket.gethostname(), seen, str(folder)])
    finally:
        if distributed.is_main():
            with contextlib.suppress(OSError):
                probe.unlink()
    first_host, _, place = told[0]
    for process, (host, seen, _) in enumerate(told):
        if not seen:
            raise ConfigError(
                f"process {process} on {host} does not see what process 0 on {first_host} writes "
                f"to {place}; training.checkpoint_dir must name a folder that all machines "
                "share, or an object store"
            )


def _leave_file(folder: epath.Path) -> tuple[int, str]:
    """How far above `folder`, and under which name: nothing is made that would stay."""
    places = [folder] if "://" in str(folder) else [folder, *folder.parents]
    up = next((i for i, place in enumerate(places) if place.exists()), 0)
    name = f"shared-{secrets.token_hex(8)}.tmp"
    try:
        (places[up] / name).write_text("Whether all processes see this.")
    except OSError as error:
        raise ConfigError(
            f"checkpoints cannot be written to {folder}: {error.strerror or error}; name another "
            "training.checkpoint_dir or --run_dir"
        ) from None
    return up, name
