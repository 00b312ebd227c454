"""Rotary frequencies, with YaRN."""

import math

import numpy as np

from repo_jax.config import RopeScaling


def rotary_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[np.ndarray, float]:
    """Radians per position of each pair of channels, and the factor on cos and sin.

    RoFormer (arXiv 2104.09864) without `scaling`. With it YaRN (arXiv 2309.00071): pairs
    that make more than `beta_fast` turns in `original_length` tokens keep their frequency,
    those that make fewer than `beta_slow` are divided by `factor`, with a linear ramp over
    whole channel indices between; the factor on cos and sin is 0.1 ln(factor) + 1.

    Args:
      head_dim: H, even.
      theta: base.
      scaling: None for none.

    Returns:
      inv_freq, float32 [H / 2], and the factor.
    """
    pairs = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    inv_freq = theta**-pairs
    if scaling is None or scaling.factor == 1.0:
        return inv_freq.astype(np.float32), 1.0

    def pair_with(turns: float) -> float:
        """The (fractional) pair that makes so many turns in the original length."""
        wavelength_ratio = scaling.original_length / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength_ratio) / (2 * math.log(theta))

    low = max(math.floor(pair_with(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_with(scaling.beta_slow)), head_dim - 1)
    ramp = (np.arange(head_dim // 2) - low) / max(high - low, 1e-3)
    slowed = np.clip(ramp, 0.0, 1.0)
    inv_freq = inv_freq * (1.0 - slowed) + inv_freq / scaling.factor * slowed
    return inv_freq.astype(np.float32), 0.1 * math.log(scaling.factor) + 1.0
