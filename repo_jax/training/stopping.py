"""When a run stops before its end: SIGTERM, Ctrl-C, and notices of preemption."""

import os
import signal
from typing import Self

import jax
from jax.experimental import multihost_utils


class Stop:
    """Inside, notices are taken; `requested` asks for them.

    One process takes SIGTERM and Ctrl-C itself. Of several, whichever is told, JAX sees to it
    that all stop at the same call of `requested`; it takes SIGTERM when it starts. A second
    Ctrl-C interrupts.

    Attributes:
      reason: what came; None until all are to stop.
    """

    def __init__(self):
        self.reason: str | None = None
        self._asked = 0
        self._interrupted = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        """Takes over the signals."""
        several = jax.process_count() > 1
        handlers = {signal.SIGINT: self._forward} if several else {}
        handlers = handlers or dict.fromkeys((signal.SIGTERM, signal.SIGINT), self._note)
        try:
            self._before = {s: signal.signal(s, handler) for s, handler in handlers.items()}
        except ValueError:  # not in the main thread, where nobody can be told
            self._before = {}
        return self

    def __exit__(self, *_) -> None:
        """Gives the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        """Whether to stop now. Of several processes each must ask equally often."""
        if jax.process_count() > 1 and self.reason is None:
            self._asked += 1
            if multihost_utils.reached_preemption_sync_point(self._asked):
                self.reason = "preempted"
        return self.reason is not None

    def _note(self, number, frame):
        del frame
        if self.reason is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name

    def _forward(self, number, frame):
        del number, frame
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        os.kill(os.getpid(), signal.SIGTERM)
