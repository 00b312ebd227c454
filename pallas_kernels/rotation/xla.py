"""Norm and rotation in plain JAX, for any device. The contract is in api.py."""

import jax
import jax.numpy as jnp

from pallas_kernels.rotation.sincos import sincos


def _cos_sin(positions_BTP, inv_freq_F, rope_scale):
    """cos and sin [B, T, P, H / 2] of every angle, times the scale."""

    def evaluate(positions):
        sin, cos = sincos(positions[..., None] * inv_freq_F[(None,) * positions.ndim])
        return cos * rope_scale, sin * rope_scale

    def stored(positions):
        # In two halves, because what a loop computes is stored. XLA's CPU compiler would
        # otherwise evaluate every sine and cosine again for each half of q and of k.
        halves = jax.lax.map(evaluate, positions.reshape(2, -1))
        return jax.tree.map(lambda x: x.reshape(*positions.shape, -1), halves)

    if positions_BTP.size % 2 or positions_BTP.shape[1] == 1:  # few: cheaper than a loop
        return evaluate(positions_BTP)
    return jax.lax.platform_dependent(positions_BTP, cpu=stored, default=evaluate)


def _per_position(x_BTXH, columns: int):
    """[B, T, X, H] -> two fp32 halves [B, T, P, X/P, H/2], x heads grouped by their position."""
    B, T, X, H = x_BTXH.shape
    x = x_BTXH.reshape(B, T, columns, X // columns, H).astype(jnp.float32)
    return x[..., : H // 2], x[..., H // 2 :]


def _turn(halves, cos, sin):
    """The rotate-half (NeoX) rotation of `_per_position`'s halves: channel c pairs with c + H/2."""
    x1, x2 = halves
    cos, sin = cos[..., None, :], sin[..., None, :]
    return x1 * cos - x2 * sin, x2 * cos + x1 * sin


def _join(halves, like):
    return jnp.concatenate(halves, axis=-1).reshape(like.shape)


def _d_positions(y, dy, inv_freq_F):
    """sum_m w_m (y1_m dy2_m - y2_m dy1_m): d/dangle of a pair (y1, y2) is (-y2, y1)."""
    # A sum over the channel pairs and over the heads that share the position. A product, since
    # XLA's CPU compiler evaluates a sum of so much a term at a time, in 3 times as long for all
    # of `backward`; exact, since it would be rounded to bf16 on TPU.
    return jnp.einsum(
        "BTPGF,F->BTP", y[0] * dy[1] - y[1] * dy[0], inv_freq_F, precision=jax.lax.Precision.HIGHEST
    )


def _inverse_rms(x_BTXH, mean_square_BT, eps):
    if mean_square_BT is None:
        wide = x_BTXH.astype(jnp.float32)
        mean_square_BT = jnp.mean(wide * wide, (2, 3))
    return jax.lax.rsqrt(mean_square_BT + eps)[..., None, None]


def forward(xs, weights, mean_squares, positions, inv_freq, rope_scale, eps):
    """See api.py."""
    tables = None if positions is None else _cos_sin(positions, inv_freq, rope_scale)
    ys = []
    for x, weight, mean_square in zip(xs, weights, mean_squares, strict=True):
        y = x
        if weight is not None:
            y = x.astype(jnp.float32) * _inverse_rms(x, mean_square, eps) * weight[None, None]
        if tables is not None:
            y = _join(_turn(_per_position(y, positions.shape[2]), *tables), x)
        ys.append(y.astype(x.dtype))
    return tuple(ys)


def backward(kept, d_ys, weights, mean_squares, positions, inv_freq, rope_scale, eps):
    """See api.py. With y = s R(z w) n: dn = s R(-z w) dy."""
    d_xs, d_weights, d_mean_squares, d_positions = [], [], [], None
    if positions is not None:
        cos, sin = _cos_sin(positions, inv_freq, rope_scale)
        halves = lambda x: _per_position(x, positions.shape[2])
        d_positions = jnp.zeros_like(positions)
    for x, dy, weight, mean_square in zip(kept, d_ys, weights, mean_squares, strict=True):
        dn = dy if positions is None else _join(_turn(halves(dy), cos, -sin), dy)
        if weight is None:
            d_positions += _d_positions(halves(x), halves(dy), inv_freq)
            d_xs.append(dn.astype(dy.dtype))
            d_weights.append(None)
            d_mean_squares.append(None)
            continue
        # n = u weight with u = x / rms.
        dn, inverse = dn.astype(jnp.float32), _inverse_rms(x, mean_square, eps)
        u = x.astype(jnp.float32) * inverse
        if positions is not None:
            # From y and dy, not from n and dn, which would be the same: on CPU, XLA would
            # then evaluate dn again for each of its halves (measured: 1.7 times slower).
            y = _turn(halves(u * weight[None, None]), cos, sin)
            d_positions += _d_positions(y, halves(dy), inv_freq)
        du = dn * weight[None, None]
        dot = jnp.sum(u * du, (2, 3), keepdims=True)
        if mean_square is None:
            d_mean_squares.append(None)
            du = du - u * (dot / weight.size)
        else:
            d_mean_squares.append((-0.5 * inverse * inverse * dot)[..., 0, 0])
        d_xs.append((du * inverse).astype(x.dtype))
        d_weights.append(jnp.sum(dn * u, (0, 1)))
    return tuple(d_xs), tuple(d_weights), tuple(d_mean_squares), d_positions
