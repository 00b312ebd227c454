"""Dense attention, O(T * S) memory: what the other implementations are tested against."""

import jax.numpy as jnp

from pallas_kernels.attention import masks


def attend(q_BTNH, k_BSKH, v_BSKH, mask, *, scale):
    """softmax(scale q k^T) v under `mask`, and its logsumexp.

    Args:
      q_BTNH, k_BSKH, v_BSKH: [B, T, N, H], [B, S, K, H], [B, S, K, H].
      mask: as `masks.build` makes it.
      scale: factor on the scores.

    Returns:
      out [B, T, N, H] in q's dtype and lse float32 [B, N, T]; zeros and -inf for queries
      that see nothing.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    q = q_BTNH.astype(wide).reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k_BSKH.astype(wide)) * scale
    if isinstance(mask, masks.Default):
        mask = {name: jnp.asarray(x) for name, x in mask.arrays(T, S).items()}
    visible = mask["index"][:, None, :] <= mask["limit"][:, :, None]
    if "q_segment" in mask:
        visible &= mask["q_segment"][:, :, None] == mask["kv_segment"][:, None, :]
    visible = visible[:, None, None]
    top = jnp.where(visible, scores, -jnp.inf).max(-1, keepdims=True)
    top = jnp.where(top == -jnp.inf, 0.0, top)
    # Masked before the exponential: a where after it would send NaN into the gradient.
    weights = jnp.where(visible, jnp.exp(jnp.where(visible, scores - top, 0.0)), 0.0)
    total = weights.sum(-1, keepdims=True)
    sees = total > 0
    weights = weights / jnp.where(sees, total, 1.0)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH.astype(wide))
    lse = jnp.where(sees, jnp.log(jnp.where(sees, total, 1.0)) + top, -jnp.inf)
    return out.reshape(B, T, N, H).astype(q_BTNH.dtype), lse.reshape(B, N, T)
