"""The optimizer with the recipe's groups, schedules, and a rate for each parameter pattern."""

import re

import jax
import jax.numpy as jnp
import optax

from repo_jax.config import OptimizerConfig, TrainingConfig
from repo_jax.errors import ConfigError


def parameter_paths(params) -> list[str]:
    """Slash-separated path of each leaf, in tree order: `layers/mlp/up/kernel`."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return ["/".join(str(key.key) for key in path) for path, _ in leaves]


def learning_rates(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate as a function of the updates done so far.

    Step s, counted from 1, of a schedule of S: a rise s / W to the peak in the W steps of
    warm-up, then down so that step S has `final_fraction` of the peak, where it stays.
    """
    warmup, final = config.warmup_steps, config.final_fraction

    def rate(done):
        step = done + 1
        # From the steps that are left, so that the last one has exactly `final_fraction`.
        left = jnp.clip((steps - step) / max(steps - warmup, 1), 0.0, 1.0)
        if config.schedule == "linear":
            share = final + (1.0 - final) * left
        elif config.schedule == "cosine":
            share = final + (1.0 - final) * (1.0 - jnp.cos(jnp.pi * left)) / 2.0
        else:
            share = jnp.ones_like(left)
        if warmup:
            share = jnp.where(step < warmup, step / warmup, share)
        return config.learning_rate * share

    return rate


def rate_factors(config: OptimizerConfig, params):
    """The factor on the learning rate of each leaf, a tree like `params`; 0 is frozen.

    Raises:
      ConfigError: a pattern of `config.rates` that matches no parameter.
    """
    paths = parameter_paths(params)
    for pattern in config.rates:
        if not any(re.fullmatch(pattern, path) for path in paths):
            raise ConfigError(
                f"optimizer.rates has the pattern {pattern!r}, which matches no parameter; "
                f"parameters: {', '.join(paths)}"
            )

    def factor(path: str) -> float:
        return next((f for p, f in config.rates.items() if re.fullmatch(p, path)), 1.0)

    return jax.tree.unflatten(jax.tree.structure(params), [factor(path) for path in paths])


def make_optimizer(
    config: OptimizerConfig, training: TrainingConfig, params
) -> optax.GradientTransformation:
    """Clip, AdamW or Adafactor, decoupled decay of all but the embedding, learning rate.

    Args:
      config, training: options; the schedule's length is `training`'s.
      params: the tree, for its paths only; abstract arrays will do.
    """
    factors = rate_factors(config, params)
    paths = parameter_paths(params)
    decayed = jax.tree.unflatten(
        jax.tree.structure(params), [not path.startswith("embedding/") for path in paths]
    )
    schedule = learning_rates(config, training.schedule_steps or training.steps)
    scale_each = optax.stateless(
        lambda updates, _: jax.tree.map(
            lambda f, u: u if isinstance(u, optax.MaskedNode) or f == 1.0 else u * f,
            factors,
            updates,
        )
    )
    if config.name == "adafactor":
        # Updates of RMS 1, as Adam's are, so that a learning rate means the same.
        scale = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    else:
        scale = optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=config.mu_dtype)
    chain = optax.chain(
        scale,
        optax.add_decayed_weights(config.weight_decay, decayed),
        optax.scale_by_learning_rate(schedule),
        scale_each if config.rates else optax.identity(),
    )
    if config.clip_norm is not None:
        chain = optax.chain(optax.clip_by_global_norm(config.clip_norm), chain)
    if all(f > 0 for f in jax.tree.leaves(factors)):
        return chain
    # Frozen parameters have no moments and take no part in the norm.
    labels = jax.tree.map(lambda f: "trained" if f > 0 else "frozen", factors)
    return optax.partition({"trained": chain, "frozen": optax.set_to_zero()}, labels)


def freeze(params, factors):
    """`params` with no gradient to those of factor 0, so that XLA never computes one."""
    return jax.tree.map(lambda p, f: p if f > 0 else jax.lax.stop_gradient(p), params, factors)


def global_norm(tree) -> jax.Array:
    """L2 norm over all leaves, float32."""
    return optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.float32), tree))
