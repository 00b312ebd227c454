"""ContextRePositioning in other people's models."""

import flax.linen as nn
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import rotary_attention
from repo_jax import ContextRePositioning
from repo_jax.modeling.rope import rotary_frequencies

H = jax.random.normal(jax.random.key(0), (2, 5, 32))


@pytest.mark.parametrize("tokens", [5, 40])  # fewer and more than the width, 32
def test_equations_4_and_5(tokens):
    h = jax.random.normal(jax.random.key(0), (2, tokens, 32))
    module = ContextRePositioning(columns=4, init_std=0.5)
    params = nn.unbox(module.init(jax.random.key(1), h)["params"])
    assert params["gate_map"]["kernel"].shape == params["content_map"]["kernel"].shape == (32, 4)

    def written_out(params, h):
        g, c, w = (params[n]["kernel"] for n in ("gate_map", "content_map", "final_map"))
        gate = h @ g
        return (gate / (1 + jnp.exp(-gate)) * (h @ c)) @ w

    z = module.apply({"params": params}, h)
    d_z = jax.random.normal(jax.random.key(2), z.shape)
    grads = jax.vjp(lambda p, h: module.apply({"params": p}, h), params, h)[1](d_z)
    with jax.enable_x64():
        exact = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (params, h))
        expected, vjp = jax.vjp(written_out, *exact)
        expected_grads = vjp(d_z.astype(jnp.float64))
    np.testing.assert_allclose(z, expected, atol=1e-5)
    jax.tree.map(
        lambda g, e: np.testing.assert_allclose(g, e, atol=1e-5 * np.abs(np.asarray(e)).max()),
        *(grads, expected_grads),
    )


def test_linear():
    module = ContextRePositioning(columns=1, f_phi="linear", init_std=0.5)
    params = nn.unbox(module.init(jax.random.key(1), H)["params"])
    z = module.apply({"params": params}, H)
    np.testing.assert_allclose(z, H @ params["linear_map"]["kernel"], atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_positions_are_float32_whatever_comes_in(dtype):
    module = ContextRePositioning(columns=4, dtype=dtype)
    z, _ = module.init_with_output(jax.random.key(1), H.astype(dtype))
    assert z.dtype == jnp.float32
    assert z.shape == (2, 5, 4)


class SomeonesAttention(nn.Module):
    """A Linen attention of another model, with learned positions added."""

    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.DenseGeneral((4, 8), name=n)(x) for n in "qkv")
        z = ContextRePositioning(columns=4)(x)
        inv_freq, _ = rotary_frequencies(8, theta=10_000.0)
        return rotary_attention(q, k, v, z, z, inv_freq=inv_freq)


def test_in_someone_elses_linen_model():
    model = SomeonesAttention()
    variables = model.init(jax.random.key(0), H)
    grads = jax.grad(lambda v: model.apply(v, H).sum() ** 2)(variables)
    f_phi = nn.unbox(grads["params"]["ContextRePositioning_0"])
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(f_phi))


def test_in_an_nnx_model():
    module = nnx.bridge.ToNNX(ContextRePositioning(columns=4), rngs=nnx.Rngs(0)).lazy_init(H)
    z = module(H)
    assert z.shape == (2, 5, 4)

    grads = nnx.grad(lambda m: (m(H) ** 2).sum())(module)
    leaves = jax.tree.leaves(grads)
    assert len(leaves) == 3
    assert all(np.abs(leaf).max() > 0 for leaf in leaves)
