"""Flash attention on TPU: Pallas kernels for Mosaic, forward and backward.

FlashAttention-2's recurrence (Dao 2023; arXiv 2307.08691) over lists of the blocks that can
see each other (`tpu_plan`), read off the token marks at run time: blocks that cannot are not
computed, nor loaded unless one that is loaded with them can; those that see everything skip
the mask; on a causal diagonal little more than the half that is seen is computed. The
backward pass gathers dq in vector memory beside dk and dv, so it needs one sweep and five
matrix products a pair of blocks; when the queries do not fit it goes over them in stretches,
adding to dk and dv in place, so memory stays linear.

Heads stand side by side in the last axis, [B, T, N * H], as a projection leaves them, so
nothing is transposed. Head dims are padded to whole lanes (128), lengths to whole blocks.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import dispatch
from pallas_kernels.attention import masks, tpu_plan
from pallas_kernels.attention.tpu_backward import backward
from pallas_kernels.attention.tpu_forward import LANES, forward

_GENERATIONS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}

# Visits held in scalar memory (1 MiB on all generations) at a time, 8 bytes each.
_MOST_VISITS = 2**16


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """What is handled at a time. Tokens are rounded to what the length needs.

    Attributes:
      query, key: tokens in a block of the forward kernel.
      query_backward, key_backward: and of the backward kernel.
      span: blocks of the inner loop loaded together, at most `tpu_plan.MOST_SPAN`.
      gathered: most rows of dq, over all the heads of a group, held in vector memory.
      limit_bytes: of vector memory, for the compiler.
    """

    query: int = 512
    key: int = 512
    query_backward: int = 512
    key_backward: int = 512
    span: int = 4
    gathered: int = 8192
    limit_bytes: int = 100 * 2**20


def default_blocks(generation: str, dtype, H: int, T: int) -> BlockSizes:
    """Block sizes for a TPU generation ("v5e", "v6e" or "v5p"), dtype, head dim and length.

    Chosen by counting bundles of compiled kernels (benchmarks/tpu_static.py), not on a chip.
    v6e's larger matrix units want larger blocks; elsewhere those gain nothing, and smaller
    ones skip more of a row of short documents.
    """
    limit_bytes = 100 * 2**20 if generation in ("v5e", "v6e") else 50 * 2**20
    row_bytes = jnp.dtype(dtype).itemsize * _whole(H, LANES)
    block = 1024 if generation == "v6e" and T >= 2048 and row_bytes == 256 else 512
    return BlockSizes(
        *(block,) * 4,
        span=max(1, 2**20 // (block * row_bytes)),
        gathered=2**21 // row_bytes,
        limit_bytes=limit_bytes,
    )


def generation() -> str:
    """Of the TPU that is traced for; "v5p", which has the least vector memory, for none."""
    platform, kind = dispatch.target()
    if platform != "tpu":
        return "v5p"
    if kind not in _GENERATIONS:
        raise NotImplementedError(f"the TPU kernels are for v5e, v5p and v6e, not for {kind!r}")
    return _GENERATIONS[kind]


def _block(length: int, most: int) -> int:
    """The size of as few equal blocks of at most `most` as cover `length`, in whole lanes."""
    n = -(-length // most)
    return -(-length // (LANES * n)) * LANES


def _spans(blocks: int, most: int) -> int:
    return -(-blocks // -(-blocks // most))


@dataclasses.dataclass(frozen=True)
class _Call:
    """What both kernels are told that is not an array."""

    default: masks.Default | None
    heads: int
    kv_heads: int
    scale: float
    lengths: tuple[int, int]  # before padding
    blocks: BlockSizes

    def options(self, mask, cq: int, ck: int, span: int) -> dict:
        """The keyword arguments of `forward` and `backward`."""
        return dict(
            heads=self.heads,
            kv_heads=self.kv_heads,
            scale=self.scale,
            kind=tpu_plan.kind(self.default or mask, *self.lengths, cq, ck),
            blocks=(cq, ck, span),
            limit_bytes=self.blocks.limit_bytes,
        )


def _longer(x, n: int):
    """Pads axis 1 to n."""
    return jnp.pad(x, ((0, 0), (0, n - x.shape[1])) + ((0, 0),) * (x.ndim - 2))


def _whole(length: int, block: int) -> int:
    return -(-length // block) * block


def _by_rows(f, visits: int, mask, *arrays):
    """f(mask, *arrays) a few rows of the batch at a time, so that their plans fit."""
    B, rows = arrays[0].shape[0], _MOST_VISITS // visits
    if rows == 0:
        raise NotImplementedError(f"a plan of {visits} visits does not fit the scalar memory")
    if not mask or rows >= B:
        return f(mask, *arrays)
    rows = max(d for d in range(1, rows + 1) if B % d == 0)
    parts = lambda x: x.reshape(B // rows, rows, *x.shape[1:])
    out = jax.lax.map(lambda part: f(*part), jax.tree.map(parts, (mask, *arrays)))
    return jax.tree.map(lambda x: x.reshape(B, *x.shape[2:]), out)


def _listed(live, full, **options):
    """`tpu_plan.visits`, its count the largest of any row; both concrete if the plan is."""
    visits, count = tpu_plan.visits(live, full, **options)
    return visits, int(count.max()) if isinstance(count, np.ndarray) else count.max()


def _forward(call: _Call, q, k, v, mask):
    """[B, T, N * H] and [B, S, K * H] of any lengths: out, and lse [B, N, T]."""
    (T, S), blocks = call.lengths, call.blocks
    cq, ck = _block(T, blocks.query), _block(S, blocks.key)
    whole_T, whole_S = _whole(T, cq), _whole(S, ck)
    span = _spans(whole_S // ck, blocks.span)
    most = whole_T // cq * -(-whole_S // (ck * span))

    def some_rows(mask, q, k, v):
        live, full = tpu_plan.plan(call.default or mask, T, S, cq, ck)
        visits, count = _listed(live, full, span=span, keep_empty=True)
        marks = ()
        if mask:
            padded = masks.pad(mask, whole_T, whole_S)
            wide = lambda x: jnp.broadcast_to(x[:, :, None], (*x.shape, LANES))
            marks = (wide(padded["limit"]), padded["index"][:, None])
            if "q_segment" in mask:
                marks += (wide(padded["q_segment"]), padded["kv_segment"][:, None])
        return forward(
            *(_longer(q, whole_T), _longer(k, whole_S), _longer(v, whole_S), marks),
            *(visits, count),
            **call.options(mask, cq, ck, span),
        )

    out, lse = _by_rows(some_rows, most, mask, q, k, v)
    return out[:, :T], lse[:, :, 0, :T]


def _backward(call: _Call, q, k, v, do, out, lse, d_lse, mask):
    """dq, dk, dv of `_forward`; lse, d_lse [B, N, T]."""
    (T, S), blocks = call.lengths, call.blocks
    group = call.heads // call.kv_heads
    cq = _block(T, min(blocks.query_backward, blocks.gathered // group // LANES * LANES))
    ck = _block(S, blocks.key_backward)
    whole_S = _whole(S, ck)
    # Queries go in equal stretches whose dq fits.
    n = -(-_whole(T, cq) // (blocks.gathered // group // cq * cq))
    stretch = _whole(-(-T // n), cq)
    whole_T = n * stretch
    span = _spans(stretch // cq, blocks.span)
    most = whole_S // ck * -(-stretch // (cq * span))

    def some_rows(mask, q, k, v, do, out, lse, d_lse):
        live, full = tpu_plan.plan(call.default or mask, T, S, cq, ck)
        B = q.shape[0]
        marks_q, marks_k = (), ()
        if mask:
            padded = masks.pad(mask, whole_T, whole_S)
            wide = lambda x: jnp.broadcast_to(x[:, :, None], (*x.shape, LANES))
            marks_q, marks_k = (padded["limit"][:, None],), (wide(padded["index"]),)
            if "q_segment" in mask:
                marks_q += (padded["q_segment"][:, None],)
                marks_k += (wide(padded["kv_segment"]),)
        fill = ((0, 0), (0, 0), (0, whole_T - T))
        lse = jnp.pad(lse, fill, constant_values=-jnp.inf)[:, :, None]
        d_lse = jnp.pad(d_lse, fill)[:, :, None]
        q, do, out = (_longer(x, whole_T) for x in (q, do, out))
        k, v = _longer(k, whole_S), _longer(v, whole_S)
        pair = lambda x, y: tuple(m for xy in zip(x, y, strict=True) for m in xy)
        options = call.options(mask, cq, ck, span)
        keys_first = lambda x: x.swapaxes(-1, -2)
        if n == 1:
            listed = _listed(keys_first(live), keys_first(full), span=span, keep_empty=True)
            return backward(
                q, k, v, do, out, lse, d_lse, pair(marks_q, marks_k), *listed, **options
            )

        live, full = (
            jnp.pad(x, ((0, 0), (0, whole_T // cq - x.shape[1]), (0, 0))) for x in (live, full)
        )
        part = lambda x, axis: jnp.moveaxis(
            x.reshape(*x.shape[:axis], n, x.shape[axis] // n, *x.shape[axis + 1 :]), axis, 0
        )

        def one_stretch(dkv, xs):
            start, live, full, q, do, out, lse, d_lse, marks_q = xs
            listed = _listed(keys_first(live), keys_first(full), span=span, keep_empty=False)
            marks = pair(marks_q, marks_k)
            dq, *dkv = backward(
                *(q, k, v, do, out, lse, d_lse, marks, *listed, start, tuple(dkv)), **options
            )
            return tuple(dkv), dq

        zeros = jnp.zeros(k.shape, jnp.float32)
        start = jnp.arange(n, dtype=jnp.int32) * stretch
        rows = (*(part(x, 1) for x in (live, full, q, do, out)), part(lse, 3), part(d_lse, 3))
        xs = (start, *rows, tuple(part(x, 2) for x in marks_q))
        (dk, dv), dq = jax.lax.scan(one_stretch, (zeros, zeros), xs)
        dq = jnp.moveaxis(dq, 0, 1).reshape(B, whole_T, -1)
        return dq, (dk * call.scale).astype(k.dtype), dv.astype(v.dtype)

    dq, dk, dv = _by_rows(some_rows, most, mask, q, k, v, do, out, lse, d_lse)
    return dq[:, :T], dk[:, :S], dv[:, :S]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, mask, call):
    return _attend_fwd(q, k, v, mask, call)[0]


def _attend_fwd(q, k, v, mask, call):
    out, lse = _forward(call, q, k, v, mask)
    out = checkpoint_name(out, "attention_out")
    lse = checkpoint_name(lse, "attention_lse")
    return (out, lse), (q, k, v, mask, out, lse)


def _attend_bwd(call, residuals, cotangents):
    q, k, v, mask, out, lse = residuals
    d_out, d_lse = cotangents
    return *_backward(call, q, k, v, d_out, out, lse, d_lse, mask), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def attend(q_BTNH, k_BSKH, v_BSKH, mask, *, scale, blocks: BlockSizes | None = None):
    """softmax(scale q k^T) v under `mask`, and its logsumexp.

    Args:
      q_BTNH, k_BSKH, v_BSKH: [B, T, N, H], [B, S, K, H], [B, S, K, H], any lengths;
        bfloat16 or float32, all the same. float32 products are not rounded to bfloat16.
      mask: as `masks.build` makes it.
      scale: factor on the scores, a Python number.
      blocks: upper bounds on the block sizes; None: `default_blocks`.

    Returns:
      out [B, T, N, H] in q's dtype and lse float32 [B, N, T]; zeros and -inf for queries
      that see nothing. Differentiable in q, k, v, by either output.

    Raises:
      NotImplementedError: another generation of TPU, other dtypes, too many query heads to a
        key head, more blocks than a plan has room for, or a mesh that XLA splits.
    """
    dispatch.refuse_partitioner()
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    dtypes = {x.dtype.name for x in (q_BTNH, k_BSKH, v_BSKH)}
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float32"}:
        raise NotImplementedError(
            f"the TPU kernels take q, k, v all bfloat16 or all float32, not {sorted(dtypes)}"
        )
    blocks = blocks or default_blocks(generation(), q_BTNH.dtype, H, T)
    if blocks.gathered < N // K * LANES:
        raise NotImplementedError(
            f"the TPU backward kernel takes up to {blocks.gathered // LANES} query heads to a "
            f"key head, not {N // K}"
        )

    def side_by_side(x):
        x = jnp.pad(x, ((0, 0),) * 3 + ((0, _whole(H, LANES) - H),))
        return x.reshape(*x.shape[:2], -1)

    default = isinstance(mask, masks.Default)
    call = _Call(mask if default else None, N, K, float(scale), (T, S), blocks)
    q, k, v = (side_by_side(x) for x in (q_BTNH, k_BSKH, v_BSKH))
    out, lse = _attend(q, k, v, {} if default else mask, call)
    return out.reshape(B, T, N, -1)[..., :H], lse
