"""A process for one cell on one core of a CPU, so that numbers depend on no thread count."""

import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path

from repo_jax.evidence.suite import Cell

# XLA makes its pool of threads as large as NPROC says, and Eigen's products use none of it.
_ONE_CORE = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "NPROC": "1"}


class Pace:
    """How long a cell takes, from its own first and last chunks of steps.

    Attributes:
      seconds: about how many from beginning to end; None: not known yet.
    """

    def __init__(self, steps: int):
        self._steps, self._began = steps, time.monotonic()
        self._first: tuple[float, int] | None = None
        self.seconds: float | None = None

    def heard(self, step: int) -> None:
        """So many steps are done now."""
        now = time.monotonic() - self._began
        if self._first is None:
            self._first = now, step
        elif step > self._first[1]:
            # Compiling is in the first chunk.
            begin, first = self._first
            self.seconds = begin + (now - begin) / (step - first) * (self._steps - first)


class Worker:
    """A running cell.

    Attributes:
      cell: which.
      done: share of its steps.
      loss: at the last step that was heard of.
      seconds: that it will probably take in all; None: not known yet.
    """

    def __init__(self, cell: Cell, out: Path, commit: str):
        self.cell, self.done, self.loss = cell, 0.0, float("nan")
        self.seconds: float | None = None
        context = multiprocessing.get_context("spawn")
        self._reports, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=_work, args=(cell, out, commit, sender), daemon=True)
        self._process.start()
        sender.close()

    def poll(self) -> int | None:
        """Hears what it says; its exit status, or None while it runs."""
        try:
            while self._reports.poll():
                steps, self.loss, self.seconds = self._reports.recv()
                self.done = steps / self.cell.definition.all_steps
        except EOFError:
            pass
        return self._process.exitcode

    @property
    def sentinel(self) -> int:
        """Ready when the process has ended."""
        return self._process.sentinel

    def end(self) -> None:
        """Ends it now; nothing of it counts."""
        self._process.kill()
        self._process.join()


def _work(cell: Cell, out: Path, commit: str, reports: Connection) -> None:
    import signal

    # Ctrl-C goes to all processes of a terminal; the runner decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ |= _ONE_CORE
    import jax

    # Read when the module was imported, before this.
    jax.config.update("jax_platforms", "cpu")
    from repo_jax.evidence.cell import run

    parent, pace = os.getppid(), Pace(cell.definition.all_steps)

    def watch(step: int, loss: float) -> None:
        if os.getppid() != parent:
            raise SystemExit("the runner is gone")
        pace.heard(step)
        reports.send((step, loss, pace.seconds))

    run([cell], out, watch, commit=commit)
