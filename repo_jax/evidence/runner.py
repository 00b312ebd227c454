"""Runs the cells of a suite that are not done, and stops when asked to."""

import collections
import dataclasses
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from multiprocessing import connection
from pathlib import Path

import jax

from repo_jax.errors import ConfigError, TrainingError
from repo_jax.evidence import cell as cells
from repo_jax.evidence import results
from repo_jax.evidence.suite import Cell, Suite, definition
from repo_jax.evidence.worker import Worker
from repo_jax.training import lock
from repo_jax.training.stopping import Stop

_SECONDS_BETWEEN_LINES = 30.0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a call of `run_suite` came to.

    Attributes:
      done, total: cells of the suite.
      reason: why it stopped before the end: a signal's name, `time`; None: it is finished.
    """

    done: int
    total: int
    reason: str | None


def run_suite(
    suite: Suite, out: Path, *, command: str, workers: int | None = None, minutes: float | None
) -> Outcome:
    """Runs what is missing and writes results.json and results.csv.

    On a CPU each cell has a process with one core. Elsewhere cells run one after the other in
    this process, or the seeds of one method together if the suite says so.

    Args:
      suite: what is to be done.
      out: its folder, new or begun before; a cell that is done is kept, one that was half done is
        done again.
      command: for the results.
      workers: processes at a time on a CPU; None: as many as cores.
      minutes: after which nothing goes on; no cell is begun that would probably not end by then.

    Raises:
      ConfigError: the folder has other things, or cells of other definitions.
      TrainingError: a cell failed.
    """
    on_cpu = jax.default_backend() == "cpu"
    _check(suite, out, on_cpu)
    out.mkdir(parents=True, exist_ok=True)
    try:
        held = lock.hold(out)
        held.__enter__()
    except ConfigError as error:
        raise ConfigError(str(error).replace("--run_dir", "--out")) from None
    try:
        _begin(suite, out)
        run = _Run(suite, out, minutes)
        with Stop() as stop:
            if on_cpu:
                run.in_workers(stop, workers or _cores())
            else:
                run.here(stop)
        results.save(out, command)
        left = sum(map(len, run.missing()))
        total = len(suite.cells())
        return Outcome(total - left, total, (stop.reason or "time") if left else None)
    finally:
        held.__exit__(None, None, None)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check(suite: Suite, out: Path, on_cpu: bool) -> None:
    """Refuses what would fail later."""
    if suite.vmap_seeds and on_cpu:
        raise ConfigError("vmap_seeds is true; it must be false on a CPU")
    path = out / "suite.json"
    if not path.is_file() and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} is not empty and has no suite.json; name a new folder")
    found = json.loads(path.read_text()) if path.is_file() else {}
    for name, experiment in suite.experiments.items():
        ours = _plain(definition(experiment, suite.dtype))
        theirs = found.get(name, ours)
        for option in sorted({*ours, *theirs}):
            if ours.get(option) != theirs.get(option):
                raise ConfigError(
                    f"experiments.{name}.{option} is {ours.get(option)!r}, but {out} was begun "
                    f"with {theirs.get(option)!r}; keep that, or name another --out"
                )
        sets = experiment.task.evaluation_sets()
        known = [*sets, *dict.fromkeys(f"mean_{s.x}" for s in sets.values() if s.group)]
        for wanted in experiment.headline:
            if wanted not in known:
                raise ConfigError(
                    f"experiments.{name}.headline has {wanted!r}; there are {', '.join(known)}"
                )
    for cell in suite.cells():
        cell.method_and_model()


def _plain(value):
    return json.loads(json.dumps(value))


def _begin(suite: Suite, out: Path) -> None:
    """Notes the definitions that the folder's cells have."""
    path = out / "suite.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    found |= {name: definition(e, suite.dtype) for name, e in suite.experiments.items()}
    cells.write(path, json.dumps(found, indent=1) + "\n")


class _Run:
    """The state of a call of `run_suite`."""

    def __init__(self, suite: Suite, out: Path, minutes: float | None):
        self.suite, self.out = suite, out
        self.deadline = time.monotonic() + (math.inf if minutes is None else 60 * minutes)
        # Of the cells that are done, by experiment.
        self.seconds: dict[str, list[float]] = collections.defaultdict(list)
        for record in results.collect(out):
            self.seconds[record["experiment"]].append(record["seconds"])
        self.line_at = 0.0

    def missing(self) -> list[list[Cell]]:
        """What is left: one cell each, or the seeds of a method."""
        left = [c for c in self.suite.cells() if not cells.cell_path(self.out, c).is_file()]
        if not self.suite.vmap_seeds:
            return [[cell] for cell in left]
        groups: dict[tuple[str, str], list[Cell]] = {}
        for cell in left:
            groups.setdefault((cell.experiment, cell.method), []).append(cell)
        return list(groups.values())

    def in_workers(self, stop: Stop, limit: int) -> None:
        """Cells in processes, `limit` of them at a time."""
        waiting = [group[0] for group in self.missing()]
        running: dict[Worker, float] = {}
        self._say(waiting, {})
        try:
            while waiting or running:
                now = time.monotonic()
                if stop.requested() or now >= self.deadline:
                    return
                while len(running) < limit and (cell := self._next(waiting, running)):
                    waiting.remove(cell)
                    running[Worker(cell, self.out)] = time.monotonic()
                if not running:
                    return
                connection.wait([worker.sentinel for worker in running], timeout=0.5)
                for worker in list(running):
                    status = worker.poll()
                    if status is None:
                        continue
                    began = running.pop(worker)
                    if status:
                        raise TrainingError(
                            f"{worker.cell.name} failed with status {status}; its error is above"
                        )
                    self._finished(worker.cell, time.monotonic() - began, waiting, running)
                if time.monotonic() - self.line_at > _SECONDS_BETWEEN_LINES:
                    self._say(waiting, running)
        finally:
            for worker in running:
                worker.end()

    def here(self, stop: Stop) -> None:
        """Cells one after the other in this process."""

        def watch(step: int, loss: float) -> None:
            if stop.requested() or time.monotonic() >= self.deadline:
                raise _Stopped
            if time.monotonic() - self.line_at > _SECONDS_BETWEEN_LINES:
                self.line_at = time.monotonic()
                print(f"{group[0].name}: step {step}, loss {loss:.4f}", file=sys.stderr, flush=True)

        waiting = self.missing()
        while waiting and not stop.requested():
            fits = [group for group in waiting if self._fits(group[0])]
            if not fits:
                return
            group = fits[0]
            waiting.remove(group)
            began = time.monotonic()
            try:
                cells.run(group, self.out, watch)
            except _Stopped:
                return
            left = [cell for group in waiting for cell in group[:1]]
            self._finished(group[0], time.monotonic() - began, left, {})

    def _next(self, waiting: Sequence[Cell], running) -> Cell | None:
        return next((c for c in waiting if self._fits(c, running)), None)

    def _fits(self, cell: Cell, running=()) -> bool:
        """Whether it would probably end in time; unknown: yes."""
        expected = self._expected(cell, running)
        now = time.monotonic()
        return now < self.deadline and (expected is None or now + expected <= self.deadline)

    def _expected(self, cell: Cell, running) -> float | None:
        """Seconds of a cell: the mean of those of its experiment, done or far enough."""
        known = self.seconds[cell.experiment] or [
            (time.monotonic() - running[worker]) / worker.done
            for worker in running
            if worker.cell.experiment == cell.experiment and worker.done > 0.1
        ]
        return statistics.fmean(known) if known else None

    def _finished(self, cell: Cell, seconds: float, waiting, running) -> None:
        self.seconds[cell.experiment].append(seconds)
        print(f"{cell.name}: done in {seconds:.0f} s", file=sys.stderr, flush=True)
        self._say(waiting, running)

    def _say(self, waiting: Sequence[Cell], running) -> None:
        """One line: what is done, what runs, about how long it will be."""
        self.line_at = now = time.monotonic()
        total = len(self.suite.cells())
        done = sum(cells.cell_path(self.out, c).is_file() for c in self.suite.cells())
        parts = [f"{done} of {total} cells done"]
        parts += [
            f"{w.cell.name} {w.done:.0%}" + (f" (loss {w.loss:.3f})" if w.done else "")
            for w in running
        ]
        expected = [self._expected(cell, running) for cell in waiting]
        for worker, began in running.items():
            whole = self._expected(worker.cell, running)
            expected.append(None if whole is None else max(0.0, whole - (now - began)))
        if expected and None not in expected:
            parts.append(f"about {sum(expected) / max(1, len(running)) / 60:.0f} min left")
        print("; ".join(parts), file=sys.stderr, flush=True)


class _Stopped(Exception):
    """A cell was ended before its end."""
