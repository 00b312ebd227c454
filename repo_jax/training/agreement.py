"""What the processes of a run must have alike, lest they train on without noticing."""

import dataclasses
import json
import socket
from typing import Any

import jax

from repo_jax import distributed
from repo_jax.config import TrainConfig, to_dict
from repo_jax.data import Data
from repo_jax.errors import ConfigError


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
