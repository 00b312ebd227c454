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


def test_equations_4_and_5():
    module = ContextRePositioning(columns=4, init_std=0.5)
    params = nn.unbox(module.init(jax.random.key(1), H)["params"])
    z = module.apply({"params": params}, H)
    g, c, w = (
        np.asarray(params[n]["kernel"], np.float64)
        for n in ("gate_map", "content_map", "final_map")
    )
    assert g.shape == c.shape == (32, 4)
    h = np.asarray(H, np.float64)
    gate = h @ g
    np.testing.assert_allclose(z, (gate / (1 + np.exp(-gate)) * (h @ c)) @ w, atol=1e-5)


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
