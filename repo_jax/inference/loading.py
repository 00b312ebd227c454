"""Models as commands name them: `--run`, or `--model`, a folder or a hub id."""

import dataclasses
from pathlib import Path
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from repo_jax import sharding
from repo_jax.config import DecoderConfig, Dtype, MeshConfig, RopeScaling
from repo_jax.errors import ConfigError
from repo_jax.modeling import RePoLM


class Named(Protocol):
    """What configs of commands have in common.

    Attributes:
      run: a run directory.
      model: where `run` is None, a local folder or a hub id in Hugging Face's layout.
      step: of the run: `latest`, `best`, or a number.
      revision: of the hub id.
      rope_scaling: YaRN instead of what the model has; None: what it has.
    """

    run: str | None
    model: str | None
    step: str
    revision: str | None
    rope_scaling: RopeScaling | None


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model, and where it came from.

    Attributes:
      model, params: as `from_pretrained` or `load_run` returns them.
      folder: what its tokenizer is in.
      step: of a run.
      mesh: whose devices share the parameters.
    """

    model: RePoLM
    params: Any
    folder: Path
    step: int | None = None
    mesh: Mesh | None = None


def folder_of(named: Named) -> Path:
    """The run directory, or the model's folder, fetched from the hub if that is where it is.

    Raises:
      ConfigError: there is none, or the hub cannot be reached.
    """
    from repo_jax.interop.hub import locate

    if named.run is None:
        return locate(named.model, named.revision)
    if not Path(named.run).is_dir():
        raise ConfigError(f"--run {named.run}: there is no such folder")
    return Path(named.run)


def config_of(named: Named) -> DecoderConfig:
    """The config of a model with the YaRN that is asked for, its parameters not read."""
    folder = folder_of(named)
    if named.run is not None:
        from repo_jax.training.run_dir import read_config

        model = read_config(folder).model
        scaling = named.rope_scaling or model.rope_scaling
        return dataclasses.replace(model, rope_scaling=scaling)
    from repo_jax.interop.checkpoint import Checkpoint
    from repo_jax.interop.load import resolve_config

    return resolve_config(Checkpoint(folder), None, named.rope_scaling)[1]


def check_step(named: Named) -> None:
    """Looks for the checkpoint of a run, and reads nothing of it.

    Raises:
      ConfigError: it is not there.
    """
    if named.run is None:
        return
    from repo_jax.training.checkpoints import Checkpoints
    from repo_jax.training.run_dir import read_config

    folder = folder_of(named)
    place = read_config(folder).training.checkpoint_dir
    with Checkpoints(folder, checkpoint_dir=place) as checkpoints:
        checkpoints.find(named.step)


def open_mesh(named: Named, config: MeshConfig | None) -> Mesh | None:
    """The mesh that a command is asked to put a model on; None where it is asked for none.

    Args:
      named: the model, of which only the config is read.
      config: sizes.

    Raises:
      ConfigError: the mesh does not fit the devices or the model, is of several processes or
        slices, or splits tokens.
    """
    if config is None:
        return None
    if jax.process_count() > 1:
        raise ConfigError(
            f"--mesh is given in {jax.process_count()} processes; only training runs in several, "
            "so start one, which has all devices of its machine"
        )
    for name, why in (("slices", "runs on several slices"), ("context", "splits tokens")):
        size = getattr(config, name)
        if size != 1:
            raise ConfigError(f"mesh.{name} is {size}; it must be 1, as only training {why}")
    mesh = sharding.make_mesh(config)
    sharding.check_model(config_of(named), mesh)
    return mesh


def load(named: Named, dtype: Dtype | None = None, mesh: Mesh | None = None) -> Loaded:
    """Reads a model.

    Args:
      named: which.
      dtype: of activations; None: the model's.
      mesh: as in `from_pretrained`, say of `open_mesh`.

    Raises:
      ConfigError, MissingPackageError, TrainingError: as `load_run` and `from_pretrained`.
    """
    folder, step = folder_of(named), None
    if named.run is not None:
        from repo_jax.training.checkpoints import load_run_step

        model, params, step = load_run_step(folder, named.step, named.rope_scaling, mesh)
    else:
        from repo_jax.interop import from_pretrained

        model, params = from_pretrained(folder, rope_scaling=named.rope_scaling, mesh=mesh)
    if dtype is not None:
        model = RePoLM(dataclasses.replace(model.config, dtype=dtype))
    return Loaded(model, params, folder, step, mesh)
