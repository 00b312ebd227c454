"""Next-token cross-entropy with z-loss that never holds the logits of a batch."""

import functools

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class LossSums:
    """Sums over valid targets, float32 scalars, natural log.

    Attributes:
      loss: ce + z; the only one that carries a gradient.
      ce: cross-entropy.
      z: z_loss * logsumexp ** 2 (PaLM, arXiv 2204.02311).
    """

    loss: jax.Array
    ce: jax.Array
    z: jax.Array


def next_token_targets(tokens_BT, segment_ids=None):
    """Targets and which of them count.

    Args:
      tokens_BT: int32 [B, T].
      segment_ids: int32 [B, T] or None. The target across a boundary and padding don't count.

    Returns:
      targets int32 [B, T] (each row's last is a placeholder) and valid bool [B, T].
    """
    T = tokens_BT.shape[1]
    targets = jnp.roll(tokens_BT, -1, axis=1)
    valid = jnp.broadcast_to(jnp.arange(T)[None] < T - 1, tokens_BT.shape)
    if segment_ids is not None:
        valid &= (segment_ids == jnp.roll(segment_ids, -1, axis=1)) & (segment_ids != 0)
    return targets, valid


def cross_entropy(hidden_BTD, kernel_DV, targets_BT, weights_BT, *, z_loss=0.0, chunk=1024):
    """Sums of cross-entropy and z-loss of a linear head.

    Logits exist for `chunk` positions at a time. Their gradient is a function of the
    logits alone, so it is formed beside them in the forward pass and the backward pass
    only scales it: three matrix products in all, against four when logits are recomputed.

    Args:
      hidden_BTD: [B, T, D], the head's input.
      kernel_DV: [D, V], the head's weights.
      targets_BT: int32 [B, T] in [0, V).
      weights_BT: float32 [B, T], 0 where a target does not count.
      z_loss: weight of logsumexp ** 2.
      chunk: positions, over the whole batch, whose logits exist at a time.

    Returns:
      `LossSums`. Differentiable in `hidden_BTD` and `kernel_DV` through `loss`.
    """
    B, T, _ = hidden_BTD.shape
    size = min(T, max(1, chunk // B))
    size = -(-T // -(-T // size))  # as few chunks, of equal size
    n = -(-T // size)

    def chunks(x):
        x = jnp.pad(x, ((0, 0), (0, n * size - T)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(B, n, size, *x.shape[2:]).swapaxes(0, 1)

    xs = (chunks(hidden_BTD), chunks(targets_BT), chunks(weights_BT.astype(jnp.float32)))
    loss, (ce, z) = _sums(xs[0], kernel_DV, *xs[1:], z_loss)
    return LossSums(loss=loss, ce=jax.lax.stop_gradient(ce), z=jax.lax.stop_gradient(z))


def _chunk_losses(h, kernel, targets, weights, z_loss):
    logits = jnp.einsum("BCD,DV->BCV", h, kernel, preferred_element_type=jnp.float32)
    top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    lse = jnp.log(jnp.exp(logits - top).sum(-1)) + top[..., 0]
    at_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    ce = jnp.sum(weights * (lse - at_target))
    z = z_loss * jnp.sum(weights * lse**2)
    return logits, lse, ce, z


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sums(h_nBCD, kernel_DV, targets_nBC, weights_nBC, z_loss):
    kernel = kernel_DV.astype(h_nBCD.dtype)

    def body(carry, xs):
        h, targets, weights = xs
        _, _, ce, z = _chunk_losses(h, kernel, targets, weights, z_loss)
        return (carry[0] + ce, carry[1] + z), None

    zero = jnp.zeros((), jnp.float32)
    (ce, z), _ = jax.lax.scan(body, (zero, zero), (h_nBCD, targets_nBC, weights_nBC))
    return ce + z, (ce, z)


def _sums_fwd(h_nBCD, kernel_DV, targets_nBC, weights_nBC, z_loss):
    kernel = kernel_DV.astype(h_nBCD.dtype)

    def body(carry, xs):
        ce_sum, z_sum, d_kernel = carry
        h, targets, weights = xs
        logits, lse, ce, z = _chunk_losses(h, kernel, targets, weights, z_loss)
        # d ce / d logits = p - onehot; d lse^2 / d logits = 2 lse p.
        p = jnp.exp(logits - lse[..., None])
        is_target = jnp.arange(logits.shape[-1])[None, None] == targets[..., None]
        d_logits = p * (weights * (1.0 + 2.0 * z_loss * lse))[..., None]
        d_logits = (d_logits - jnp.where(is_target, weights[..., None], 0.0)).astype(h.dtype)
        d_h = jnp.einsum("BCV,DV->BCD", d_logits, kernel)
        d_kernel += jnp.einsum("BCD,BCV->DV", h, d_logits, preferred_element_type=jnp.float32)
        return (ce_sum + ce, z_sum + z, d_kernel), d_h

    zero = jnp.zeros((), jnp.float32)
    start = (zero, zero, jnp.zeros(kernel_DV.shape, jnp.float32))
    xs = (h_nBCD, targets_nBC, weights_nBC)
    (ce, z, d_kernel), d_h = jax.lax.scan(body, start, xs)
    return (ce + z, (ce, z)), (d_h, d_kernel.astype(kernel_DV.dtype))


def _sums_bwd(z_loss, residuals, cotangents):
    d_h, d_kernel = residuals
    g = cotangents[0]
    return (d_h * g.astype(d_h.dtype), d_kernel * g.astype(d_kernel.dtype), None, None)


_sums.defvjp(_sums_fwd, _sums_bwd)
