"""The train step of a run on a mesh, ready to be compiled: for devices that are there or not."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from repo_jax import sharding
from repo_jax.config import TrainConfig
from repo_jax.modeling import RePoLM, abstract_params, boxed_params, init_params
from repo_jax.training.step import Batch, TrainState, create_state, make_train_step

# What XLA does not do by itself, by platform.
COMPILER_OPTIONS = {
    # Else products with gathered weights are cut along the contracted axis into as many steps
    # as there are devices, too small for the matrix units (docs/8-planning.md); without, the
    # gathers run beside other work.
    #
    # libtpu 0.0.42 can crash where it packs buffers into VMEM anew, which it did for OLMo-2 1B
    # with RePo on 8 v6e chips (32 microbatches). Three plans that compile either way were the
    # same to the last byte.
    "tpu": {"xla_tpu_enable_windowed_einsum_for_all_gather": False, "xla_msa_max_repacks": 0},
    # Transfers begin as early as they can.
    "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True},
}


@dataclasses.dataclass(frozen=True)
class Program:
    """What runs in every step, and what it takes.

    Attributes:
      model, optimizer: of the run.
      mesh: it runs on.
      state: `TrainState` of `jax.ShapeDtypeStruct` with shardings.
      batch: likewise, for all rows of all processes.
      step: `step(state, batch) -> state, metrics`, jitted; donates the state. To be called, or
        lowered, inside `sharding.use(mesh)`.
    """

    model: RePoLM
    optimizer: optax.GradientTransformation
    mesh: Mesh
    state: TrainState
    batch: Batch
    step: Callable

    def create_state(self, params, seed: int) -> TrainState:
        """The state before the first step, from parameters that lie where they should."""
        places = jax.tree.map(lambda x: x.sharding, self.state)
        make = lambda params: create_state(params, self.optimizer, seed)
        return jax.jit(make, out_shardings=places)(params)

    def init_params(self, rng: jax.Array):
        """New weights, each device drawing its own part. Not to be called inside `use(mesh)`."""
        places = jax.tree.map(lambda x: x.sharding, self.state.params)
        return init_params(self.model, rng, places)


def make_program(config: TrainConfig, mesh: Mesh) -> Program:
    """The program of a run on `mesh`, whose devices need not be there.

    Raises:
      ConfigError: the mesh does not divide the model or the batch.
    """
    sharding.check(config, mesh)
    model = RePoLM(config.model)
    params = abstract_params(model)
    places = sharding.param_shardings(boxed_params(model), mesh)
    data = config.data
    optimizer, step = make_train_step(
        *(model, config.optimizer, config.training, params),
        n_sources=len(data.sources),
        place_grads=lambda grads: jax.lax.with_sharding_constraint(grads, places),
    )
    state = jax.eval_shape(lambda p: create_state(p, optimizer, config.training.seed), params)
    state_places = sharding.like_params(state, params, places, mesh)
    row, rows = (sharding.batch_sharding(mesh, ndim) for ndim in (1, 2))
    int32 = lambda *shape, sharding: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
    B, T = data.batch_size, data.sequence_length
    batch = {"tokens": int32(B, T, sharding=rows)}
    if data.document_mask:
        batch["segment_ids"] = int32(B, T, sharding=rows)
    if data.repetition_filter:
        batch["valid"] = jax.ShapeDtypeStruct((B,), bool, sharding=row)
    if data.sources:
        batch["source"] = int32(B, sharding=row)
    whole = NamedSharding(mesh, PartitionSpec())
    step = jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(state_places, {name: x.sharding for name, x in batch.items()}),
        out_shardings=(state_places, whole),
        compiler_options=COMPILER_OPTIONS.get(_platform(mesh)),
    )
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, state_places
    )
    return Program(model, optimizer, mesh, state, batch, step)


def _platform(mesh: Mesh) -> str:
    platform = mesh.devices.flat[0].platform
    return {"cuda": "gpu"}.get(platform, platform)
