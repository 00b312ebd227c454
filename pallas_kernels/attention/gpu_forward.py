"""The forward attention kernel for Hopper.

A block of the grid is three warp groups. One loads keys and values with TMA, `stages` blocks
ahead, and keeps few registers; two compute, `query` rows each. While one of the two is in its
softmax the other has the tensor cores, as in FlashAttention-3 (arXiv 2407.08608): each starts
the weighted sum of one block and the scores of the next, and then it is the other's turn.
With 2 x 64 queries, blocks of 128 keys, heads of 128 and two stages that is 160 KiB of shared
memory, one block per multiprocessor, and 64 + 64 + 32 registers a thread for output, scores
and weights.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu
from pallas_kernels.attention import gpu_common as common

COMPUTE = 2  # warp groups that compute


def key_blocks(i, plan, b, lengths, blocks, causal: bool):
    """Blocks of keys that tile i of queries visits: how many masked, how many, and which."""
    if plan:
        counts, order = plan
        return counts[b, i, 0], counts[b, i, 1], lambda s: order[b, i, s]
    T, S = lengths
    tile, n = COMPUTE * blocks.query, -(-S // blocks.key)
    if not causal:
        full, live = S // blocks.key, n
    else:
        first = i * tile + (S - T)  # what the first query of the tile sees last
        full = lax.div(jnp.maximum(first + 1, 0), blocks.key)
        live = lax.div(jnp.maximum(first + tile, 0) + blocks.key - 1, blocks.key)
        # Opaque: a compiler that sees n = 1 would unroll the loops, and run out of registers.
        live = lax.optimization_barrier(jnp.minimum(live, n))
        full = jnp.minimum(full, live)
    masked = live - full
    return masked, live, lambda s: jnp.where(s < masked, full + s, s - masked)


def _consume(refs, scratch, wg, head, i, work, *, scale, lengths, blocks, causal):
    q_ref, _, _, mask, _, out_ref, lse_ref = refs
    q_smem, k_smem, v_smem, lse_smem, q_ready, k_ready, v_ready, *rest = scratch
    k_free, v_free, turn, s_stand_in, out_stand_in = rest
    b, n = head
    masked, live, block_at = work
    rows, H = blocks.query, q_ref.shape[-1]
    start = (i * COMPUTE + wg) * rows
    queries = (b, pl.ds(start, rows), n)
    q_smem, lse_smem = q_smem.at[wg], lse_smem.at[wg]
    factor = scale * common.LOG2_E

    def hand_over():
        plgpu.barrier_arrive(turn.at[1 - wg])

    def take_over():
        plgpu.barrier_wait(turn.at[wg])

    plgpu.copy_gmem_to_smem(q_ref.at[queries], q_smem, q_ready.at[wg])
    plgpu.barrier_wait(q_ready.at[wg])

    def keys_ready(s):
        slot = lax.rem(s, blocks.stages)
        pl.when(s < live)(lambda: plgpu.barrier_wait(k_ready.at[slot]))

    def attend(acc):
        def step(s, carry, hidden: bool):
            m, l = carry
            slot = lax.rem(s, blocks.stages)

            def scores(x):
                if hidden:
                    at = block_at(s) * blocks.key
                    zero = common.filled(shape, 0.0, common.TILE)
                    x[...] = common.hide(zero, mask, b, start, at, lengths, causal=causal)
                common.mma(x, q_smem, k_smem.at[slot], transposed=True)
                hand_over()
                return common.value(x)

            shape = (rows, blocks.key)
            x = common.accumulate(scores, shape, stand_ins=[s_stand_in], wg=wg)
            plgpu.barrier_arrive(k_free.at[slot])
            m_new = jnp.maximum(m, x.max(1) * factor)
            # Only a masked block can leave a row that has seen nothing; any finite maximum
            # then gives weights of zero.
            m_safe = jnp.where(m_new == -jnp.inf, 0.0, m_new) if hidden else m_new
            p = jnp.exp2(x * factor - common.rows(m_safe, shape))
            shrink = jnp.exp2(m - m_safe)
            l = l * shrink + p.sum(1)
            out = common.value(acc) * common.rows(shrink, (rows, H))
            # All of this before the tensor cores are taken, not after.
            out, l, m_new, p = lax.optimization_barrier((out, l, m_new, p.astype(q_ref.dtype)))
            plgpu.barrier_wait(v_ready.at[slot])
            take_over()
            acc[...] = out
            common.mma(acc, p, v_smem.at[slot])
            keys_ready(s + 1)
            common.wait()
            plgpu.barrier_arrive(v_free.at[slot])
            return m_new, l

        m = common.filled((rows,), -jnp.inf, common.ROW)
        l = common.filled((rows,), 0.0, common.ROW)
        keys_ready(jnp.int32(0))
        pl.when(wg == 1)(take_over)
        m, l = lax.fori_loop(0, masked, lambda s, c: step(s, c, True), (m, l))
        m, l = lax.fori_loop(masked, live, lambda s, c: step(s, c, False), (m, l))
        pl.when(wg == 0)(hand_over)
        return common.value(acc), m, l

    acc, m, l = common.accumulate(attend, (rows, H), stand_ins=[out_stand_in], wg=wg)
    sees = l > 0.0
    l = jnp.where(sees, l, 1.0)
    q_smem[...] = (acc * common.rows(1.0 / l, acc.shape)).astype(q_ref.dtype)
    lse_smem[...] = jnp.where(sees, m * common.LN_2 + jnp.log(l), -jnp.inf)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_smem, out_ref.at[queries], commit_group=False)
    plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[b, n, pl.ds(start, rows)], commit_group=False)
    plgpu.commit_smem_to_gmem_group()
    plgpu.wait_smem_to_gmem(0)


def forward(q_BTNH, k_BSKH, v_BSKH, mask, plan, *, lengths, scale, causal, blocks):
    """Attention of whole tiles.

    Args:
      q_BTNH, k_BSKH, v_BSKH: bfloat16 or float16, H a multiple of 64, lengths a multiple of 8.
      mask: arrays of `masks.build` padded to whole blocks, or {}.
      plan: of `common.visits` for tiles of queries, or None where mask is {}.
      lengths: T and S.
      causal: what `masks.Default` says; of no meaning otherwise.
      blocks: with `query` rows for each of two warp groups, `key` and `stages`.

    Returns:
      out like q and lse float32 [B, N, whole tiles].
    """
    B, T, N, H = q_BTNH.shape
    group = N // k_BSKH.shape[2]
    tile = COMPUTE * blocks.query
    tiles = -(-T // tile)
    kv_bytes = 4 * H * k_BSKH.shape[1] // group
    together = common.divisor(B * N, max(blocks.cache // kv_bytes, group))

    def body(*args):
        refs, scratch = args[:7], args[7:]
        head, i = common.tile_of(lax.axis_index("tile"), tiles, together)
        head = (lax.div(head, N), lax.rem(head, N))
        wg = lax.axis_index("wg")
        work = key_blocks(i, refs[4], head[0], lengths, blocks, causal)

        def compute():
            plgpu.set_max_registers(blocks.compute_registers, action="increase")
            options = dict(scale=scale, lengths=lengths, blocks=blocks, causal=causal)
            _consume(refs, scratch, wg, head, i, work, **options)

        def load():
            plgpu.set_max_registers(blocks.load_registers, action="decrease")
            key_head = (head[0], lax.div(head[1], group))
            common.load_keys(refs[1:3], scratch[1:3], scratch[5:9], key_head, work, blocks)

        # Not one `pl.when` after the other: what the second needs would be kept through the first.
        lax.cond(wg < COMPUTE, compute, load)

    dtype, stages = q_BTNH.dtype, blocks.stages
    free = plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages)
    return mosaic_gpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(q_BTNH.shape, dtype),
            jax.ShapeDtypeStruct((B, N, tiles * tile), jnp.float32),
        ),
        scratch_types=[
            common.smem((COMPUTE, blocks.query, H), dtype),
            common.smem((stages, blocks.key, H), dtype),
            common.smem((stages, blocks.key, H), dtype),
            plgpu.SMEM((COMPUTE, blocks.query), jnp.float32),
            plgpu.Barrier(num_barriers=COMPUTE),
            *(plgpu.Barrier(num_barriers=stages),) * 2,
            *(free,) * 2,
            plgpu.Barrier(num_barriers=COMPUTE),
            *common.accumulator_scratch(COMPUTE, (blocks.query, blocks.key), (blocks.query, H)),
        ],
        grid=(B * N * tiles,),
        grid_names=("tile",),
        num_threads=COMPUTE + 1,
        thread_name="wg",
        name="attention_forward",
        params={"approx_math": True},
    )(q_BTNH, k_BSKH, v_BSKH, mask, plan)
