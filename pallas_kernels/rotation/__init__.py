"""Rotation of queries and keys by real-valued positions."""

from pallas_kernels.rotation.api import rotate

__all__ = ["rotate"]
