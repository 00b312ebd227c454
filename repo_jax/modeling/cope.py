"""Contextual position encoding: a query counts the keys that its gates let through."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.attention import masks

_QUERY_BLOCK = 128


def cope_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    position_kernel_HP: jax.Array,
    *,
    q_index: np.ndarray | jax.Array | None = None,
    kv_index: np.ndarray | jax.Array | None = None,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    scale: float,
) -> jax.Array:
    """Attention with CoPE (Golovneva et al., arXiv 2405.18719), in plain JAX.

    With s = scale q k^T, key j stands at p = sum of sigmoid(s) over the keys from j on that the
    query sees, at most P - 1, and the score is s + q e[p], where e, the columns of the position
    kernel, is interpolated between the whole positions around p.

    Every query has positions of its own for all keys, which nothing fuses: time grows by several
    passes over the scores, O(T S), and by a product of width min(P, S + 1). Queries are handled
    in blocks, so memory is O(S) for each of a block's; the backward pass makes a block's scores
    anew. Gathering them by position is what costs most.

    Args:
      q_BTNH: [B, T, N, H], normed and not rotated.
      k_BSKH, v_BSKH: [B, S, K, H], K dividing N. Of the keys that a query sees, one that comes
        later in its sequence lies later here, too, unless `kv_index` is a numpy array.
      position_kernel_HP: [H, P].
      q_index, kv_index, q_segment_ids, kv_segment_ids: what sees what, as in
        `pallas_kernels.rotary_attention`; a numpy array [T], [S] where all rows are alike.
      scale: factor on q k^T.

    Returns:
      [B, T, N, H] in q's dtype; zeros for queries that see nothing. Differentiable in q, k, v and
      the kernel. float32 inside, float64 where q is.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    if isinstance(kv_index, np.ndarray):
        order = np.argsort(kv_index, kind="stable")
        kv_index = kv_index[order]
        k_BSKH, v_BSKH = k_BSKH[:, order], v_BSKH[:, order]
        kv_segment_ids = None if kv_segment_ids is None else kv_segment_ids[:, order]
    mask = masks.build(
        (B, T, S),
        causal=True,
        q_index=q_index,
        kv_index=kv_index,
        q_segment_ids=q_segment_ids,
        kv_segment_ids=kv_segment_ids,
    )
    if isinstance(mask, masks.Default):
        mask = jax.tree.map(lambda x: jnp.repeat(x, B, axis=0), mask.arrays(T, S))
    keys = {name: mask[name] for name in ("index", "kv_segment") if name in mask}

    n_blocks = -(-T // _QUERY_BLOCK)
    size = -(-T // n_blocks)
    padded = masks.pad(mask, n_blocks * size, S)
    queries = {name: padded[name] for name in ("limit", "q_segment") if name in mask}
    queries["q"] = jnp.pad(q_BTNH, ((0, 0), (0, n_blocks * size - T), (0, 0), (0, 0)))
    in_blocks = lambda x: jnp.moveaxis(x.reshape(B, n_blocks, size, *x.shape[2:]), 1, 0)

    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    k, v = k_BSKH.astype(wide), v_BSKH.astype(wide)
    # No query sees more than S keys, so none stands beyond S.
    kernel = position_kernel_HP[:, : S + 1].astype(wide)

    @jax.checkpoint
    def attend(queries):
        q = queries["q"].astype(wide).reshape(B, -1, K, N // K, H)
        scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k) * scale
        visible = keys["index"][:, None, :] <= queries["limit"][:, :, None]
        if "q_segment" in queries:
            visible &= keys["kv_segment"][:, None, :] == queries["q_segment"][:, :, None]
        visible = visible[:, None, None]
        scores += position_scores(scores, visible, jnp.einsum("BTKGH,HP->BKGTP", q, kernel))
        top = jnp.where(visible, scores, -jnp.inf).max(-1, keepdims=True)
        top = jax.lax.stop_gradient(jnp.where(top == -jnp.inf, 0.0, top))
        # Masked before the exponential: a where after it would send NaN into the gradient.
        weights = jnp.where(visible, jnp.exp(jnp.where(visible, scores - top, 0.0)), 0.0)
        total = weights.sum(-1, keepdims=True)
        weights /= jnp.where(total > 0, total, 1.0)
        return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v)

    out = jax.lax.map(attend, jax.tree.map(in_blocks, queries))
    out = jnp.moveaxis(out, 0, 1).reshape(B, -1, N, H)[:, :T].astype(q_BTNH.dtype)
    return checkpoint_name(out, "attention_out")


def position_scores(scores: jax.Array, visible: jax.Array, at_whole: jax.Array) -> jax.Array:
    """What the positions add to the scores.

    Args:
      scores: [..., S], s of `cope_attention`, keys in the order of their index.
      visible: bool, broadcast to `scores`.
      at_whole: [..., P], q e[p] of the whole positions p.

    Returns:
      [..., S]; of no meaning where a key is not visible.
    """
    gates = jnp.where(visible, jax.nn.sigmoid(scores), 0.0)
    position = jax.lax.cumsum(gates, axis=gates.ndim - 1, reverse=True)
    last = at_whole.shape[-1] - 1
    position = jnp.minimum(position, last)
    below = position.astype(jnp.int32)
    between = position - below
    take = lambda at: jnp.take_along_axis(at_whole, at, axis=-1)
    return (1.0 - between) * take(below) + between * take(jnp.minimum(below + 1, last))
