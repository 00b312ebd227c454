"""Linear maps, norms and the MLP, as OLMo 2 has them: no biases anywhere."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from repo_jax.config import DecoderConfig


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _contract(x, kernel, n, dtype):
    dims = (tuple(range(x.ndim - n, x.ndim)), tuple(range(n)))
    return jax.lax.dot_general(x, kernel, (dims, ((), ())), preferred_element_type=dtype)


def _contract_bwd(n, dtype, residuals, dy):
    x, kernel = residuals
    dy = dy.astype(x.dtype)
    batch, features = tuple(range(x.ndim - n)), tuple(range(n, kernel.ndim))
    y_features = tuple(range(len(batch), dy.ndim))
    dx = jax.lax.dot_general(dy, kernel, ((y_features, features), ((), ())))
    d_kernel = jax.lax.dot_general(x, dy, ((batch, batch), ((), ())))
    return dx, d_kernel


_contract.defvjp(lambda x, kernel, n, dtype: (_contract(x, kernel, n, dtype), (x, kernel)), _contract_bwd)


def dot_general(x, kernel, dimension_numbers, *, precision=None, preferred_element_type=None):
    """`lax.dot_general` of a linear map, with the kernel's gradient as x^T dy.

    JAX's own rule forms it as (dy^T x)^T. On CPU XLA then fuses what produced dy into the
    copy that transposes it and evaluates its exponentials one by one there, 18 times
    slower than in order; x is at hand as it is.
    """
    del precision
    (x_axes, kernel_axes), _ = dimension_numbers
    n = len(kernel_axes)
    assert kernel_axes == tuple(range(n)) and x_axes == tuple(range(x.ndim - n, x.ndim))
    return _contract(x, kernel, n, preferred_element_type)


def init_weights(std: float, axes: tuple[str | None, ...]):
    """Truncated normal, cut at 3 sigma, with the logical axis names of the parameter."""
    init = nn.initializers.truncated_normal(std, lower=-3.0, upper=3.0)
    return nn.with_logical_partitioning(init, axes)


def linear(config: DecoderConfig, features, axes, *, inputs: int = 1, **options):
    """A map of the last `inputs` axes to `features` in the activation dtype.

    The parameter is `kernel` [*in, *features] with logical `axes`.
    """
    settings = dict(
        features=features,
        axis=tuple(range(-inputs, 0)),
        use_bias=False,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        kernel_init=init_weights(config.init_std, axes),
        dot_general=dot_general,
    )
    return nn.DenseGeneral(**(settings | options))


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
        up = functools.partial(linear, self.config, self.config.d_ff, ("embed", "mlp"))
        gate_BTF, up_BTF = up(name="gate")(x_BTD), up(name="up")(x_BTD)
        hidden_BTF = nn.with_logical_constraint(
            jax.nn.silu(gate_BTF) * up_BTF, ("batch", "length", "mlp")
        )
        down = linear(self.config, self.config.d_model, ("mlp", "embed"), name="down")
        return down(hidden_BTF)


def float32_dot(*args, **kwargs):
    """`dot_general` whose result is float32 whatever the operands are."""
    return dot_general(*args, **(kwargs | {"preferred_element_type": jnp.float32}))
