"""The state of training and one step of it, both pure. Needs only jax, flax and optax."""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax

from repo_jax.config import OptimizerConfig, TrainingConfig
from repo_jax.modeling import RePoLM
from repo_jax.sharding import token_order
from repo_jax.training.loss import cross_entropy, next_token_targets
from repo_jax.training.optimizer import (
    freeze,
    global_norm,
    learning_rates,
    make_optimizer,
    rate_factors,
)

Batch = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
    """All that a run needs to go on.

    Attributes:
      step: int32, updates done; the data at step s are a function of the seed and s.
      params: plain tree of arrays.
      opt_state: of optax.
      rng: key data, uint32, for whatever a step draws. The recipe draws nothing.
    """

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    rng: jax.Array


def create_state(params, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        rng=jax.random.key_data(jax.random.key(seed)),
    )


def batch_loss(model: RePoLM, params, batch: Batch, *, n_targets, z_loss: float, chunk: int):
    """Cross-entropy and z-loss of a batch, each the sum over its targets / `n_targets`."""
    segment_ids = batch.get("segment_ids")
    targets, valid = batch_targets(batch)
    tokens, weights = batch["tokens"], valid * (1.0 / n_targets)
    order = token_order(tokens.shape[1])
    if order is not None:
        # Sequences are split over devices, each of which gets as much to attend to.
        given = (tokens, segment_ids, targets, weights)
        tokens, segment_ids, targets, weights = jax.tree.map(lambda x: x[:, order], given)
    hidden = model.apply({"params": params}, tokens, segment_ids, index=order, method="hidden")
    kernel = params["head"]["kernel"]
    return cross_entropy(hidden, kernel, targets, weights, z_loss=z_loss, chunk=chunk)


def batch_targets(batch: Batch):
    """Targets int32 [B, T] and which count, bool [B, T]: as documents and `valid` rows say."""
    targets, valid = next_token_targets(batch["tokens"], batch.get("segment_ids"))
    if "valid" in batch:
        valid &= batch["valid"][:, None]
    return targets, valid


def count_targets(batch: Batch) -> jax.Array:
    """Valid targets of a batch, float32 so that the sum over a pod cannot overflow."""
    return batch_targets(batch)[1].sum(dtype=jnp.float32)


def batch_hash(tokens_BT: jax.Array) -> jax.Array:
    """uint32 hash of a batch: the same wherever its rows are, another if a token changes place."""
    B, T = tokens_BT.shape
    at = jnp.arange(B * T, dtype=jnp.uint32).reshape(B, T)
    x = (tokens_BT.astype(jnp.uint32) + 1) * (2 * at + 1)
    # The mixing of 32 bits in MurmurHash3; sums of integers have no order.
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return (x ^ (x >> 16)).sum(dtype=jnp.uint32)


def make_train_step(
    model: RePoLM,
    optimizer_config: OptimizerConfig,
    training: TrainingConfig,
    params,
    *,
    n_sources: int = 0,
    place_grads: Callable = lambda grads: grads,
) -> tuple[optax.GradientTransformation, Callable]:
    """The optimizer, and `step(state, batch) -> state, metrics`, to be jitted by the caller.

    Args:
      model: whose `config` decides precision and remat.
      optimizer_config, training: options.
      params: the tree, for its structure only; abstract arrays will do.
      n_sources: of the data; 0: they are not told apart.
      place_grads: constrains where the gradients of a microbatch go.

    Returns:
      The step's batch is `tokens` int32 [B, T] and optionally `segment_ids`, likewise, `valid`
      bool [B], False for rows that do not count, and `source` int32 [B]. It is cut into
      `training.accumulation` microbatches whose gradients are summed, every target having
      the weight 1 / (targets in the whole batch). Metrics are float32 scalars: loss,
      ce_loss, z_loss, grad_norm (before clipping), param_norm (before the update),
      update_norm, learning_rate, targets; uint32 batch_hash; with sources,
      ce_loss_by_source [n_sources], NaN where there is no target.
    """
    optimizer = make_optimizer(optimizer_config, training, params)
    factors = rate_factors(optimizer_config, params)
    schedule = learning_rates(optimizer_config, training.schedule_steps or training.steps)

    def loss(params, batch, n_targets):
        sums = batch_loss(
            *(model, freeze(params, factors), batch),
            n_targets=n_targets,
            z_loss=training.z_loss,
            chunk=training.loss_chunk,
        )
        aux = {"ce_loss": sums.ce, "z_loss": sums.z}
        if n_sources:
            aux["ce_loss_by_source"] = by_source(sums.ce_B, batch)
        return sums.loss, aux

    def by_source(values_B, batch):
        return jnp.zeros(n_sources).at[batch["source"]].add(values_B)

    def gradients(params, batch):
        n_targets = jnp.maximum(count_targets(batch), 1.0)

        def grad(batch):
            grads, aux = jax.grad(loss, has_aux=True)(params, batch, n_targets)
            return place_grads(grads), aux

        n = training.accumulation
        if n == 1:
            return grad(batch)
        # Microbatch i has rows i, i + n, ...: where rows are sharded over devices in
        # contiguous parts, each device keeps working on its own.
        micro = jax.tree.map(
            lambda x: x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1), batch
        )
        zeros = jax.tree.map(
            jnp.zeros_like, jax.eval_shape(grad, jax.tree.map(lambda x: x[0], micro))
        )
        add = lambda total, batch: (jax.tree.map(jnp.add, total, grad(batch)), None)
        return jax.lax.scan(add, zeros, micro)[0]

    def step(state: TrainState, batch: Batch):
        grads, sums = gradients(state.params, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        targets = count_targets(batch)
        metrics = {
            "loss": sums["ce_loss"] + sums["z_loss"],
            "ce_loss": sums["ce_loss"],
            "z_loss": sums["z_loss"],
            "grad_norm": global_norm(grads),
            "param_norm": global_norm(state.params),
            "update_norm": global_norm(updates),
            "learning_rate": schedule(state.step),
            "targets": targets,
            "batch_hash": batch_hash(batch["tokens"]),
        }
        if n_sources:
            # From a share of all targets' mean to the mean over the source's own.
            share = by_source(batch_targets(batch)[1].sum(1), batch) / targets
            metrics["ce_loss_by_source"] = sums["ce_loss_by_source"] / share
        state = state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
        )
        return state, metrics

    return optimizer, step
