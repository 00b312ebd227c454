"""From a checkpoint to a model and its parameters."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from repo_jax import sharding
from repo_jax.config import DecoderConfig, PositionConfig, RopeScaling
from repo_jax.errors import ConfigError
from repo_jax.interop import config_json, hub
from repo_jax.interop.checkpoint import Checkpoint
from repo_jax.interop.names import Entry, by_parameter, table
from repo_jax.modeling import RePoLM, boxed_params


def from_pretrained(
    path_or_hub_id: str | Path,
    *,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    positions: PositionConfig | None = None,
    rng: jax.Array | None = None,
    rope_scaling: RopeScaling | None = None,
    revision: str | None = None,
    mesh: Mesh | None = None,
) -> tuple[RePoLM, dict[str, Any]]:
    """Loads an OLMo-2 or RePo checkpoint from safetensors.

    Reads config.json of Hugging Face's layout, of the RePo authors' fork and of
    `save_pretrained`, or OLMo's config.yaml; tensors under Hugging Face's or OLMo's names.
    One parameter at a time is built on the host, so memory there is the largest parameter
    (all layers of an MLP matrix) beside what the devices hold.

    Args:
      path_or_hub_id: a folder, or a Hugging Face hub id. What exists here wins.
      dtype: of activations, float32 or bfloat16. None: float32.
      param_dtype: of the parameters, float32 or bfloat16, whatever the checkpoint's is.
      positions: imposed instead of the checkpoint's, e.g. RePo on a RoPE checkpoint. f_phi of
        a layer that had none is drawn from a truncated normal (std `positions.init_std`, or the
        config's, cut at 3 sigma); f_phi that is no longer needed is dropped.
      rng: of new weights. None: `jax.random.key(0)`.
      rope_scaling: YaRN instead of what the checkpoint says. None: what it says.
      revision: branch, tag or commit on the hub.
      mesh: its devices share the parameters as `sharding.RULES` says, by the names of its
        axes (`sharding.make_mesh`); along other axes each device has all of them. None: they go
        to the default device.

    Returns:
      The model, and its plain (unboxed) parameters.

    Raises:
      ConfigError: one sentence on what is wrong with the path, the config, the tensors or the
        mesh.
      MissingPackageError: a hub id needs huggingface_hub.
    """
    changes = {
        "dtype": _dtype_name("dtype", jnp.float32 if dtype is None else dtype),
        "param_dtype": _dtype_name("param_dtype", param_dtype),
    }
    checkpoint = Checkpoint(hub.locate(path_or_hub_id, revision))
    stored, config = resolve_config(checkpoint, positions, rope_scaling)
    config = dataclasses.replace(config, **changes)
    if mesh is not None:
        sharding.check_model(config, mesh)
    source = Source(checkpoint, stored, config, rng)
    model = RePoLM(config)
    return model, load_params(source, _placement(model, mesh), jnp.dtype(config.param_dtype))


def resolve_config(
    checkpoint: Checkpoint, positions: PositionConfig | None, rope_scaling: RopeScaling | None
) -> tuple[DecoderConfig, DecoderConfig]:
    """The checkpoint's own config, its tensors checked against it, and the one asked for."""
    stored = config_json.read_folder(checkpoint.folder, rope_scaling)
    checkpoint.check(table(stored))
    wanted = stored if positions is None else dataclasses.replace(stored, positions=positions)
    return stored, wanted


class Source:
    """Where each tensor of the wanted model comes from: the checkpoint, or the generator.

    Raises:
      ConfigError: the checkpoint's f_phi has another shape than the wanted positions need.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        stored: DecoderConfig,
        wanted: DecoderConfig,
        rng: jax.Array | None,
    ):
        self.checkpoint = checkpoint
        self.entries = table(wanted)
        self._std = wanted.position_init_std
        self._rng = jax.random.key(0) if rng is None else rng
        self._stored = {entry.name: entry for entry in table(stored)}
        for entry in self.entries:
            shape = self._stored[entry.name].stored if self.has(entry) else entry.stored
            if shape != entry.stored:
                raise ConfigError(
                    f"{checkpoint.folder} has {entry.name} {list(shape)} where the positions "
                    f"asked for need {list(entry.stored)}"
                )

    def has(self, entry: Entry) -> bool:
        """Whether the checkpoint has this tensor; else it is drawn."""
        return entry.name in self._stored

    def read(self, entry: Entry) -> np.ndarray:
        """The tensor as [*ours], in the checkpoint's dtype, or new in float32."""
        if self.has(entry):
            return entry.to_ours(self.checkpoint.read_entry(entry))
        # By layer and name, so that a weight does not depend on which others are new.
        maps = ("gate_map", "content_map", "final_map", "linear_map", "position_kernel")
        key = jax.random.fold_in(self._rng, entry.layer)
        (at,) = (i for i, name in enumerate(maps) if name in entry.path)
        key = jax.random.fold_in(key, at)
        return np.asarray(self._std * jax.random.truncated_normal(key, -3.0, 3.0, entry.ours))


def load_params(
    source: Source, place: Callable[[tuple, np.ndarray], jax.Array], dtype: np.dtype
) -> dict[str, Any]:
    """The parameter tree, one parameter at a time.

    Args:
      source: of every tensor.
      place: puts the parameter of this path, a host array, on the devices.
      dtype: of the parameters.
    """
    params = {}
    for path, entries in by_parameter(source.entries).items():
        stack = () if entries[0].index is None else (len(entries),)
        host = np.empty((*stack, *entries[0].ours), dtype)
        for entry in entries:
            host[... if entry.index is None else entry.index] = source.read(entry)
        params[path] = place(path, host)
    return traverse_util.unflatten_dict(params)


def _placement(
    model: RePoLM, mesh: Mesh | None
) -> Callable[[tuple[str, ...], np.ndarray], jax.Array]:
    if mesh is None:
        return lambda path, x: jnp.asarray(x)
    places = traverse_util.flatten_dict(sharding.param_shardings(boxed_params(model), mesh))

    def place(path, x):
        # Each process gives its own devices their part, so this works on many hosts.
        return jax.make_array_from_callback(x.shape, places[path], lambda index: x[index])

    return place


def _dtype_name(option: str, dtype: Any) -> str:
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = dtype
    if name not in ("float32", "bfloat16"):
        raise ConfigError(f"{option} is {name!r}; it must be float32 or bfloat16")
    return name
