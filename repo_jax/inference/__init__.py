"""Text from a model."""

from repo_jax.inference.generator import Completion, Generator, generate
from repo_jax.inference.sampling import Sampling

__all__ = ["Completion", "Generator", "Sampling", "generate"]
