"""Attention over rotated queries and keys."""

from pallas_kernels.attention.api import rotary_attention

__all__ = ["rotary_attention"]
