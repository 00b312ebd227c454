"""What attention.py compares on a GPU or a TPU: our operation and others', each as one function.

    f(q, k, v, z, segments) -> [B, T, N, H]

q, k, v [B, T, N, H] bf16, z float32 [B, T, N], segments int32 [B, T] or None; causal. Rivals
rotate as one writes it in JAX, with cos, sin and automatic differentiation (`rotated`), and
then call somebody's attention.
"""

import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import rotary_attention, rotate
from pallas_kernels.attention import cudnn, masks

Operation = Callable[..., jax.Array]
THETA = 500_000.0


def frequencies(head_dim: int) -> jax.Array:
    return THETA ** (-jnp.arange(0, head_dim, 2) / head_dim)


def rotated(x, z):
    """Rotation by learned positions in plain JAX, fp32 inside."""
    angle = z[..., None] * frequencies(x.shape[-1])
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def after_rotation(attend: Operation) -> Operation:
    """XLA's rotation, then attend(q, k, v, segments)."""
    return lambda q, k, v, z, segments: attend(rotated(q, z), rotated(k, z), v, segments)


def alone(attend: Operation) -> Operation:
    """No rotation."""
    return lambda q, k, v, z, segments: attend(q, k, v, segments)


def ours(implementation: str, *, rotation: bool = True) -> Operation:
    """Our operation, by the name of an implementation."""

    def operation(q, k, v, z, segments):
        z = z if rotation else None
        options = {"q_segment_ids": segments, "kv_segment_ids": segments}
        options |= {"inv_freq": frequencies(q.shape[-1]), "implementation": implementation}
        return rotary_attention(q, k, v, z, z, **options)

    return operation


def our_rotation_and_cudnn(q, k, v, z, segments):
    """`rotate` by its GPU kernel, whatever the automatic order says, then our `cudnn`."""
    if segments is not None:
        raise NotImplementedError("cuDNN has no documents without a dense mask")
    inv_freq, scale = frequencies(q.shape[-1]), q.shape[-1] ** -0.5
    q, k = rotate(q, k, z, z, inv_freq=inv_freq, implementation="pallas_gpu")
    return cudnn.attend(q, k, v, masks.Default(causal=True), scale=scale)[0]


def jax_cudnn(q, k, v, segments):
    """cuDNN by jax.nn; documents as a dense mask, which is all it has for them."""
    mask = None if segments is None else (segments[:, None, :, None] == segments[:, None, None, :])
    attend = jax.nn.dot_product_attention
    return attend(q, k, v, mask=mask, is_causal=True, implementation="cudnn")


def tokamax(q, k, v, segments):
    """tokamax's Mosaic GPU kernel."""
    if segments is not None:
        raise NotImplementedError("tokamax's public function has no documents but a dense mask")
    import tokamax

    return tokamax.dot_product_attention(q, k, v, is_causal=True, implementation="mosaic")


def splash(q, k, v, segments):
    """jax's splash attention on TPU at its best known blocks, fused backward pass."""
    from jax.experimental.pallas.ops.tpu import splash_attention as s

    T, N, H = q.shape[1:]
    block = min(T, 1024 if T <= 4096 else 2048)
    compute = min(T, 512)
    sizes = s.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=compute,
        block_q_dkv=min(T, 1024),
        block_kv_dkv=min(T, 1024),
        block_kv_dkv_compute=compute,
        use_fused_bwd_kernel=True,
    )
    mask = s.MultiHeadMask([s.CausalMask((T, T))] * N)
    kernel = s.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    heads_first = lambda x: x.transpose(0, 2, 1, 3)
    q, k, v = heads_first(q) * jnp.asarray(H**-0.5, q.dtype), heads_first(k), heads_first(v)
    if segments is None:
        return heads_first(jax.vmap(kernel)(q, k, v))
    ids = s.SegmentIds(q=segments, kv=segments)
    return heads_first(jax.vmap(kernel)(q, k, v, ids))


def operations(platform: str) -> tuple[dict[str, Operation], str]:
    """{name: operation} of "gpu" or "tpu", and the name of the one that ours are compared with."""
    if platform == "tpu":
        baseline = "XLA rotation + splash"
        return {
            "ours, pallas_tpu": ours("pallas_tpu"),
            "ours, xla": ours("xla"),
            baseline: after_rotation(splash),
            "pallas_tpu, no rotation": ours("pallas_tpu", rotation=False),
            "splash, no rotation": alone(splash),
        }, baseline
    baseline = "XLA rotation + cuDNN"
    found = {
        "ours, pallas_gpu": ours("pallas_gpu"),
        "ours, cudnn": ours("cudnn"),
        "ours, rotation kernel + cudnn": our_rotation_and_cudnn,
        "ours, xla": ours("xla"),
        baseline: after_rotation(jax_cudnn),
        "pallas_gpu, no rotation": ours("pallas_gpu", rotation=False),
        "cuDNN, no rotation": alone(jax_cudnn),
    }
    if importlib.util.find_spec("tokamax"):
        found["XLA rotation + tokamax"] = after_rotation(tokamax)
        found["tokamax, no rotation"] = alone(tokamax)
    return found, baseline
