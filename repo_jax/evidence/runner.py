"""Runs the cells of a suite that are not done, and stops when asked to."""

import collections
import dataclasses
import json
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

import jax

from repo_jax.errors import ConfigError
from repo_jax.evidence import about, results
from repo_jax.evidence import cell as cells
from repo_jax.evidence.suite import Cell, Suite, definition
from repo_jax.evidence.worker import Pace, Worker
from repo_jax.progress import Lines
from repo_jax.training import lock
from repo_jax.training.stopping import Stop


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a call of `run_suite` came to.

    Attributes:
      done, total: cells of the suite.
      reason: why it stopped before the end: a signal's name, `time`; None: it did not.
      failed: names of the cells that ended with an error.
    """

    done: int
    total: int
    reason: str | None
    failed: tuple[str, ...] = ()


def run_suite(
    suite: Suite, out: Path, *, command: str, workers: int | None = None, minutes: float | None
) -> Outcome:
    """Runs what is missing and writes results.json and results.csv.

    On a CPU each cell has a process with one core. Elsewhere cells run one after the other in
    this process, or the seeds of one method together if the suite says so. A cell that fails is
    noted, and the others go on.

    Args:
      suite: what is to be done.
      out: its folder, new or begun before; a cell that is done is kept, one that was half done is
        done again.
      command: for the results.
      workers: processes at a time on a CPU; None: as many as cores.
      minutes: after which nothing goes on; no cell is begun that would probably not end by then.

    Raises:
      ConfigError: the folder has other things, or cells of other definitions; or no cell that is
        left would end within `minutes`.
    """
    on_cpu = jax.default_backend() == "cpu"
    _check(suite, out, on_cpu)
    out.mkdir(parents=True, exist_ok=True)
    with lock.hold(out, "--out"):
        run = _Run(suite, out, minutes)
        run.check_time()
        _begin(suite, out, command)
        with Stop() as stop:
            if on_cpu:
                run.in_workers(stop, workers or _cores())
            else:
                run.here(stop)
        results.save(out, _read(out)["commands"])
        left = sum(map(len, run.missing()))
        total = len(suite.cells())
        stopped = left > len(run.failed)
        reason = (stop.reason or "time") if stopped else None
        return Outcome(total - left, total, reason, tuple(run.failed))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check(suite: Suite, out: Path, on_cpu: bool) -> None:
    """Refuses what would fail later."""
    if suite.vmap_seeds and on_cpu:
        raise ConfigError("vmap_seeds is true; it must be false on a CPU: add --vmap_seeds false")
    path = out / "suite.json"
    if not path.is_file() and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} is not empty and has no suite.json; name a new folder")
    found = _read(out)["experiments"]
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
    results.collect(out)
    for cell in suite.cells():
        cell.method_and_model()
        path, ours = cells.cell_path(out, cell), cell.config_hash()
        if path.is_file() and (theirs := json.loads(path.read_text())["config_hash"]) != ours:
            raise ConfigError(
                f"{path} has the config_hash {theirs}, and {cell.name} is {ours} now; name "
                "another --out, or remove that file to run the cell again"
            )


def _plain(value):
    return json.loads(json.dumps(value))


def _read(out: Path) -> dict[str, Any]:
    """What `_begin` noted."""
    path = out / "suite.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    return {"commands": [], "experiments": {}} | found


def _begin(suite: Suite, out: Path, command: str) -> None:
    """Notes the definitions that the folder's cells have, and the commands that made them."""
    found = _read(out)
    found["experiments"] |= {
        name: definition(e, suite.dtype) for name, e in suite.experiments.items()
    }
    found["commands"] = list(dict.fromkeys([*found["commands"], command]))
    cells.write(out / "suite.json", json.dumps(found, indent=1) + "\n")


class _Run:
    """The state of a call of `run_suite`."""

    def __init__(self, suite: Suite, out: Path, minutes: float | None):
        self.suite, self.out, self.minutes = suite, out, minutes
        # Now, since files may change while cells run.
        self.commit = about.commit()
        self.failed: list[str] = []
        self.deadline = time.monotonic() + (math.inf if minutes is None else 60 * minutes)
        # Of the cells that are done, by experiment.
        self.seconds: dict[str, list[float]] = collections.defaultdict(list)
        for record in results.collect(out):
            self.seconds[record["experiment"]].append(record["seconds"])
        # Of cells that were stopped, by experiment: what they would have taken.
        path = out / "expected.json"
        self.expected: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}
        self.lines = Lines()
        self.at_a_time = 1

    def check_time(self) -> None:
        """Refuses a time in which no cell can end."""
        expected = {group[0].name: self._expected(group[0], ()) for group in self.missing()}
        if self.minutes is None or not expected or None in expected.values():
            return
        name = min(expected, key=expected.get)
        if expected[name] > 60 * self.minutes:
            raise ConfigError(
                f"--minutes is {self.minutes:g}; no cell that is left would end by then: "
                f"{name} takes about {expected[name] / 60:.3g} minutes"
            )

    def _is_done(self, cell: Cell) -> bool:
        """Whether the cell has a record, and so have those that it was trained together with."""
        path = cells.cell_path(self.out, cell)
        if not path.is_file():
            return False
        together = json.loads(path.read_text())["seeds_together"]
        others = (dataclasses.replace(cell, seed=seed) for seed in together)
        return all(cells.cell_path(self.out, other).is_file() for other in others)

    def _stopped(self, cell: Cell, seconds: float | None) -> None:
        """Notes how long a cell would have taken."""
        if seconds is not None:
            self.expected[cell.experiment] = seconds
            cells.write(self.out / "expected.json", json.dumps(self.expected) + "\n")

    def missing(self) -> list[list[Cell]]:
        """What is left: one cell each, or the seeds of a method."""
        left = [cell for cell in self.suite.cells() if not self._is_done(cell)]
        if not self.suite.vmap_seeds:
            return [[cell] for cell in left]
        groups: dict[tuple[str, str], list[Cell]] = {}
        for cell in left:
            groups.setdefault((cell.experiment, cell.method), []).append(cell)
        return list(groups.values())

    def in_workers(self, stop: Stop, limit: int) -> None:
        """Cells in processes, `limit` of them at a time."""
        self.at_a_time = limit
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
                    running[Worker(cell, self.out, self.commit)] = time.monotonic()
                if not running:
                    return
                connection.wait([worker.sentinel for worker in running], timeout=0.5)
                for worker in list(running):
                    status = worker.poll()
                    if status is None:
                        continue
                    began = running.pop(worker)
                    if status:
                        self._failed([worker.cell], f"status {status}")
                        continue
                    self._finished(worker.cell, time.monotonic() - began, waiting, running)
                if self.lines.due:
                    self._say(waiting, running)
        finally:
            for worker in running:
                worker.end()
                self._stopped(worker.cell, worker.seconds)

    def here(self, stop: Stop) -> None:
        """Cells one after the other in this process."""

        def watch(step: int, loss: float) -> None:
            late = step < group[0].definition.all_steps and time.monotonic() >= self.deadline
            if stop.requested() or late:
                raise _Stopped
            pace.heard(step)
            if self.lines.due:
                self.lines.written()
                print(f"{group[0].name}: step {step}, loss {loss:.4f}", file=sys.stderr, flush=True)

        waiting = self.missing()
        while waiting and not stop.requested():
            fits = [group for group in waiting if self._fits(group[0])]
            if not fits:
                return
            group = fits[0]
            waiting.remove(group)
            began, pace = time.monotonic(), Pace(group[0].definition.all_steps)
            try:
                cells.run(group, self.out, watch, commit=self.commit)
            except _Stopped:
                self._stopped(group[0], pace.seconds)
                return
            except Exception:
                traceback.print_exc()
                self._failed(group, "the error above")
                continue
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
        """Seconds of a cell: the mean of those of its experiment, done, running or stopped."""
        known = self.seconds[cell.experiment] or [
            worker.seconds
            for worker in running
            if worker.cell.experiment == cell.experiment and worker.seconds is not None
        ]
        return statistics.fmean(known) if known else self.expected.get(cell.experiment)

    def _failed(self, group: Sequence[Cell], why: str) -> None:
        names = [cell.name for cell in group]
        self.failed += names
        print(f"{', '.join(names)}: failed ({why})", file=sys.stderr, flush=True)

    def _finished(self, cell: Cell, seconds: float, waiting, running) -> None:
        self.seconds[cell.experiment].append(seconds)
        print(f"{cell.name}: done in {seconds:.0f} s", file=sys.stderr, flush=True)
        self._say(waiting, running)

    def _say(self, waiting: Sequence[Cell], running) -> None:
        """One line: what is done, what runs, about how long it will be."""
        self.lines.written()
        now = time.monotonic()
        total = len(self.suite.cells())
        done = sum(map(self._is_done, self.suite.cells()))
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
            at_a_time = min(self.at_a_time, len(expected))
            parts.append(f"about {sum(expected) / at_a_time / 60:.0f} min left")
        print("; ".join(parts), file=sys.stderr, flush=True)


class _Stopped(Exception):
    """A cell was ended before its end."""
