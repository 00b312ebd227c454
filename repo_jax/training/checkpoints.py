"""Checkpoints of a run, by Orbax: written in the background, kept by age and by loss."""

import dataclasses
from pathlib import Path
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from repo_jax.errors import ConfigError
from repo_jax.modeling import RePoLM
from repo_jax.training.run_dir import read_config
from repo_jax.training.step import TrainState

_LOSS = "val_loss"


def abstract_params(model: RePoLM):
    """Shapes and dtypes of the plain parameter tree, without making any."""
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return nn.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens)["params"])


def _placed(tree):
    """Abstract arrays that will be restored to the default device."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


class Checkpoints:
    """The checkpoints of one run: `checkpoints/<step>/{params,state,data}`.

    Parameters are apart from the rest of the state, so that they can be read alone. A
    checkpoint appears under its number only once it is whole. A context manager, which
    closes.

    Args:
      run_dir: of the run.
      keep_last: newest checkpoints kept; the best by validation loss is kept besides.
        None: only reads.
    """

    def __init__(self, run_dir: Path, keep_last: int | None = None):
        self.folder = (Path(run_dir) / "checkpoints").absolute()
        if keep_last is None and not self.folder.is_dir():
            raise ConfigError(f"{run_dir} has no checkpoints")
        policies = [preservation_policy.LatestN(keep_last)]
        policies.append(
            preservation_policy.BestN(
                get_metric_fn=lambda metrics: -metrics[_LOSS],
                n=1,
                keep_checkpoints_without_metrics=False,
            )
        )
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                read_only=keep_last is None,
                cleanup_tmp_directories=keep_last is not None,  # what a kill left half written
                # `best_fn` tells Orbax that metrics are there to be read back.
                best_fn=lambda metrics: metrics[_LOSS],
                best_mode="min",
                preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
            ),
        )

    def __enter__(self) -> Self:
        """Nothing is left to open."""
        return self

    def __exit__(self, *_) -> None:
        """Closes."""
        self.close()

    def save(self, state: TrainState, data: dict[str, Any], val_loss: float | None) -> None:
        """Copies the state and writes it in the background."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        rest = {"step": state.step, "opt_state": state.opt_state, "rng": state.rng}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                state=ocp.args.StandardSave(rest),
                data=ocp.args.JsonSave(data),
            ),
            metrics=None if val_loss is None else {_LOSS: val_loss},
        )

    def wait(self) -> None:
        """Until what was saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then lets go."""
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """The newest whole checkpoint."""
        return self._manager.latest_step()

    @property
    def best_loss(self) -> float | None:
        """The lowest validation loss of the checkpoints that are there."""
        infos = [self._manager.metrics(step) for step in self._manager.all_steps()]
        losses = [info[_LOSS] for info in infos if info]
        return min(losses) if losses else None

    def find(self, step: int | str) -> int:
        """`latest`, `best` or a number, as the number of a checkpoint that is there.

        Raises:
          ConfigError: there is no such checkpoint.
        """
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise ConfigError(f"{self.folder} holds no checkpoint yet")
        if step == "latest":
            return steps[-1]
        if step == "best":
            best = self._manager.best_step()
            if best is None:
                raise ConfigError(f"{self.folder} has no checkpoint with a validation loss")
            return best
        if str(step).isdigit() and int(step) in steps:
            return int(step)
        known = ", ".join(map(str, steps))
        raise ConfigError(
            f"step {step!r}: {self.folder} has the checkpoints {known}; latest and best also serve"
        )

    def restore(self, abstract: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        """The state at `step`, in the shapes of `abstract`, and what was saved of the data."""
        rest = {"step": abstract.step, "opt_state": abstract.opt_state, "rng": abstract.rng}
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(_placed(abstract.params)),
                state=ocp.args.StandardRestore(_placed(rest)),
                data=ocp.args.JsonRestore(),
            ),
        )
        return TrainState(params=restored.params, **restored.state), restored.data

    def restore_params(self, abstract, step: int):
        """The parameters alone."""
        args = ocp.args.Composite(params=ocp.args.StandardRestore(_placed(abstract)))
        return self._manager.restore(step, args=args).params


def newest_step(run_dir: Path) -> int | None:
    """The newest whole checkpoint of a run; None where there is none."""
    if not (run_dir / "checkpoints").is_dir():
        return None
    with Checkpoints(run_dir) as checkpoints:
        return checkpoints.latest


def load_run(run_dir: str | Path, step: int | str = "latest") -> tuple[RePoLM, dict]:
    """The model of a run and its parameters.

    Args:
      run_dir: where train.py wrote.
      step: `latest`, `best` (lowest validation loss) or a number.

    Returns:
      The model, and its plain dict of arrays in the run's `param_dtype`.

    Raises:
      ConfigError: no run, or no such checkpoint.
    """
    run_dir = Path(run_dir)
    # What runs attention is chosen anew: this may be another machine.
    model = RePoLM(dataclasses.replace(read_config(run_dir).model, attention=None))
    with Checkpoints(run_dir) as checkpoints:
        params = checkpoints.restore_params(abstract_params(model), checkpoints.find(step))
    return model, params
