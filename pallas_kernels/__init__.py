"""Continuous-position rotary attention, importable on its own.

Positions are real numbers, one per token (and per head), as produced by RePo's
f_phi (arXiv 2512.14391) or by anything else; integer positions are the special case
of ordinary RoPE. Nothing in this package knows about models.

* `rotate` turns q and k by their positions.
* `rotary_attention` is attention on the rotated q and k, one differentiable
  operation with gradients to q, k, v and both positions.
* `Partition` says how batch, heads and tokens are split over a mesh.

Letters in shapes: B batch, T query length, S key length, N query heads, K key/value
heads, H head dim, P position columns (1, K or N).
"""

from pallas_kernels.attention import rotary_attention
from pallas_kernels.partition import Partition
from pallas_kernels.rotation import rotate

__all__ = ["Partition", "rotary_attention", "rotate"]
