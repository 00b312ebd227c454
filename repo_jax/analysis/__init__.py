"""What a model learned: where its tokens stand, and what they look at."""

from repo_jax.analysis.reading import Reading, read

__all__ = ["Reading", "read"]
