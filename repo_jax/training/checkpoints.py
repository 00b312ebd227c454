"""Checkpoints of a run, by Orbax: written in the background, kept by age and by loss.

What is read is held against sums of its bits that were saved with it. A checkpoint that is not
whole is told from one that does not fit, and from a store that does not answer.
"""

import contextlib
import dataclasses
import functools
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh
from orbax.checkpoint.checkpoint_managers import preservation_policy

from repo_jax import distributed, sharding
from repo_jax.config import RopeScaling
from repo_jax.errors import ConfigError, TrainingError
from repo_jax.modeling import RePoLM, abstract_params, boxed_params
from repo_jax.training.checkpoint_files import (
    DamagedCheckpoint,
    checkpoint_folder,
    digest,
    loss_file,
    read_record,
    reading,
    reason,
    saved_steps,
)
from repo_jax.training.run_dir import read_config
from repo_jax.training.step import TrainState

_LOSS = "val_loss"


@jax.jit
def _sums(tree):
    """A sum of the bits of each leaf, uint32, which does not depend on how it is split.

    Each element has an odd factor of its own, so that one which changes or changes place
    changes the sum.
    """

    def total(x):
        if x.dtype == bool:
            x = x.astype(jnp.uint8)
        bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
        at = jnp.zeros(x.shape, jnp.uint32)
        for axis, size in enumerate(x.shape):
            at = at * size + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        return (bits * (2 * at + 1)).sum(dtype=jnp.uint32)

    return jax.tree.map(total, tree)


def _checksums(tree) -> dict[str, int]:
    sums = jax.device_get(_sums(tree))
    return {name: int(total) for name, total in _by_name(sums).items()}


def _by_name(tree) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


class _Manager(ocp.CheckpointManager):
    """Orbax's, which a damaged checkpoint does not stop and which leaves preemption to us."""

    def metrics(self, step: int):
        """None, too, where they cannot be read."""
        try:
            return super().metrics(step)
        except Exception:
            return None

    def reached_preemption(self, step: int) -> bool:
        """Asks nobody: all processes must ask JAX equally often, see `stopping.Stop`."""
        return False


class Checkpoints:
    """The checkpoints of one run: `<folder>/<step>/{params,state,data}`.

    `params` are alone, so that they can be read without the optimizer's state. Each item is
    written whole before the checkpoint gets its name, so a killed process leaves none that
    is half there. Every process of a run makes one, and calls the same.

    Args:
      run_dir: of the run.
      keep_last: newest checkpoints kept; the best by validation loss is kept besides.
        None: only reads.
      checkpoint_dir: where they are instead of in `run_dir`.
    """

    def __init__(
        self, run_dir: Path, keep_last: int | None = None, checkpoint_dir: str | None = None
    ):
        self.folder = checkpoint_folder(run_dir, checkpoint_dir)
        if keep_last is None and not self.folder.is_dir():
            raise ConfigError(f"{run_dir} has no checkpoints")
        self._writing: int | None = None
        policies = [preservation_policy.LatestN(keep_last)]
        policies.append(
            preservation_policy.BestN(
                get_metric_fn=lambda metrics: -metrics[_LOSS],
                n=1,
                keep_checkpoints_without_metrics=False,
            )
        )
        options = ocp.CheckpointManagerOptions(
            read_only=keep_last is None,
            cleanup_tmp_directories=keep_last is not None,  # what a kill left half written
            # `best_fn` tells Orbax that metrics are there to be read back.
            best_fn=lambda metrics: metrics[_LOSS],
            best_mode="min",
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
        )
        try:
            self._manager = _Manager(self.folder, options=options)
        except OSError as error:
            raise ConfigError(
                f"checkpoints cannot be written to {self.folder}: {reason(error)}; name "
                "another training.checkpoint_dir or --run_dir"
            ) from None

    def __enter__(self) -> Self:
        """Nothing is left to open."""
        return self

    def __exit__(self, kind, *_) -> None:
        """Closes. What fails then does not hide what failed before."""
        try:
            self.close()
        except TrainingError:
            if kind is None:
                raise

    def save(self, state: TrainState, data: dict[str, Any], val_loss: float | None) -> None:
        """Copies the state and writes it in the background.

        Args:
          state: of the step to save.
          data: what else to keep, such as JSON holds.
          val_loss: of this step, if known.

        Raises:
          TrainingError: this checkpoint, or the one before, cannot be written.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self.wait()
        items = self._items(state)
        sums = {name: _checksums(tree) for name, tree in items.items()}
        record = {**data, "checksums": sums}
        self._writing = step
        with self._told():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
                    data=ocp.args.JsonSave({**record, "digest": digest(record)}),
                ),
                metrics=None if val_loss is None else {_LOSS: val_loss},
            )

    def add_loss(self, step: int, val_loss: float) -> None:
        """Notes the validation loss of a checkpoint that is there and was saved without.

        Raises:
          TrainingError: it cannot be written.
        """
        self._writing = step

        def write():
            with self._told():
                file = loss_file(self.folder, step)
                file.parent.mkdir(exist_ok=True)
                file.write_text(json.dumps({_LOSS: val_loss}))

        distributed.on_main(write)
        self._manager.reload()

    @staticmethod
    def _items(state: TrainState) -> dict[str, Any]:
        rest = {"step": state.step, "opt_state": state.opt_state, "rng": state.rng}
        return {"params": state.params, "state": rest}

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            last = max(saved_steps(self.folder), default=None)
            good = (
                f"the last good one is {self.folder / str(last)}" if last else "there is no other"
            )
            raise TrainingError(
                f"the checkpoint of step {self._writing} cannot be written to {self.folder}: "
                f"{reason(error)}; {good}, and the same command goes on from there"
            ) from error

    def wait(self) -> None:
        """Until what was saved is there.

        Raises:
          TrainingError: it cannot be written.
        """
        with self._told():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then lets go."""
        with self._told():
            self._manager.close()

    @property
    def latest(self) -> int | None:
        """The newest checkpoint."""
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

    def restore_newest(
        self, abstract: TrainState, check: Callable[[dict[str, Any]], None] = lambda data: None
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest whole checkpoint; None where there never was one.

        A damaged one is named on standard error, set aside as `<step>.corrupt`, and passed over
        for the one before.

        Args:
          abstract: shapes, dtypes and shardings.
          check: is given what was saved beside arrays before these are read, and may raise.

        Raises:
          ConfigError: it has other shapes than `abstract`.
          TrainingError: none is whole, or the store does not answer.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return self.restore(abstract, step, check)
            except DamagedCheckpoint as damage:
                distributed.on_main(functools.partial(self._set_aside, step, str(damage)))
                self._manager.reload()
        aside = distributed.on_main(
            lambda: (
                self.folder.is_dir()
                and any(re.match(r"\d+\.corrupt", path.name) for path in self.folder.iterdir())
            )
        )
        if aside:
            raise TrainingError(
                f"no checkpoint in {self.folder} is whole; bring one back, or name another "
                "--run_dir to start anew"
            )
        return None

    def _set_aside(self, step: int, damage: str) -> None:
        path = self.folder / str(step)
        taken = {path.name for path in self.folder.iterdir()}
        names = (f"{step}.corrupt{f'-{i}' if i else ''}" for i in range(len(taken) + 1))
        aside = next(name for name in names if name not in taken)
        path.rename(self.folder / aside)
        print(
            f"the checkpoint {path} is damaged ({damage}); it is set aside as {aside}, and the "
            "one before is taken",
            file=sys.stderr,
        )

    def restore(
        self,
        abstract: TrainState,
        step: int,
        check: Callable[[dict[str, Any]], None] = lambda data: None,
    ) -> tuple[TrainState, dict[str, Any]]:
        """The state at `step`, and what was saved beside it.

        Raises:
          DamagedCheckpoint: it is not what was saved.
          ConfigError, TrainingError: as for `restore_newest`.
        """
        record = self._record(step)
        distributed.everywhere(lambda: check(record))
        items = self._load(step, self._items(abstract), record)
        return TrainState(params=items["params"], **items["state"]), record

    def restore_params(self, abstract, step: int):
        """The parameters alone; errors are those of `restore`."""
        return self._load(step, {"params": abstract}, self._record(step))["params"]

    def _record(self, step: int) -> dict[str, Any]:
        def read():
            try:
                return read_record(self.folder, step), None
            except DamagedCheckpoint as damage:
                return None, str(damage)

        record, damage = distributed.on_main(read)
        if damage is not None:
            raise DamagedCheckpoint(damage)
        return record

    def _load(self, step: int, items: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
        # Not by the manager, which waits for all processes where one of them may have failed.
        handler = ocp.StandardCheckpointHandler()

        def read():
            try:
                with reading():
                    loaded = {}
                    for name, abstract in items.items():
                        path = self.folder / str(step) / name
                        _check_shapes(path, handler.metadata(path).tree, abstract)
                        arguments = ocp.args.StandardRestore(_placed(abstract))
                        loaded[name] = handler.restore(path, args=arguments)
                    return loaded, None
            except DamagedCheckpoint as damage:
                return None, str(damage)

        loaded, damage = distributed.everywhere(read)
        damages = [found for found in distributed.exchange(damage) if found]
        if damages:
            raise DamagedCheckpoint(damages[0])
        for name, tree in loaded.items():
            saved = record["checksums"][name]
            wrong = [leaf for leaf, total in _checksums(tree).items() if saved[leaf] != total]
            if wrong:
                raise DamagedCheckpoint(f"{name}{wrong[0]} is not what was saved")
        return loaded


def _placed(abstract):
    """Abstract arrays that say where they go: those that do not, to the default device."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or device), abstract
    )


def _check_shapes(path: epath.Path, stored, abstract) -> None:
    shapes = lambda tree: {name: tuple(leaf.shape) for name, leaf in _by_name(tree).items()}
    theirs = shapes(stored)
    ours = shapes(ocp.tree.serialize_tree(abstract, keep_empty_nodes=True))
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            has = list(theirs[name]) if name in theirs else "nothing"
            needs = list(ours[name]) if name in ours else "nothing"
            raise ConfigError(
                f"the checkpoint {path} has {has} for {name} where the run needs {needs}; it is "
                "of another model or optimizer"
            )


def load_run(
    run_dir: str | Path,
    step: int | str = "latest",
    rope_scaling: RopeScaling | None = None,
    *,
    mesh: Mesh | None = None,
) -> tuple[RePoLM, dict]:
    """The model of a run and its parameters.

    Args:
      run_dir: where train.py wrote.
      step: `latest`, `best` (lowest validation loss) or a number. If the newest is damaged,
        `latest` says so and takes the one before.
      rope_scaling: YaRN instead of what the run has. None: what it has.
      mesh: as in `from_pretrained`; the mesh that the run was trained on does not matter.

    Returns:
      The model, and its plain dict of arrays in the run's `param_dtype`.

    Raises:
      ConfigError: no run, or no such checkpoint, or it is damaged; or the mesh does not divide
        the model.
      MissingPackageError: its checkpoints are in an object store, which needs a package.
      TrainingError: that store does not answer.
    """
    return load_run_step(run_dir, step, rope_scaling, mesh)[:2]


def load_run_step(
    run_dir: str | Path,
    step: int | str = "latest",
    rope_scaling: RopeScaling | None = None,
    mesh: Mesh | None = None,
) -> tuple[RePoLM, dict, int]:
    """`load_run`, and which step it is."""
    run_dir = Path(run_dir)
    config = read_config(run_dir)
    # What runs attention is chosen anew: this may be another machine.
    changes = {} if rope_scaling is None else {"rope_scaling": rope_scaling}
    model = RePoLM(dataclasses.replace(config.model, attention=None, **changes))
    abstract = abstract_params(model)
    if mesh is not None:
        sharding.check_model(model.config, mesh)
        # Each device is given its part of what is read, and never more.
        places = sharding.param_shardings(boxed_params(model), mesh)
        abstract = jax.tree.map(lambda x, place: x.update(sharding=place), abstract, places)
    with Checkpoints(run_dir, checkpoint_dir=config.training.checkpoint_dir) as checkpoints:
        found = checkpoints.find(step)
        earlier = [other for other in saved_steps(checkpoints.folder) if other < found]
        while True:
            try:
                return model, checkpoints.restore_params(abstract, found), found
            except DamagedCheckpoint as damage:
                named = f"the checkpoint {checkpoints.folder / str(found)} is damaged ({damage})"
                if step != "latest" or not earlier:
                    raise ConfigError(f"{named}; name another step") from None
                found = earlier.pop()
                print(f"{named}; step {found} is taken", file=sys.stderr)
