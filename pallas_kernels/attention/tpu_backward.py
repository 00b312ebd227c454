"""The backward kernel of flash attention on TPU: dq, dk and dv in one sweep.

Key blocks are the outer loop, so dk and dv are gathered in place, and dq of all the queries
of the call is gathered in vector memory beside them: each pair of blocks is visited once
and costs five matrix products, where a sweep for dk, dv and one for dq would take seven.
Scores are transposed, [key, query]: what belongs to a query is then a row, stored as such,
and only dq contracts the leading dimension of its first operand.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import tpu_plan
from pallas_kernels.attention.tpu_forward import LANES, LOG2E, across, dot


def _delta(do, out):
    """Row sums of the product of [n, H] as a row, [1, n]."""
    return (do.astype(jnp.float32) * out.astype(jnp.float32)).T.sum(0, keepdims=True)


def _kernel(visits_ref, start_ref, *refs, kind, rows, most, scale, cq, gather):
    """One visit: some query blocks of one head and a key block."""
    (q_ref, k_ref, v_ref, do_ref, out_ref, lse_ref, d_lse_ref), refs = refs[:7], refs[7:]
    n_marks = 0 if kind[0] != "arrays" else 4 if kind[1] else 2
    marks, refs = refs[:n_marks], refs[n_marks:]
    (dk_in, dv_in), refs = (refs[:2], refs[2:]) if gather else ((None, None), refs)
    dq_ref, dk_ref, dv_ref, dq_acc, dk_acc, dv_acc, delta, known = refs
    row = pl.program_id(0) if rows else 0
    t, g = pl.program_id(2), pl.program_id(3)
    where, bits = visits_ref[2 * most * row + t], visits_ref[2 * most * row + t + most]
    ck, span, blocks = k_ref.shape[0], q_ref.shape[0] // cq, dq_acc.shape[1] // cq

    def each_block_of_queries(f):
        jax.lax.fori_loop(0, blocks, lambda i, _: f(pl.ds(i * cq, cq)), None)

    diagonal = kind[0] == "diagonal"

    @pl.when(t == 0)
    def _():
        def zero(at):
            dq_acc[g, at, :] = jnp.zeros_like(dq_acc[g, at, :])

        each_block_of_queries(zero)
        for i in range(known.shape[1]):
            known[g, i] = 0

    @pl.when((where & tpu_plan.FIRST != 0) & (g == 0))
    def _():
        dk_acc[...] = dk_in[...] if gather else jnp.zeros_like(dk_acc)
        dv_acc[...] = dv_in[...] if gather else jnp.zeros_like(dv_acc)

    loaded = tpu_plan.inner(where)

    @pl.when(known[g, loaded] == 0)
    def _():
        known[g, loaded] = 1

        def block(sub, _):
            queries = pl.ds(pl.multiple_of(sub * cq, cq), cq)
            at = pl.ds(pl.multiple_of((loaded * span + sub) * cq, cq), cq)
            delta[g, :, at] = (
                _delta(do_ref[queries, :], out_ref[queries, :]) - d_lse_ref[:, queries]
            )

        jax.lax.fori_loop(0, span, block, None)

    def step(sub, masked: bool, keys=slice(0, ck), skip=0):
        """Some keys of the block with the queries of block `sub`, but the first `skip`."""
        queries = pl.ds(pl.multiple_of(sub * cq, cq) + skip, cq - skip)
        here = loaded * span + sub
        q, k, v, do = q_ref[queries, :], k_ref[keys, :], v_ref[keys, :], do_ref[queries, :]
        s = dot(k, q, 1, 1) * (scale * LOG2E)
        if masked:
            seen = tpu_plan.visible(
                kind,
                s.shape,
                row_is_query=False,
                rows=[across(x[...], cq) for x in marks[1::2]],
                columns=[x[:, queries] for x in marks[0::2]],
                q_start=skip if diagonal else start_ref[0] + here * cq,
                k_start=keys.start if diagonal else tpu_plan.outer(where) * ck,
            )
            s = jnp.where(seen, s, -jnp.inf)
        # Where a query sees nothing every s is -inf, and so must be every difference.
        lse = lse_ref[:, queries]
        p = jnp.exp2(s - jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2E))
        dv_acc[keys, :] += dot(p.astype(do.dtype), do, 1, 0)
        at = pl.ds(pl.multiple_of(here * cq, cq) + skip, cq - skip)
        ds = (p * (dot(v, do, 1, 1) - delta[g, :, at])).astype(q.dtype)
        dk_acc[keys, :] += dot(ds, q, 1, 0)
        dq_acc[g, at, :] += dot(ds, k, 0, 0)

    def each(sub, _):
        live, full = tpu_plan.live(bits, sub), tpu_plan.full(bits, sub)
        pl.when(full)(functools.partial(step, sub, False))

        @pl.when(live & ~full)
        def _():
            strips = kind[1] if diagonal else 1
            high = ck // strips
            for i in range(strips):
                skip = i * high if diagonal else 0
                step(sub, True, slice(i * high, (i + 1) * high), skip)

    jax.lax.fori_loop(0, span, each, None)

    @pl.when((where & tpu_plan.LAST != 0) & (g == pl.num_programs(3) - 1))
    def _():
        dk = dk_acc[...] if gather else dk_acc[...] * scale
        dk_ref[...] = dk.astype(dk_ref.dtype)
        dv_ref[...] = dv_acc[...].astype(dv_ref.dtype)

    @pl.when(t == pl.num_programs(2) - 1)
    def _():
        H = dq_acc.shape[2]

        def store(at):
            dq = (dq_acc[g, at, :] * scale).astype(dq_ref.dtype)
            dq_ref[at, pl.ds(pl.multiple_of(g * H, H), H)] = dq

        each_block_of_queries(store)


def backward(
    q,
    k,
    v,
    do,
    out,
    lse,
    d_lse,
    marks,
    visits,
    count,
    start=0,
    dkv=None,
    *,
    kind,
    heads,
    kv_heads,
    scale,
    blocks,
    limit_bytes,
):
    """The gradients of `tpu_forward.forward`, for a stretch of queries that fits vector memory.

    Args:
      q, do, out: [B, T, N * H]; k, v: [B, S, K * H]; T, S whole blocks, H whole lanes.
      lse, d_lse: float32 [B, N, 1, T]; lse is -inf for queries that see nothing.
      marks: for kind "arrays": limit [B, 1, T], index [B, S, LANES] and, with documents,
        the segments likewise; else ().
      visits: int32 [R, 2, most], R = B or 1: key blocks outside, queries inside; count: how
        many steps to take, at most `most`, dynamic or not.
      start: int32, number of the first query of the stretch.
      dkv: None, or float32 dk / scale and dv [B, S, K * H] to add to.
      kind: see `tpu_plan.kind`. heads, kv_heads: N, K. scale: on the scores.
      blocks: tokens in a block of queries and of keys, and query blocks to a visit.
      limit_bytes: of vector memory.

    Returns:
      dq [B, T, N * H] in q's dtype; dk, dv [B, S, K * H] in k's. With `dkv` instead the
      sums, of its dtype and meaning; key blocks that are not visited keep what it holds.
    """
    B, T, width = q.shape
    H, group = width // heads, heads // kv_heads
    cq, ck, span = blocks
    load = cq * span
    spans = -(-T // load)
    rows, most = visits.shape[0] > 1, visits.shape[2]
    at = lambda b, t, refs: refs[0][(b if rows else 0) * 2 * most + t]
    i = lambda b, t, refs: tpu_plan.inner(at(b, t, refs))
    j = lambda b, t, refs: tpu_plan.outer(at(b, t, refs))
    head = lambda h, g: h * group + g
    q_spec = pl.BlockSpec((None, load, H), lambda b, h, t, g, *refs: (b, i(b, t, refs), head(h, g)))
    kv_spec = pl.BlockSpec((None, ck, H), lambda b, h, t, g, *refs: (b, j(b, t, refs), h))
    row = pl.BlockSpec(
        (None, None, 1, load), lambda b, h, t, g, *refs: (b, head(h, g), 0, i(b, t, refs))
    )
    limit = pl.BlockSpec((None, 1, load), lambda b, h, t, g, *refs: (b, 0, i(b, t, refs)))
    index = pl.BlockSpec((None, ck, LANES), lambda b, h, t, g, *refs: (b, j(b, t, refs), 0))
    dq_spec = pl.BlockSpec((None, T, group * H), lambda b, h, t, g, *refs: (b, 0, h))
    gather = dkv is not None
    kernel = functools.partial(
        _kernel, kind=kind, rows=rows, most=most, scale=scale, cq=cq, gather=gather
    )
    dtypes = (jnp.float32, jnp.float32) if gather else (k.dtype, v.dtype)
    first = 9 + len(marks)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, kv_heads, count, group),
            in_specs=[
                *(q_spec, kv_spec, kv_spec, q_spec, q_spec, row, row),
                *[limit, index][: len(marks)] * (len(marks) // 2),
                *[kv_spec] * (2 if gather else 0),
            ],
            out_specs=[dq_spec, kv_spec, kv_spec],
            scratch_shapes=[
                pltpu.VMEM((group, T, H), jnp.float32),
                pltpu.VMEM((ck, H), jnp.float32),
                pltpu.VMEM((ck, H), jnp.float32),
                pltpu.VMEM((group, 1, spans * load), jnp.float32),
                pltpu.SMEM((group, spans), jnp.int32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            *(jax.ShapeDtypeStruct(k.shape, dtype) for dtype in dtypes),
        ],
        input_output_aliases={first: 1, first + 1: 2} if gather else {},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=limit_bytes,
        ),
        name="rotary_attention_backward",
    )(
        visits.reshape(-1),
        jnp.full(1, start, jnp.int32),
        q,
        k,
        v,
        do,
        out,
        lse,
        d_lse,
        *marks,
        *(dkv or ()),
    )
