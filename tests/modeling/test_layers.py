"""Linear maps of one row, which CPUs compute another way where the kernel is large."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repo_jax.modeling.layers import contract

SPLIT = [((512,), (8, 64)), ((8, 64), (512,)), ((2, 300), (500,))]
WHOLE = [((8, 60), (512,)), ((513,), (512,))]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("inner", "outer"), SPLIT + WHOLE)
def test_a_row_alone_is_mapped_as_among_others(inner, outer, gated):
    keys = jax.random.split(jax.random.key(0), 3)
    rows = jax.random.normal(keys[0], (3, 1, *inner))
    gate = jax.random.normal(keys[1], rows.shape) if gated else None
    kernel = jax.random.normal(keys[2], (*inner, *outer))
    x = np.asarray(rows, np.float64)
    if gated:
        g = np.asarray(gate, np.float64)
        x = x * g / (1 + np.exp(-g))
    expected = np.tensordot(x, np.asarray(kernel, np.float64), len(inner))
    for i in range(3):
        row = jax.tree.map(lambda x, i=i: x[i : i + 1], (rows, gate))
        one = contract(*row, kernel, len(inner))
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, expected[i : i + 1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("inner", "outer", "split"), [(*s, True) for s in SPLIT] + [(*s, False) for s in WHOLE]
)
def test_large_kernels_are_read_in_halves(inner, outer, split):
    """By two products side by side, and not for several rows."""
    kernel = jnp.zeros((*inner, *outer))
    for n_rows in (1, 2):
        x = jnp.zeros((n_rows, *inner))
        text = str(jax.make_jaxpr(lambda x: contract(x, None, kernel, len(inner)))(x))
        assert ("f32[2,1," in text) == (split and n_rows == 1)
