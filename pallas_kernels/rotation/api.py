"""The public `rotate`: checks, then an implementation, as one operation with one VJP.

An implementation is a module with two pure functions,

    forward(xs, weights, mean_squares, positions, inv_freq, rope_scale, eps) -> ys
    backward(kept, d_ys, weights, mean_squares, positions, inv_freq, rope_scale, eps)
        -> (d_xs, d_weights, d_mean_squares, d_positions)

  xs            tuple of 1 or 2 arrays [B, T, X, H], bf16 or fp32, each with its own X
  weights       tuple as long: float32 [X, H], or None: that x has no norm
  mean_squares  tuple as long: float32 [B, T], or None: computed here (or no norm)
  positions     float32 [B, T, P], P dividing every X, shared by all xs; None: no rotation
                (then every x has a norm)
  inv_freq      float32 [H / 2];  rope_scale: float32 [];  eps: a Python float
  ys, d_xs, d_ys  like xs, in their dtypes
  kept          x_i where it has a norm, else y_i. Attention keeps the rotated q and k, so
                a rotation without a norm adds nothing to what training holds.
  d_weights, d_mean_squares, d_positions  float32, like their arguments; None where those are

  n_i = x_i * rsqrt(mean_square_i + eps) * weight_i        (n_i = x_i without a norm)
  y_i = rope_scale * R(positions * inv_freq) n_i

The backward pass works in the rotated frame: dn = rope_scale * R(-positions * inv_freq) dy,
and d_positions = sum_m inv_freq_m cross(y_m, dy_m) = sum_m inv_freq_m cross(n_m, dn_m) with
cross((a1, a2), (b1, b2)) = a1 b2 - a2 b1, over the pairs m of all heads that share the
position, of all xs. Where `mean_square` is given its gradient is
-1/2 (mean_square + eps)^(-3/2) sum(x weight dn) and d_x leaves that path out; where it is
None d_x has both. `forward` raises NotImplementedError (with the reason) for whatever
`forward` or `backward` cannot do.
"""

import functools
import importlib

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.partition import Partition

# Imported when first used: a machine without a GPU never needs Mosaic GPU.
IMPLEMENTATIONS = {
    "xla": "pallas_kernels.rotation.xla",
    "pallas_tpu": "pallas_kernels.rotation.tpu",
    "pallas_gpu": "pallas_kernels.rotation.gpu",
}


def automatic() -> tuple[str, ...]:
    """The implementations tried in this order when none is named."""
    return ("pallas_tpu", "xla") if dispatch.on_known_tpu() else ("xla",)


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


def _check_norm(name: str, x, weight, mean_square) -> None:
    if weight is not None and weight.shape != x.shape[2:]:
        raise ValueError(
            f"{name}_norm has shape {weight.shape}; with {name} {x.shape} it must be {x.shape[2:]}"
        )
    if mean_square is not None and weight is None:
        raise ValueError(f"{name}_mean_square is given without {name}_norm")
    if mean_square is not None and mean_square.shape != x.shape[:2]:
        raise ValueError(
            f"{name}_mean_square has shape {mean_square.shape}; with {name} {x.shape} "
            f"it must be {x.shape[:2]}"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 7))
def _rotate(backend, xs, weights, mean_squares, positions, inv_freq, rope_scale, eps):
    return backend.forward(xs, weights, mean_squares, positions, inv_freq, rope_scale, eps)


def _rotate_fwd(backend, xs, weights, mean_squares, positions, inv_freq, rope_scale, eps):
    # Not `_rotate`, which forward over reverse (Hessian-vector products) could not go through.
    ys = backend.forward(xs, weights, mean_squares, positions, inv_freq, rope_scale, eps)
    kept = tuple(y if w is None else x for x, y, w in zip(xs, ys, weights, strict=True))
    return ys, (kept, weights, mean_squares, positions, inv_freq, rope_scale)


def _rotate_bwd(backend, eps, residuals, d_ys):
    kept, *others = residuals
    return *backend.backward(kept, d_ys, *others, eps), None, None


_rotate.defvjp(_rotate_fwd, _rotate_bwd)


def rotate(
    q: jax.Array,
    k: jax.Array,
    positions_q: jax.Array | None,
    positions_k: jax.Array | None,
    *,
    inv_freq: jax.Array,
    rope_scale: float = 1.0,
    q_norm: jax.Array | None = None,
    k_norm: jax.Array | None = None,
    norm_eps: float = 1e-6,
    q_mean_square: jax.Array | None = None,
    k_mean_square: jax.Array | None = None,
    implementation: str | None = None,
    partition: Partition | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Normalizes, then rotates queries and keys by real-valued positions.

    Rotation (RePo eq. 7; RoFormer for integers): channel c is paired with c + H/2 and the
    pair is turned by position * inv_freq[c] radians. The norm is OLMo 2's, an RMSNorm over
    all heads together: x * rsqrt(mean(x^2) + eps) * weight. All of it is fp32 inside,
    rounded once at the end, whatever the dtype of q and k. Differentiable in q, k, both
    weights, both mean squares and both positions.

    Args:
      q: [B, T, N, H].
      k: [B, S, K, H].
      positions_q: float [B, T, P] with P = 1, K or N (any divisor of N; column p serves
        heads p*N/P .. (p+1)*N/P - 1), or None for no rotation of q.
      positions_k: float [B, S, P], P dividing K, or None. Passing the very same array for
        both shares one evaluation of sin and cos.
      inv_freq: float [H / 2], radians per position. Angles, position * inv_freq, may be up to
        205,887 rad; beyond, sines are wrong and soon not finite.
      rope_scale: factor on cos and sin (YaRN's attention scale). Both are constants: their
        gradients are zero.
      q_norm, k_norm: weights [N, H], [K, H] of the norm; None: no norm.
      norm_eps: epsilon of both norms.
      q_mean_square, k_mean_square: float [B, T], [B, S], the mean of x^2 over the whole
        width where the heads here are a part of it (tensor parallelism: the caller sums
        over the axis). Their gradient carries the norm's backward pass to the other parts.
        None: computed here, from the heads here.
      implementation: a name of `IMPLEMENTATIONS`; None: the first of `automatic()` that can.
      partition: how batch, heads and tokens are split over the mesh in context; each device
        then runs the implementation on its part, and norms are summed over the heads' axes.
        None: not split, or split by XLA's partitioner, which knows `xla` only.

    Returns:
      q and k, normalized and rotated, in their own shapes and dtypes.

    Raises:
      ValueError: shapes that do not fit together, or an unknown implementation.
      NotImplementedError: the named implementation cannot do this.
    """
    dispatch.check_name(implementation, IMPLEMENTATIONS)
    check_inv_freq(inv_freq, q.shape[-1])
    inv_freq = jnp.asarray(inv_freq, jnp.float32)
    rope_scale = jnp.asarray(rope_scale, jnp.float32)
    inputs = {
        "q": (q, q_norm, q_mean_square, positions_q),
        "k": (k, k_norm, k_mean_square, positions_k),
    }
    for name, (x, weight, mean_square, positions) in inputs.items():
        _check_norm(name, x, weight, mean_square)
        if positions is not None:
            check_positions(f"positions_{name}", positions, name, x)
    local = functools.partial(
        _local, eps=norm_eps, implementation=implementation, partition=partition
    )
    arrays = dict(
        **dict(q=q, k=k, positions_q=positions_q, positions_k=positions_k),
        **dict(q_norm=q_norm, k_norm=k_norm),
        **dict(q_mean_square=q_mean_square, k_mean_square=k_mean_square),
        **dict(inv_freq=inv_freq, rope_scale=rope_scale),
    )
    if partition is None:
        return local(**arrays)
    return partition.apply(local, arrays, _AXES, ("BTNH", "BSKH"))


_AXES = dict(
    **dict(q="BTNH", k="BSKH", positions_q="BTP", positions_k="BSP"),
    **dict(q_norm="NH", k_norm="KH", q_mean_square="BT", k_mean_square="BS"),
    **dict(inv_freq="F", rope_scale=""),
)


def _local(
    q,
    k,
    inv_freq,
    rope_scale,
    positions_q=None,
    positions_k=None,
    q_norm=None,
    k_norm=None,
    q_mean_square=None,
    k_mean_square=None,
    *,
    eps: float,
    implementation: str | None,
    partition: Partition | None,
):
    """`rotate` on the heads, rows and tokens that one device has."""
    inputs = {
        "q": (q, q_norm, q_mean_square, positions_q),
        "k": (k, k_norm, k_mean_square, positions_k),
    }
    if partition is not None and partition.heads:
        for name, (x, weight, mean_square, positions) in inputs.items():
            if weight is not None and mean_square is None:
                here = jnp.mean(jnp.square(x.astype(jnp.float32)), (-2, -1))
                inputs[name] = (x, weight, jax.lax.pmean(here, partition.heads), positions)
    together = positions_q is positions_k and q.shape[:2] == k.shape[:2]
    out = {"q": q, "k": k}
    for names in (("q", "k"),) if together else (("q",), ("k",)):
        names = [n for n in names if inputs[n][1] is not None or inputs[n][3] is not None]
        if not names:
            continue
        wide = lambda x: None if x is None else x.astype(jnp.float32)
        xs, weights, mean_squares, positions = zip(*(inputs[n] for n in names), strict=True)
        weights, mean_squares = tuple(map(wide, weights)), tuple(map(wide, mean_squares))
        args = (xs, weights, mean_squares, wide(positions[0]), inv_freq, rope_scale)
        call = lambda path, args=args: _rotate(importlib.import_module(path), *args, eps)
        ys = dispatch.first_able(implementation, automatic(), IMPLEMENTATIONS, call)
        out |= dict(zip(names, ys, strict=True))
    return out["q"], out["k"]
