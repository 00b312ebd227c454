"""Attention through the cuDNN that jax brings along, for NVIDIA GPUs.

`jax.nn.dot_product_attention` rounds the logsumexp to the dtype of the queries and drops its
gradient without a word, so the function below it is called: the logsumexp is then float32,
and our own VJP can name what it keeps. That function is private to jax; its signature is
checked, and another one is refused.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from pallas_kernels import dispatch
from pallas_kernels.attention import masks, xla

try:
    from jax._src.cudnn import fused_attention_stablehlo as fused
except ImportError:  # moved in a later jax
    fused = None

_SEED, _BTNH = 42, "BTNH"
# The parameters of jax's rule for the backward pass: of jax 0.10 and 0.11, and of 0.12.
_COMMON = {"scale", "seed", "dropout_rate", "variadic_args", "mask_type", "layout"}
_COMMON |= {"sliding_window_length", "return_residual", "res", "grad_output"}
_BACKWARD = (_COMMON | {"is_training"}, _COMMON | {"score_mod", "cudnn_version"})


def _parameters() -> set[str]:
    rule = getattr(fused, "_dot_product_attention_bwd_rule", None)
    return set(inspect.signature(rule).parameters) if rule else set()


def _check(q, k, v, mask) -> None:
    if not isinstance(mask, masks.Default):
        raise NotImplementedError(
            "cuDNN has no mask of documents, indices or cache lengths other than a dense one"
        )
    T, S = q.shape[1], k.shape[1]
    if mask.causal and T != S:
        raise NotImplementedError(
            f"cuDNN's causal mask puts {T} queries at the start, not at the end, of {S} keys"
        )
    dtypes = {str(x.dtype) for x in (q, k, v)}
    if dtypes not in ({"bfloat16"}, {"float16"}):
        raise NotImplementedError(
            f"cuDNN takes bfloat16 or float16, the same for all, not {', '.join(sorted(dtypes))}"
        )
    if min(*q.shape, *k.shape) == 0:
        raise NotImplementedError(f"there is nothing to attend: q {q.shape}, k {k.shape}")
    if _parameters() not in _BACKWARD:
        raise NotImplementedError(f"jax {jax.__version__}'s interface to cuDNN is not known here")
    if fused.cuda_versions is None or dispatch.target()[0] == "tpu":
        raise NotImplementedError("cuDNN needs an NVIDIA GPU and jax's CUDA packages")


def _kind(causal: bool):
    return fused.MaskType.CAUSAL if causal else fused.MaskType.NO_MASK


def _forward(q_BTNH, k_BSKH, v_BSKH, causal, scale):
    out, lse = fused.dot_product_attention(
        *(q_BTNH, k_BSKH, v_BSKH),
        scale=scale,
        mask_type=_kind(causal),
        seed=_SEED,
        qkv_layout=_BTNH,
        return_residual=True,
    )
    return checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")


_attend = jax.custom_vjp(_forward, nondiff_argnums=(3, 4))


def _attend_fwd(q, k, v, causal, scale):
    q, k, v = (x.value for x in (q, k, v))
    out, lse = _forward(q, k, v, causal, scale)
    return (out, lse), (q, k, v, out, lse)


def _attend_bwd(causal, scale, residuals, cotangents):
    q, k, v, out, lse = residuals
    d_out, d_lse = cotangents
    if not isinstance(d_lse, SymbolicZero):
        # cuDNN's backward pass takes no gradient of the logsumexp. XLA's does, from the start.
        attend = functools.partial(xla.attend, mask=masks.Default(causal), scale=scale)
        _, vjp = jax.vjp(attend, q, k, v)
        return vjp((jnp.zeros_like(out) if isinstance(d_out, SymbolicZero) else d_out, d_lse))
    if isinstance(d_out, SymbolicZero):
        return jnp.zeros_like(q), jnp.zeros_like(k), jnp.zeros_like(v)
    none = jnp.zeros(0, q.dtype)  # of bias, lengths, offsets and page tables
    if "score_mod" in _parameters():
        options, modified = {"score_mod": None, "cudnn_version": None}, ((),)
    else:
        options, modified = {"is_training": True}, ()
    d_q, d_k, d_v, *_ = fused._dot_product_attention_bwd_rule(
        scale=scale,
        seed=_SEED,
        dropout_rate=0.0,
        variadic_args=(False, False),
        mask_type=_kind(causal),
        layout=fused.AttentionLayout[_BTNH].value,
        sliding_window_length=None,
        return_residual=False,
        res=(q, k, v, *(none,) * 7, *modified, lse, out),
        grad_output=d_out,
        **options,
    )
    return d_q, d_k, d_v


_attend.defvjp(_attend_fwd, _attend_bwd, symbolic_zeros=True)


def attend(q_BTNH, k_BSKH, v_BSKH, mask, *, scale, blocks=None):
    """softmax(scale q k^T) v under `mask`, and its logsumexp.

    Args:
      q_BTNH, k_BSKH, v_BSKH: [B, T, N, H], [B, S, K, H], [B, S, K, H], all bfloat16 or all
        float16; H a multiple of 8, to 128, or to 256 on a Hopper GPU.
      mask: `masks.Default`; T = S if it is causal.
      scale: factor on the scores, a number.
      blocks: must be None; cuDNN chooses.

    Returns:
      out [B, T, N, H] in q's dtype and lse float32 [B, N, T]. Differentiable in q, k, v, by
      either output; a gradient of lse makes the backward pass one of `xla`.

    Raises:
      NotImplementedError: whatever else, and where there is no cuDNN.
    """
    _check(q_BTNH, k_BSKH, v_BSKH, mask)
    if blocks is not None:
        raise ValueError(f"cudnn takes no block sizes, not {blocks}")
    return _attend(q_BTNH, k_BSKH, v_BSKH, mask.causal, float(scale))
