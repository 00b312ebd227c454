"""Memory-efficient attention in plain JAX, for any device, with its own VJP.

Flash attention's recurrence (Dao et al. 2022; arXiv 2205.14135) as XLA loops: one row of
the batch and one key/value head at a time, blocks of queries outside, blocks of keys
inside. Memory is O(T). Blocks that see nothing are never visited, and blocks that see
everything skip the mask, by token index and by document alike.

Rows are walked one by one, not batched, because XLA's CPU runtime multiplies a pair of
matrices at full speed and a batch of them no faster, while one block of scores then
stays in cache. For the same reason the backward pass works on transposed scores: no
product in it contracts the leading dimension of both operands, which is three times
slower there.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.attention import masks


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Rows of queries and keys handled at a time.

    Scores of one block are [G * query, key] fp32; with 512 x 512 that is 1 MiB for
    each query head of the group.
    """

    query: int = 512
    key: int = 512


def _visible(mask_q, mask_k):
    visible = mask_k["index"][None, :] <= mask_q["limit"][:, None]
    if "q_segment" in mask_q:
        visible &= mask_q["q_segment"][:, None] == mask_k["kv_segment"][None, :]
    return visible


def _take(mask, names, i, size: int):
    return {n: jax.lax.dynamic_slice_in_dim(mask[n], i * size, size) for n in names if n in mask}


def _slice(x, i, size: int, axis: int):
    return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)


def _dot(a, b):
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


_Q_MASK, _K_MASK = ("limit", "q_segment"), ("index", "kv_segment")


def _forward(q_KGTH, k_KHS, v_KSH, mask, live, full, *, scale, blocks):
    """One row of the batch. k comes transposed.

    Returns out [K, G, T, H] in q's dtype and lse [K, G, T] fp32 (-inf where nothing is seen).
    """
    K, G, T, H = q_KGTH.shape
    cq, ck = blocks.query, blocks.key
    first, last = masks.live_range(live)

    def query_block(i):
        q = (_slice(q_KGTH, i, cq, 2).reshape(K, G * cq, H) * scale).astype(q_KGTH.dtype)
        mask_q = _take(mask, _Q_MASK, i, cq)

        def key_block(j, carry):
            m, l, acc = carry
            s = _dot(q, _slice(k_KHS, j, ck, 2))  # [K, G * cq, ck]

            def masked(s):
                visible = _visible(mask_q, _take(mask, _K_MASK, j, ck))
                return jnp.where(visible[None, None], s.reshape(K, G, cq, ck), -jnp.inf).reshape(
                    s.shape
                )

            s = jax.lax.cond(full[i, j], lambda s: s, masked, s)
            m_new = jnp.maximum(m, s.max(-1))
            # A row that has seen nothing yet has m = -inf; any finite stand-in gives p = 0.
            m_safe = jnp.where(m_new == -jnp.inf, 0.0, m_new)
            p = jnp.exp(s - m_safe[..., None])
            shrink = jnp.exp(m - m_safe)
            l = l * shrink + p.sum(-1)
            acc = acc * shrink[..., None] + _dot(p.astype(v_KSH.dtype), _slice(v_KSH, j, ck, 1))
            return m_new, l, acc

        m = jnp.full((K, G * cq), -jnp.inf)
        l = jnp.zeros((K, G * cq))
        acc = jnp.zeros((K, G * cq, H))
        m, l, acc = jax.lax.fori_loop(first[i], last[i], key_block, (m, l, acc))
        out = acc / jnp.where(l == 0.0, 1.0, l)[..., None]
        lse = m + jnp.log(l)  # -inf + -inf where nothing was seen
        return out.astype(q_KGTH.dtype).reshape(K, G, cq, H), lse.reshape(K, G, cq)

    out, lse = jax.lax.map(query_block, jnp.arange(T // cq))
    return jnp.moveaxis(out, 0, 2).reshape(q_KGTH.shape), jnp.moveaxis(lse, 0, 2).reshape(K, G, T)


def _backward(q_KGTH, k_KSH, v_KSH, lse, delta, do_KGTH, mask, live, full, *, scale, blocks):
    """Gradients of one row of the batch: dq [K, G, T, H], dk, dv [K, S, H], fp32.

    delta [K, G, T] is rowsum(dout * out) minus the cotangent of lse. Scores are
    transposed, [key, query], so that all five products contract along contiguous memory.
    """
    K, G, T, H = q_KGTH.shape
    S = k_KSH.shape[1]
    cq, ck = blocks.query, blocks.key
    first, last = masks.live_range(live.T)  # the query blocks that see each key block

    def by_block(x):
        """[K, G, T, ...] -> [T / cq, K, G * cq, ...]."""
        x = jnp.moveaxis(x.reshape(K, G, T // cq, cq, *x.shape[3:]), 2, 0)
        return x.reshape(T // cq, K, G * cq, *x.shape[4:])

    q, do = by_block(q_KGTH), by_block(do_KGTH)
    q_T, do_T, k_T = q.swapaxes(2, 3), do.swapaxes(2, 3), k_KSH.swapaxes(1, 2)
    # Rows that see nothing: exp(-inf - inf) = 0.
    lse = by_block(jnp.where(lse == -jnp.inf, jnp.inf, lse))[:, :, None]
    delta = by_block(delta)[:, :, None]
    at = lambda x, i: jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False)

    def key_block(dq_T, j):
        k, v = _slice(k_KSH, j, ck, 1), _slice(v_KSH, j, ck, 1)
        k_scaled = (k * scale).astype(k.dtype)
        k_j_T = _slice(k_T, j, ck, 2)
        mask_k = _take(mask, _K_MASK, j, ck)

        def query_block(i, carry):
            dq_T, dk, dv = carry
            s = _dot(k_scaled, at(q_T, i))  # [K, ck, G * cq]

            def masked(s):
                visible = _visible(_take(mask, _Q_MASK, i, cq), mask_k).T[None, :, None]
                return jnp.where(visible, s.reshape(K, ck, G, cq), -jnp.inf).reshape(s.shape)

            s = jax.lax.cond(full[i, j], lambda s: s, masked, s)
            p = jnp.exp(s - at(lse, i))
            dv += _dot(p.astype(do.dtype), at(do, i))
            ds = (p * (_dot(v, at(do_T, i)) - at(delta, i))).astype(q.dtype)
            dk += _dot(ds, at(q, i))
            dq_i = at(dq_T, i) + _dot(k_j_T, ds)
            return jax.lax.dynamic_update_index_in_dim(dq_T, dq_i, i, 0), dk, dv

        zeros = jnp.zeros((K, ck, H))
        dq_T, dk, dv = jax.lax.fori_loop(first[j], last[j], query_block, (dq_T, zeros, zeros))
        return dq_T, (dk * scale, dv)

    dq_T = jnp.zeros((T // cq, K, H, G * cq))
    dq_T, dkv = jax.lax.scan(key_block, dq_T, jnp.arange(S // ck))
    dq = dq_T.reshape(T // cq, K, H, G, cq).transpose(1, 3, 0, 4, 2).reshape(q_KGTH.shape)
    dk, dv = (jnp.moveaxis(x, 0, 1).reshape(k_KSH.shape) for x in dkv)
    return dq * scale, dk, dv


def default_blocks() -> BlockSizes:
    """The fastest on two CPU cores; see benchmarks/results."""
    return BlockSizes()


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
    blocks = BlockSizes(_block(T, most.query), _block(S, most.key))
    whole_T, whole_S = -(-T // blocks.query) * blocks.query, -(-S // blocks.key) * blocks.key
    longer = lambda x, n: jnp.pad(x, ((0, 0), (0, n - x.shape[1]), (0, 0), (0, 0)))
    out, lse = _attend(
        *(longer(q_BTNH, whole_T), longer(k_BSKH, whole_S), longer(v_BSKH, whole_S)),
        *(masks.pad(mask, whole_T, whole_S), scale, blocks),
    )
    return out[:, :T], lse[..., :T]


def _rows(f, *args):
    """f over the rows of the batch, one after the other."""
    return jax.lax.map(lambda row: f(*row), args)


def _split(q_BTNH, K: int):
    B, T, N, H = q_BTNH.shape
    return q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]


def _merge(q_BKGTH):
    B, K, G, T, H = q_BKGTH.shape
    return q_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q_BTNH, k_BSKH, v_BSKH, mask, scale, blocks):
    return _attend_fwd(q_BTNH, k_BSKH, v_BSKH, mask, scale, blocks)[0]


def _attend_fwd(q_BTNH, k_BSKH, v_BSKH, mask, scale, blocks):
    K = k_BSKH.shape[2]
    out, lse = _rows(
        functools.partial(_forward, scale=scale, blocks=blocks),
        *(_split(q_BTNH, K), k_BSKH.transpose(0, 2, 3, 1), v_BSKH.transpose(0, 2, 1, 3)),
        *(mask, *masks.block_plan(mask, blocks.query, blocks.key)),
    )
    out = _merge(out)
    B, T, N, _ = q_BTNH.shape
    out = checkpoint_name(out, "attention_out")
    lse = checkpoint_name(lse.reshape(B, N, T), "attention_lse")
    return (out, lse), (q_BTNH, k_BSKH, v_BSKH, mask, out, lse)


def _attend_bwd(scale, blocks, residuals, cotangents):
    q, k, v, mask, out, lse = residuals
    d_out, d_lse = cotangents
    K = k.shape[2]
    B, N, T = lse.shape
    delta = jnp.einsum("BTNH,BTNH->BNT", d_out, out, preferred_element_type=jnp.float32)
    grouped = lambda x: x.reshape(B, K, N // K, T)
    dq, dk, dv = _rows(
        functools.partial(_backward, scale=scale, blocks=blocks),
        *(_split(q, K), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)),
        *(grouped(lse), grouped(delta - d_lse), _split(d_out, K)),
        *(mask, *masks.block_plan(mask, blocks.query, blocks.key)),
    )
    back = lambda x, like: x.transpose(0, 2, 1, 3).astype(like.dtype)
    return _merge(dq).astype(q.dtype), back(dk, k), back(dv, v), None


_attend.defvjp(_attend_fwd, _attend_bwd)
