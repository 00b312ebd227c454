"""The forward kernel of flash attention on TPU."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import tpu_plan

LANES = 128
LOG2E = 1.4426950408889634
# Where the running maximum starts: finite, so that no difference is ever inf - inf, and far
# below any score, so that it is only ever kept where nothing was seen.
_LOWEST = -1e30


def dot(a, b, contract_a: int, contract_b: int):
    """Matrix product in fp32; fp32 operands are not rounded to bf16."""
    exact = "HIGHEST" if a.dtype == jnp.float32 else "DEFAULT"  # whatever jax's config says
    return jax.lax.dot_general(
        a,
        b,
        (((contract_a,), (contract_b,)), ((), ())),
        precision=jax.lax.Precision[exact],
        preferred_element_type=jnp.float32,
    )


def across(x, width: int):
    """[n, LANES], the same in all lanes -> [n, width]."""
    return jnp.tile(x, (1, width // LANES))


def _reciprocal(x):
    """1 / x, for ordinary x > 0: the hardware's estimate and two steps of Newton's."""
    r = pl.reciprocal(x, approx=True)
    for _ in range(2):
        r = r * (2.0 - x * r)
    return r


def _kernel(visits_ref, q_ref, k_ref, v_ref, *refs, kind, rows, most, factor, ck):
    """One visit: a query block, some key blocks, and the online softmax over their scores."""
    n_marks = 0 if kind[0] != "arrays" else 4 if kind[1] else 2
    marks, (out_ref, lse_ref, m_ref, l_ref, acc_ref) = refs[:n_marks], refs[n_marks:]
    row = pl.program_id(0) if rows else 0
    at = 2 * most * row + pl.program_id(2)
    where, bits = visits_ref[at], visits_ref[at + most]
    cq, span = q_ref.shape[0], k_ref.shape[0] // ck
    diagonal = kind[0] == "diagonal"

    @pl.when(where & tpu_plan.FIRST != 0)
    def _():
        m_ref[...] = jnp.full_like(m_ref, _LOWEST)
        l_ref[...] = jnp.zeros_like(l_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def step(sub, masked: bool, rows=slice(0, cq), width=ck):
        """Some queries of the block with the first keys of block `sub`."""
        keys = pl.ds(sub * ck, width)
        s = dot(q_ref[rows, :], k_ref[keys, :], 1, 1) * factor
        if masked:
            seen = tpu_plan.visible(
                kind,
                s.shape,
                row_is_query=True,
                rows=[across(x[...], ck) for x in marks[0::2]],
                columns=[x[:, keys] for x in marks[1::2]],
                q_start=rows.start if diagonal else tpu_plan.outer(where) * cq,
                k_start=0 if diagonal else (tpu_plan.inner(where) * span + sub) * ck,
            )
            s = jnp.where(seen, s, -jnp.inf)
        m = m_ref[rows, :]
        m_new = jnp.maximum(m, s.max(-1, keepdims=True))
        p = jnp.exp2(s - across(m_new, width))
        shrink = jnp.exp2(m - m_new)
        # Sums stay apart by lane until the end.
        part = functools.reduce(jnp.add, [p[:, i : i + LANES] for i in range(0, width, LANES)])
        l_ref[rows, :] = l_ref[rows, :] * shrink + part
        m_ref[rows, :] = m_new
        pv = dot(p.astype(v_ref.dtype), v_ref[keys, :], 1, 0)
        acc_ref[rows, :] = acc_ref[rows, :] * across(shrink, acc_ref.shape[1]) + pv

    def each(sub, _):
        live, full = tpu_plan.live(bits, sub), tpu_plan.full(bits, sub)
        pl.when(full)(functools.partial(step, sub, False))

        @pl.when(live & ~full)
        def _():
            strips = kind[1] if diagonal else 1
            high = cq // strips
            for i in range(strips):
                width = (i + 1) * high if diagonal else ck
                step(sub, True, slice(i * high, (i + 1) * high), width)

    jax.lax.fori_loop(0, span, each, None)

    @pl.when(where & tpu_plan.LAST != 0)
    def _():
        l = jnp.broadcast_to(l_ref[...].sum(-1, keepdims=True), l_ref.shape)
        # Where nothing was seen, acc is zero and so is the output.
        inverse = _reciprocal(jnp.maximum(l, 1e-30))
        out = acc_ref[...] * across(inverse, acc_ref.shape[1])
        out_ref[...] = out.astype(out_ref.dtype)
        # One transpose turns both columns into rows.
        lane = jax.lax.broadcasted_iota(jnp.int32, l.shape, 1)
        rows = jnp.where(lane == 0, m_ref[...], l).T
        m, l = rows[:1], rows[1:2]
        lse_ref[...] = jnp.where(l == 0.0, -jnp.inf, (m + jnp.log2(l)) * (1.0 / LOG2E))


def forward(q, k, v, marks, visits, count, *, kind, heads, kv_heads, scale, blocks, limit_bytes):
    """Attention of every head.

    Args:
      q: [B, T, N * H]; k, v: [B, S, K * H]; T, S whole blocks, H whole lanes.
      marks: for kind "arrays": limit [B, T, LANES], index [B, 1, S] and, with documents,
        the segments likewise; else ().
      visits: int32 [R, 2, most], R = B or 1: query blocks outside, keys inside; count: how
        many steps to take, at most `most`, dynamic or not.
      kind: see `tpu_plan.kind`. heads, kv_heads: N, K. scale: on the scores.
      blocks: tokens in a block of queries and of keys, and key blocks to a visit.
      limit_bytes: of vector memory.

    Returns:
      out [B, T, N * H] in q's dtype, lse float32 [B, N, 1, T].
    """
    B, T, width = q.shape
    H, group = width // heads, heads // kv_heads
    cq, ck, span = blocks
    load = ck * span
    rows, most = visits.shape[0] > 1, visits.shape[2]
    at = lambda b, t, ref: ref[(b if rows else 0) * 2 * most + t]
    i = lambda b, t, ref: tpu_plan.outer(at(b, t, ref))
    j = lambda b, t, ref: tpu_plan.inner(at(b, t, ref))
    q_spec = pl.BlockSpec((None, cq, H), lambda b, n, t, ref: (b, i(b, t, ref), n))
    kv_spec = pl.BlockSpec(
        (None, load, H), lambda b, n, t, ref: (b, j(b, t, ref), jax.lax.div(n, group))
    )
    limit = pl.BlockSpec((None, cq, LANES), lambda b, n, t, ref: (b, i(b, t, ref), 0))
    index = pl.BlockSpec((None, 1, load), lambda b, n, t, ref: (b, 0, j(b, t, ref)))
    lse_spec = pl.BlockSpec((None, None, 1, cq), lambda b, n, t, ref: (b, n, 0, i(b, t, ref)))
    kernel = functools.partial(
        _kernel, kind=kind, rows=rows, most=most, factor=scale * LOG2E, ck=ck
    )
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, heads, count),
            in_specs=[q_spec, kv_spec, kv_spec, *[limit, index][: len(marks)] * (len(marks) // 2)],
            out_specs=[q_spec, lse_spec],
            scratch_shapes=[
                pltpu.VMEM((cq, LANES), jnp.float32),
                pltpu.VMEM((cq, LANES), jnp.float32),
                pltpu.VMEM((cq, H), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((B, heads, 1, T), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=limit_bytes,
        ),
        name="rotary_attention_forward",
    )(visits.reshape(-1), q, k, v, *marks)
