"""Linear maps, norms and the MLP, as OLMo 2 has them: no biases anywhere."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from repo_jax.config import DecoderConfig
from repo_jax.sharding import TokenSplit, parts, split_axes


def init_weights(std: float, axes: tuple[str | None, ...] | None):
    """Truncated normal, cut at 3 sigma, with the parameter's logical axis names if given."""
    init = nn.initializers.truncated_normal(std, lower=-3.0, upper=3.0)
    return nn.with_logical_partitioning(init, axes) if axes else init


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def contract(x, gate, kernel, n: int, out_dtype=None, precision=None, axes=None):
    """x [..., *in] times kernel [*in, *out], over the n axes of in; silu(gate) * x if gated.

    kernel may be a tuple of some of one shape: one product, results side by side on the last
    axis.

    Its VJP keeps the kernel as it is stored, not cast to x's dtype, and the factors of the
    gated x, not the product: under a scan over layers, what is kept is stacked. The kernel's
    gradient comes in the kernel's own dtype, and as x^T dy; JAX's own rule forms (dy^T x)^T.
    On CPU XLA fuses what produced dy into the copy that transposes it and evaluates the
    exponentials there one by one instead of in vectors; x is at hand as it is.

    axes: logical names of the kernel's axes, if it has any. Where devices share tokens x
      [B, T, *in], each sums its own and one reduce-scatter leaves the parts of the kernel's
      gradient where the parts of the kernel are.
    """
    x = x if gate is None else swiglu.fun(gate, x)
    kernel = _joined(kernel).astype(x.dtype)
    options = dict(preferred_element_type=out_dtype, precision=precision)
    if _is_one_row_on_cpu(x, kernel, n):
        return _one_row(x, kernel, n, options)
    inner = (tuple(range(x.ndim - n, x.ndim)), tuple(range(n)))
    return jax.lax.dot_general(x, kernel, (inner, ((), ())), **options)


def _is_one_row_on_cpu(x, kernel, n: int) -> bool:
    # A kernel of less than a MiB, like those of f_phi, is read before a second core has begun.
    large = kernel.size >= 2**18 and kernel.shape[0] % 2 == 0
    alone = jax.sharding.get_abstract_mesh().empty and dispatch.target()[0] == "cpu"
    return large and alone and math.prod(x.shape[: x.ndim - n]) == 1 and x.dtype == jnp.float32


def _one_row(x, kernel, n: int, options):
    """One row times a kernel, as two halves of the sum.

    Decoding waits for weights to come from memory, and one core does not draw all that the
    memory gives. XLA for CPUs does not spread a small product of one row over cores, but does
    the products of a batch.
    """
    x_21I = x.reshape(2, 1, -1)
    kernel_2IO = kernel.reshape(2, x_21I.shape[2], -1)
    halves = jax.lax.dot_general(x_21I, kernel_2IO, (((2,), (1,)), ((0,), (0,))), **options)
    return halves.sum(0).reshape(*x.shape[: x.ndim - n], *kernel.shape[n:])


def _joined(kernel):
    return jnp.concatenate(kernel, -1) if isinstance(kernel, tuple) else kernel


def _contract_fwd(x, gate, kernel, n, out_dtype, precision, axes):
    return contract.fun(x, gate, kernel, n, out_dtype, precision, axes), (x, gate, kernel)


def _contract_bwd(n, out_dtype, precision, axes, residuals, dy):
    del out_dtype
    up, gate, kernels = residuals
    kernel = _joined(kernels)
    x = up if gate is None else swiglu.fun(gate, up)
    dy = dy.astype(x.dtype)
    batch = tuple(range(x.ndim - n))
    outputs = (tuple(range(len(batch), dy.ndim)), tuple(range(n, kernel.ndim)))
    dims = (outputs, ((), ()))
    dx = jax.lax.dot_general(dy, kernel.astype(x.dtype), dims, precision=precision)
    d_kernel = _kernel_gradient(x, dy, kernel, n, precision, axes)
    if isinstance(kernels, tuple):
        d_kernel = tuple(jnp.split(d_kernel, len(kernels), -1))
    d_gate, d_up = (None, dx) if gate is None else _swiglu_bwd((gate, up), dx)
    return d_up, d_gate, d_kernel


def _kernel_gradient(x, dy, kernel, n, precision, axes):
    def local(x, dy):
        # As matrices: with one contracted axis the product takes x as it lies, with two XLA's
        # CPU compiler copies it transposed first.
        rows = math.prod(x.shape[: x.ndim - n])
        d_kernel = jax.lax.dot_general(
            *(x.reshape(rows, -1), dy.reshape(rows, -1), (((0,), (0,)), ((), ()))),
            precision=precision,
            preferred_element_type=kernel.dtype,
        )
        return d_kernel.reshape(*x.shape[x.ndim - n :], *dy.shape[x.ndim - n :])

    if axes is None or x.ndim != n + 2:
        return local(x, dy)
    split = TokenSplit.of(*x.shape[:2])
    if "embed" not in axes:
        split = split._replace(embed=())
    # The width of activations is whole on every device; that of a kernel may be split.
    whole = [() if name in (None, "embed") else split_axes(name) for name in axes]
    parted = [split.embed if name == "embed" else w for name, w in zip(axes, whole, strict=True)]

    def reduced(x, dy):
        return (split.sum_tokens(local(x, dy), axes.index("embed") if split.embed else 0),)

    tokens = [split.batch, split.length]
    run = split.run(reduced, [[*tokens, *whole[:n]], [*tokens, *whole[n:]]], [parted])
    return run(x, dy)[0]


contract.defvjp(_contract_fwd, _contract_bwd)


class Linear(nn.Module):
    """A map of the last `inputs` axes of x to the axes `features`.

    The parameter is `kernel` [*in, *features]. (Flax's DenseGeneral draws it flattened, which
    logical axis names do not survive under a mesh, and has JAX's own VJP.)

    Attributes:
      features: the new axes.
      axes: logical names of the kernel's axes; None: a plain parameter.
      inputs: how many axes of x are mapped.
      init_std: of the truncated normal, cut at 3 sigma, that draws the kernel.
      dtype: of the operands; None: x's.
      param_dtype: of the kernel.
      out_dtype: of the result; None: that of the operands.
      precision: of the product and of its gradients.
    """

    features: tuple[int, ...]
    axes: tuple[str | None, ...] | None = None
    inputs: int = 1
    init_std: float = 0.02
    dtype: Any = None
    param_dtype: Any = jnp.float32
    out_dtype: Any = None
    precision: Any = None

    @nn.compact
    def kernel(self, shape: tuple[int, ...]) -> jax.Array:
        """The parameter for inputs of this shape, for who contracts several at once."""
        init = init_weights(self.init_std, self.axes)
        return self.param("kernel", init, (*shape, *self.features), jnp.dtype(self.param_dtype))

    def __call__(self, x: jax.Array, gate: jax.Array | None = None) -> jax.Array:
        """x [..., *in] -> [..., *features]; with `gate`, of x's shape, maps silu(gate) * x."""
        kernel = self.kernel(x.shape[x.ndim - self.inputs :])
        x, gate = jax.tree.map(lambda a: a.astype(self.dtype or x.dtype), (x, gate))
        return contract(*(x, gate, kernel, self.inputs, self.out_dtype, self.precision, self.axes))


def linear(config: DecoderConfig, features: tuple[int, ...], axes, **options) -> Linear:
    """A `Linear` with the config's init and dtypes."""
    dtypes = dict(dtype=config.dtype, param_dtype=config.param_dtype)
    return Linear(features, axes, init_std=config.init_std, **dtypes, **options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def look_up(table_VD, tokens_BT, dtype):
    """Rows of the table: [B, T, D] in `dtype`.

    Devices exchange the cast table. Its gradient is added up in the table's own dtype: in
    bfloat16 the sum over a frequent token would stop growing.
    """
    split = TokenSplit.of(*tokens_BT.shape)

    def local(table_VD, tokens_BT):
        table_VD = split.whole(table_VD.astype(dtype), axis=1)
        if not split.vocab:
            return (jnp.take(table_VD, tokens_BT, axis=0),)
        at = tokens_BT - jax.lax.axis_index(split.vocab) * table_VD.shape[0]
        inside = (at >= 0) & (at < table_VD.shape[0])
        x_BTD = jnp.where(inside[:, :, None], table_VD[jnp.where(inside, at, 0)], 0)
        return (split.sum(x_BTD, split.vocab),)

    return split.apply(local, ("Vd", "BT"), ("BTD",))(table_VD, tokens_BT)[0]


def _look_up_bwd(dtype, residuals, dx_BTD):
    del dtype
    tokens_BT, table_VD = residuals
    split = TokenSplit.of(*tokens_BT.shape)
    rows = table_VD.shape[0] // parts(split.vocab)

    def local(tokens_BT, dx_BTD):
        at = tokens_BT - (jax.lax.axis_index(split.vocab) * rows if split.vocab else 0)
        at = jnp.where(at >= 0, at, rows)  # beyond the end, where updates are dropped
        zeros = jnp.zeros((rows, dx_BTD.shape[2]), table_VD.dtype)
        table = zeros.at[at].add(dx_BTD.astype(zeros.dtype), mode="drop")
        return (split.sum_tokens(table, axis=1),)

    return split.apply(local, ("BT", "BTD"), ("Vd",))(tokens_BT, dx_BTD)[0], None


def _look_up_fwd(table_VD, tokens_BT, dtype):
    return look_up(table_VD, tokens_BT, dtype), (tokens_BT, table_VD)


look_up.defvjp(_look_up_fwd, _look_up_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def normalize(x, scale, eps: float):
    """x / rms(x) * scale, over the trailing axes that `scale` has; float32 inside.

    Its VJP keeps x and one number a row. What automatic differentiation keeps besides is
    the size of x again, for each of a layer's four norms.
    """
    return _normalize_fwd(x, scale, eps)[0]


def _normalize_fwd(x, scale, eps):
    axes = tuple(range(-scale.ndim, 0))
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axes, keepdims=True) + eps)
    out = wide * inverse * _to_rank(scale, x.ndim)
    return out.astype(x.dtype), (x, scale, inverse)


def _normalize_bwd(eps, residuals, dy):
    """With u = x / rms: du = dy * scale, dx = (du - u mean(u du)) / rms."""
    del eps
    x, scale, inverse = residuals
    axes = tuple(range(-scale.ndim, 0))
    u, dy = x.astype(jnp.float32) * inverse, dy.astype(jnp.float32)
    du = dy * _to_rank(scale, x.ndim)
    dx = (du - u * jnp.mean(u * du, axes, keepdims=True)) * inverse
    d_scale = jnp.sum(dy * u, tuple(range(x.ndim - scale.ndim)))
    return dx.astype(x.dtype), d_scale.astype(scale.dtype)


normalize.defvjp(_normalize_fwd, _normalize_bwd)


def _to_rank(x, rank: int):
    return x.astype(jnp.float32).reshape((1,) * (rank - x.ndim) + x.shape)


class RMSNorm(nn.Module):
    """RMSNorm (arXiv 1910.07467) over as many trailing axes as `axes` names.

    The parameter is `scale`, of the shape of those axes.

    Attributes:
      config: gives dtypes and epsilon.
      axes: logical names of the axes.
    """

    config: DecoderConfig
    axes: tuple[str | None, ...]

    @nn.compact
    def scale(self, shape: tuple[int, ...]) -> jax.Array:
        """The parameter, for who applies the norm together with something else."""
        init = nn.with_logical_partitioning(nn.initializers.ones, self.axes)
        return self.param("scale", init, shape, jnp.dtype(self.config.param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x of any shape with those axes last -> the same shape in the activation dtype."""
        scale = self.scale(x.shape[x.ndim - len(self.axes) :])
        return normalize(x.astype(self.config.dtype), scale, self.config.norm_eps)


@jax.custom_vjp
def swiglu(gate, up):
    """silu(gate) * up. Keeps its two inputs; automatic differentiation keeps five arrays."""
    return jax.nn.silu(gate) * up


def _swiglu_bwd(residuals, dy):
    gate, up = (x.astype(jnp.float32) for x in residuals)
    dtype, dy = residuals[0].dtype, dy.astype(jnp.float32)
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    d_gate = dy * up * (sigmoid + silu * (1.0 - sigmoid))
    return d_gate.astype(dtype), (dy * silu).astype(dtype)


swiglu.defvjp(lambda gate, up: (swiglu.fun(gate, up), (gate, up)), _swiglu_bwd)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)); Shazeer, arXiv 2002.05202."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        to_mlp = functools.partial(linear, c, (c.d_ff,), ("embed", "mlp"))
        gate_BTF, up_BTF = (
            nn.with_logical_constraint(to_mlp(name=name)(x_BTD), ("batch", "length", "mlp"))
            for name in ("gate", "up")
        )
        return linear(c, (c.d_model,), ("mlp", "embed"), name="down")(up_BTF, gate_BTF)
