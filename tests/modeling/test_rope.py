"""Rotary frequencies and YaRN, against the numbers of its paper's recipe for OLMo 2."""

import math

import numpy as np

from repo_jax import RopeScaling
from repo_jax.modeling.rope import rotary_frequencies


def test_plain():
    inv_freq, scale = rotary_frequencies(8, 10_000.0)
    np.testing.assert_allclose(inv_freq, [1.0, 0.1, 0.01, 0.001], rtol=1e-6)
    assert inv_freq.dtype == np.float32
    assert scale == 1.0


def test_factor_one_is_plain():
    scaled, scale = rotary_frequencies(128, 5e5, RopeScaling(1.0, 4096))
    np.testing.assert_array_equal(scaled, rotary_frequencies(128, 5e5)[0])
    assert scale == 1.0


def test_yarn_keeps_fast_pairs_divides_slow_ones_and_ramps_between():
    """For head dim 128 and theta 5e5 the ramp goes from pair 14 to pair 32."""
    plain, _ = rotary_frequencies(128, 5e5)
    scaled, scale = rotary_frequencies(128, 5e5, RopeScaling(factor=4.0, original_length=4096))
    np.testing.assert_array_equal(scaled[:15], plain[:15])
    np.testing.assert_allclose(scaled[32:], plain[32:] / 4, rtol=1e-6)
    middle = (scaled / plain)[14:33]
    np.testing.assert_allclose(middle, 1 - 0.75 * np.arange(19) / 18, rtol=1e-5)
    assert math.isclose(scale, 0.1 * math.log(4) + 1)
