"""A process for one cell on one core of a CPU, so that numbers depend on no thread count."""

import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path

from repo_jax.evidence.suite import Cell

# XLA makes its pool of threads as large as NPROC says, and Eigen's products use none of it.
_ONE_CORE = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "NPROC": "1"}


class Worker:
    """A running cell.

    Attributes:
      cell: which.
      done: share of its steps.
      loss: at the last step that was heard of.
    """

    def __init__(self, cell: Cell, out: Path):
        self.cell, self.done, self.loss = cell, 0.0, float("nan")
        context = multiprocessing.get_context("spawn")
        self._reports, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=_work, args=(cell, out, sender), daemon=True)
        self._process.start()
        sender.close()

    def poll(self) -> int | None:
        """Hears what it says; its exit status, or None while it runs."""
        try:
            while self._reports.poll():
                steps, self.loss = self._reports.recv()
                self.done = steps / self.cell.definition.steps
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


def _work(cell: Cell, out: Path, reports: Connection) -> None:
    import signal

    # Ctrl-C goes to all processes of a terminal; the runner decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ |= _ONE_CORE
    import jax

    # Read when the module was imported, before this.
    jax.config.update("jax_platforms", "cpu")
    from repo_jax.evidence.cell import run

    parent = os.getppid()

    def watch(step: int, loss: float) -> None:
        if os.getppid() != parent:
            raise SystemExit("the runner is gone")
        reports.send((step, loss))

    run([cell], out, watch)
