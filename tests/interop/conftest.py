from pathlib import Path

import numpy as np
import pytest
from flax import traverse_util

from repo_jax.config import DecoderConfig, PositionConfig
from repo_jax.interop.names import parameter_shapes
from repo_jax.modeling import RePoLM

REPO = PositionConfig("repo")
GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(params=["rope", "repo", "r2n1"])
def golden(request):
    """A folder made by the reference implementation."""
    return GOLDEN / request.param


@pytest.fixture
def golden_repo():
    return GOLDEN / "repo"


@pytest.fixture
def golden_rope():
    return GOLDEN / "rope"


@pytest.fixture
def make_model():
    """Makes a small model and random parameters."""

    def make(positions=REPO, dtype=np.float32, **changes):
        settings = {
            "vocab_size": 48,
            "d_model": 32,
            "n_layers": 4,
            "n_heads": 4,
            "d_ff": 40,
            "max_length": 64,
        }
        config = DecoderConfig(**settings | changes, positions=positions)
        rng = np.random.default_rng(0)
        params = {
            path: rng.normal(0, 0.1, shape).astype(dtype)
            for path, shape in parameter_shapes(config).items()
        }
        return RePoLM(config), traverse_util.unflatten_dict(params)

    return make


@pytest.fixture
def assert_same():
    """Asserts that two parameter trees are equal, bit for bit."""

    def same(a, b):
        a, b = traverse_util.flatten_dict(a), traverse_util.flatten_dict(b)
        assert a.keys() == b.keys()
        for path, x in a.items():
            x, y = np.asarray(x), np.asarray(b[path])
            assert x.dtype == y.dtype, path
            assert x.shape == y.shape, path
            assert x.tobytes() == y.tobytes(), path

    return same
