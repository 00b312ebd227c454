"""Flash attention for NVIDIA Hopper (H100, H200) in Pallas Mosaic GPU, with its own VJP.

FlashAttention-3's shape (arXiv 2407.08608): TMA loads by a warp group of their own, wgmma by
two more. Which blocks see each other is known before a kernel starts: those that do not are
neither loaded nor computed, and only those that are partly seen are masked, and come first.
The backward pass is two kernels. Together they make seven products where one sweep would need
five, but nothing is added atomically, so gradients are the same bits every time, and no fp32
dq goes through memory.

Registers and spills were read from ptxas for an H200 (none spill), and numbers compared in
jax's interpreter. On a GPU this has not run yet, so no automatic order contains it. jax 0.12.0
compiles all Mosaic GPU kernels, its own included, so that ptxas ignores `setmaxnreg`: these
then spill, and are slow. jax 0.10.2 and 0.11.2 do not.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import mosaic_gpu
from pallas_kernels.attention import gpu_common, gpu_dkv, gpu_dq, gpu_forward, masks


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What one kernel handles at a time.

    Attributes:
      query, key: tokens; of the side that stays put (queries; keys for dk and dv), per warp
        group, of which two compute.
      stages: blocks of the other side in shared memory.
      compute_registers, load_registers: of a thread; twice the first and the second are at
        most 504.
      cache: bytes of the second-level cache for what the heads at work walk over.
    """

    query: int
    key: int
    stages: int = 2
    compute_registers: int = 240
    load_registers: int = 24
    cache: int = 24 * 2**20

    def __post_init__(self):
        for name in ("query", "key"):
            if getattr(self, name) < 64 or getattr(self, name) % 64:
                raise ValueError(f"{name} {getattr(self, name)} must be a multiple of 64")


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """For the forward kernel and the two backward ones."""

    forward: Blocks
    dkv: Blocks
    dq: Blocks


# (compute capability, padded head dimension): the largest without spills.
_DEFAULTS = {
    (9, 64): BlockSizes(Blocks(64, 128, 4), Blocks(64, 64, 4), Blocks(64, 128, 4)),
    (9, 128): BlockSizes(Blocks(64, 128, 2), Blocks(64, 64, 4), Blocks(64, 128, 2)),
    (9, 256): BlockSizes(Blocks(64, 64, 2), Blocks(64, 64, 2), Blocks(64, 64, 1)),
}


def default_blocks(head_dim: int, capability: int = 9) -> BlockSizes:
    """The defaults for a head dimension: for both 16-bit dtypes and any length the same."""
    return _DEFAULTS[capability, _padded_head(head_dim)]


def _padded_head(H: int) -> int:
    for size in (64, 128, 256):
        if size >= H:
            return size
    raise NotImplementedError(f"head dimension {H}: at most 256 fits in registers")


def _check(q, k, v, scale) -> None:
    mosaic_gpu.check_device(9)
    dtypes = {x.dtype for x in (q, k, v)}
    if len(dtypes) > 1 or q.dtype not in (jnp.bfloat16, jnp.float16):
        names = ", ".join(str(x.dtype) for x in (q, k, v))
        raise NotImplementedError(
            f"q, k, v of {names}: all must be bfloat16 or all float16 (for float32 the tensor "
            "cores have TF32 only)"
        )
    if scale <= 0:
        raise NotImplementedError(f"{scale=} must be positive")


def _padded(x, tile: int):
    """[B, T, N, H] with H as the kernels have it and T what TMA can address.

    TMA reads zeros beyond the end and writes nothing there, but lengths must be multiples of
    8. The interpreter wants whole tiles.
    """
    x = gpu_common.pad_to(x, _padded_head(x.shape[3]), 3)
    return gpu_common.pad_to(
        x, gpu_common.whole(x.shape[1], tile if mosaic_gpu.interpreting() else 8), 1
    )


def _plan(mask, T: int, S: int, q_block: int, k_block: int, *, by_key: bool = False):
    """The mask padded to whole blocks and its plan; ({}, None) without a mask."""
    if not mask:
        return {}, None
    whole = gpu_common.whole
    mask = masks.pad(mask, whole(T, q_block), whole(S, k_block))
    return mask, gpu_common.visits(mask, q_block, k_block, by_key=by_key)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attend(q_BTNH, k_BSKH, v_BSKH, mask, causal, scale, blocks):
    return _attend_fwd(q_BTNH, k_BSKH, v_BSKH, mask, causal, scale, blocks)[0]


def _attend_fwd(q_BTNH, k_BSKH, v_BSKH, mask, causal, scale, blocks):
    T, S, H = q_BTNH.shape[1], k_BSKH.shape[1], q_BTNH.shape[3]
    sizes = blocks.forward
    tile = gpu_forward.COMPUTE * sizes.query
    out, lse = gpu_forward.forward(
        *(_padded(q_BTNH, tile), _padded(k_BSKH, sizes.key), _padded(v_BSKH, sizes.key)),
        *_plan(mask, T, S, tile, sizes.key),
        **dict(lengths=(T, S), scale=scale, causal=causal, blocks=sizes),
    )
    out = checkpoint_name(out[:, :T, :, :H], "attention_out")
    lse = checkpoint_name(lse[..., :T], "attention_lse")
    return (out, lse), (q_BTNH, k_BSKH, v_BSKH, mask, out, lse)


def _attend_bwd(causal, scale, blocks, residuals, cotangents):
    q, k, v, mask, out, lse = residuals
    d_out, d_lse = cotangents
    T, S, H = q.shape[1], k.shape[1], q.shape[3]
    delta = jnp.einsum("BTNH,BTNH->BNT", d_out, out, preferred_element_type=jnp.float32) - d_lse
    # Both are what an accumulator starts from: exp(scale * (q k - lse / scale)) and
    # do v - delta. Where nothing is seen, and beyond the end, weights must be exp(-inf).
    lse = jnp.where(lse == -jnp.inf, -jnp.inf, lse / -scale)
    tile_q = gpu_forward.COMPUTE * blocks.dq.query
    tile_k = gpu_dkv.key_tile(_padded_head(H), blocks.dkv)
    whole = math.lcm(tile_q, blocks.dkv.query)
    rows = gpu_common.whole(T, whole)
    x = (
        *(_padded(q, whole), _padded(k, math.lcm(tile_k, blocks.dq.key))),
        *(_padded(v, math.lcm(tile_k, blocks.dq.key)), _padded(d_out, whole)),
        gpu_common.pad_to(lse, rows, 2, -jnp.inf),
        gpu_common.pad_to(-delta, rows, 2),
    )
    common = dict(lengths=(T, S), scale=scale, causal=causal)
    plan = _plan(mask, T, S, blocks.dkv.query, tile_k, by_key=True)
    dk, dv = gpu_dkv.dkv(*x, *plan, **common, blocks=blocks.dkv)
    plan = _plan(mask, T, S, tile_q, blocks.dq.key)
    dq = gpu_dq.dq(*x, *plan, **common, blocks=blocks.dq)
    return dq[:, :T, :, :H], dk[:, :S, :, :H], dv[:, :S, :, :H], None


_attend.defvjp(_attend_fwd, _attend_bwd)


def attend(q_BTNH, k_BSKH, v_BSKH, mask, *, scale, blocks: BlockSizes | None = None):
    """softmax(scale q k^T) v under `mask`, and its logsumexp.

    Args:
      q_BTNH, k_BSKH, v_BSKH: [B, T, N, H], [B, S, K, H], [B, S, K, H], any lengths; all
        bfloat16 or all float16.
      mask: as `masks.build` makes it.
      scale: factor on the scores.
      blocks: None: the defaults.

    Returns:
      out [B, T, N, H] in q's dtype and lse float32 [B, N, T]; zeros and -inf for queries
      that see nothing. Differentiable in q, k, v, by either output.

    Raises:
      NotImplementedError: other dtypes, H > 256, a scale that is not positive, or a GPU that
        is not a Hopper.
    """
    _check(q_BTNH, k_BSKH, v_BSKH, scale)
    default = isinstance(mask, masks.Default)
    return _attend(
        *(q_BTNH, k_BSKH, v_BSKH, {} if default else mask),
        *(default and mask.causal, float(scale), blocks or default_blocks(q_BTNH.shape[3])),
    )
