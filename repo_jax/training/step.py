"""The state of training and one step of it, both pure. Needs only jax, flax and optax."""

import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax

from repo_jax.config import OptimizerConfig, TrainingConfig
from repo_jax.modeling import RePoLM
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
    hidden = model.apply({"params": params}, batch["tokens"], segment_ids, method="hidden")
    targets, valid = next_token_targets(batch["tokens"], segment_ids)
    weights = valid * (1.0 / n_targets)
    return cross_entropy(
        hidden, params["head"]["kernel"], targets, weights, z_loss=z_loss, chunk=chunk
    )


def count_targets(batch: Batch) -> jax.Array:
    """Valid targets of a batch, float32 so that the sum over a pod cannot overflow."""
    _, valid = next_token_targets(batch["tokens"], batch.get("segment_ids"))
    return valid.sum(dtype=jnp.float32)


def make_train_step(
    model: RePoLM, optimizer_config: OptimizerConfig, training: TrainingConfig, params
) -> tuple[optax.GradientTransformation, Callable]:
    """The optimizer, and `step(state, batch) -> state, metrics`, to be jitted by the caller.

    Args:
      model: whose `config` decides precision and remat.
      optimizer_config, training: options.
      params: the tree, for its structure only; abstract arrays will do.

    Returns:
      The step's batch is `tokens` int32 [B, T] and optionally `segment_ids`; it is cut into
      `training.accumulation` microbatches whose gradients are summed, every target having
      the weight 1 / (targets in the whole batch). Metrics are float32 scalars: loss,
      ce_loss, z_loss, grad_norm (before clipping), learning_rate, targets.
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
        return sums.loss, sums

    def gradients(params, batch):
        grad = functools.partial(
            jax.grad(loss, has_aux=True), params, n_targets=jnp.maximum(count_targets(batch), 1.0)
        )
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
        metrics = {
            "loss": sums.ce + sums.z,
            "ce_loss": sums.ce,
            "z_loss": sums.z,
            "grad_norm": global_norm(grads),
            "learning_rate": schedule(state.step),
            "targets": count_targets(batch),
        }
        state = state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
        )
        return state, metrics

    return optimizer, step
