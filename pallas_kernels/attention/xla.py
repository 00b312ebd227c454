"""Memory-efficient attention in plain JAX, for any device, with its own VJP.

Flash attention's recurrence (Dao et al. 2022; arXiv 2205.14135) over tiles of a few query
blocks and windows of a few key blocks. Memory is O(T). Windows beyond what a tile can see,
by token index or by document, are never visited.

Shaped by XLA's CPU runtime, where it has to be fast. One product of these sizes does not
keep several cores busy, but operations that do not depend on each other run side by side:
so a tile's query blocks are handled as so many independent ones, and the tile on the
diagonal is spelled out as stairs of static sizes. Few heads run at a time, so that scores
stay in the cache; scores are transposed in the backward pass, so that no product contracts
the leading dimension of both operands, which is slow there. On other devices, where each
operation has a price of its own, as many rows and heads run together as memory allows.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import dispatch
from pallas_kernels.attention import masks


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """What is handled at a time.

    Attributes:
      query, key: most tokens in a block.
      window: most query blocks in a tile and most key blocks in a window.
      scores: most in one product; as many heads run together as that allows.
      rows: most rows of the batch that run together, if all their heads may.
    """

    query: int = 256
    key: int = 256
    window: int = 4
    scores: int = 2**19
    rows: int = 1


def default_blocks() -> BlockSizes:
    """For `dispatch.target()`: on CPUs chosen on two cores at T = 1024; elsewhere so that few
    operations are launched and scores take 256 MiB."""
    if dispatch.target()[0] == "cpu":
        return BlockSizes()
    return BlockSizes(query=512, key=512, scores=2**26, rows=2**26)


def _part(x, start, size: int, axis: int):
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def _dot(a, b, product=jnp.matmul):
    dot = functools.partial(product, preferred_element_type=jnp.float32)
    if a.dtype == b.dtype == jnp.float32:
        return dot(a, b)
    # jaxlib 0.10.2's CPU runtime refuses some bf16 products with fp32 results.
    wide = lambda a, b: dot(a.astype(jnp.float32), b.astype(jnp.float32))
    return jax.lax.platform_dependent(a, b, cpu=wide, default=dot)


def _rows(mask, start, size: int, group: int):
    """The queries' side of the masks for `size` queries, [M, group * size]."""
    names = ("limit", "q_segment")
    return {n: jnp.tile(_part(mask[n], start, size, 1), group) for n in names if n in mask}


def _columns(mask, start, size: int):
    """The keys' side of the masks for a window, [M, size]."""
    names = ("index", "kv_segment")
    return {n: _part(mask[n], start, size, 1) for n in names if n in mask}


def _hide(s, rows, columns, *, transposed: bool):
    """Scores [R, rows, keys], or transposed, with -inf where a query does not see a key.

    The first R / M are under the first mask, and so on.
    """
    keys = slice(s.shape[1 if transposed else 2])

    def pair(q, k):
        k = k[:, keys]
        return (q[:, None, :], k[:, :, None]) if transposed else (q[:, :, None], k[:, None, :])

    limit, index = pair(rows["limit"], columns["index"])
    visible = index <= limit
    if "q_segment" in rows:
        q, k = pair(rows["q_segment"], columns["kv_segment"])
        visible &= q == k
    return jnp.where(jnp.repeat(visible, s.shape[0] // visible.shape[0], axis=0), s, -jnp.inf)


def _over_windows(first, last, n_keys: int, blocks: BlockSizes, fold, carry):
    """Folds `carry = fold(carry, at, sizes)` over the windows that a tile has to visit.

    first, last: int32 [tile's query blocks]: the key blocks first .. last that each visits.
    fold: takes the window from key `at` on, of which the tile's query blocks visit the
      first `sizes` (static) key blocks each.
    n_keys: key blocks there are, at least as many as the tile has query blocks.
    """
    n = first.shape[0]
    lo, hi = first.min(), last.max()
    # Stairs: each query block visits one key block more than the one before.
    stairs = (hi >= n) & jnp.all(last <= hi - jnp.arange(n)[::-1])
    climb = lambda carry: fold(carry, (hi - n) * blocks.key, range(1, n + 1))
    carry = jax.lax.cond(stairs, climb, lambda carry: carry, carry)
    hi = jnp.where(stairs, hi - n, hi)
    # A window in a loop is not all keys, or XLA would take its scores out of the loop. A single
    # key block is a stair and needs none.
    for size in sorted({min(size, n_keys - 1) for size in (1, blocks.window)} - {0}, reverse=True):
        step = lambda w, carry, lo=lo, size=size: fold(
            carry, (lo + w * size) * blocks.key, (size,) * n
        )
        rounds = jnp.maximum(hi - lo, 0) // size
        carry = jax.lax.fori_loop(0, rounds, step, carry)
        lo += rounds * size
    return carry


def _numbered(first, last, n: int):
    """The tiles of n query blocks: number and key blocks, as `_over_windows` takes them."""
    return jnp.arange(first.size // n), first.reshape(-1, n), last.reshape(-1, n)


def _finite(m):
    """A row that has seen nothing has m = -inf; any finite stand-in makes its p = 0."""
    return jnp.where(m == -jnp.inf, 0.0, m)


def _forward(q_RGTH, k_RSH, v_RSH, mask, first, last, *, scale, blocks):
    """R heads of keys with G heads of queries each, R / M of them under each of M masks.

    first, last: int32 [T / query]: the key blocks that each query block has to visit under
      any of the masks.
    Returns out [R, G, T, H] in q's dtype and lse [R, G, T] fp32 (-inf where nothing is seen).
    """
    R, G, T, H = q_RGTH.shape
    cq, ck = blocks.query, blocks.key
    n = _divisor(T // cq, blocks.window)
    k_RHS = k_RSH.swapaxes(1, 2)

    def tile(at_tile):
        i, first, last = at_tile
        starts = [(i * n + j) * cq for j in range(n)]
        queries = [_part(q_RGTH, at, cq, 2).reshape(R, G * cq, H) for at in starts]
        rows = [_rows(mask, at, cq, G) for at in starts]

        def fold(carry, at, sizes):
            whole = max(sizes) * ck
            k, v = _part(k_RHS, at, whole, 2), _part(v_RSH, at, whole, 1)
            columns = _columns(mask, at, whole)

            def one(carry, q, rows, size):
                m, l, acc = carry
                s = _dot(q, k[:, :, : size * ck]) * scale
                s = _hide(s, rows, columns, transposed=False)
                new_m = jnp.maximum(m, s.max(-1))
                p = jnp.exp(s - _finite(new_m)[..., None])
                old = jnp.exp(m - _finite(new_m))
                acc = old[..., None] * acc + _dot(p.astype(v.dtype), v[:, : size * ck])
                return new_m, old * l + p.sum(-1), acc

            return [one(*x) for x in zip(carry, queries, rows, sizes, strict=True)]

        shape = (R, G * cq)
        zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
        start = (zeros(shape) - jnp.inf, zeros(shape), zeros((*shape, H)))
        n_keys = k_RSH.shape[1] // ck
        folded = _over_windows(first, last, n_keys, blocks, fold, [start] * n)
        m, l, acc = (jnp.stack(x, 1) for x in zip(*folded, strict=True))  # [R, n, G * cq, ...]
        out = acc / jnp.where(l == 0.0, 1.0, l)[..., None]
        return out.astype(q_RGTH.dtype), m + jnp.log(l)  # -inf where nothing was seen

    out, lse = jax.lax.map(tile, _numbered(first, last, n))
    whole = lambda x: jnp.moveaxis(
        x.reshape(-1, R, n, G, cq, *x.shape[4:]), (1, 3), (0, 1)
    ).reshape(R, G, T, *x.shape[4:])
    return whole(out), whole(lse)


def _backward(q_RGTH, k_RSH, v_RSH, lse, delta, do_RGTH, mask, first, last, *, scale, blocks):
    """The gradients of `_forward`: dq [R, G, T, H], dk, dv [R, S, H], fp32.

    delta [R, G, T] is rowsum(dout * out) minus the cotangent of lse. Scores are
    transposed, [key, query], so that all five products contract along contiguous memory.
    """
    R, G, T, H = q_RGTH.shape
    cq, ck = blocks.query, blocks.key
    n = _divisor(T // cq, blocks.window)
    k_RHS = k_RSH.swapaxes(1, 2)
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)  # rows that see nothing: exp(-inf - inf) = 0

    def tile(dkv, at_tile):
        i, first, last = at_tile
        starts = [(i * n + j) * cq for j in range(n)]

        def block(at):
            of = lambda x: _part(x, at, cq, 2).reshape(R, G * cq, *x.shape[3:])
            return *map(of, (q_RGTH, do_RGTH, lse, delta)), _rows(mask, at, cq, G)

        queries = [block(at) for at in starts]

        def fold(carry, at, sizes):
            window = lambda x, axis: _part(x, at, max(sizes) * ck, axis)
            k, k_T, v = window(k_RSH, 1), window(k_RHS, 2), window(v_RSH, 1)
            columns = _columns(mask, at, max(sizes) * ck)
            dqs, *dkv = carry
            dk, dv = (window(x, 1) for x in dkv)
            new_dqs = []
            for dq, (q, do, lse_i, delta_i, rows), size in zip(dqs, queries, sizes, strict=True):
                seen = slice(size * ck)
                s = _dot(k[:, seen], q.swapaxes(1, 2)) * scale  # [R, keys, G * cq]
                p = jnp.exp(_hide(s, rows, columns, transposed=True) - lse_i[:, None])
                dp = _dot(v[:, seen], do.swapaxes(1, 2))
                ds = (p * (dp - delta_i[:, None])).astype(q.dtype)
                dk = dk.at[:, seen].add(_dot(ds, q))
                dv = dv.at[:, seen].add(_dot(p.astype(do.dtype), do))
                new_dqs.append(dq + _dot(k_T[:, :, seen], ds))
            put = lambda x, dx: jax.lax.dynamic_update_slice_in_dim(x, dx, at, 1)
            return new_dqs, *map(put, dkv, (dk, dv))

        start = ([jnp.zeros((R, H, G * cq), jnp.float32)] * n, *dkv)
        n_keys = k_RSH.shape[1] // ck
        dq_T, *dkv = _over_windows(first, last, n_keys, blocks, fold, start)
        return tuple(dkv), jnp.stack(dq_T)

    zeros = jnp.zeros(k_RSH.shape, jnp.float32)
    (dk, dv), dq_T = jax.lax.scan(tile, (zeros, zeros), _numbered(first, last, n))
    dq = dq_T.reshape(T // cq, R, H, G, cq).transpose(1, 3, 0, 4, 2).reshape(q_RGTH.shape)
    return dq * scale, dk * scale, dv


def _heads(f, mask, default: masks.Default | None, blocks: BlockSizes, args):
    """f over all heads, args leading with [B, K], a few at a time as the blocks allow."""
    B, K, G, T, _ = args[0].shape
    if default is not None:
        mask = masks.pad(default[0].arrays(*default[1:]), T, args[1].shape[2])
    # Tied to the queries: what depends on the mask alone would be taken out of a scan over
    # layers, and written out for all heads and tiles.
    mask, _ = jax.lax.optimization_barrier((mask, args[0][0, 0, 0, 0, 0]))
    live, _ = masks.block_plan(mask, blocks.query, blocks.key)
    masked = (mask, *masks.live_range(live))
    each = G * blocks.query * blocks.key * blocks.window
    heads = _divisor(K, blocks.scores // each)
    rows = _divisor(B, min(blocks.rows, blocks.scores // (each * K)))
    # Rows of the batch have masks of their own, unless all have the one known mask.
    row = jnp.arange(B * K // (rows * heads)) * rows * heads // K * (default is None)

    def some(groups, row):
        at = lambda x: _part(x, row, rows if default is None else 1, 0)
        mask, first, last = jax.tree.map(at, masked)
        return f(*groups, mask, first.min(0), last.max(0))

    groups = [x.reshape(-1, rows * heads, *x.shape[2:]) for x in args]
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


def _block(length: int, most: int, window: int) -> int:
    """The size, a multiple of 8, of as few blocks of at most `most` as cover `length` in
    tiles of equally many, at most `window`."""
    n = -(-length // most)
    tiles = -(-n // window)
    n = -(-n // tiles) * tiles
    return -(-length // (8 * n)) * 8


def _attend_one(q_B1NH, keys, values, mask, scale):
    """`attend` for one query a row, as in decoding: the keys once, and nothing in blocks.

    keys, values: tuples of parts [B, S_i, K, H]; one that nothing sees is not read, but the first.
    """
    B, _, K, H = keys[0].shape
    flat = lambda x_BSKH: x_BSKH.swapaxes(1, 2).reshape(B * K, -1, H)
    visible = mask["index"] <= mask["limit"]
    if "q_segment" in mask:
        visible &= mask["q_segment"] == mask["kv_segment"]
    visible = jnp.broadcast_to(visible, (B, visible.shape[1]))
    ends = np.cumsum([k.shape[1] for k in keys])[:-1].tolist()
    seen = [part.any() for part in jnp.split(visible, ends, axis=1)]
    seen[0] = None  # of no use: something is in the first part

    def of_part(live, product, a, b):
        zeros = lambda a, b: jnp.zeros_like(jax.eval_shape(product, a, b))
        return product(a, b) if live is None else jax.lax.cond(live, product, zeros, a, b)

    def product(equation):
        return functools.partial(_dot, product=functools.partial(jnp.einsum, equation))

    # With one query a key there is no axis G: XLA for CPUs copies scores that have one of length 1.
    G = q_B1NH.shape[2] // K
    axes = (G,) if G > 1 else ()
    q_RGH = q_B1NH.reshape(B * K, *axes, H)
    of_keys, of_values = product("R...H,RSH->R...S"), product("R...S,RSH->R...H")
    scores = [of_part(live, of_keys, q_RGH, flat(k)) for live, k in zip(seen, keys, strict=True)]
    s_RGS = jnp.concatenate(scores, -1) * scale
    visible = jnp.expand_dims(jnp.repeat(visible, K, axis=0), range(1, 1 + len(axes)))
    s_RGS = jnp.where(visible, s_RGS, -jnp.inf)
    m = jax.lax.stop_gradient(_finite(s_RGS.max(-1, keepdims=True)))
    p = jnp.exp(s_RGS - m)
    sees = (l := p.sum(-1, keepdims=True)) > 0
    l = jnp.where(sees, l, 1.0)
    weights = jnp.split((p / l).astype(values[0].dtype), ends, axis=-1)
    parts = zip(seen, weights, values, strict=True)
    out = sum(of_part(live, of_values, w, flat(v)) for live, w, v in parts)
    lse = jnp.where(sees, m + jnp.log(l), -jnp.inf)
    return out.astype(q_B1NH.dtype).reshape(q_B1NH.shape), lse.reshape(B, -1, 1)


def attend(q_BTNH, k_BSKH, v_BSKH, mask, *, scale, blocks: BlockSizes | None = None):
    """softmax(scale q k^T) v under `mask`, and its logsumexp.

    Args:
      q_BTNH, k_BSKH, v_BSKH: [B, T, N, H], [B, S, K, H], [B, S, K, H], any lengths; keys and
        values may be tuples of parts along S.
      mask: as `masks.build` makes it.
      scale: factor on the scores.
      blocks: upper bounds on the block sizes; None: the defaults.

    Returns:
      out [B, T, N, H] in q's dtype and lse float32 [B, N, T]; zeros and -inf for queries
      that see nothing. Differentiable in q, k, v, by either output.
    """
    keys, values = (x if isinstance(x, tuple) else (x,) for x in (k_BSKH, v_BSKH))
    T, S = q_BTNH.shape[1], sum(k.shape[1] for k in keys)
    if T == 1 and blocks is None:
        arrays = mask.arrays(T, S) if isinstance(mask, masks.Default) else mask
        return _attend_one(q_BTNH, keys, values, arrays, scale)
    k_BSKH, v_BSKH = (jnp.concatenate(x, axis=1) for x in (keys, values))
    most = blocks or default_blocks()
    if T == S:  # as many stairs as a tile may have: what lies above them is not computed
        stair = max(64, -(-T // most.window))
        most = dataclasses.replace(most, query=min(most.query, stair), key=min(most.key, stair))
    cq, ck = _block(T, most.query, most.window), _block(S, most.key, most.window)
    whole_T, whole_S = -(-T // cq) * cq, -(-S // ck) * ck
    blocks = dataclasses.replace(most, query=cq, key=ck, window=min(most.window, whole_S // ck))
    longer = lambda x, n: jnp.pad(x, ((0, 0), (0, n - x.shape[1]), (0, 0), (0, 0)))
    default = (mask, T, S) if isinstance(mask, masks.Default) else None
    out, lse = _attend(
        *(longer(q_BTNH, whole_T), longer(k_BSKH, whole_S), longer(v_BSKH, whole_S)),
        *({} if default else masks.pad(mask, whole_T, whole_S), default, scale, blocks),
    )
    return out[:, :T], lse[..., :T]
