"""Rotation in plain JAX, for any device, with its own VJP.

The residuals are the *rotated* array and the positions. Attention keeps the rotated
q and k anyway, so rotation adds nothing to what training holds; the backward pass
works in the rotated frame (see `_bwd`).
"""

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

    if positions_BTP.size % 2:
        return evaluate(positions_BTP)
    return jax.lax.platform_dependent(positions_BTP, cpu=stored, default=evaluate)


def _per_position(x_BTXH, columns: int):
    """[B, T, X, H] -> two halves [B, T, P, X/P, H/2], x heads grouped by their position."""
    B, T, X, H = x_BTXH.shape
    x = x_BTXH.reshape(B, T, columns, X // columns, H)
    return x[..., : H // 2], x[..., H // 2 :]


def _turn(x, cos, sin):
    """The rotate-half (NeoX) rotation: channel c pairs with c + H/2. fp32 inside."""
    x1, x2 = (half.astype(jnp.float32) for half in _per_position(x, cos.shape[2]))
    cos, sin = cos[..., None, :], sin[..., None, :]
    out = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
    return out.reshape(x.shape).astype(x.dtype)


@jax.custom_vjp
def rotate_many(xs: tuple, positions_BTP, inv_freq_F, rope_scale):
    """Rotates each [B, T, X, H] of `xs` by the same positions, one sincos for all."""
    cos, sin = _cos_sin(positions_BTP, inv_freq_F, rope_scale)
    return tuple(_turn(x, cos, sin) for x in xs)


def _fwd(xs, positions_BTP, inv_freq_F, rope_scale):
    out = rotate_many(xs, positions_BTP, inv_freq_F, rope_scale)
    return out, (out, positions_BTP, inv_freq_F, rope_scale)


def _bwd(residuals, d_outs):
    """With y = s R(z w) x: dx = s R(-z w) dy and dz = sum_m w_m (y1_m dy2_m - y2_m dy1_m).

    dz needs no cos or sin: d/dangle of a rotated pair (y1, y2) is (-y2, y1), scaled or not.
    """
    outs, positions_BTP, inv_freq_F, rope_scale = residuals
    cos, sin = _cos_sin(positions_BTP, inv_freq_F, rope_scale)
    d_xs = tuple(_turn(d_out, cos, -sin) for d_out in d_outs)
    d_positions = jnp.zeros_like(positions_BTP)
    for y, dy in zip(outs, d_outs, strict=True):
        y1, y2 = (h.astype(jnp.float32) for h in _per_position(y, positions_BTP.shape[2]))
        dy1, dy2 = (h.astype(jnp.float32) for h in _per_position(dy, positions_BTP.shape[2]))
        # A sum over the channel pairs and over the heads that share the position. Plain
        # multiply and reduce: a dot would be rounded to bf16 on TPU.
        d_positions += jnp.sum(
            (y1 * dy2 - y2 * dy1) * inv_freq_F[None, None, None, None], axis=(-2, -1)
        )
    return d_xs, d_positions, None, None


rotate_many.defvjp(_fwd, _bwd)
