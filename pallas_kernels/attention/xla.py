"""Memory-efficient attention in plain JAX, for any device, with its own VJP.

Flash attention's recurrence (Dao et al. 2022; arXiv 2205.14135) over blocks of queries and
keys. Memory is O(T). Blocks that see nothing are never visited and blocks that see
everything skip the mask, by token index and by document alike.

Shaped by XLA's CPU runtime, where it has to be fast: many heads at a time, because a
batch of matrices keeps both the cores and the cache busy; and transposed scores in the
backward pass, so that no product contracts the leading dimension of both operands, which
is slow there.
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
      query, key: tokens in a block.
      scores: most scores held at once, fp32; as many heads run together as that allows.
    """

    query: int = 512
    key: int = 256
    scores: int = 2**20


def default_blocks() -> BlockSizes:
    """Chosen on two CPU cores at T = 1024, where 256 to 512 a side differ little."""
    return BlockSizes()


def _part(x, i, size: int, axis: int):
    return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)


def _hide(s, mask, i, j, full, blocks, *, transposed: bool):
    """Scores of block (i, j), [R, G * query, key] or transposed, with -inf where unseen."""
    cq, ck = blocks.query, blocks.key
    group = s.shape[2 if transposed else 1] // cq

    def hidden(s):
        limit, index = _part(mask["limit"], i, cq, 0), _part(mask["index"], j, ck, 0)
        visible = index[None, :] <= limit[:, None]
        if "q_segment" in mask:
            q, k = _part(mask["q_segment"], i, cq, 0), _part(mask["kv_segment"], j, ck, 0)
            visible &= q[:, None] == k[None, :]
        visible = jnp.tile(visible.T, (1, group)) if transposed else jnp.tile(visible, (group, 1))
        return jnp.where(visible[None], s, -jnp.inf)

    return jax.lax.cond(full[i, j], lambda s: s, hidden, s)


def _dot(a, b):
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _forward(q_RGTH, k_RHS, v_RSH, mask, live, full, *, scale, blocks):
    """R heads of keys with G heads of queries each, all under one mask. k comes transposed.

    Returns out [R, G, T, H] in q's dtype and lse [R, G, T] fp32 (-inf where nothing is seen).
    """
    R, G, T, H = q_RGTH.shape
    cq, ck = blocks.query, blocks.key
    first, last = masks.live_range(live)

    def query_block(i):
        q = (_part(q_RGTH, i, cq, 2).reshape(R, G * cq, H) * scale).astype(q_RGTH.dtype)

        def key_block(j, carry):
            m, l, acc = carry
            s = _dot(q, _part(k_RHS, j, ck, 2))  # [R, G * cq, ck]
            s = _hide(s, mask, i, j, full, blocks, transposed=False)
            m_new = jnp.maximum(m, s.max(-1))
            # A row that has seen nothing yet has m = -inf; any finite stand-in gives p = 0.
            m_safe = jnp.where(m_new == -jnp.inf, 0.0, m_new)
            p = jnp.exp(s - m_safe[..., None])
            shrink = jnp.exp(m - m_safe)
            l = l * shrink + p.sum(-1)
            acc = acc * shrink[..., None] + _dot(p.astype(v_RSH.dtype), _part(v_RSH, j, ck, 1))
            return m_new, l, acc

        start = (jnp.full((R, G * cq), -jnp.inf), jnp.zeros((R, G * cq)), jnp.zeros((R, G * cq, H)))
        m, l, acc = jax.lax.fori_loop(first[i], last[i], key_block, start)
        out = acc / jnp.where(l == 0.0, 1.0, l)[..., None]
        lse = m + jnp.log(l)  # -inf + -inf where nothing was seen
        return out.astype(q_RGTH.dtype).reshape(R, G, cq, H), lse.reshape(R, G, cq)

    out, lse = jax.lax.map(query_block, jnp.arange(T // cq))
    return jnp.moveaxis(out, 0, 2).reshape(q_RGTH.shape), jnp.moveaxis(lse, 0, 2).reshape(R, G, T)


def _backward(q_RGTH, k_RSH, v_RSH, lse, delta, do_RGTH, mask, live, full, *, scale, blocks):
    """The gradients of `_forward`: dq [R, G, T, H], dk, dv [R, S, H], fp32.

    delta [R, G, T] is rowsum(dout * out) minus the cotangent of lse. Scores are
    transposed, [key, query], so that all five products contract along contiguous memory.
    """
    R, G, T, H = q_RGTH.shape
    S = k_RSH.shape[1]
    cq, ck = blocks.query, blocks.key
    first, last = masks.live_range(live.T)  # the query blocks that see each key block

    def by_block(x):
        """[R, G, T, ...] -> [T / cq, R, G * cq, ...]."""
        x = jnp.moveaxis(x.reshape(R, G, T // cq, cq, *x.shape[3:]), 2, 0)
        return x.reshape(T // cq, R, G * cq, *x.shape[4:])

    q, do = by_block(q_RGTH), by_block(do_RGTH)
    q_T, do_T, k_T = q.swapaxes(2, 3), do.swapaxes(2, 3), k_RSH.swapaxes(1, 2)
    # Rows that see nothing: exp(-inf - inf) = 0.
    lse = by_block(jnp.where(lse == -jnp.inf, jnp.inf, lse))[:, :, None]
    delta = by_block(delta)[:, :, None]
    at = lambda x, i: jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False)

    def key_block(dq_T, j):
        k, v = _part(k_RSH, j, ck, 1), _part(v_RSH, j, ck, 1)
        k_scaled = (k * scale).astype(k.dtype)
        k_j_T = _part(k_T, j, ck, 2)

        def query_block(i, carry):
            dq_T, dk, dv = carry
            s = _dot(k_scaled, at(q_T, i))  # [R, ck, G * cq]
            s = _hide(s, mask, i, j, full, blocks, transposed=True)
            p = jnp.exp(s - at(lse, i))
            dv += _dot(p.astype(do.dtype), at(do, i))
            ds = (p * (_dot(v, at(do_T, i)) - at(delta, i))).astype(q.dtype)
            dk += _dot(ds, at(q, i))
            dq_i = at(dq_T, i) + _dot(k_j_T, ds)
            return jax.lax.dynamic_update_index_in_dim(dq_T, dq_i, i, 0), dk, dv

        zeros = jnp.zeros((R, ck, H))
        dq_T, dk, dv = jax.lax.fori_loop(first[j], last[j], query_block, (dq_T, zeros, zeros))
        return dq_T, (dk * scale, dv)

    dq_T = jnp.zeros((T // cq, R, H, G * cq))
    dq_T, dkv = jax.lax.scan(key_block, dq_T, jnp.arange(S // ck))
    dq = dq_T.reshape(T // cq, R, H, G, cq).transpose(1, 3, 0, 4, 2).reshape(q_RGTH.shape)
    dk, dv = (jnp.moveaxis(x, 0, 1).reshape(k_RSH.shape) for x in dkv)
    return dq * scale, dk, dv


def _heads(f, mask, default: masks.Default | None, blocks: BlockSizes, args):
    """f over all heads, args leading with [B, K]: as many together as the blocks allow.

    Rows of the batch have masks of their own, so theirs are kept apart, unless all have the
    one known mask.
    """
    B, K, G, T, _ = args[0].shape
    if default is not None:
        S = args[2].shape[2]
        mask = masks.pad(default[0].arrays(*default[1:]), T, S)
        plan = masks.block_plan(mask, blocks.query, blocks.key)
        shared = jax.tree.map(lambda x: x[0], (mask, *plan))
        together = _divisor(B * K, blocks.scores // (G * blocks.query * blocks.key))
        groups = [x.reshape(-1, together, *x.shape[2:]) for x in args]
        out = jax.lax.map(lambda heads: f(*heads, *shared), groups)
    else:
        plan = masks.block_plan(mask, blocks.query, blocks.key)
        out = jax.lax.map(lambda row: f(*row), (*args, mask, *plan))
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
        (_split(q_BTNH, K), k_BSKH.transpose(0, 2, 3, 1), v_BSKH.transpose(0, 2, 1, 3)),
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
    delta = jnp.einsum("BTNH,BTNH->BNT", d_out, out, preferred_element_type=jnp.float32)
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
    most = blocks or default_blocks()
    blocks = dataclasses.replace(most, query=_block(T, most.query), key=_block(S, most.key))
    whole_T, whole_S = -(-T // blocks.query) * blocks.query, -(-S // blocks.key) * blocks.key
    longer = lambda x, n: jnp.pad(x, ((0, 0), (0, n - x.shape[1]), (0, 0), (0, 0)))
    default = (mask, T, S) if isinstance(mask, masks.Default) else None
    out, lse = _attend(
        *(longer(q_BTNH, whole_T), longer(k_BSKH, whole_S), longer(v_BSKH, whole_S)),
        *({} if default else masks.pad(mask, whole_T, whole_S), default, scale, blocks),
    )
    return out[:, :T], lse[..., :T]
