"""Linear maps, norms and the MLP, as OLMo 2 has them: no biases anywhere."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from repo_jax.config import DecoderConfig


def init_weights(std: float, axes: tuple[str | None, ...] | None):
    """Truncated normal, cut at 3 sigma, with the parameter's logical axis names if given."""
    init = nn.initializers.truncated_normal(std, lower=-3.0, upper=3.0)
    return nn.with_logical_partitioning(init, axes) if axes else init


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def contract(x, kernel, n: int, out_dtype=None):
    """x [..., *in] times kernel [*in, *out], over the n axes of in.

    Its VJP forms the kernel's gradient as x^T dy; JAX's own rule forms (dy^T x)^T. On CPU
    XLA fuses what produced dy into the copy that transposes it and evaluates the
    exponentials there one by one, 18 times slower than in order; x is at hand as it is.
    """
    axes = (tuple(range(x.ndim - n, x.ndim)), tuple(range(n)))
    return jax.lax.dot_general(x, kernel, (axes, ((), ())), preferred_element_type=out_dtype)


def _contract_fwd(x, kernel, n, out_dtype):
    return contract(x, kernel, n, out_dtype), (x, kernel)


def _contract_bwd(n, out_dtype, residuals, dy):
    del out_dtype
    x, kernel = residuals
    dy = dy.astype(x.dtype)
    batch = tuple(range(x.ndim - n))
    outputs = (tuple(range(len(batch), dy.ndim)), tuple(range(n, kernel.ndim)))
    dx = jax.lax.dot_general(dy, kernel, (outputs, ((), ())))
    d_kernel = jax.lax.dot_general(x, dy, ((batch, batch), ((), ())))
    return dx, d_kernel


contract.defvjp(_contract_fwd, _contract_bwd)


class Linear(nn.Module):
    """A map of the last `inputs` axes of x to the axes `features`.

    The parameter is `kernel` [*in, *features]. (Flax's DenseGeneral draws it flattened, which
    logical axis names do not survive under a mesh, and has JAX's own VJP.)

    Attributes:
      config: gives dtypes and init.
      features: the new axes.
      axes: logical names of the kernel's axes.
      inputs: how many axes of x are mapped.
      out_dtype: of the result; None: the activation dtype.
    """

    config: DecoderConfig
    features: tuple[int, ...]
    axes: tuple[str | None, ...]
    inputs: int = 1
    out_dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., *in] -> [..., *features]."""
        c = self.config
        shape = (*x.shape[x.ndim - self.inputs :], *self.features)
        init = init_weights(c.init_std, self.axes)
        kernel = self.param("kernel", init, shape, jnp.dtype(c.param_dtype))
        return contract(x.astype(c.dtype), kernel.astype(c.dtype), self.inputs, self.out_dtype)


def rms_norm(config: DecoderConfig, axes, **options):
    """RMSNorm over as many trailing axes as `axes` names; statistics in float32."""
    over = tuple(range(-len(axes), 0))
    return nn.RMSNorm(
        epsilon=config.norm_eps,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, axes),
        reduction_axes=over,
        feature_axes=over,
        **options,
    )


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)); Shazeer, arXiv 2002.05202."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        to_mlp = functools.partial(Linear, c, (c.d_ff,), ("embed", "mlp"))
        gate_BTF, up_BTF = to_mlp(name="gate")(x_BTD), to_mlp(name="up")(x_BTD)
        hidden_BTF = nn.with_logical_constraint(
            jax.nn.silu(gate_BTF) * up_BTF, ("batch", "length", "mlp")
        )
        return Linear(c, (c.d_model,), ("mlp", "embed"), name="down")(hidden_BTF)
