"""The public `rotate`: checks, then the implementation."""

import jax
import jax.numpy as jnp

from pallas_kernels.rotation import xla


def check_positions(name: str, positions, x_name: str, x) -> None:
    """Raises ValueError unless `positions` [B, T, P] fits x [B, T, X, H] with P dividing X."""
    if positions.ndim != 3 or positions.shape[:2] != x.shape[:2]:
        raise ValueError(
            f"{name} has shape {positions.shape}; with {x_name} {x.shape} it must be "
            f"[{x.shape[0]}, {x.shape[1]}, P]"
        )
    if x.shape[2] % positions.shape[2]:
        raise ValueError(
            f"{name} has {positions.shape[2]} columns, which do not divide "
            f"the {x.shape[2]} heads of {x_name}"
        )


def check_inv_freq(inv_freq, head_dim: int) -> None:
    """Raises ValueError unless there is one frequency for each pair of channels."""
    if head_dim % 2 or jnp.shape(inv_freq) != (head_dim // 2,):
        raise ValueError(
            f"inv_freq has shape {jnp.shape(inv_freq)}; head dim {head_dim} needs "
            f"({head_dim // 2},) and an even head dim"
        )


def rotate(
    q: jax.Array,
    k: jax.Array,
    positions_q: jax.Array | None,
    positions_k: jax.Array | None,
    *,
    inv_freq: jax.Array,
    rope_scale: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Rotates queries and keys by real-valued positions (RePo eq. 7; RoFormer for integers).

    Channel c is paired with c + H/2 and the pair is turned by position * inv_freq[c]
    radians. Angles, sines and the rotation are fp32 whatever the dtype of q and k.
    Differentiable in q, k and both positions.

    Args:
      q: [B, T, N, H].
      k: [B, S, K, H].
      positions_q: float [B, T, P] with P = 1, K or N (any divisor of N; column p serves
        heads p*N/P .. (p+1)*N/P - 1), or None to leave q as it is.
      positions_k: float [B, S, P], P dividing K, or None. Passing the very same array for
        both shares one evaluation of sin and cos.
      inv_freq: float [H / 2], radians per position.
      rope_scale: factor on cos and sin (YaRN's attention scale).

    Returns:
      q and k, rotated, in their own shapes and dtypes.

    Raises:
      ValueError: shapes that do not fit together.
    """
    check_inv_freq(inv_freq, q.shape[-1])
    inv_freq = jnp.asarray(inv_freq, jnp.float32)
    rope_scale = jnp.asarray(rope_scale, jnp.float32)
    if positions_q is positions_k and positions_q is not None:
        check_positions("positions_q", positions_q, "q", q)
        check_positions("positions_k", positions_k, "k", k)
        return xla.rotate_many((q, k), positions_q.astype(jnp.float32), inv_freq, rope_scale)
    rotated = []
    for name, x, positions in (("q", q, positions_q), ("k", k, positions_k)):
        if positions is not None:
            check_positions(f"positions_{name}", positions, name, x)
            positions = positions.astype(jnp.float32)
            (x,) = xla.rotate_many((x,), positions, inv_freq, rope_scale)
        rotated.append(x)
    return tuple(rotated)
