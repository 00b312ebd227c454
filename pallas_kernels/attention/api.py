"""The public `rotary_attention`: checks, defaults, choice of implementation."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.attention import masks
from pallas_kernels.partition import Partition
from pallas_kernels.rotation import rotate
from pallas_kernels.rotation.api import check_inv_freq, check_positions

# Each module has `attend(q, k, v, mask, *, scale)` for rotated q and k, as in `xla`. Imported
# when first used: a machine needs the dependencies of its own kernels only.
IMPLEMENTATIONS = {
    name: f"pallas_kernels.attention.{module}"
    for name, module in {
        "reference": "reference",
        "xla": "xla",
        "pallas_tpu": "tpu",
        "pallas_gpu": "gpu",
        "cudnn": "cudnn",
    }.items()
}


def rotation_for(implementation: str | None) -> str | None:
    """The implementation of `rotate` that goes with one of attention."""
    if implementation is None or implementation.startswith("pallas"):
        return implementation
    return "xla"


_AXES = dict(
    **dict(q="BTNH", k="BSKH", v="BSKH", positions_q="BTP", positions_k="BSP"),
    **dict(q_index="BT", kv_index="BS", q_segment_ids="BT", kv_segment_ids="BS"),
    **dict(kv_length="B", inv_freq="F", rope_scale=""),
)


# Keys that are scattered in more pieces are left as they lie; a mesh needs two for each part.
_MOST_PIECES = 1024


def automatic() -> tuple[str, ...]:
    """The implementations tried in this order when none is named, for `dispatch.target()`.

    A kernel of ours for GPUs enters when it was seen correct on one (docs/6-kernels.md).
    """
    if dispatch.on_known_tpu():
        return ("pallas_tpu", "xla")
    return ("cudnn", "xla") if dispatch.target()[0] == "gpu" else ("xla",)


def _check(q, k, v, positions_q, positions_k, arrays) -> None:
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    if k.shape != (B, S, K, H) or v.shape != k.shape:
        raise ValueError(
            f"k {k.shape} and v {v.shape} must both be [{B}, S, K, {H}] to go with q {q.shape}"
        )
    if N % K:
        raise ValueError(f"q has {N} heads, which {K} key/value heads do not divide")
    for name, x, other, other_name in (
        ("positions_q", positions_q, q, "q"),
        ("positions_k", positions_k, k, "k"),
    ):
        if x is not None and not (name == "positions_k" and x.shape == (B, S, N)):
            check_positions(name, x, other_name, other)
    if (positions_q is None) != (positions_k is None):
        raise ValueError("positions_q and positions_k must both be given or both be None")
    lengths = {"q_index": (B, T), "kv_index": (B, S), "q_segment_ids": (B, T)}
    lengths |= {"kv_segment_ids": (B, S), "kv_length": (B,)}
    for name, x in arrays.items():
        one_row = name in ("q_index", "kv_index") and isinstance(x, np.ndarray) and x.ndim == 1
        if x is not None and x.shape != lengths[name][one_row:]:
            also = f", or a numpy array {lengths[name][1:]}" if name.endswith("index") else ""
            raise ValueError(f"{name} has shape {x.shape}; it must be {lengths[name]}{also}")
        if x is not None and not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"{name} has dtype {x.dtype}; it must be an integer dtype")
    if (arrays["q_segment_ids"] is None) != (arrays["kv_segment_ids"] is None):
        raise ValueError("q_segment_ids and kv_segment_ids must both be given or both be None")


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(x, axes):
    """Every device's x [B, S / C, D] over these C parts of the mesh: [B, S, D]."""
    return jax.lax.all_gather(x, axes, axis=1, tiled=True)


def _gather_bwd(axes, _, d_x):
    # C gradients are added up. In bf16, one after another, that would cost 0.5 % for C = 16
    # and 1 % for C = 64, as much as a result may be off; so it is done in float32. The parts
    # lead: along an inner axis XLA for TPUs sums everything everywhere, then takes a part.
    wide = d_x.astype(jnp.promote_types(d_x.dtype, jnp.float32))
    parts = wide.reshape(d_x.shape[0], jax.lax.axis_size(axes), -1, d_x.shape[2])
    d_x_sum = jax.lax.psum_scatter(parts.swapaxes(0, 1), axes, scatter_dimension=0)
    return (d_x_sum.astype(d_x.dtype),)


_gather.defvjp(lambda x, axes: (_gather(x, axes), None), _gather_bwd)


def rotary_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array | tuple[jax.Array, ...],
    v_BSKH: jax.Array | tuple[jax.Array, ...],
    positions_q: jax.Array | None,
    positions_k: jax.Array | None,
    *,
    q_index: jax.Array | np.ndarray | None = None,
    kv_index: jax.Array | np.ndarray | None = None,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    kv_length: jax.Array | None = None,
    causal: bool = True,
    scale: float | None = None,
    inv_freq: jax.Array,
    rope_scale: float = 1.0,
    return_lse: bool = False,
    implementation: str | None = None,
    partition: Partition | None = None,
):
    """Attention whose queries and keys are rotated by real-valued positions (RePo eq. 7).

    A_ts = scale * q_t^T R(z_s - z_t) k_s, softmax over the s that t may see, times v.
    Who sees whom is decided by token index and document, never by position. One
    differentiable operation: gradients to q, k, v and both positions. Memory is linear in
    T and S for every implementation but `reference`.

    Args:
      q_BTNH: [B, T, N, H].
      k_BSKH, v_BSKH: [B, S, K, H], K dividing N; query heads n*N/K .. share key/value head n.
        Or two tuples of parts along S, alike: in a decoding step (T = 1) of rotated keys those
        after the first that nothing sees are not read; elsewhere they are put together.
      positions_q: float32 [B, T, P], P = 1, K or N (any divisor of N), or None for no
        rotation.
      positions_k: float32 [B, S, P], P = 1, K or N. With N columns and K < N, keys are
        repeated to the query heads, each rotated its own way.
      q_index, kv_index: int32 [B, T], [B, S]: what the causal mask compares; a query sees
        keys of index <= its own. Default: 0, 1, ... for the keys, and the queries at the
        end of the keys (of the filled ones where `kv_length` is given). Where all rows are
        alike, a numpy array [T] or [S]: keys out of order, as a balanced split over devices
        has them, are then put in order, so that blocks of them that are not seen are skipped.
      q_segment_ids, kv_segment_ids: int32 [B, T], [B, S], nondecreasing in index order;
        only equal ids see each other; 0 is padding, which sees and is seen by nothing.
      kv_length: int32 [B]: how many of the S keys of a cache are filled.
      causal: False: every query sees every key of its document.
      scale: factor on the scores, a Python number. Default: 1 / sqrt(H).
      inv_freq: float [H / 2]: radians per position of channel pair (c, c + H/2).
      rope_scale: factor on cos and sin, so its square is on the scores (YaRN). Both are
        constants, as in `rotate`, which also has the limit of the angles.
      return_lse: also return the logsumexp of the scores.
      implementation: a name of `IMPLEMENTATIONS`; None: the first of `automatic()` that can.
      partition: how batch, heads and tokens are split over the mesh in context; each device
        then runs the implementation on its part. Where tokens are split it gathers the rotated
        keys and the values, once more in the backward pass, and there is no `kv_length`.
        Kernels need it under a mesh; None: not split, or split by XLA's partitioner, which
        knows the `xla` implementation only.

    Returns:
      [B, T, N, H] in q's dtype; zeros for queries that see nothing. With `return_lse` also
      float32 [B, N, T], -inf for those queries.

    Raises:
      ValueError: shapes or dtypes that do not fit, `kv_length` where tokens are split, or an
        unknown implementation.
      NotImplementedError: the implementation that was named cannot do this, or none can.
    """
    parts = None
    if isinstance(k_BSKH, tuple) or isinstance(v_BSKH, tuple):
        shapes = lambda x: [part.shape for part in x] if isinstance(x, tuple) else x.shape
        if shapes(k_BSKH) != shapes(v_BSKH):
            raise ValueError(f"k has parts {shapes(k_BSKH)}, but v {shapes(v_BSKH)}")
        one_by_one = q_BTNH.shape[1] == 1 and positions_q is None and partition is None
        parts = (k_BSKH, v_BSKH) if one_by_one else None
        k_BSKH, v_BSKH = (jnp.concatenate(x, axis=1) for x in (k_BSKH, v_BSKH))
    arrays = dict(
        q_index=q_index,
        kv_index=kv_index,
        q_segment_ids=q_segment_ids,
        kv_segment_ids=kv_segment_ids,
        kv_length=kv_length,
    )
    _check(q_BTNH, k_BSKH, v_BSKH, positions_q, positions_k, arrays)
    check_inv_freq(inv_freq, q_BTNH.shape[-1])
    dispatch.check_name(implementation, IMPLEMENTATIONS)
    try:
        scale = q_BTNH.shape[-1] ** -0.5 if scale is None else float(scale)
    except jax.errors.ConcretizationTypeError:
        raise ValueError("scale is traced; it must be a number (q may be multiplied)") from None

    S, length = k_BSKH.shape[1], partition.length if partition else None
    if length and kv_length is not None:
        raise ValueError(f"kv_length is given, but {partition} splits the keys of the cache")
    if length and causal and q_index is None:
        arrays["q_index"] = np.arange(S - q_BTNH.shape[1], S, dtype=np.int32)
    axes = _AXES | ({"q_index": "T"} if np.ndim(arrays["q_index"]) == 1 else {})
    known_index, sizes, order = None, [S], [0]
    if np.ndim(kv_index) == 1:
        known_index, pieces = arrays.pop("kv_index"), masks.stretches(kv_index)
        if kv_length is None and len(pieces[0]) <= _MOST_PIECES:
            known_index, (sizes, order) = np.sort(kv_index), pieces

    def whole(x):
        """Of all keys, in ascending order where that is known: [B, S, ...]."""
        if not length and len(order) == 1:
            return x
        # With heads side by side, as kernels for TPU have them too; else XLA lays x out anew.
        flat = x.reshape(*x.shape[:2], -1)
        if length:
            flat = _gather(flat, length)
        if len(order) > 1:
            pieces = jax.lax.split(flat, sizes, axis=1)
            flat = jnp.concatenate([pieces[i] for i in order], axis=1)
        return flat.reshape(x.shape[0], S, *x.shape[2:])

    def see(q, k, v, marks):
        k, v = whole(k), whole(v)
        if k.shape[2] > v.shape[2]:
            v = jnp.repeat(v, k.shape[2] // v.shape[2], axis=2)
        for name in ("kv_index", "kv_segment_ids"):
            if name in marks:
                marks = marks | {name: whole(marks[name])}
        if known_index is not None:
            marks = marks | {"kv_index": known_index[None]}
        if np.ndim(marks.get("q_index")) == 1:
            marks = marks | {"q_index": marks["q_index"][None]}
        B, T = q.shape[:2]
        mask = masks.build((B, T, S), causal=causal, **marks)
        if parts is not None and implementation in (None, "xla"):
            k, v = parts
        call = lambda module: importlib.import_module(module).attend(q, k, v, mask, scale=scale)
        # A decoding step uses each key once: a kernel has nothing to gain from keeping blocks.
        order = ("xla",) if T == 1 else automatic()
        return dispatch.first_able(implementation, order, IMPLEMENTATIONS, call)

    if length:
        # The gathered keys are as large as if nothing were split, so the backward pass gathers
        # them again. In a scan over layers XLA cannot merge the two, so nothing need prevent it.
        keep = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
        see = jax.checkpoint(see, policy=keep, prevent_cse=False)

    def attend(q, k, v, inv_freq, rope_scale, positions_q=None, positions_k=None, **marks):
        N, K = q.shape[2], k.shape[2]
        if positions_k is not None and positions_k.shape[-1] > K:
            k = jnp.repeat(k, N // K, axis=2)
        q, k = rotate(
            *(q, k, positions_q, positions_k),
            inv_freq=inv_freq,
            rope_scale=rope_scale,
            implementation=rotation_for(implementation),
        )
        return see(q, k, v, marks)

    arrays |= dict(q=q_BTNH, k=k_BSKH, v=v_BSKH)
    arrays |= dict(positions_q=positions_q, positions_k=positions_k)
    arrays |= dict(inv_freq=jnp.asarray(inv_freq), rope_scale=rope_scale)
    if partition is None:
        out, lse = attend(**{name: x for name, x in arrays.items() if x is not None})
    else:
        out, lse = partition.apply(attend, arrays, axes, ("BTNH", "BNT"))
    return (out, lse) if return_lse else out
