"""How long steps take."""

import contextlib
import time
from collections.abc import Iterator


class StepTimer:
    """Seconds per step since the last lap; the first step, which compiles, does not count."""

    def __init__(self):
        self._lap_start: float | None = None
        self._lap_step = 0
        self._total = 0.0
        self._counted = 0

    def lap(self, step: int) -> float | None:
        """Seconds per step since the lap before; None at the first."""
        now = time.perf_counter()
        seconds = None
        if self._lap_start is not None and step > self._lap_step:
            elapsed = now - self._lap_start
            seconds = elapsed / (step - self._lap_step)
            self._total += elapsed
            self._counted += step - self._lap_step
        self._lap_start, self._lap_step = now, step
        return seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside does not count."""
        start = time.perf_counter()
        yield
        if self._lap_start is not None:
            self._lap_start += time.perf_counter() - start

    def mean_rate(self) -> float | None:
        """Steps per second over all laps."""
        return self._counted / self._total if self._total else None
