"""How far long work is: a bar on a terminal, else some lines."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 30.0


class Lines:
    """When a log of long work gets a line: as soon as `due`, at first half a minute from now."""

    def __init__(self):
        self.written()

    def written(self) -> None:
        """One was, due or not."""
        self._at = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether the last one was long ago."""
        return time.monotonic() - self._at >= _SECONDS_BETWEEN_LINES


@contextlib.contextmanager
def progress(task: str, total: int, unit: str) -> Iterator[Callable[[int], object]]:
    """Gives a function to call with how much more was done.

    Args:
      task: what is done, for the reader.
      total: how much there is to do.
      unit: of `total`, such as `batches`; `B` are bytes, and read as MB.
    """
    is_bytes = unit == "B"
    if sys.stderr.isatty():
        with tqdm(total=total, desc=task, unit=unit, unit_scale=is_bytes, leave=False) as bar:
            yield bar.update
        return
    done, start, lines = 0, time.monotonic(), Lines()
    scale, name = (1e6, "MB") if is_bytes else (1, unit)

    def update(more: int) -> None:
        nonlocal done
        done += more
        if lines.due:
            lines.written()
            seconds = time.monotonic() - start
            print(
                f"{task}: {done / scale:.0f} of {total / scale:.0f} {name} in {seconds:.0f} s",
                file=sys.stderr,
                flush=True,
            )

    yield update
