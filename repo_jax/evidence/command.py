"""The evidence command: runs a suite, or reports what one found."""

import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from repo_jax import cli, plots
from repo_jax.config import Dtype
from repo_jax.errors import ConfigError, TrainingError
from repo_jax.evidence import figures, report, results
from repo_jax.evidence.runner import run_suite
from repo_jax.evidence.suite import load
from repo_jax.evidence.summary import BASELINE

_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
_ABOUT = "Trains and tests methods on tasks with several seeds, and says which differ."


@dataclasses.dataclass(frozen=True)
class EvidenceConfig:
    """What to run, or what to report.

    Attributes:
      suite: laptop, structured, continued, causes, rates, embeddings, gpu, full, tiny, or a YAML
        file. The same command again goes on where it stopped.
      tasks: experiments of the suite, with commas between; empty: all.
      methods: instead of the suite's, with commas between.
      seeds: instead of the suite's, with commas between.
      set: a change of the suite, `experiments.reversal.steps=100` or `experiments.*.steps=100`, or
        a list of them, `[experiments.*.steps=100, experiments.*.batch_size=64]`.
      dtype: of activations; None: the suite's.
      vmap_seeds: seeds in one program, not on CPUs; None: the suite's.
      out: the folder for everything; None: runs/evidence/SUITE.
      workers: cells at a time on a CPU, each with one core; None: as many as cores.
      minutes: to stop after; None: when all is done.
      report: instead of running, a folder with results.json, beside which tables and figures go.
      readme: with `report`, a Markdown file whose table between `<!-- evidence:NAME -->` and
        `<!-- /evidence:NAME -->` is replaced, NAME being the folder's.
      baseline: with `report`, the method that the others are compared with.
    """

    suite: str | None = None
    tasks: tuple[str, ...] | str = ()
    methods: tuple[str, ...] | str = ()
    seeds: tuple[int, ...] | str | int = ()
    set: tuple[str, ...] | str = ()
    dtype: Dtype | None = None
    vmap_seeds: bool | None = None
    out: str | None = None
    workers: int | None = None
    minutes: float | None = None
    report: str | None = None
    readme: str | None = None
    baseline: str = BASELINE

    def __post_init__(self):
        for name in ("tasks", "methods", "seeds"):
            value = getattr(self, name)
            value = str(value) if isinstance(value, int) else value
            value = value.split(",") if isinstance(value, str) else value
            given = tuple(x.strip() if isinstance(x, str) else x for x in value if x != "")
            object.__setattr__(self, name, given)
        changes = (self.set,) if isinstance(self.set, str) else tuple(self.set)
        object.__setattr__(self, "set", changes)
        try:
            object.__setattr__(self, "seeds", tuple(map(int, self.seeds)))
        except ValueError:
            raise ConfigError(
                f"--seeds is {','.join(self.seeds)}; it must be whole numbers with commas between"
            ) from None
        if (self.suite is None) == (self.report is None):
            raise ConfigError("give one of --suite (what to run) and --report (a folder)")
        if self.readme is not None and self.report is None:
            raise ConfigError("--readme needs --report, the folder with the results")
        if self.baseline != BASELINE and self.report is None:
            raise ConfigError("--baseline needs --report, the folder with the results")
        for name in ("workers", "minutes"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"--{name} is {value}; it must be positive")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what is missing, then writes results, tables and figures.

    Raises:
      ConfigError: an option, the suite or the folder is wrong.
      TrainingError: a cell failed; the others are in the results.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    config, _ = cli.parse(EvidenceConfig, "evidence", _ABOUT, given)
    plots.import_pyplot(figures.FEATURE)  # before the long work
    if config.report is not None:
        return _report(config)
    # Read when JAX first makes its backend.
    flags = os.environ.get("XLA_FLAGS", "")
    if _DETERMINISTIC not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_DETERMINISTIC}".strip()
    changes = [*config.set]
    for name in ("dtype", "vmap_seeds"):
        if getattr(config, name) is not None:
            changes.append(f"{name}={getattr(config, name)}")
    suite = load(
        config.suite,
        experiments=config.tasks,
        methods=config.methods,
        seeds=config.seeds,
        changes=changes,
    )
    out = Path(config.out or f"runs/evidence/{Path(config.suite).stem}")
    command = shlex.join(["python", "-m", "repo_jax.evidence", *given])
    outcome = run_suite(suite, out, command=command, workers=config.workers, minutes=config.minutes)
    if results.collect(out):
        report.write_report(out)
        print((out / "summary.md").read_text())
    if outcome.reason is not None:
        print(
            f"stopped ({outcome.reason}) with {outcome.done} of {outcome.total} cells done; the "
            "same command goes on",
            file=sys.stderr,
        )
    if outcome.failed:
        raise TrainingError(
            f"{len(outcome.failed)} of {outcome.total} cells failed, with the errors above: "
            f"{', '.join(outcome.failed)}; the same command tries them again"
        )


def _report(config: EvidenceConfig) -> None:
    folder = Path(config.report)
    found = results.load(folder)
    if config.readme is not None:
        name = folder.resolve().name
        report.rewrite(Path(config.readme), name, report.headline_table(found, config.baseline))
    report.write_report(folder, config.baseline)
    print(f"written to {folder}", file=sys.stderr)


def run() -> None:
    """The console script."""
    cli.run(main)
