"""What the tests of analysis share."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def fast_compilation():
    """Programs here run once, so that compiling them is what takes time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
