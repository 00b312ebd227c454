"""Next-token cross-entropy with z-loss that never holds the logits of a batch."""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from repo_jax.sharding import TokenSplit


@flax.struct.dataclass
class LossSums:
    """Sums over valid targets, float32, natural log; scalars unless it says otherwise.

    Attributes:
      loss: ce + z; the only one that carries a gradient.
      ce: cross-entropy.
      z: z_loss * logsumexp ** 2 (PaLM, arXiv 2204.02311).
      ce_B: [B], cross-entropy of each row.
    """

    loss: jax.Array
    ce: jax.Array
    z: jax.Array
    ce_B: jax.Array


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

    Under a mesh each device works on its rows, its tokens and its part of the vocabulary; the
    head is gathered once and its gradient is summed over devices once, not in each chunk.

    Args:
      hidden_BTD: [B, T, D], the head's input.
      kernel_DV: [D, V], the head's weights.
      targets_BT: int32 [B, T] in [0, V).
      weights_BT: float32 [B, T], 0 where a target does not count.
      z_loss: weight of logsumexp ** 2.
      chunk: positions, over all rows of a device, whose logits exist at a time.

    Returns:
      `LossSums`. Differentiable in `hidden_BTD` and `kernel_DV` through `loss`.
    """
    loss, (ce_B, z_B) = _sums(
        hidden_BTD, kernel_DV, targets_BT, weights_BT.astype(jnp.float32), z_loss, chunk
    )
    ce_B, z_B = jax.lax.stop_gradient((ce_B, z_B))
    return LossSums(loss=loss, ce=ce_B.sum(), z=z_B.sum(), ce_B=ce_B)


def chunks(x, chunk: int):
    """[B, T, ...] as [n, B, size, ...]: few chunks of equal size, filled up with zeros."""
    B, T = x.shape[:2]
    size = min(T, max(1, chunk // B))
    size = -(-T // -(-T // size))
    n = -(-T // size)
    x = jnp.pad(x, ((0, 0), (0, n * size - T)) + ((0, 0),) * (x.ndim - 2))
    return x.reshape(B, n, size, *x.shape[2:]).swapaxes(0, 1)


def _chunk_losses(h, kernel, targets, weights, z_loss, vocab):
    """Of one chunk: logits, logsumexp, where the targets' logits are, and sums for each row."""
    logits = jnp.einsum("BCD,DV->BCV", h, kernel, preferred_element_type=jnp.float32)
    width = logits.shape[-1]
    at = targets - (jax.lax.axis_index(vocab) * width if vocab else 0)
    top = logits.max(-1, keepdims=True)
    top = jax.lax.pmax(top, vocab) if vocab else top
    total = functools.partial(TokenSplit.sum, axes=vocab)
    lse = jnp.log(total(jnp.exp(logits - top).sum(-1))) + top[..., 0]
    at_target = jnp.take_along_axis(logits, jnp.clip(at, 0, width - 1)[..., None], axis=-1)[..., 0]
    at_target = total(jnp.where((at >= 0) & (at < width), at_target, 0.0))
    ce = jnp.sum(weights * (lse - at_target), axis=-1)
    return logits, lse, at, ce, z_loss * jnp.sum(weights * lse**2, axis=-1)


# hidden, kernel, targets, weights; d is the width of the kernel.
_INPUTS = ("BTD", "dV", "BT", "BT")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _sums(hidden_BTD, kernel_DV, targets_BT, weights_BT, z_loss, chunk):
    split = TokenSplit.of(*targets_BT.shape)

    def local(h, kernel, *rest):
        kernel = split.whole(kernel.astype(h.dtype), axis=0)

        def body(carry, xs):
            h, targets, weights = xs
            *_, ce, z = _chunk_losses(h, kernel, targets, weights, z_loss, split.vocab)
            return (carry[0] + ce, carry[1] + z), None

        zero = jnp.zeros(h.shape[0], jnp.float32)
        xs = tuple(chunks(x, chunk) for x in (h, *rest))
        sums, _ = jax.lax.scan(body, (zero, zero), xs)
        return split.sum(sums, split.length)

    run = split.apply(local, _INPUTS, ("B", "B"))
    ce_B, z_B = run(hidden_BTD, kernel_DV, targets_BT, weights_BT)
    return ce_B.sum() + z_B.sum(), (ce_B, z_B)


def _sums_fwd(hidden_BTD, kernel_DV, targets_BT, weights_BT, z_loss, chunk):
    split = TokenSplit.of(*targets_BT.shape)

    def local(h, kernel, *rest):
        B, T, D = h.shape
        dtype = kernel.dtype
        kernel = split.whole(kernel.astype(h.dtype), axis=0)

        def body(carry, xs):
            ce_sum, z_sum, d_kernel = carry
            h, targets, weights = xs
            logits, lse, at, ce, z = _chunk_losses(h, kernel, targets, weights, z_loss, split.vocab)
            # d ce / d logits = p - onehot; d lse^2 / d logits = 2 lse p.
            p = jnp.exp(logits - lse[..., None])
            is_target = jnp.arange(logits.shape[-1])[None, None] == at[..., None]
            d_logits = p * (weights * (1.0 + 2.0 * z_loss * lse))[..., None]
            d_logits = (d_logits - jnp.where(is_target, weights[..., None], 0.0)).astype(h.dtype)
            d_h = jnp.einsum("BCV,DV->BCD", d_logits, kernel)
            d_kernel += jnp.einsum("BCD,BCV->DV", h, d_logits, preferred_element_type=jnp.float32)
            return (ce_sum + ce, z_sum + z, d_kernel), d_h

        zero = jnp.zeros(B, jnp.float32)
        xs = tuple(chunks(x, chunk) for x in (h, *rest))
        start = (zero, zero, jnp.zeros(kernel.shape, jnp.float32))
        (ce, z, d_kernel), d_h = jax.lax.scan(body, start, xs)
        d_h = split.sum(d_h.swapaxes(0, 1).reshape(B, -1, D)[:, :T], split.vocab)
        d_kernel = split.sum_tokens(d_kernel, axis=0).astype(dtype)
        return *split.sum((ce, z), split.length), d_h, d_kernel

    run = split.apply(local, _INPUTS, ("B", "B", "BTD", "dV"))
    ce_B, z_B, d_hidden, d_kernel = run(hidden_BTD, kernel_DV, targets_BT, weights_BT)
    return (ce_B.sum() + z_B.sum(), (ce_B, z_B)), (d_hidden, d_kernel)


def _sums_bwd(z_loss, chunk, residuals, cotangents):
    d_hidden, d_kernel = residuals
    g = cotangents[0]
    return (d_hidden * g.astype(d_hidden.dtype), d_kernel * g.astype(d_kernel.dtype), None, None)


_sums.defvjp(_sums_fwd, _sums_bwd)
