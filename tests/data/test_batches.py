"""Batches: windows, the order, resuming, segment ids, validity."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repo_jax.data import Mixture, TrainingBatches, ValidationBatches, segment_ids, trim_tokens
from repo_jax.errors import ConfigError

T, B = 4, 5

# Windows of steps 0 and 3 where an epoch is one batch of ten.
ORDER_OF_SEED_7 = [7, 9, 0, 8, 4, 2, 5, 6, 3, 1, 3, 8, 7, 5, 1, 2, 6, 0, 9, 4]


def files(*lengths):
    """Arrays whose ids all differ, so that a window tells where it comes from."""
    ends = np.cumsum(lengths)
    return [np.arange(end - n, end, dtype=np.uint32) for n, end in zip(lengths, ends, strict=True)]


def training(tokens, **changes):
    return TrainingBatches(tokens, **{"sequence_length": T, "batch_size": B, **changes})


def starts(batches, steps):
    """First ids of the windows of some steps, in order."""
    return np.concatenate([batches.at(step)["tokens"][:, 0] for step in steps])


def test_windows_do_not_overlap_nor_reach_across_files():
    batches = training(files(4 * T + 3, T - 1, 7 * T))
    tokens = np.concatenate([batches.at(step)["tokens"] for step in range(11)])
    assert tokens.dtype == np.int32
    assert batches.at(0)["tokens"].shape == (B, T)
    assert np.array_equal(tokens, tokens[:, :1] + np.arange(T))
    first, third = range(0, 4 * T, T), range(5 * T + 2, 12 * T + 2, T)
    assert sorted(tokens[:11, 0]) == [*first, *third]


def test_every_epoch_has_all_windows_in_an_order_of_its_own():
    order = starts(training(files(20 * T)), range(12))
    epochs = order.reshape(3, 20)
    for epoch in epochs:
        assert sorted(epoch) == list(range(0, 20 * T, T))
    assert len({tuple(epoch) for epoch in epochs} | {tuple(sorted(epochs[0]))}) == 4


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), steps=st.lists(st.integers(0, 10**6), min_size=1, max_size=5))
def test_a_batch_depends_on_seed_and_step_alone(seed, steps):
    tokens = files(33 * T)
    batches = training(tokens, seed=seed)
    for step in steps:
        fresh = training(tokens, seed=seed).at(step)["tokens"]
        assert np.array_equal(batches.at(step)["tokens"], fresh)


def test_seeds_give_different_orders():
    tokens = files(50 * T)
    orders = {tuple(starts(training(tokens, seed=seed), range(10))) for seed in range(4)}
    assert len(orders) == 4


def test_the_order_is_the_same_in_every_release():
    # A run that is continued with a newer grain must see the data it would have seen.
    order = starts(training(files(10 * T), seed=7, batch_size=10), [0, 3]) // T
    assert order.tolist() == ORDER_OF_SEED_7


@pytest.mark.parametrize("prefetch", [1, 3])
@pytest.mark.parametrize("start", [0, 1, 6])
def test_iterating_from_any_step_gives_the_batches_of_these_steps(start, prefetch):
    batches = training(files(13 * T), seed=3, prefetch=prefetch)
    stream = batches.iterate(start)
    for step in range(start, start + 7):
        assert np.array_equal(next(stream)["tokens"], batches.at(step)["tokens"])
    stream.close()


def test_closing_stops_the_threads():
    before = set(threading.enumerate())
    stream = training(files(13 * T)).iterate()
    next(stream)
    assert set(threading.enumerate()) - before
    stream.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=10)
    assert not set(threading.enumerate()) - before


def test_a_process_can_read_its_rows_only():
    tokens = files(13 * T)
    whole = training(tokens, document_mask=True, eos_id=3).at(4)
    part = training(tokens, document_mask=True, eos_id=3, rows=slice(2, 4)).at(4)
    for name in ("tokens", "segment_ids"):
        assert np.array_equal(part[name], whole[name][2:4])


@settings(max_examples=8)
@given(
    processes=st.sampled_from([1, 2, 8]),
    resumed_with=st.sampled_from([1, 2, 8]),
    step=st.integers(0, 10**4),
    seed=st.integers(0, 100),
)
def test_any_number_of_processes_reads_the_same_global_batches(processes, resumed_with, step, seed):
    tokens = files(13 * T, 9 * T)
    options = dict(batch_size=16, seed=seed, mixture=Mixture([2, 1]), source_of=(0, 1))
    whole = training(tokens, **options)

    def globally(step, count):
        # A process need not hold neighbouring rows.
        rows = [np.arange(process, 16, count) for process in range(count)]
        parts = [training(tokens, rows=part, **options).at(step) for part in rows]
        return {
            name: np.concatenate([part[name] for part in parts])[np.argsort(np.concatenate(rows))]
            for name in parts[0]
        }

    for at, count in ((step, processes), (step + 1, resumed_with)):
        batch = globally(at, count)
        assert batch.keys() == {"tokens", "source"}
        for name, value in whole.at(at).items():
            assert np.array_equal(batch[name], value)


def test_too_few_windows_for_a_batch():
    message = r"has 4 windows of sequence_length 4 \(22 tokens\); batch_size is 5"
    with pytest.raises(ConfigError, match=message):
        training(files(19, 3))
    assert training(files(19, 4)).at(0)["tokens"].shape == (B, T)


@pytest.mark.parametrize("iterate", [False, True])
def test_an_id_beyond_the_vocabulary_names_the_file(tmp_path, iterate):
    np.zeros(10 * T, "<u4").tofile(tmp_path / "good.bin")
    tokens = np.zeros(10 * T, "<u4")
    tokens[17] = 2**31 + 5  # Negative if it is taken for an int32.
    tokens.tofile(tmp_path / "bad.bin")
    arrays = [np.memmap(tmp_path / name, "<u4", mode="r") for name in ("good.bin", "bad.bin")]
    batches = training(arrays, vocab_size=100, batch_size=20)
    with pytest.raises(ConfigError, match=r"bad\.bin has the token id 2147483653; .* 100 entries"):
        next(batches.iterate()) if iterate else batches.at(0)
    assert training(arrays[:1], vocab_size=1).at(0)["tokens"].max() == 0


def test_eos_belongs_to_the_document_it_ends():
    tokens = np.array([[5, 9, 6, 7, 9, 9], [9, 5, 5, 5, 5, 9], [1, 2, 3, 4, 5, 6]])
    expected = [[1, 1, 2, 2, 2, 3], [1, 2, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1]]
    ids = segment_ids(tokens, eos_id=9)
    assert ids.dtype == np.int32
    assert ids.tolist() == expected


def test_batches_have_segment_ids_only_with_a_document_mask():
    tokens = [np.tile([1, 2, 9], 20)]
    assert training(tokens, eos_id=9).at(0).keys() == {"tokens"}
    batch = training(tokens, document_mask=True, eos_id=9).at(0)
    assert np.array_equal(batch["segment_ids"], segment_ids(batch["tokens"], 9))
    for kind in (TrainingBatches, ValidationBatches):
        with pytest.raises(ConfigError, match="document_mask needs eos_id"):
            kind(tokens, sequence_length=T, batch_size=B, document_mask=True)


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    length=st.integers(2, 9),
    batch_size=st.integers(1, 7),
)
def test_validation_has_every_window_once_in_order(lengths, length, batch_size):
    tokens = files(*lengths)
    expected = [a[i : i + length] for a in tokens for i in range(0, len(a) - length + 1, length)]
    options = {"sequence_length": length, "batch_size": batch_size}
    if not expected:
        with pytest.raises(ConfigError, match=f"no window of sequence_length {length}: it has"):
            ValidationBatches(tokens, **options)
        return
    batches = ValidationBatches(tokens, **options)
    for _ in range(2):
        found = list(batches)
        assert len(found) == len(batches)
        assert all(batch["tokens"].shape == (batch_size, length) for batch in found)
        rows = np.concatenate([batch["tokens"][batch["valid"]] for batch in found])
        assert np.array_equal(rows, expected)
        assert batches.windows == len(expected)


def test_rows_that_fill_the_last_batch_are_zero_and_invalid():
    options = {"sequence_length": T, "batch_size": 2, "document_mask": True, "eos_id": 9}
    first, last = ValidationBatches([np.full(3 * T, 9)], **options)
    assert first["valid"].tolist() == [True, True]
    assert last["valid"].tolist() == [True, False]
    assert last["valid"].dtype == bool
    assert not last["tokens"][1].any()
    assert not last["segment_ids"][1].any()
    assert last["segment_ids"].dtype == last["tokens"].dtype == np.int32


def test_max_windows_are_spread_over_all_of_them():
    options = {"sequence_length": T, "batch_size": 3}
    (batch,) = ValidationBatches(files(9 * T + 1, T, T), max_windows=3, **options)
    assert (batch["tokens"][:, 0] // T).tolist() == [0, 3, 7]
    assert ValidationBatches(files(2 * T), max_windows=3, **options).windows == 2


def test_validation_checks_ids_too():
    batches = ValidationBatches(files(T), sequence_length=T, batch_size=1, vocab_size=T - 1)
    with pytest.raises(ConfigError, match="the data has the token id 3; the vocabulary has 3"):
        list(batches)


def test_trimmed_tokens_are_the_same_for_windows_of_all_lengths():
    tokens = trim_tokens(files(19, 3, 40), multiple=8, max_tokens=50)
    assert [len(array) for array in tokens] == [16, 32]
    for length in (2, 4, 8):
        rows = ValidationBatches(tokens, sequence_length=length, batch_size=1)
        seen = np.concatenate([batch["tokens"].ravel() for batch in rows])
        assert np.array_equal(seen, [*range(16), *range(22, 54)])
