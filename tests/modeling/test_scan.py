"""The scan plan covers any list of layers, and presets with at most two bodies of scan."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repo_jax import PositionConfig
from repo_jax.modeling.scan import plan

KINDS = st.sampled_from(["rope", "nope", "repo"])


@given(st.lists(KINDS, min_size=1, max_size=40))
def test_segments_put_end_to_end_are_the_layers(kinds):
    layers = []
    for segment in plan(kinds):
        assert segment.start == len(layers)
        layers += list(segment.pattern) * segment.repeats
    assert layers == kinds


@given(st.lists(KINDS, min_size=1, max_size=4), st.integers(1, 9))
def test_a_repeated_pattern_is_never_compiled_longer_than_once(pattern, repeats):
    assert sum(len(s.pattern) for s in plan(pattern * repeats)) <= len(pattern) + 1


@pytest.mark.parametrize("depth", [16, 32, 40, 64])
@pytest.mark.parametrize(
    ("preset", "bodies"), [("rope", 1), ("nope", 1), ("repo", 2), ("r2n1", 5), ("n2r1", 5)]
)
def test_presets(preset, bodies, depth):
    segments = plan(PositionConfig(preset=preset).kinds(depth))
    assert len(segments) <= 2
    assert sum(len(s.pattern) for s in segments) <= bodies
