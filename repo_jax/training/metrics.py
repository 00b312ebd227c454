"""Where numbers go: metrics.jsonl always, TensorBoard and Weights & Biases when asked."""

import contextlib
import importlib
import json
import math
from pathlib import Path

from repo_jax.config import TrainingConfig
from repo_jax.errors import MissingPackageError, TrainingError

Value = float | int | None | list[float]


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; a last line cut short by a kill is left out."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def require_loggers(config: TrainingConfig) -> None:
    """Raises MissingPackageError unless the loggers that are asked for are installed."""
    if config.tensorboard:
        _import_logger("tensorboardX", "training.tensorboard")
    if config.wandb_project:
        _import_logger("wandb", "training.wandb_project")


def _import_logger(package: str, option: str):
    try:
        return importlib.import_module(package)
    except ImportError:
        raise MissingPackageError(package, option, "loggers") from None


class MetricsWriter:
    """Appends one JSON object a line, flushed at once. NaN and infinities become null.

    Loggers get the numbers of a list under names of their own: `z_std/00`, `z_std/01`, ...

    Args:
      run_dir: of the run.
      config: says which loggers are wanted besides.
      start_step: what stands there of later steps is cut off, so that no step stands twice.
    """

    def __init__(self, run_dir: Path, config: TrainingConfig, start_step: int):
        self.path = run_dir / "metrics.jsonl"
        kept = [line for line in read_metrics(self.path) if line["step"] <= start_step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(self.path)
        self._file = self.path.open("a")
        self._loggers = []
        if config.tensorboard:
            tensorboard = _import_logger("tensorboardX", "training.tensorboard")
            board = tensorboard.SummaryWriter(
                str(run_dir / "tensorboard"), purge_step=start_step + 1
            )

            def to_board(line):
                for name, value in line.items():
                    if name != "step":
                        board.add_scalar(name, value, line["step"])

            self._loggers.append((to_board, board.close))
        if config.wandb_project:
            wandb = _import_logger("wandb", "training.wandb_project")
            run = wandb.init(
                project=config.wandb_project, id=run_dir.name, resume="allow", dir=str(run_dir)
            )
            self._loggers.append((lambda line: run.log(line, step=line["step"]), run.finish))

    def write(self, step: int, **values: Value) -> None:
        """One line.

        Raises:
          TrainingError: it cannot be written.
        """
        line = {"step": step, **values}
        try:
            self._file.write(json.dumps({k: _finite(v) for k, v in line.items()}) + "\n")
            self._file.flush()
        except OSError as error:
            raise TrainingError(
                f"{self.path} cannot be written: {error.strerror}; the same command goes on from "
                "the last checkpoint"
            ) from error
        scalars = {name: value for k, v in line.items() for name, value in _scalars(k, v)}
        for log, _ in self._loggers:
            log(scalars)

    def close(self) -> None:
        """Flushes and closes every logger."""
        with contextlib.suppress(OSError):  # what `write` could not write either
            self._file.close()
        for _, close in self._loggers:
            close()


def _finite(value: Value) -> Value:
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(name: str, value: Value) -> list[tuple[str, float | int]]:
    if isinstance(value, list):
        return [(f"{name}/{i:02}", one) for i, one in enumerate(value)]
    return [] if value is None else [(name, value)]
