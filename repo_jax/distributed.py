"""Several processes that run one program: how they start, and what they agree on.

Every process calls the same functions in the same order. What one process finds out alone, such
as a mistake in a file, is exchanged before anyone acts on it, so that none waits for others that
are gone.
"""

import itertools
import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from repo_jax.errors import ConfigError, TrainingError

Result = TypeVar("Result")

# How long a process that ends waits for the others; they may all be stuck in a collective with it.
_SHUTDOWN_SECONDS = 60

# How long processes wait for one that is at work alone.
_PATIENCE_SECONDS = 24 * 3600

_meetings = itertools.count()  # every process counts the same


def add_options(parser) -> None:
    """Adds the options that `start` takes to a command's parser."""
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="One of several processes, found out from the TPU pod, SLURM or Open MPI.",
    )
    parser.add_argument(
        "--coordinator", type=str, help="Instead: address of process 0, as host:port."
    )
    parser.add_argument("--num_processes", type=int, help="With --coordinator: of how many.")
    parser.add_argument("--process_id", type=int, help="With --coordinator: which one, from 0.")


def start(
    *,
    auto: bool = False,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins the other processes; does nothing if no option is given.

    To be called before anything touches a device.

    Args:
      auto: find out the rest from a TPU pod, SLURM or Open MPI.
      coordinator: host:port of process 0, which opens the port.
      num_processes, process_id: how many there are, and which this one is. It takes all devices
        that it sees; found out from SLURM or Open MPI, it takes one GPU.

    Raises:
      ConfigError: the options do not belong together, or no such processes are found.
    """
    given = {
        "--coordinator": coordinator,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        if not auto:
            return
    elif missing:
        there = [name for name in given if name not in missing]
        raise ConfigError(
            f"{' and '.join(there)} without {' and '.join(missing)}; give all three, "
            "or --distributed alone"
        )
    else:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError(f"--coordinator is {coordinator}; it must be host:port")
        if not 0 <= process_id < num_processes:
            raise ConfigError(
                f"--process_id is {process_id}; with --num_processes {num_processes} it must be "
                f"0 to {num_processes - 1}"
            )
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            # Else a SLURM job around it would still choose the process's GPU.
            cluster_detection_method=None if missing else "deactivate",
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        if missing:
            raise ConfigError(
                f"--distributed finds no TPU pod, SLURM job or Open MPI here ({reason}); "
                "give --coordinator, --num_processes and --process_id"
            ) from None
        raise ConfigError(
            f"process {process_id} of {num_processes} cannot join --coordinator {coordinator}: "
            f"{reason}"
        ) from None


def is_main() -> bool:
    """Whether this is process 0, which alone writes what is written once."""
    return jax.process_index() == 0


def exchange(value: Any) -> list[Any]:
    """What each process gives, in their order. Values are such as JSON holds."""
    if jax.process_count() == 1:
        return [value]
    _meet()
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(text)] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:n])) for row, n in zip(rows, lengths, strict=True)]


def _meet() -> None:
    """Waits until all processes are here, while one may download or tokenise for hours.

    By JAX's coordination service, which also notices who is gone. A collective would give up
    after half a minute on CPUs, after minutes on GPUs.
    """
    from orbax.checkpoint import multihost

    wait = multihost.get_barrier_sync_fn()
    wait(key=f"repo_jax.{next(_meetings)}", timeout_ms=1000 * _PATIENCE_SECONDS)


def everywhere(action: Callable[[], Result]) -> Result:
    """The action's result here; if it fails in any process, all raise.

    Raises:
      ConfigError, TrainingError: what the first process that failed says.
    """
    if jax.process_count() == 1:
        return action()
    try:
        result, error = action(), None
    except Exception as raised:
        error = raised
    told = exchange(error and [isinstance(error, (ConfigError, ImportError)), str(error)])
    if error is not None:
        raise error
    for process, failure in enumerate(told):
        if failure:
            mistake, message = failure
            raise (ConfigError if mistake else TrainingError)(f"process {process}: {message}")
    return result


def on_main(action: Callable[[], Result]) -> Result:
    """The result in process 0, where alone the action runs; such as JSON holds.

    Raises:
      ConfigError, TrainingError: what process 0 says.
    """
    result = everywhere(lambda: action() if is_main() else None)
    return exchange(result)[0]


def main_first(action: Callable[[], Result]) -> Result:
    """`everywhere`, but process 0 goes ahead, so that others find what it leaves, say a cache."""
    done: list[Result] = []
    on_main(lambda: done.append(action()))
    return everywhere(lambda: done[0] if done else action())
