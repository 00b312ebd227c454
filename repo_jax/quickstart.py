"""python -m repo_jax.quickstart: trains, evaluates, samples and plots a small RePo model."""

import sys
from collections.abc import Sequence
from pathlib import Path

from repo_jax import cli, plots
from repo_jax.data import Tokenizer
from repo_jax.evaluation.command import evaluate, table
from repo_jax.evaluation.config import EvalConfig
from repo_jax.inference import generate
from repo_jax.training import command as training
from repo_jax.training.checkpoints import load_run
from repo_jax.training.metrics import read_metrics

_PROMPT = "def read_lines(path):\n"
_PLOT = "the loss plot"

_NEXT = """\
What next?
  the same command again goes on where it stopped, or does nothing once it is finished
  {scripts}repo-eval --run {run} --context_lengths '[64, 1024]'
  {scripts}repo-generate --run {run} --prompt 'class Queue:' --temperature 0.8
  {scripts}repo-train --config quickstart --model.positions.preset rope --run_dir runs/rope
"""


def plot_losses(run_dir: Path) -> Path:
    """Draws the losses in metrics.jsonl to `loss.png` and `loss.svg` in the run directory.

    Returns:
      The former.

    Raises:
      MissingPackageError: matplotlib is not installed.
    """
    pyplot = plots.import_pyplot(_PLOT)
    lines = read_metrics(run_dir / "metrics.jsonl")
    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for name, label, style in (
        ("ce_loss", "training", dict(color=plots.COLORS[0], lw=0.8, alpha=0.7)),
        ("val_loss", "validation", dict(color=plots.COLORS[1], marker=plots.MARKERS[0], ms=4)),
    ):
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(xlabel="step", ylabel="cross-entropy (nats per token)", title=run_dir.name)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path, _ = plots.save(figure, run_dir / "loss")
    return path


def _scripts() -> str:
    """What comes before our commands here: `.venv/bin/` where `make` made it, or nothing."""
    try:
        return f"{Path(sys.executable).parent.relative_to(Path.cwd())}/"
    except ValueError:
        return ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs every step; options are those of train.py."""
    plots.import_pyplot(_PLOT)  # missed now, not after training
    given = list(sys.argv[1:] if arguments is None else arguments)
    run_dir, summary = training.main(["--config", "quickstart", *given])
    if not summary.finished:
        return

    print("\nHeld-out text at several context lengths:")
    print(table(evaluate(EvalConfig(run=str(run_dir)))))

    model, params = load_run(run_dir)
    tokenizer = Tokenizer.load(run_dir)
    (ids,) = generate(
        *(model, params, [tokenizer.encode(_PROMPT)]),
        max_new_tokens=96,
        temperature=0.7,
        top_p=0.9,
    )
    print(f"\nA sample:\n{_PROMPT}{tokenizer.decode(ids)}\n")
    print(f"Loss curve: {plot_losses(run_dir)}\n")
    print(_NEXT.format(scripts=_scripts(), run=run_dir), end="")


if __name__ == "__main__":
    cli.run(main)
