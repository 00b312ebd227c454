"""Measures of positions whose answers are known."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from repo_jax.analysis.measures import (
    centroids,
    distance_sums,
    index_correlation,
    local_patterns,
    position_ranges,
    prefix_lengths,
    table_pairs,
)

# Quarters: sums and differences are exact, so that shifts change nothing by rounding.
quarters = st.integers(-4000, 4000).map(lambda n: np.float32(n / 4))


@st.composite
def positions(draw, shortest=1, longest=40):
    shape = (2, 3, draw(st.integers(shortest, longest)))
    return draw(hnp.arrays(np.float32, shape, elements=quarters))


def shares(patterns):
    return np.stack([patterns.constant, patterns.monotonic, patterns.hybrid])


def test_ranges_of_known_positions():
    z = np.array([[4, 1, 2, 3, 100], [-5, -5, -5, -5, -5]], np.float32)
    ranges = position_ranges(z)
    np.testing.assert_array_equal(ranges.low, [1, -5])
    np.testing.assert_array_equal(ranges.high, [100, -5])
    np.testing.assert_array_equal(ranges.range, [99, 0])
    # Quartiles 2 and 4, so that what is beyond -1 and 7 is out.
    np.testing.assert_array_equal(ranges.low_whisker, [1, -5])
    np.testing.assert_array_equal(ranges.high_whisker, [4, -5])
    np.testing.assert_array_equal(ranges.outliers, [1, 0])


def test_a_whisker_reaches_exactly_one_and_a_half():
    z = np.array([2, 3, 4, 7, 2, 4, 3, 3, -1.0])  # quartiles 2 and 4
    ranges = position_ranges(z)
    assert (ranges.low_whisker, ranges.high_whisker, ranges.outliers) == (-1, 7, 0)
    beyond = position_ranges(np.where(z == 7, 7.25, z))
    assert (beyond.high, beyond.high_whisker, beyond.outliers) == (7.25, 4, 1)


@given(positions(), quarters)
def test_ranges_move_with_the_positions(z, shift):
    here, there = position_ranges(z), position_ranges(z + shift)
    np.testing.assert_array_equal(there.range, here.range)
    np.testing.assert_array_equal(there.outliers, here.outliers)
    np.testing.assert_array_equal(there.low_whisker, here.low_whisker + shift)
    np.testing.assert_array_equal(there.high_whisker, here.high_whisker + shift)


@given(positions())
def test_whiskers_lie_within_the_range_and_a_longer_text_has_no_smaller_one(z):
    whole, part = position_ranges(z), position_ranges(z[..., : z.shape[-1] // 2 + 1])
    assert (whole.low <= whole.low_whisker).all()
    assert (whole.low_whisker <= whole.high_whisker).all()
    assert (whole.high_whisker <= whole.high).all()
    assert (part.range <= whole.range).all()


@pytest.mark.parametrize(
    ("length", "expected"),
    [(3, [3]), (16, [16]), (17, [16, 17]), (64, [16, 32, 64]), (100, [16, 32, 64, 100])],
)
def test_prefixes_are_powers_of_two_and_all(length, expected):
    assert prefix_lengths(length) == expected


CHUNKS = {
    "constant": [
        [3, 3, 3, 3],
        [0, 0.4, 0, 0.4],  # at most 0.2 off the mean
        [0, 0.1, 0.2, 0.3],  # rises, too: constant comes first
    ],
    "monotonic": [[0, 1, 2, 3], [9, 4, 0, -7], [0, 0.2, 0.4, 0.6]],
    "hybrid": [[0, 1, 1, 2], [0, 1, 2, 1], [5, 0, 5, 0], [0, 0, 0, 1]],
}


@pytest.mark.parametrize("kind", CHUNKS)
def test_each_chunk_has_its_pattern(kind):
    for z in CHUNKS[kind]:
        found = local_patterns(np.array(z, np.float64), chunk=4, eps=0.2 + 1e-12)
        assert getattr(found, kind) == 1, z
        assert shares(found).sum() == 1


def test_shares_count_whole_chunks_only():
    z = np.array([1, 1, 1, 5, 6, 7, 9, 8, 9, 0, 50], np.float32)
    found = local_patterns(np.stack([z, np.arange(11)]), chunk=3)
    assert found.chunks == 3
    np.testing.assert_allclose(found.constant, [1 / 3, 0])
    np.testing.assert_allclose(found.monotonic, [1 / 3, 1])
    np.testing.assert_allclose(found.hybrid, [1 / 3, 0])


@given(positions(shortest=8), st.integers(1, 8), st.sampled_from([0.0, 0.2, 1.0, 50.0]), quarters)
def test_shares_sum_to_one_and_a_shift_changes_none(z, chunk, eps, shift):
    here = local_patterns(z, chunk=chunk, eps=eps)
    np.testing.assert_allclose(shares(here).sum(0), 1, rtol=1e-12)
    assume(chunk & (chunk - 1) == 0)  # else the mean is rounded
    np.testing.assert_array_equal(
        shares(local_patterns(z + shift, chunk=chunk, eps=eps)), shares(here)
    )


@given(positions(shortest=8), st.integers(2, 8))
def test_strictly_rising_or_falling_is_monotonic(z, chunk):
    for sign in (1, -1):
        rising = sign * np.cumsum(np.abs(z) + 1.0, axis=-1)
        assert (local_patterns(rising, chunk=chunk, eps=0.2).monotonic == 1).all()


@given(positions(shortest=8))
def test_a_wider_eps_makes_more_constant(z):
    narrow, wide = (local_patterns(z, chunk=4, eps=eps).constant for eps in (0.2, 9.0))
    assert (narrow <= wide).all()


def test_bad_chunks_and_eps_are_refused():
    z = np.zeros((1, 1, 5))
    with pytest.raises(ValueError, match="chunk is 0; it must be 1 to the 5 tokens"):
        local_patterns(z, chunk=0)
    with pytest.raises(ValueError, match="chunk is 6; it must be 1 to the 5 tokens"):
        local_patterns(z, chunk=6)
    with pytest.raises(ValueError, match="eps is nan; it must be 0 or above"):
        local_patterns(z, chunk=2, eps=float("nan"))


def test_correlation_of_known_positions():
    z = np.array([[0, 1, 2, 3], [6, 4, 2, 0], [0, 1, 10, 1000], [0.1, 0.1, 0.1, 0.1]], np.float32)
    pearson, spearman = index_correlation(z)
    np.testing.assert_allclose(spearman[:3], [1, -1, 1])
    np.testing.assert_allclose(pearson[:2], [1, -1])
    assert 0.5 < pearson[2] < 0.9
    assert np.isnan([pearson[3], spearman[3]]).all()
    assert np.isnan(index_correlation(np.zeros((2, 3, 1)))[0]).all()


@given(positions(shortest=3))
def test_correlation_is_scipys(z):
    pearson, spearman = index_correlation(z)
    index = np.arange(z.shape[-1])
    for at in np.ndindex(z.shape[:-1]):
        if z[at].min() == z[at].max():
            assert np.isnan(pearson[at])
            assert np.isnan(spearman[at])
            continue
        wide = z[at].astype(np.float64)
        assert pearson[at] == pytest.approx(scipy.stats.pearsonr(wide, index)[0], abs=1e-12)
        assert spearman[at] == pytest.approx(scipy.stats.spearmanr(wide, index)[0], abs=1e-12)


def test_a_cell_stands_at_the_mean_of_its_tokens():
    cells = np.array([-1, 0, 0, -1, 1, 2, 2, 2, -1])
    z = np.stack([np.arange(9), np.arange(9) ** 2]).astype(np.float32)[None]
    points, index = centroids(z, cells)
    np.testing.assert_allclose(index, [1.5, 4, 6])
    np.testing.assert_allclose(points, [[[1.5, 4, 6], [2.5, 16, 110 / 3]]])


def test_pairs_of_a_table():
    pairs = {name: {*map(tuple, found.T.tolist())} for name, found in table_pairs(2, 3).items()}
    assert pairs == {
        "same_row": {(0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (4, 5)},
        "same_column": {(0, 3), (1, 4), (2, 5)},
        "unrelated": {(0, 4), (0, 5), (1, 3), (1, 5), (2, 3), (2, 4)},
    }


@given(st.integers(2, 6), st.integers(2, 6))
def test_each_pair_of_cells_has_one_relation(rows, columns):
    pairs = np.concatenate([*table_pairs(rows, columns).values()], axis=1).T.tolist()
    n = rows * columns
    assert sorted(map(tuple, pairs)) == [(i, j) for i in range(n) for j in range(i + 1, n)]


def test_distances_are_summed_over_the_pairs():
    points = np.array([[0.0, 1.0, 5.0], [2.0, -2.0, 2.0]])
    pairs = np.array([[0, 1], [1, 2]])
    np.testing.assert_array_equal(distance_sums(points, pairs), [5, 8])
