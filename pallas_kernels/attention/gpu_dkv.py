"""The backward attention kernel for Hopper that makes dk and dv.

64 keys a warp group stay, and blocks of 64 queries go by, of all the query heads that share the
keys. Scores are transposed, keys in rows, so that weights and dS are register operands of the
products that sum over queries. S and dP are started together: the weights are computed while
dP is, dS while dv is, and the other warp group fills the rest. They start from -lse and -delta,
which so take no registers afterwards. A thread has 64 + 64 registers of dk and dv and 32 + 32
of S and dP. Heads of 256 would need twice the first: there both warp groups have the same 64
keys, each computes all of S and dP, and half the columns of dk and dv.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu
from pallas_kernels.attention import gpu_common as common
from pallas_kernels.attention.gpu_forward import COMPUTE


def shares_keys(H: int) -> bool:
    """Whether the warp groups of `dkv` have the same keys and each half of the columns."""
    return H > 128


def key_tile(H: int, blocks) -> int:
    """Keys of a block of the grid of `dkv`."""
    return blocks.key * (1 if shares_keys(H) else COMPUTE)


def _query_blocks(j, plan, b, lengths, tile: int, blocks, causal: bool):
    """Blocks of queries that see tile j of keys: how many masked, how many, and which."""
    if plan:
        counts, order = plan
        return counts[b, j, 0], counts[b, j, 1], lambda p: order[b, j, p]
    T, S = lengths
    n = -(-T // blocks.query)
    if not causal:
        return 0, n, lambda p: p
    first = j * tile - (S - T)  # the first query that sees a key of the tile
    live = jnp.minimum(lax.div(jnp.maximum(first, 0), blocks.query), n)
    full = lax.div(jnp.maximum(first + tile - 1, 0) + blocks.query - 1, blocks.query)
    live = lax.optimization_barrier(live)  # as in key_blocks
    full = jnp.clip(full, live, n)
    return full - live, n - live, lambda p: live + p


def _over_heads(masked, live, block_at, group: int):
    """The same for all query heads of a key head, one after the other.

    Returns:
      How many steps are masked, and how many there are; the (head, block) of a step; and the
      block of one that is masked.
    """
    if group == 1:
        return masked, live, lambda s: (0, block_at(s)), block_at
    at_least_one = lambda n: jnp.maximum(n, 1)

    def at(s):
        late = s >= masked * group
        n = at_least_one(jnp.where(late, live - masked, masked))
        s = jnp.where(late, s - masked * group, s)
        return lax.div(s, n), block_at(lax.rem(s, n) + jnp.where(late, masked, 0))

    masked_at = lambda s: block_at(lax.rem(s, at_least_one(masked)))
    return masked * group, live * group, at, masked_at


def _consume(refs, scratch, wg, head, j, work, *, scale, lengths, blocks, causal):
    q_ref, k_ref, v_ref, _, _, _, mask, _, dk_ref, dv_ref = refs
    k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, kv_ready, *rest = scratch
    q_ready, do_ready, q_free, do_free, done, *stand_ins = rest
    b, n = head
    masked, steps, _, masked_at = work
    H, dtype = q_ref.shape[-1], q_ref.dtype
    share = shares_keys(H)
    width = H // COMPUTE if share else H
    columns = pl.ds(wg * width if share else 0, width)
    own = 0 if share else wg
    start = j * key_tile(H, blocks) + own * blocks.key
    keys = (b, pl.ds(start, blocks.key), n)
    shape = (blocks.key, blocks.query)

    for i, (ref, buffer) in enumerate(((k_ref, k_smem), (v_ref, v_smem))):
        args = (ref.at[keys], buffer.at[own], kv_ready.at[own])
        copy = functools.partial(plgpu.copy_gmem_to_smem, *args)
        pl.when(wg == i)(copy) if share else copy()
    plgpu.barrier_wait(kv_ready.at[own])

    def sweep(dk, dv):
        def step(s, carry, hidden: bool):
            slot = lax.rem(s, blocks.stages)
            q, do = q_smem.at[slot], do_smem.at[slot]
            i = common.fresh(own) if H > 128 else own
            k, v = k_smem.at[i], v_smem.at[i]

            def products(scores, dp):
                plgpu.barrier_wait(q_ready.at[slot])
                lse = common.load_smem(lse_smem.at[slot], common.COLUMN)
                x = common.columns(lse, shape)
                if hidden:
                    where = (masked_at(s) * blocks.query, start, lengths)
                    x = common.hide(x, mask, b, *where, causal=causal, keys_in_rows=True)
                scores[...] = x
                common.mma(scores, k, q, transposed=True)
                plgpu.barrier_wait(do_ready.at[slot])
                delta = common.load_smem(delta_smem.at[slot], common.COLUMN)
                dp[...] = common.columns(delta, shape)
                common.mma(dp, v, do, transposed=True)
                p = jnp.exp2(common.value(scores, pending=1) * (scale * common.LOG2_E))
                common.mma(dv, p.astype(dtype), do.at[:, columns])
                ds = p * common.value(dp, pending=1)
                common.mma(dk, ds.astype(dtype), q.at[:, columns])
                common.wait(1)
                plgpu.barrier_arrive(do_free.at[slot])
                common.wait(0)
                plgpu.barrier_arrive(q_free.at[slot])

            common.accumulate(products, shape, shape, stand_ins=stand_ins[2:], wg=wg)
            return carry

        lax.fori_loop(0, masked, lambda s, c: step(s, c, True), 0)
        lax.fori_loop(masked, steps, lambda s, c: step(s, c, False), 0)
        return common.value(dk), common.value(dv)

    part = (blocks.key, width)
    dk, dv = common.accumulate(sweep, part, part, stand_ins=stand_ins[:2], wg=wg)

    def meet():
        if share:
            plgpu.barrier_arrive(done)
            plgpu.barrier_wait(done)

    meet()  # The other warp group may still be reading what is written over.
    k_smem, v_smem = k_smem.at[own], v_smem.at[own]
    k_smem.at[:, columns][...] = (dk * scale).astype(dtype)
    v_smem.at[:, columns][...] = dv.astype(dtype)
    plgpu.commit_smem()
    meet()
    for i, (ref, buffer) in enumerate(((dk_ref, k_smem), (dv_ref, v_smem))):
        copy = functools.partial(plgpu.copy_smem_to_gmem, buffer, ref.at[keys])
        pl.when(wg == i)(copy) if share else copy()
    plgpu.wait_smem_to_gmem(0)


def _produce(refs, scratch, head, work, *, blocks, group):
    q_ref, _, _, do_ref, lse_ref, delta_ref, *_ = refs
    _, _, q_smem, do_smem, lse_smem, delta_smem, _, *rest = scratch
    q_ready, do_ready, q_free, do_free, *_ = rest
    b, n = head
    _, steps, at, _ = work

    @pl.loop(0, steps)
    def _(s):
        slot = lax.rem(s, blocks.stages)
        g, i = at(s)
        part = pl.ds(i * blocks.query, blocks.query)
        for ref, vector, buffer, small, ready, free in (
            (q_ref, lse_ref, q_smem, lse_smem, q_ready, q_free),
            (do_ref, delta_ref, do_smem, delta_smem, do_ready, do_free),
        ):
            pl.when(s >= blocks.stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
            query = (b, part, n * group + g)
            plgpu.copy_gmem_to_smem(ref.at[query], buffer.at[slot], ready.at[slot])
            values = vector.at[b, n * group + g, part]
            plgpu.copy_gmem_to_smem(values, small.at[slot], ready.at[slot])

    common.drain(steps, blocks.stages, q_free, do_free)


def dkv(q, k, v, do, lse, delta, mask, plan, *, lengths, scale, causal, blocks):
    """The gradients to k and v.

    Args:
      q, do: [B, T, N, H]; k, v: [B, S, K, H]: as of `gpu_forward.forward`.
      lse: float32 [B, N, whole blocks]: logsumexp times log2(e); inf where nothing is seen.
      delta: float32 like lse: rowsum(do * out) minus the cotangent of the logsumexp.
      mask, lengths, causal: as of `gpu_forward.forward`.
      plan: of `common.visits` by key, or None.

    Returns:
      dk and dv like k and v.
    """
    B, S, K, H = k.shape
    N, dtype = q.shape[2], q.dtype
    group = N // K
    tile = key_tile(H, blocks)
    tiles = -(-S // tile)
    together = common.divisor(B * K, blocks.cache // (4 * H * q.shape[1] * group))

    def body(*args):
        refs, scratch = args[:10], args[10:]
        # The first tiles of keys are the ones that most queries see.
        head, j = common.tile_of(lax.axis_index("tile"), tiles, together, last_first=False)
        head = (lax.div(head, K), lax.rem(head, K))
        wg = lax.axis_index("wg")
        work = _query_blocks(j, refs[7], head[0], lengths, tile, blocks, causal)
        work = _over_heads(*work, group)

        def compute():
            plgpu.set_max_registers(blocks.compute_registers, action="increase")
            options = dict(scale=scale, lengths=lengths, blocks=blocks, causal=causal)
            _consume(refs, scratch, wg, head, j, work, **options)

        def load():
            plgpu.set_max_registers(blocks.load_registers, action="decrease")
            _produce(refs, scratch, head, work, blocks=blocks, group=group)

        lax.cond(wg < COMPUTE, compute, load)

    stages, scores = blocks.stages, (blocks.key, blocks.query)
    loaded = plgpu.Barrier(num_arrivals=2, num_barriers=stages)
    free = plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages)
    owners = 1 if shares_keys(H) else COMPUTE
    parts = ((blocks.key, H // COMPUTE * owners),) * 2
    return mosaic_gpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct(k.shape, dtype), jax.ShapeDtypeStruct(v.shape, dtype)),
        scratch_types=[
            *(common.smem((owners, blocks.key, H), dtype),) * 2,
            *(common.smem((stages, blocks.query, H), dtype),) * 2,
            *(plgpu.SMEM((stages, blocks.query), jnp.float32),) * 2,
            plgpu.Barrier(num_arrivals=2, num_barriers=owners),
            *(loaded,) * 2,
            *(free,) * 2,
            plgpu.Barrier(num_arrivals=COMPUTE),
            *common.accumulator_scratch(COMPUTE, *parts, scores, scores),
        ],
        grid=(B * K * tiles,),
        grid_names=("tile",),
        num_threads=COMPUTE + 1,
        thread_name="wg",
        name="attention_backward_dkv",
        params={"approx_math": True},
    )(q, k, v, do, lse, delta, mask, plan)
