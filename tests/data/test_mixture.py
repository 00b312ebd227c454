"""Mixtures: exact proportions at every moment, epochs of each source, what a run is told."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repo_jax.config import DataConfig, SourceConfig
from repo_jax.data import Mixture, TrainingBatches, mixture, open_data
from repo_jax.errors import ConfigError

T = 4


def places(weights, count):
    """Sources, and numbers within them, of the first `count` places: int [count] each."""
    mixed = Mixture(weights)
    return np.array([mixed[place] for place in range(count)]).T


@given(weights=st.lists(st.integers(1, 60), min_size=1, max_size=9), scale=st.integers(1, 7))
def test_no_source_is_ever_a_whole_window_away_from_its_share(weights, scale):
    total = sum(weights)
    sources, _ = places([weight * scale / 10 for weight in weights], 2 * total + 7)
    n = np.arange(1, len(sources) + 1)
    for source, weight in enumerate(weights):
        count = np.cumsum(sources == source)
        assert np.all(np.abs(count * total - n * weight) < total)


@given(weights=st.lists(st.floats(0.05, 20), min_size=2, max_size=5))
def test_weights_without_a_short_period_are_rounded_and_then_kept_to(weights):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture, "_LONGEST_PERIOD", 500)
        shares = Mixture(weights).shares
        sources, _ = places(weights, 1500)
    n = np.arange(1, len(sources) + 1)
    for source, (share, weight) in enumerate(zip(shares, weights, strict=True)):
        assert share == pytest.approx(weight / sum(weights), abs=len(weights) / 500)
        count = np.cumsum(sources == source)
        assert np.all(np.abs(count - n * share) < 1)


@given(weights=st.lists(st.integers(1, 9), min_size=1, max_size=5), count=st.integers(1, 200))
def test_the_windows_of_a_source_are_taken_one_after_the_other(weights, count):
    sources, numbers = places(weights, count)
    for source in range(len(weights)):
        taken = numbers[sources == source]
        assert taken.tolist() == list(range(len(taken)))


def test_a_tiny_weight_is_not_lost():
    shares = Mixture([1e9, 1.0]).shares
    assert shares[1] > 0
    assert sum(shares) == pytest.approx(1)


@pytest.fixture
def config(tmp_path):
    """Sources a, b and c of 6, 3 and 20 windows, in 2, 1 and 1 files; weights 1, 2 and 1."""
    for name, start, windows in (("a1", 0, 4), ("a2", 4, 2), ("b", 6, 3), ("c", 9, 20)):
        ids = np.arange(start * T, (start + windows) * T, dtype="<u4")
        ids.tofile(tmp_path / f"{name}.npy")
    source = lambda name, weight: SourceConfig(tokens=str(tmp_path / name), weight=weight)
    return DataConfig(
        sources={"a": source("a*.npy", 1), "b": source("b.npy", 2.0), "c": source("c.npy", 1)},
        validation_fraction=0.0,
        sequence_length=T,
        batch_size=8,
    )


def read(batches, steps):
    """Windows, by their numbers over all files, and sources of some steps, in order."""
    read = [batches.at(step) for step in range(steps)]
    windows = np.concatenate([batch["tokens"][:, 0] // T for batch in read])
    return windows, np.concatenate([batch["source"] for batch in read])


def test_each_row_names_its_source_and_small_sources_repeat(config):
    data = open_data(config)
    assert data.source_names == ("a", "b", "c")
    batches = data.training_batches()
    assert batches.at(0)["source"].dtype == np.int32
    windows, sources = read(batches, 30)
    assert np.array_equal(sources, np.searchsorted([6, 9, 29], windows, side="right"))
    assert np.bincount(sources).tolist() == [60, 120, 60]
    for source, (start, stop) in enumerate([(0, 6), (6, 9), (9, 29)]):
        epochs = windows[sources == source].reshape(-1, stop - start)
        assert all(sorted(epoch) == list(range(start, stop)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1


def test_the_seed_moves_windows_but_not_sources(config):
    seeded = [
        read(open_data(DataConfig(**{**vars(config), "seed": seed})).training_batches(), 8)
        for seed in (0, 1)
    ]
    (windows, sources), (other_windows, other_sources) = seeded
    assert np.array_equal(sources, other_sources)
    assert not np.array_equal(windows, other_windows)


def test_sources_of_one_size_do_not_go_in_step():
    tokens = [np.arange(k * 50 * T, (k + 1) * 50 * T) for k in range(2)]
    batches = TrainingBatches(
        tokens, sequence_length=T, batch_size=100, mixture=Mixture([1, 1]), source_of=(0, 1)
    )
    windows, sources = read(batches, 1)
    assert not np.array_equal(windows[sources == 0], windows[sources == 1] - 50)


def test_without_weights_each_source_has_its_share_of_the_windows(config):
    sources = {name: SourceConfig(tokens=source.tokens) for name, source in config.sources.items()}
    data = open_data(DataConfig(**{**vars(config), "sources": sources, "batch_size": 29}))
    windows, _ = read(data.training_batches(), 1)
    assert sorted(windows) == list(range(29))


def test_what_a_run_is_told_of_its_sources(config):
    assert open_data(config).describe(steps=30) == [
        "a: 24 tokens in 6 windows, 25 % of the run, 10 epochs",
        "b: 12 tokens in 3 windows, 50 % of the run, 40 epochs",
        "c: 80 tokens in 20 windows, 25 % of the run, 3 epochs",
    ]
    alone = DataConfig(tokens=config.sources["c"].tokens, sequence_length=T, batch_size=5)
    (line,) = open_data(alone).describe(steps=19)
    assert line == "data: 76 tokens in 19 windows, 100 % of the run, 5 epochs"


def test_text_and_tokens_mix_with_what_each_holds_out(config, tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text(f"document {i} " * 5)
    mixed = DataConfig(
        sources={
            "text": SourceConfig(text=str(tmp_path / "text")),
            "c": SourceConfig(tokens=config.sources["c"].tokens),
        },
        cache_dir=str(tmp_path / "cache"),
        validation_fraction=0.3,
        sequence_length=T,
        batch_size=4,
    )
    data = open_data(mixed)
    assert data.source_of == (0, 1)
    assert data.tokenizer.decode(data.train[0]).startswith("document")
    assert [len(array) for array in data.train[1:]] == [14 * T]
    assert len(data.validation) == 2


def test_the_fingerprint_knows_names_and_weights(config):
    def fingerprint(sources):
        return open_data(DataConfig(**{**vars(config), "sources": sources})).fingerprint

    (a, source_a), *others = config.sources.items()
    heavier = SourceConfig(tokens=source_a.tokens, weight=3)
    variants = [
        config.sources,
        dict([(a, heavier), *others]),
        dict([("renamed", source_a), *others]),
        dict(others),
        dict([*others, (a, source_a)]),
    ]
    assert fingerprint(dict(config.sources)) == fingerprint(config.sources)
    assert len({fingerprint(variant) for variant in variants}) == len(variants)


def test_sources_that_are_refused(config, tmp_path):
    def refused(message, sources, **options):
        with pytest.raises(ConfigError, match=message):
            open_data(DataConfig(sources=sources, **options))

    tokens = config.sources["a"].tokens
    refused("data.sources.x must have one of text and tokens", {"x": SourceConfig()})
    refused(
        "data.sources.x must have one of text and tokens",
        {"x": SourceConfig(text="a", tokens="b")},
    )
    for weight in (0, -1.0, float("inf"), float("nan")):
        refused(
            rf"data\.sources\.x\.weight is {weight}; it must be positive",
            {"x": SourceConfig(tokens=tokens, weight=weight)},
        )
    refused(
        "data.sources.y has no weight and data.sources.x has one",
        {"x": SourceConfig(tokens=tokens, weight=1), "y": SourceConfig(tokens=tokens)},
    )
    refused("data.tokens and data.sources are given; give one", config.sources, tokens="a")
    refused("bpe:300, which would", {"x": SourceConfig(text="a")}, tokenizer="bpe:300")
    np.zeros(3, "<u4").tofile(tmp_path / "short.npy")
    sources = {**config.sources, "x": SourceConfig(tokens=str(tmp_path / "short.npy"), weight=1)}
    refused("data.sources.x has no window of sequence_length 4", sources, sequence_length=T)


def test_a_mixture_goes_on_wherever_it_is_asked(config):
    batches = open_data(config).training_batches()
    stream = batches.iterate(5)
    for step, batch in zip(range(5, 9), itertools.islice(stream, 4), strict=True):
        for name, value in batch.items():
            assert np.array_equal(value, batches.at(step)[name])
    stream.close()
