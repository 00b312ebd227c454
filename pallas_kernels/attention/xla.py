"""Memory-efficient attention in plain JAX, for any device, with its own VJP.

Flash attention's recurrence (Dao et al. 2022; arXiv 2205.14135) over blocks of queries and
windows of keys. Memory is O(T). Keys beyond what a block of queries can see, by token index
or by document, are never visited.

Shaped by XLA's CPU runtime, where it has to be fast: products as large as the visible part
of the keys allows, so a window is as many key blocks as are left, up to `BlockSizes.window`,
and each size has a branch of its own; few heads at a time, so that scores stay in the cache;
and transposed scores in the backward pass, so that no product contracts the leading
dimension of both operands, which is slow there.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.attention import masks


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """What is handled at a time.

    Attributes:
      query, key: tokens in a block; what is skipped is decided by block.
      window: most key blocks in one product.
      scores: most scores held at once, fp32; as many heads run together as that allows.
    """

    query: int = 256
    key: int = 256
    window: int = 4
    scores: int = 2**19


def default_blocks() -> BlockSizes:
    """Chosen on two CPU cores at T = 1024, where 128 to 512 a side differ little."""
    return BlockSizes()


def _part(x, start, size: int, axis: int):
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def _dot(a, b, product=jnp.matmul):
    dot = functools.partial(product, preferred_element_type=jnp.float32)
    if a.dtype == b.dtype == jnp.float32:
        return dot(a, b)
    # jaxlib 0.10.2's CPU runtime refuses some bf16 products with fp32 results.
    wide = lambda a, b: dot(a.astype(jnp.float32), b.astype(jnp.float32))
    return jax.lax.platform_dependent(a, b, cpu=wide, default=dot)


def _row_block(mask, i, cq: int, group: int):
    """The queries' side of the mask for block i, [group * cq]."""
    names = ("limit", "q_segment")
    return {n: jnp.tile(_part(mask[n], i * cq, cq, 0), group) for n in names if n in mask}


def _hide(s, rows, mask, at, *, transposed: bool):
    """Scores [R, rows, keys], or transposed, with -inf where a query does not see a key.

    `at` is the first key of the window.
    """
    keys = s.shape[1 if transposed else 2]
    against = lambda q, k: (q[None, :], k[:, None]) if transposed else (q[:, None], k[None, :])
    limit, index = against(rows["limit"], _part(mask["index"], at, keys, 0))
    visible = index <= limit
    if "q_segment" in mask:
        q, k = against(rows["q_segment"], _part(mask["kv_segment"], at, keys, 0))
        visible &= q == k
    return jnp.where(visible[None], s, -jnp.inf)


def _over_windows(first, last, blocks: BlockSizes, window, merge, carry):
    """Folds `carry = merge(carry, at, window(keys, at))` over the key blocks first .. last.

    window: what a window of `keys` (static) keys from key `at` on gives by itself.
    """
    sizes = [functools.partial(window, (n + 1) * blocks.key) for n in range(blocks.window)]

    def step(w, carry):
        start = first + w * blocks.window
        at = start * blocks.key
        n = jnp.minimum(last - start, blocks.window)
        return merge(carry, at, jax.lax.switch(n - 1, sizes, at))

    return jax.lax.fori_loop(0, (last - first + blocks.window - 1) // blocks.window, step, carry)


def _finite(m):
    """A row that has seen nothing has m = -inf; any finite stand-in makes its p = 0."""
    return jnp.where(m == -jnp.inf, 0.0, m)


def _forward(q_RGTH, k_RSH, v_RSH, mask, first, last, *, scale, blocks):
    """R heads of keys with G heads of queries each, all under one mask.

    first, last: int32 [T / query]: the key blocks that each query block has to visit.
    Returns out [R, G, T, H] in q's dtype and lse [R, G, T] fp32 (-inf where nothing is seen).
    """
    R, G, T, H = q_RGTH.shape
    cq = blocks.query
    k_RHS = k_RSH.swapaxes(1, 2)

    def query_block(i):
        q = (_part(q_RGTH, i * cq, cq, 2).reshape(R, G * cq, H) * scale).astype(q_RGTH.dtype)
        rows = _row_block(mask, i, cq, G)

        def window(keys, at):
            s = _dot(q, _part(k_RHS, at, keys, 2))  # [R, G * cq, keys]
            s = _hide(s, rows, mask, at, transposed=False)
            m = s.max(-1)
            p = jnp.exp(s - _finite(m)[..., None])
            return m, p.sum(-1), _dot(p.astype(v_RSH.dtype), _part(v_RSH, at, keys, 1))

        def merge(carry, at, new):
            m = jnp.maximum(carry[0], new[0])
            old, new = ((jnp.exp(m_part - _finite(m)), l, acc) for m_part, l, acc in (carry, new))
            l = old[0] * old[1] + new[0] * new[1]
            return m, l, old[0][..., None] * old[2] + new[0][..., None] * new[2]

        start = (jnp.full((R, G * cq), -jnp.inf), jnp.zeros((R, G * cq)), jnp.zeros((R, G * cq, H)))
        m, l, acc = _over_windows(first[i], last[i], blocks, window, merge, start)
        out = acc / jnp.where(l == 0.0, 1.0, l)[..., None]
        lse = m + jnp.log(l)  # -inf + -inf where nothing was seen
        return out.astype(q_RGTH.dtype).reshape(R, G, cq, H), lse.reshape(R, G, cq)

    out, lse = jax.lax.map(query_block, jnp.arange(T // cq))
    return jnp.moveaxis(out, 0, 2).reshape(q_RGTH.shape), jnp.moveaxis(lse, 0, 2).reshape(R, G, T)


def _backward(q_RGTH, k_RSH, v_RSH, lse, delta, do_RGTH, mask, first, last, *, scale, blocks):
    """The gradients of `_forward`: dq [R, G, T, H], dk, dv [R, S, H], fp32.

    delta [R, G, T] is rowsum(dout * out) minus the cotangent of lse. Scores are
    transposed, [key, query], so that all five products contract along contiguous memory.
    """
    R, G, T, H = q_RGTH.shape
    S = k_RSH.shape[1]
    cq = blocks.query
    whole = blocks.window * blocks.key
    k_scaled, k_RHS = (k_RSH * scale).astype(k_RSH.dtype), k_RSH.swapaxes(1, 2)
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)  # rows that see nothing: exp(-inf - inf) = 0

    def query_block(dkv, i):
        block = lambda x: _part(x, i * cq, cq, 2).reshape(R, G * cq, *x.shape[3:])
        q, do, lse_i, delta_i = map(block, (q_RGTH, do_RGTH, lse, delta))
        q_T, do_T = q.swapaxes(1, 2), do.swapaxes(1, 2)
        rows = _row_block(mask, i, cq, G)

        def window(keys, at):
            s = _dot(_part(k_scaled, at, keys, 1), q_T)  # [R, keys, G * cq]
            p = jnp.exp(_hide(s, rows, mask, at, transposed=True) - lse_i[:, None])
            dp = _dot(_part(v_RSH, at, keys, 1), do_T)
            ds = (p * (dp - delta_i[:, None])).astype(q.dtype)
            # All windows give dk and dv of one size.
            fill = lambda x: jnp.pad(x, ((0, 0), (0, whole - keys), (0, 0)))
            dk, dv = fill(_dot(ds, q)), fill(_dot(p.astype(do.dtype), do))
            return _dot(_part(k_RHS, at, keys, 2), ds), (dk, dv)

        def merge(carry, at, new):
            add = lambda x, dx: jax.lax.dynamic_update_slice_in_dim(
                x, _part(x, at, whole, 1) + dx, at, 1
            )
            return carry[0] + new[0], jax.tree.map(add, carry[1], new[1])

        start = (jnp.zeros((R, H, G * cq)), dkv)
        dq_T, dkv = _over_windows(first[i], last[i], blocks, window, merge, start)
        return dkv, dq_T

    zeros = jnp.zeros((R, S + whole - blocks.key, H))  # the last window may end beyond the keys
    (dk, dv), dq_T = jax.lax.scan(query_block, (zeros, zeros), jnp.arange(T // cq))
    dq = dq_T.reshape(T // cq, R, H, G, cq).transpose(1, 3, 0, 4, 2).reshape(q_RGTH.shape)
    return dq * scale, dk[:, :S] * scale, dv[:, :S]


def _heads(f, mask, default: masks.Default | None, blocks: BlockSizes, args):
    """f over all heads, args leading with [B, K], a few at a time as the blocks allow."""
    B, K, G, T, _ = args[0].shape
    if default is not None:
        mask = masks.pad(default[0].arrays(*default[1:]), T, args[1].shape[2])
    live, _ = masks.block_plan(mask, blocks.query, blocks.key)
    masked = (mask, *masks.live_range(live))
    window = blocks.query * blocks.key * blocks.window
    together = _divisor(K, blocks.scores // (G * window))
    # Rows of the batch have masks of their own, unless all have the one known mask.
    row = jnp.arange(B * K // together) * together // K * (default is None)

    def some(heads, row):
        at = lambda x: jax.lax.dynamic_index_in_dim(x, row, 0, keepdims=False)
        return f(*heads, *jax.tree.map(at, masked))

    groups = [x.reshape(-1, together, *x.shape[2:]) for x in args]
    out = jax.lax.map(lambda x: some(*x), (groups, row))
    return jax.tree.map(lambda x: x.reshape(B, K, *x.shape[2:]), out)


def _divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most`, at least 1."""
    return max(d for d in range(1, n + 1) if n % d == 0 and d <= max(most, 1))


def _split(q_BTNH, K: int):
    B, T, N, H = q_BTNH.shape
    return q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]


def _merge(q_BKGTH):
    B, K, G, T, H = q_BKGTH.shape
    return q_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attend(q_BTNH, k_BSKH, v_BSKH, mask, default, scale, blocks):
    return _attend_fwd(q_BTNH, k_BSKH, v_BSKH, mask, default, scale, blocks)[0]


def _attend_fwd(q_BTNH, k_BSKH, v_BSKH, mask, default, scale, blocks):
    K = k_BSKH.shape[2]
    out, lse = _heads(
        functools.partial(_forward, scale=scale, blocks=blocks),
        *(mask, default, blocks),
        (_split(q_BTNH, K), k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)),
    )
    B, T, N, _ = q_BTNH.shape
    out = checkpoint_name(_merge(out), "attention_out")
    lse = checkpoint_name(lse.reshape(B, N, T), "attention_lse")
    return (out, lse), (q_BTNH, k_BSKH, v_BSKH, mask, out, lse)


def _attend_bwd(default, scale, blocks, residuals, cotangents):
    q, k, v, mask, out, lse = residuals
    d_out, d_lse = cotangents
    K = k.shape[2]
    B, N, T = lse.shape
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1).swapaxes(1, 2)
    grouped = lambda x: x.reshape(B, K, N // K, T)
    dq, dk, dv = _heads(
        functools.partial(_backward, scale=scale, blocks=blocks),
        *(mask, default, blocks),
        (
            *(_split(q, K), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)),
            *(grouped(lse), grouped(delta - d_lse), _split(d_out, K)),
        ),
    )
    back = lambda x, like: x.transpose(0, 2, 1, 3).astype(like.dtype)
    return _merge(dq).astype(q.dtype), back(dk, k), back(dv, v), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _block(length: int, most: int) -> int:
    """The size of as few equal blocks of at most `most` as cover `length`, a multiple of 8."""
    n = -(-length // most)
    return -(-length // (8 * n)) * 8


def _attend_one(q_B1NH, k_BSKH, v_BSKH, mask, scale):
    """`attend` for one query a row, as in decoding: the keys once, and nothing in blocks."""
    B, _, K, H = k_BSKH.shape
    flat = lambda x_BSKH: x_BSKH.swapaxes(1, 2).reshape(B * K, -1, H)
    q_RGH = (q_B1NH * scale).astype(q_B1NH.dtype).reshape(B * K, -1, H)
    s_RGS = _dot(q_RGH, flat(k_BSKH), functools.partial(jnp.einsum, "RGH,RSH->RGS"))
    visible = mask["index"] <= mask["limit"]
    if "q_segment" in mask:
        visible &= mask["q_segment"] == mask["kv_segment"]
    visible = jnp.broadcast_to(visible, (B, visible.shape[1]))
    s_RGS = jnp.where(jnp.repeat(visible, K, axis=0)[:, None], s_RGS, -jnp.inf)
    m = jax.lax.stop_gradient(_finite(s_RGS.max(-1, keepdims=True)))
    p = jnp.exp(s_RGS - m)
    sees = (l := p.sum(-1, keepdims=True)) > 0
    l = jnp.where(sees, l, 1.0)
    out = _dot((p / l).astype(v_BSKH.dtype), flat(v_BSKH))
    lse = jnp.where(sees, m + jnp.log(l), -jnp.inf)
    return out.astype(q_B1NH.dtype).reshape(q_B1NH.shape), lse.reshape(B, -1, 1)


def attend(q_BTNH, k_BSKH, v_BSKH, mask, *, scale, blocks: BlockSizes | None = None):
    """softmax(scale q k^T) v under `mask`, and its logsumexp.

    Args:
      q_BTNH, k_BSKH, v_BSKH: [B, T, N, H], [B, S, K, H], [B, S, K, H], any lengths.
      mask: as `masks.build` makes it.
      scale: factor on the scores.
      blocks: upper bounds on the block sizes; None: the defaults.

    Returns:
      out [B, T, N, H] in q's dtype and lse float32 [B, N, T]; zeros and -inf for queries
      that see nothing. Differentiable in q, k, v, by either output.
    """
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    if T == 1 and blocks is None:
        arrays = mask.arrays(T, S) if isinstance(mask, masks.Default) else mask
        return _attend_one(q_BTNH, k_BSKH, v_BSKH, arrays, scale)
    most = blocks or default_blocks()
    cq, ck = _block(T, most.query), _block(S, most.key)
    whole_T, whole_S = -(-T // cq) * cq, -(-S // ck) * ck
    blocks = dataclasses.replace(most, query=cq, key=ck, window=min(most.window, whole_S // ck))
    longer = lambda x, n: jnp.pad(x, ((0, 0), (0, n - x.shape[1]), (0, 0), (0, 0)))
    default = (mask, T, S) if isinstance(mask, masks.Default) else None
    out, lse = _attend(
        *(longer(q_BTNH, whole_T), longer(k_BSKH, whole_S), longer(v_BSKH, whole_S)),
        *({} if default else masks.pad(mask, whole_T, whole_S), default, scale, blocks),
    )
    return out[:, :T], lse[..., :T]
