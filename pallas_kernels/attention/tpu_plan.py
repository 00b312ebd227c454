"""Which blocks the TPU attention kernels visit, and in what order: two int32 a visit.

A grid over all pairs of blocks would spend a step, and in a long packed row most of its
steps, on pairs that cannot see each other. The kernels run over a list of visits instead,
prefetched to scalar memory and read by their index maps; its length is a dynamic grid bound.
A visit is one outer block and a span of up to `MOST_SPAN` inner blocks that are loaded
together, with two bits for each of these: whether anything in the pair is seen, and whether
everything is.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import masks

MOST_SPAN = 16
FIRST, LAST = 1, 2  # flags in `where`: the first and the last visit of this outer block
STRIP = 256  # tokens in a strip of a block on the diagonal
MOST_BLOCKS = 1 << 14  # outer blocks, and spans of inner ones, that fit `where`


def outer(where):
    """The number of the block whose result is gathered over consecutive visits."""
    return where >> 16


def inner(where):
    """The number of the span of blocks that changes from visit to visit."""
    return (where >> 2) & (MOST_BLOCKS - 1)


def live(bits, sub):
    """Whether anything is seen between the outer block and block `sub` of the span."""
    return bits >> sub & 1 != 0


def full(bits, sub):
    """Whether everything is seen there, so that no mask is needed."""
    return bits >> (MOST_SPAN + sub) & 1 != 0


def visits(live, full, *, span: int, keep_empty: bool):
    """The visits of every row of the mask, in order, packed.

    Args:
      live, full: bool [R, outer blocks, inner blocks], as from `masks.block_plan`.
      span: inner blocks to a visit, at most `MOST_SPAN`.
      keep_empty: outer blocks without live pairs get a visit in which nothing is live, so
        that their result (zeros) is written as well. Otherwise only the first block of a
        row in which nothing at all is live gets one.

    Returns:
      int32 [R, 2, most], where and bits: as many visits as the row has, then its last one
      again with nothing to do (a kernel then loads nothing either); and int32 [R], how many
      it has.
    """
    R, n_outer, n_inner = live.shape
    n_spans = -(-n_inner // span)
    if max(n_outer, n_spans) > MOST_BLOCKS:
        raise NotImplementedError(f"{max(n_outer, n_spans)} blocks are more than {MOST_BLOCKS}")

    # What is known while tracing stays in numpy: a computation of jax's, even an eager one,
    # belongs to the mesh in context.
    xp = np if isinstance(live, np.ndarray) else jnp

    def bits(x, start):
        x = xp.pad(x, ((0, 0), (0, 0), (0, n_spans * span - n_inner)))
        x = x.reshape(R, n_outer, n_spans, span)
        return (x.astype(np.int32) << (start + np.arange(span))[None, None, None]).sum(-1)

    bits = bits(live, 0) + bits(live & full, MOST_SPAN)
    marked = bits != 0
    empty = ~marked.any(-1) if keep_empty else ~marked.any((-1, -2))[:, None]
    first = (np.arange(n_outer) == 0)[None, :, None] | keep_empty
    first = first & (np.arange(n_spans) == 0)[None, None]
    marked = marked | (first & empty[:, :, None])
    where = (np.arange(n_outer)[:, None] << 16 | np.arange(n_spans)[None] << 2)[None]
    where = where + FIRST * (marked & (xp.cumsum(marked, -1) == 1))
    where = where + LAST * (marked & (xp.cumsum(marked[..., ::-1], -1)[..., ::-1] == 1))
    marked, where, bits = (
        x.reshape(R, -1) for x in (marked, where.astype(np.int32), bits.astype(np.int32))
    )
    count = marked.sum(-1, dtype=np.int32)
    at = np.arange(marked.shape[1])[None]
    order = xp.argsort(~marked, axis=-1, stable=True)
    order = xp.take_along_axis(order, xp.minimum(at, xp.maximum(count - 1, 0)[:, None]), -1)
    where, bits = (xp.take_along_axis(x, order, -1) for x in (where, bits))
    real = at < count[:, None]
    return xp.stack([xp.where(real, where, where & ~3), xp.where(real, bits, 0)], 1), count


def plan(mask, T: int, S: int, q_block: int, k_block: int):
    """`masks.block_plan` of padded lengths; concrete numpy arrays for a `Default` mask.

    Args:
      mask: a `Default` of the lengths T and S, or the arrays of `masks.build`.
      T, S: lengths before padding. q_block, k_block: tokens in a block.

    Returns:
      live, full: bool [R, query blocks, key blocks]; R is 1 for a `Default`.
    """
    whole_T, whole_S = -(-T // q_block) * q_block, -(-S // k_block) * k_block
    if not isinstance(mask, masks.Default):
        return masks.block_plan(masks.pad(mask, whole_T, whole_S), q_block, k_block)
    # Queries of the padding may see anything, so their blocks need no mask on their account.
    index = np.arange(whole_S, dtype=np.int32)[None]
    limit = np.arange(whole_T, dtype=np.int32)[None] + (S - T)
    if not mask.causal:
        index, limit = np.where(index < S, 0, masks.NEVER), np.zeros_like(limit)
    return masks.block_plan({"limit": limit, "index": index}, q_block, k_block)


def kind(mask, T: int, S: int, q_block: int, k_block: int) -> tuple:
    """How a kernel masks a block of which something, not everything, is seen; static.

    Returns:
      ("arrays", documents): from the marks of the tokens, documents or not;
      ("below", S): keys before S are seen;
      ("causal", offset): keys of index <= that of the query + offset are seen;
      ("diagonal", strips): the same, and all such blocks lie on the diagonal, so that little
        more than half of one has to be computed, in that many strips.
    """
    if not isinstance(mask, masks.Default):
        return "arrays", "q_segment" in mask
    if not mask.causal:
        return "below", S
    if q_block != k_block or (S - T) % k_block:
        return "causal", S - T
    return "diagonal", 1 if q_block % STRIP else q_block // STRIP


def visible(kind, shape, *, row_is_query: bool, rows, columns, q_start, k_start):
    """Which scores of one block are seen, bool of `shape`, from what the kernel has at hand.

    Args:
      kind: as from `kind`.
      shape: of the block of scores. row_is_query: False for transposed scores.
      rows, columns: for "arrays", the int32 marks of the tokens along rows and columns,
        broadcasting against each other: limit or index and, with documents, the segment.
      q_start, k_start: index of the block's first query and key, for the other kinds; for
        "diagonal" within the block on the diagonal.
    """
    name, parameter = kind
    if name == "arrays":
        q, k = (rows, columns) if row_is_query else (columns, rows)
        seen = k[0] <= q[0]
        return seen & (q[1] == k[1]) if parameter else seen
    q_axis, k_axis = (0, 1) if row_is_query else (1, 0)
    k_index = jax.lax.broadcasted_iota(jnp.int32, shape, k_axis)
    if name == "below":
        return k_index < parameter - k_start
    q_index = jax.lax.broadcasted_iota(jnp.int32, shape, q_axis)
    offset = parameter if name == "causal" else 0
    return k_index - q_index <= q_start - k_start + offset
