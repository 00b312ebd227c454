"""What may see what, as a few integers per token, shared by all implementations.

A query sees a key when `index <= limit`, and, with documents, when both are of the same
one. Causality, padding, cache length and "not causal" all become values of the two.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

NEVER = jnp.iinfo(jnp.int32).max  # the index of a key that nothing sees
NOTHING = jnp.iinfo(jnp.int32).min  # the limit of a query that sees nothing

Mask = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Default:
    """The mask without indices, documents or a cache: the same for every row of the batch."""

    causal: bool

    def arrays(self, T: int, S: int) -> Mask:
        """The arrays that `build` would make, for one row."""
        factor = int(self.causal)
        limit = factor * (jnp.arange(T, dtype=jnp.int32) + (S - T))
        return {"limit": limit[None], "index": factor * jnp.arange(S, dtype=jnp.int32)[None]}


def build(
    shapes: tuple[int, int, int],
    *,
    causal: bool,
    q_index: jax.Array | None = None,
    kv_index: jax.Array | None = None,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    kv_length: jax.Array | None = None,
) -> "Mask | Default":
    """Builds the mask of `rotary_attention`.

    Args:
      shapes: B, T and S. The rest: as in `rotary_attention`.

    Returns:
      int32 `limit` [B, T] and `index` [B, S]; with documents also `q_segment` [B, T] and
      `kv_segment` [B, S], whose padding is -1 and -2 and so equals nothing. Where none of
      them is needed, `Default`.
    """
    if q_index is kv_index is q_segment_ids is kv_length is None:
        return Default(causal)
    B, T, S = shapes
    slot = jnp.arange(S, dtype=jnp.int32)[None]
    if q_index is None:
        end = S if kv_length is None else kv_length[:, None]
        q_index = jnp.arange(T, dtype=jnp.int32)[None] + (end - T)
    if kv_index is None:
        kv_index = slot
    if not causal:
        q_index, kv_index = jnp.zeros_like(q_index), jnp.zeros_like(kv_index)
    if kv_length is not None:
        kv_index = jnp.where(slot < kv_length[:, None], kv_index, NEVER)
    mask = {
        "limit": jnp.broadcast_to(q_index.astype(jnp.int32), (B, T)),
        "index": jnp.broadcast_to(kv_index.astype(jnp.int32), (B, S)),
    }
    if q_segment_ids is not None:
        # Signed first, or padding would be the largest document of an unsigned dtype.
        q_segment, kv_segment = (x.astype(jnp.int32) for x in (q_segment_ids, kv_segment_ids))
        mask["q_segment"] = jnp.where(q_segment == 0, -1, q_segment)
        mask["kv_segment"] = jnp.where(kv_segment == 0, -2, kv_segment)
    return mask


def pad(mask: Mask, T: int, S: int) -> Mask:
    """Extends the mask to T queries that see nothing and S keys that nothing sees."""
    fill = {"limit": (T, NOTHING), "index": (S, NEVER), "q_segment": (T, -1), "kv_segment": (S, -2)}
    return {
        name: jnp.pad(x, ((0, 0), (0, fill[name][0] - x.shape[1])), constant_values=fill[name][1])
        for name, x in mask.items()
    }


def stretches(index: np.ndarray) -> tuple[list[int], list[int]]:
    """How to put keys with this index [S] in ascending order by moving as few pieces as may be.

    Returns:
      The sizes of the pieces, as the keys lie, and the pieces' numbers in ascending order.
    """
    rank = np.argsort(np.argsort(index, kind="stable"))
    starts = np.flatnonzero(np.diff(rank, prepend=-2) != 1)
    return np.diff(starts, append=len(rank)).tolist(), np.argsort(rank[starts]).tolist()


def block_plan(mask: Mask, q_block: int, k_block: int) -> tuple[jax.Array, jax.Array]:
    """Which key blocks each query block has to visit, and which of those need no mask.

    Args:
      mask: padded to whole blocks.
      q_block, k_block: tokens in a block.

    Returns:
      `live` and `full`, bool [B, T / q_block, S / k_block]. A block that is not live holds
      no visible pair (the reverse may not hold); in a full one every pair is visible.
    """
    blocks = lambda name, size: mask[name].reshape(mask[name].shape[0], -1, size)
    rows = lambda x: (x.min(-1)[:, :, None], x.max(-1)[:, :, None])
    columns = lambda x: (x.min(-1)[:, None, :], x.max(-1)[:, None, :])
    limit_min, limit_max = rows(blocks("limit", q_block))
    index_min, index_max = columns(blocks("index", k_block))
    live, full = index_min <= limit_max, index_max <= limit_min
    if "q_segment" in mask:
        q_min, q_max = rows(blocks("q_segment", q_block))
        k_min, k_max = columns(blocks("kv_segment", k_block))
        live &= (q_min <= k_max) & (k_min <= q_max)
        full &= (q_min == q_max) & (k_min == k_max) & (q_min == k_min)
    return live, full


def live_range(live: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First True and one past the last along the last axis; an empty range where there is none."""
    n = live.shape[-1]
    at = jnp.arange(n).reshape((1,) * (live.ndim - 1) + (n,))
    return jnp.where(live, at, n).min(-1), jnp.where(live, at + 1, 0).max(-1)
