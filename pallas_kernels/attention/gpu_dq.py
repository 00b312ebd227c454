"""The backward attention kernel for Hopper that makes dq.

64 queries a warp group stay, and blocks of 128 keys go by. As in gpu_dkv.py S and dP are
started together, from -lse and -delta. A thread has 64 registers each of dq, S and dP.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu
from pallas_kernels.attention import gpu_common as common
from pallas_kernels.attention.gpu_forward import COMPUTE, key_blocks


def _consume(refs, scratch, wg, head, i, work, *, scale, lengths, blocks, causal):
    q_ref, _, _, do_ref, lse_ref, delta_ref, mask, _, dq_ref = refs
    q_smem, do_smem, k_smem, v_smem, q_ready, k_ready, v_ready, k_free, v_free, *stand_ins = scratch
    b, n = head
    masked, live, block_at = work
    H, dtype = q_ref.shape[-1], q_ref.dtype
    start = (i * COMPUTE + wg) * blocks.query
    part = pl.ds(start, blocks.query)
    shape = (blocks.query, blocks.key)

    plgpu.copy_gmem_to_smem(q_ref.at[b, part, n], q_smem.at[wg], q_ready.at[wg])
    plgpu.copy_gmem_to_smem(do_ref.at[b, part, n], do_smem.at[wg], q_ready.at[wg])
    lse = mosaic_gpu.load(lse_ref, (b, n, part), common.ROW)
    delta = mosaic_gpu.load(delta_ref, (b, n, part), common.ROW)
    plgpu.barrier_wait(q_ready.at[wg])

    def sweep(dq):
        def step(s, carry, hidden: bool):
            slot = lax.rem(s, blocks.stages)
            own, other = (common.fresh(wg), common.fresh(slot)) if H > 128 else (wg, slot)
            q, do, k, v = q_smem.at[own], do_smem.at[own], k_smem.at[other], v_smem.at[other]

            def products(scores, dp):
                plgpu.barrier_wait(k_ready.at[slot])
                x = common.rows(lse, shape)
                if hidden:
                    where = (start, block_at(s) * blocks.key, lengths)
                    x = common.hide(x, mask, b, *where, causal=causal)
                scores[...] = x
                common.mma(scores, q, k, transposed=True)
                plgpu.barrier_wait(v_ready.at[slot])
                dp[...] = common.rows(delta, shape)
                common.mma(dp, do, v, transposed=True)
                p = jnp.exp2(common.value(scores, pending=1) * (scale * common.LOG2_E))
                ds = p * common.value(dp)
                plgpu.barrier_arrive(v_free.at[slot])
                common.mma(dq, ds.astype(dtype), k)
                common.wait(0)
                plgpu.barrier_arrive(k_free.at[slot])

            common.accumulate(products, shape, shape, stand_ins=stand_ins[1:], wg=wg)
            return carry

        lax.fori_loop(0, masked, lambda s, c: step(s, c, True), 0)
        lax.fori_loop(masked, live, lambda s, c: step(s, c, False), 0)
        return common.value(dq)

    dq = common.accumulate(sweep, (blocks.query, H), stand_ins=stand_ins[:1], wg=wg)
    q_smem = q_smem.at[wg]
    q_smem[...] = (dq * scale).astype(dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_smem, dq_ref.at[b, part, n])
    plgpu.wait_smem_to_gmem(0)


def dq(q, k, v, do, lse, delta, mask, plan, *, lengths, scale, causal, blocks):
    """The gradient to q, from the arguments of `gpu_dkv.dkv`; plan: as of `gpu_forward.forward`."""
    B, T, N, H = q.shape
    dtype, group = q.dtype, N // k.shape[2]
    tiles = -(-T // (COMPUTE * blocks.query))
    together = common.divisor(B * N, blocks.cache // (4 * H * k.shape[1] // group))

    def body(*args):
        refs, scratch = args[:9], args[9:]
        head, i = common.tile_of(lax.axis_index("tile"), tiles, together)
        head = (lax.div(head, N), lax.rem(head, N))
        wg = lax.axis_index("wg")
        work = key_blocks(i, refs[7], head[0], lengths, blocks, causal)

        def compute():
            plgpu.set_max_registers(blocks.compute_registers, action="increase")
            options = dict(scale=scale, lengths=lengths, blocks=blocks, causal=causal)
            _consume(refs, scratch, wg, head, i, work, **options)

        def load():
            plgpu.set_max_registers(blocks.load_registers, action="decrease")
            _, _, k_smem, v_smem, _, *barriers = scratch[:9]
            b, n = head
            key_head = (b, lax.div(n, group))
            common.load_keys(refs[1:3], (k_smem, v_smem), barriers, key_head, work, blocks)

        lax.cond(wg < COMPUTE, compute, load)

    stages, scores = blocks.stages, (blocks.query, blocks.key)
    free = plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages)
    return mosaic_gpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(q.shape, dtype),
        scratch_types=[
            *(common.smem((COMPUTE, blocks.query, H), dtype),) * 2,
            *(common.smem((stages, blocks.key, H), dtype),) * 2,
            plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTE),
            *(plgpu.Barrier(num_barriers=stages),) * 2,
            *(free,) * 2,
            *common.accumulator_scratch(COMPUTE, (blocks.query, H), scores, scores),
        ],
        grid=(B * N * tiles,),
        grid_names=("tile",),
        num_threads=COMPUTE + 1,
        thread_name="wg",
        name="attention_backward_dq",
        params={"approx_math": True},
    )(q, k, v, do, lse, delta, mask, plan)
