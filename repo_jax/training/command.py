"""The train command."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from repo_jax import cli, distributed
from repo_jax.config import TrainConfig
from repo_jax.errors import ConfigError
from repo_jax.training.loop import Summary, train


def main(arguments: Sequence[str] | None = None) -> tuple[Path, Summary]:
    """Trains, or goes on training, as the options say.

    Returns:
      The run directory, and how the run stands.
    """

    def add(parser):
        parser.add_argument(
            "--run_dir", type=str, help="Where the run is kept. Default: runs/<config name>."
        )
        distributed.add_options(parser)

    config, options = cli.parse(
        TrainConfig, "train.py", "Trains a RePo language model.", arguments, add
    )
    distributed.start(
        auto=options.distributed,
        coordinator=options.coordinator,
        num_processes=options.num_processes,
        process_id=options.process_id,
    )
    run_dir = options.run_dir
    if run_dir is None:
        if not options.config:
            raise ConfigError("neither --config nor --run_dir is given; name one of them")
        run_dir = Path("runs") / Path(str(options.config[-1])).stem
    # A failed save is told in one sentence; Orbax would print where in its threads it failed.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    summary = train(config, run_dir)
    run_dir = Path(run_dir)
    if not distributed.is_main():
        return run_dir, summary
    lines = [f"{'finished' if summary.finished else 'stopped'} at step {summary.step}"]
    if summary.tokens_per_second:
        lines.append(f"{summary.tokens_per_second:,.0f} tokens/s")
    if summary.validation:
        lines.append(f"validation loss {summary.validation.loss:.4f}")
        if summary.validation.bits_per_byte:
            lines.append(f"{summary.validation.bits_per_byte:.4f} bits per byte")
    lines.append(f"run directory {run_dir}")
    print("; ".join(lines), file=sys.stderr)
    return run_dir, summary


def run() -> None:
    """The console script."""
    cli.run(main)
