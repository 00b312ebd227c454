"""What the forward and the backward attention kernels for Hopper share.

Matrix products, the plan of blocks and the mask. jax 0.10.2's Mosaic GPU interpreter has no
rule for `wgmma` with a transposed or a register operand, for writing to an accumulator and
for `plgpu.layout_cast`. There, and only there, accumulators are shared memory and products
`jnp.dot`; loads, barriers, loops, masks and stores are the kernel's own in both.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu
from pallas_kernels.attention import masks

TILE = plgpu.Layout.WGMMA  # [64 n, m] over the 128 threads of a warp group
ROW, COLUMN = TILE.reduce(1), TILE.reduce(0)  # one value per row, or per column, of such a tile
LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453

_emulated = mosaic_gpu.interpreting


def smem(shape, dtype):
    """Shared memory that TMA fills and wgmma reads; the last axis a multiple of 64."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def accumulator_scratch(warp_groups: int, *shapes: tuple[int, int]) -> list:
    """Stand-ins for accumulators, one per shape and warp group; none on a device."""
    if not _emulated():
        return [None] * len(shapes)
    return [plgpu.SMEM((warp_groups, *shape), jnp.float32) for shape in shapes]


def accumulate(body, *shapes, stand_ins, wg):
    """body(*references to accumulators of those shapes, all zero)."""
    if not _emulated():
        return pl.run_scoped(body, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))
    references = [ref.at[wg] for ref in stand_ins]
    for ref in references:
        ref[...] = jnp.zeros(ref.shape, jnp.float32)
    return body(*references)


def mma(acc, a, b, *, transposed: bool = False) -> None:
    """Starts acc += a b, or a b^T. a: registers or shared memory; b: shared memory."""
    if not _emulated():
        plgpu.wgmma(acc, a, plgpu.transpose_ref(b, (1, 0)) if transposed else b)
        return
    a, b = (x if isinstance(x, jax.Array) else x[...] for x in (a, b))
    b = b.T if transposed else b
    acc[...] += jnp.dot(a.astype(jnp.float32), b.astype(jnp.float32))


def value(acc, pending: int = 0):
    """The accumulator, once at most `pending` younger products are still running."""
    return acc[...] if _emulated() else plgpu.wgmma_accumulator_load(acc, wait_n=pending)


def wait(pending: int = 0) -> None:
    """Waits until at most `pending` products are still running."""
    if not _emulated():
        plgpu.wgmma_wait(pending)


def filled(shape, fill, layout, dtype=jnp.float32):
    """A constant in registers."""
    x = jnp.full(shape, fill, dtype)
    return x if _emulated() else plgpu.layout_cast(x, layout)


def _iota(n: int, layout):
    if _emulated():
        return lax.iota(jnp.int32, n)
    return plgpu.broadcasted_iota(jnp.int32, (n,), 0, layout=layout)


def rows(x, shape):
    """A value per row, over the tile."""
    return lax.broadcast_in_dim(x, shape, [0])


def columns(x, shape):
    """A value per column, over the tile."""
    return lax.broadcast_in_dim(x, shape, [1])


def load_smem(ref, layout):
    """A vector from shared memory."""
    return mosaic_gpu.load(ref, ..., layout, optimized=True)


def fresh(index):
    """The index of an operand that stays put, opaque to the compiler in each step of a loop.

    It would else compute the addresses of all 16 slices of the operand ahead of the loop, and
    keep them in registers that heads of 256 do not leave.
    """
    return index + lax.optimization_barrier(jnp.int32(0))


def hide(x, mask, b, q_start, k_start, lengths, *, causal: bool, keys_in_rows: bool = False):
    """x [queries, keys] (or [keys, queries]), and -inf where the key is not seen.

    Args:
      x: what the scores of a block are started from; q_start and k_start are its first query
        and key.
      mask: references to the arrays of `masks.build`; {}: `masks.Default`.
      b: row of the batch.
      lengths: T and S.
    """
    q_axis, k_axis = (1, 0) if keys_in_rows else (0, 1)

    def tile(name, start, axis):
        layout, n = COLUMN if axis else ROW, x.shape[axis]
        if mask:
            values = mosaic_gpu.load(mask[name], (b, pl.ds(start, n)), layout)
        else:
            values = _iota(n, layout) + start
        return lax.broadcast_in_dim(values, x.shape, [axis])

    if mask:
        seen = tile("index", k_start, k_axis) <= tile("limit", q_start, q_axis)
    elif causal:
        # Added where the values are few: those of the columns are many registers already.
        later = lengths[1] - lengths[0]
        q_start, k_start = (q_start, k_start - later) if k_axis == 0 else (q_start + later, k_start)
        seen = tile("index", k_start, k_axis) <= tile("limit", q_start, q_axis)
    else:
        seen = tile("index", k_start, k_axis) < lengths[1]
    x = jnp.where(seen, x, -jnp.inf)
    if "q_segment" in mask:
        same = tile("q_segment", q_start, q_axis) == tile("kv_segment", k_start, k_axis)
        x = jnp.where(same, x, -jnp.inf)
    return x


def visits(mask: masks.Mask, q_block: int, k_block: int, *, by_key: bool = False):
    """For each block of queries the blocks of keys to visit, or the other way round.

    Args:
      mask: arrays, padded to whole blocks.

    Returns:
      counts int32 [B, blocks, 2]: how many need the mask, and how many are visited in all;
      and order int32 [B, blocks, other blocks]: those that need it, those that do not, and
      then those that are not to be visited.
    """
    live, full = masks.block_plan(mask, q_block, k_block)
    if by_key:
        live, full = live.swapaxes(1, 2), full.swapaxes(1, 2)
    rank = jnp.where(full, 1, jnp.where(live, 0, 2))
    order = jnp.argsort(rank, axis=-1, stable=True).astype(jnp.int32)
    counts = jnp.stack([(rank == 0).sum(-1), (rank < 2).sum(-1)], -1)
    return counts.astype(jnp.int32), order


def divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most`, at least 1."""
    return max(d for d in range(1, n + 1) if n % d == 0 and d <= max(most, 1))


def tile_of(index, tiles: int, together: int, *, last_first: bool = True):
    """(head, tile) of a block of the grid: all tiles of `together` heads, then the next.

    So many heads share the second-level cache. Within them the tiles come first that are the
    longest under a causal mask: the last of queries, the first of keys.
    """
    per_group = tiles * together
    group, rest = lax.div(index, per_group), lax.rem(index, per_group)
    tile, head = lax.div(rest, together), lax.rem(rest, together)
    return group * together + head, tiles - 1 - tile if last_first else tile


def load_keys(refs, buffers, barriers, head, work, blocks) -> None:
    """The loading warp group's part where blocks of keys and values are walked over."""
    k_ready, v_ready, k_free, v_free = barriers
    _, live, block_at = work
    b, n = head

    @pl.loop(0, live)
    def _(s):
        slot = lax.rem(s, blocks.stages)
        keys = (b, pl.ds(block_at(s) * blocks.key, blocks.key), n)
        ready_free = ((k_ready, k_free), (v_ready, v_free))
        for ref, buffer, (ready, free) in zip(refs, buffers, ready_free, strict=True):
            pl.when(s >= blocks.stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
            plgpu.copy_gmem_to_smem(ref.at[keys], buffer.at[slot], ready.at[slot])

    drain(live, blocks.stages, k_free, v_free)


def drain(steps, stages: int, *barriers) -> None:
    """Waits for the arrivals of the last steps: a barrier must not go before it is all seen."""

    @pl.loop(jnp.maximum(steps - stages, 0), steps)
    def _(s):
        for barrier in barriers:
            plgpu.barrier_wait(barrier.at[lax.rem(s, stages)])


def pad_to(x, size: int, axis: int, fill=0):
    """x, longer."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return x if size == x.shape[axis] else jnp.pad(x, widths, constant_values=fill)


def whole(n: int, block: int) -> int:
    """n rounded up to whole blocks."""
    return -(-n // block) * block
