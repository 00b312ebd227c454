"""The repetition filter: which windows lose their loss, and that they keep their place."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repo_jax.config import DataConfig
from repo_jax.data import TrainingBatches, open_data, repeats
from repo_jax.errors import ConfigError


def repeats_by_definition(tokens, count, max_period):
    """Whether somewhere the same p tokens are written `count` times in a row."""
    return any(
        tokens[start : start + count * p] == tokens[start : start + p] * count
        for p in range(1, max_period + 1)
        for start in range(len(tokens) - count * p + 1)
    )


@given(
    rows=st.integers(0, 60).flatmap(
        lambda T: st.lists(st.lists(st.integers(0, 1), min_size=T, max_size=T), min_size=1)
    ),
    count=st.integers(2, 6),
    max_period=st.integers(1, 5),
)
def test_it_finds_what_its_definition_says(rows, count, max_period):
    expected = [repeats_by_definition(row, count, max_period) for row in rows]
    assert repeats(np.array(rows, np.int32), count, max_period).tolist() == expected


@given(period=st.integers(1, 14), missing=st.integers(0, 1), data=st.data())
def test_32_copies_of_up_to_13_tokens_count_and_31_do_not(period, missing, data):
    tokens = np.arange(1000, 1600, dtype=np.int32)[None]
    size = 32 * period - missing
    start = data.draw(st.integers(0, 600 - size))
    tokens[0, start : start + size] = np.arange(size) % period
    assert repeats(tokens, 32).tolist() == [period <= 13 and not missing]


def test_rows_keep_their_place_and_only_those_without_loss_are_marked(tmp_path):
    windows = np.arange(4 * 64, dtype="<u4").reshape(4, 64)
    windows[2, 10:42] = 7
    windows.tofile(tmp_path / "a.npy")
    options = dict(sequence_length=64, batch_size=4, validation_fraction=0.0)
    config = DataConfig(tokens=str(tmp_path / "a.npy"), repetition_filter=32, **options)
    batch = open_data(config).training_batches().at(0)
    plain = TrainingBatches([windows.ravel()], sequence_length=64, batch_size=4).at(0)
    assert plain.keys() == {"tokens"}
    assert np.array_equal(batch["tokens"], plain["tokens"])
    assert batch["valid"].dtype == bool
    assert batch["valid"].tolist() == [row[0] != 128 for row in batch["tokens"]]
    assert batch["valid"].sum() == 3


def test_a_filter_of_less_than_two_copies_is_refused():
    with pytest.raises(ConfigError, match=r"data\.repetition_filter is 1; it must be at least 2"):
        DataConfig(tokens="a", repetition_filter=1)
