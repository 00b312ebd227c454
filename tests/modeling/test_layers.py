"""Linear maps of one row, which CPUs compute another way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repo_jax.modeling.layers import contract


@settings(max_examples=20, deadline=None)
@given(
    given=st.lists(st.integers(1, 9), min_size=1, max_size=2),
    out=st.lists(st.integers(1, 9), min_size=1, max_size=2),
    leading=st.integers(1, 2),
    gated=st.booleans(),
)
def test_a_row_alone_is_mapped_as_among_others(given, out, leading, gated):
    keys = jax.random.split(jax.random.key(0), 3)
    rows = jax.random.normal(keys[0], (3, *[1] * (leading - 1), *given))
    gate = jax.random.normal(keys[1], rows.shape) if gated else None
    kernel = jax.random.normal(keys[2], (*given, *out))
    args = lambda i: (rows[i], None if gate is None else gate[i], kernel, len(given))
    x = np.asarray(rows, np.float64)
    if gated:
        g = np.asarray(gate, np.float64)
        x = x * g / (1 + np.exp(-g))
    expected = np.tensordot(x, np.asarray(kernel, np.float64), len(given))
    for i in range(3):
        one = contract(*args(slice(i, i + 1)))
        assert one.shape == expected[i : i + 1].shape and one.dtype == jnp.float32
        np.testing.assert_allclose(one, expected[i : i + 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width, split", [(6, True), (7, False)])
def test_a_row_alone_is_two_products_side_by_side(width, split):
    text = str(
        jax.make_jaxpr(lambda x, w: contract(x, None, w, 1))(
            jnp.zeros((1, 1, width)), jnp.zeros((width, 4))
        )
    )
    assert (f"f32[2,{width // 2},4]" in text) == split
