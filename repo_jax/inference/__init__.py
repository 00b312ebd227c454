"""Text from a model."""

from repo_jax.inference.sampling import generate

__all__ = ["generate"]
