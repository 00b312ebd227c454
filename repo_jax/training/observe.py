"""What is looked at beside the loss: where RePo puts tokens, and what the devices do."""

import contextlib
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from repo_jax.modeling import RePoLM
from repo_jax.training.step import Batch

# A layer whose z spreads over so small a share of the most it did has lost its positions.
_COLLAPSED = 0.01


@functools.partial(jax.jit, static_argnames=("model", "rows"))
def position_stats(model: RePoLM, params, batch: Batch, rows: int) -> dict[str, jax.Array]:
    """The range and the spread of z in some rows of a batch.

    Args:
      model, params: a RePo model.
      batch: as for the train step.
      rows: how many rows are looked at; it divides B. With as many as the devices that share
        the rows, each looks at its first.

    Returns:
      `z_range`, max - min over the tokens of a row, and `z_std`, the standard deviation over
      them, each the mean over rows and heads: float32 [R], one for each RePo layer.
    """
    first = lambda x: x.reshape(rows, -1, *x.shape[1:])[:, 0]
    given = (first(batch[name]) if name in batch else None for name in ("tokens", "segment_ids"))
    z_BLNT = model.apply({"params": params}, *given, method="positions")
    layers = [i for i, kind in enumerate(model.config.kinds) if kind == "repo"]
    z_BRNT = z_BLNT[:, jnp.array(layers)]
    spans = {"z_range": z_BRNT.max(-1) - z_BRNT.min(-1), "z_std": z_BRNT.std(-1)}
    return {name: span.mean((0, 2)) for name, span in spans.items()}


def rows_in_parallel(mesh: Mesh) -> int:
    """Into how many parts the mesh cuts the rows of a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


class CollapseWatch:
    """Says once of each layer that its z has become all but constant."""

    def __init__(self, layers: list[int]):
        self._layers = layers
        self._most = [0.0] * len(layers)
        self._told: set[int] = set()

    def see(self, step: int, z_std: list[float]) -> None:
        """Compares with the widest spread so far."""
        self._most = [max(pair) for pair in zip(self._most, z_std, strict=True)]
        for layer, most, now in zip(self._layers, self._most, z_std, strict=True):
            if now < _COLLAPSED * most and layer not in self._told:
                self._told.add(layer)
                print(
                    f"step {step}: z of layer {layer} spreads over {now:.3g}, where it once did "
                    f"over {most:.3g}: all tokens come to stand in one place",
                    file=sys.stderr,
                )


class Profiler:
    """Traces some steps with XLA's profiler into `<run_dir>/profile`.

    Args:
      run_dir: of the run.
      steps: the first and the last; None: none.
    """

    def __init__(self, run_dir: Path, steps: tuple[int, int] | None):
        self._folder = run_dir / "profile"
        self._steps = steps
        self._running = contextlib.ExitStack()

    def starts_at(self, step: int, first: int) -> bool:
        """Whether `step` is the first one traced in a process that begins with step `first`."""
        return self._steps is not None and max(self._steps[0], first) == step <= self._steps[1]

    def start(self) -> None:
        """Starts; all steps before should be done."""
        self._running.enter_context(jax.profiler.trace(str(self._folder)))

    def ends_at(self, step: int) -> bool:
        """Whether `step` is the last one traced."""
        return self._steps is not None and step == self._steps[1]

    def stop(self) -> None:
        """Writes what was traced, if anything was."""
        self._running.close()
