"""All measures together: the model's own positions, every kind of layer, little memory."""

import dataclasses
import functools
import itertools
import math
import subprocess
import sys

import jax
import numpy as np
import pytest

from repo_jax.analysis import (
    analyse,
    attention_mass,
    labelled,
    needle_prompt,
    read_report,
    table_prompt,
)
from repo_jax.analysis.attention_mass import visible_tokens
from repo_jax.analysis.reading import read_positions
from repo_jax.config import DecoderConfig, PositionConfig
from repo_jax.data import byte_tokenizer
from repo_jax.errors import ConfigError
from repo_jax.evidence.tasks import Reversal
from repo_jax.modeling import RePoLM, capture_positions, init_params
from tests.tiny_runs import ROOT

TEXT = "A table is a list of rows. " * 5
SHAPE = dict(vocab_size=257, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=48)


@functools.cache
def make(*kinds):
    config = DecoderConfig(**SHAPE, init_std=0.2, positions=PositionConfig(layers=kinds))
    model = RePoLM(config)
    return model, init_params(model, jax.random.key(0))


@functools.cache
def analysed(*kinds):
    model, params = make(*kinds)
    options = dict(name="m", needle_length=320, prompts=2, chunk=8, eps=0.1)
    return analyse(model, params, byte_tokenizer(), TEXT, **options)


def test_positions_are_the_models_own():
    model, params = make("rope", "repo", "nope")
    reading, report = analysed("rope", "repo", "nope")
    ids = np.frombuffer(TEXT.encode(), np.uint8).astype(np.int32)
    z = np.asarray(capture_positions(model, params, ids[None]))[0]
    np.testing.assert_array_equal(reading.ids, ids)
    np.testing.assert_allclose(reading.positions, z, rtol=1e-5, atol=1e-5)
    whole = {(row.layer, row.head): row for row in report.ranges if row.tokens == len(ids)}
    for layer, head in np.ndindex(2, 4):
        row = whole[layer, head]
        assert (row.low, row.high) == pytest.approx((z[layer, head].min(), z[layer, head].max()))
        assert row.range == row.high - row.low


def test_rows_are_of_every_layer_head_and_length():
    _, report = analysed("rope", "repo", "nope")
    heads = [(layer, head) for layer in range(2) for head in range(4)]  # none without positions
    at = lambda rows, column: {(row.layer, row.head, getattr(row, column)) for row in rows}
    expected = lambda values: {(*head, value) for head in heads for value in values}
    assert at(report.ranges, "tokens") == expected([16, 32, 64, 128, 135])
    assert at(report.patterns, "chunks") == expected([135 // 8])
    assert at(report.correlations, "tokens") == expected([135])
    relations = ["same_row", "same_column", "unrelated"]
    assert at(report.distances, "relation") == expected(relations)
    parts = ["needle", "query", "rest"]
    all_heads = {(layer, head, part) for layer in range(3) for head in range(4) for part in parts}
    assert at(report.masses, "part") == all_heads
    for name, n in dict(ranges=40, patterns=8, correlations=8, distances=24, masses=36).items():
        assert len(getattr(report, name)) == n
        assert {row.model for row in getattr(report, name)} == {"m"}


def test_a_rope_layer_is_the_index():
    _, report = analysed("rope", "repo", "nope")
    rope = lambda rows: [row for row in rows if row.layer == 0]
    assert all(row.range == row.tokens - 1 and row.outliers == 0 for row in rope(report.ranges))
    assert all(row.monotonic == 1 for row in rope(report.patterns))
    for row in rope(report.correlations):
        assert (row.pearson, row.spearman) == pytest.approx((1, 1))
    for row in rope(report.distances):
        assert row.z_distance == pytest.approx(row.index_distance)
        assert row.z_ratio == pytest.approx(row.index_ratio)
    unrelated, rows, columns = (
        next(row for row in rope(report.distances) if row.relation == relation)
        for relation in ("unrelated", "same_row", "same_column")
    )
    assert (unrelated.z_ratio, unrelated.index_ratio) == (1, 1)
    assert rows.index_ratio < 0.3
    assert columns.index_ratio == pytest.approx(1, abs=0.05)
    # Two tables of 8 rows and 5 columns.
    assert (rows.pairs, columns.pairs, unrelated.pairs) == (2 * 80, 2 * 140, 2 * 560)


def test_distances_are_means_over_all_pairs_of_all_tables():
    model, params = make("rope", "repo", "nope")
    _, report = analysed("rope", "repo", "nope")
    distances = {"same_row": [], "same_column": [], "unrelated": []}
    for seed in (0, 1):
        table = table_prompt(byte_tokenizer(), 8, 5, seed)
        z = read_positions(model, params, table.ids)[1, 3].astype(np.float64)
        index = np.arange(len(z))
        points = [
            (z[table.cells == cell].mean(), index[table.cells == cell].mean()) for cell in range(40)
        ]
        for i, j in itertools.combinations(range(40), 2):
            relation = "same_row" if i // 5 == j // 5 else "unrelated"
            relation = "same_column" if i % 5 == j % 5 else relation
            distances[relation].append(np.abs(np.subtract(points[i], points[j])))
    for row in report.distances:
        if (row.layer, row.head) == (1, 3):
            mean = np.mean(distances[row.relation], 0)
            assert row.pairs == len(distances[row.relation])
            assert (row.z_distance, row.index_distance) == pytest.approx(tuple(mean))
            ratios = tuple(mean / np.mean(distances["unrelated"], 0))
            assert (row.z_ratio, row.index_ratio) == pytest.approx(ratios)


def test_mass_is_per_token_and_the_mean_over_prompts():
    model, params = make("rope", "repo", "nope")
    _, report = analysed("rope", "repo", "nope")
    prompts = [needle_prompt(byte_tokenizer(), 320, seed=seed) for seed in (0, 1)]
    each, seen = [], []
    for p in prompts:
        mass = attention_mass(model, params, p.ids, p.labels, p.queries)
        seen.append(visible_tokens(p.labels, p.queries))
        each.append(mass / seen[-1].astype(np.float32))
    for row in report.masses:
        part = ("needle", "query", "rest").index(row.part)
        assert row.mass == pytest.approx(np.mean(each, 0)[row.layer, row.head, part], rel=1e-5)
        assert row.tokens == pytest.approx(np.mean(seen, 0)[part])
        assert row.prompts == 2
    assert {row.tokens for row in report.masses if row.part == "needle"} == {7.0}


@pytest.mark.parametrize("kind", ["nope", "cope"])
def test_layers_without_positions_have_mass_only(kind):
    reading, report = analysed(*[kind] * 3)
    assert np.isnan(reading.positions).all()
    assert len(report.masses) == 36
    rest = dataclasses.replace(report, masses=())
    assert rest == type(report)()


def test_a_users_own_prompts_take_the_place_of_needles(tmp_path):
    model, params = make("rope", "repo", "nope")
    own = [
        labelled(byte_tokenizer(), "one two three", {"first": [(0, 3)]}, (8, 13)),
        labelled(byte_tokenizer(), "two, three", {"other": [(0, 3)]}, (5, 10)),
    ]
    options = dict(name="m", prompts=0, labelled=own, chunk=4096)
    _, report = analyse(model, params, byte_tokenizer(), TEXT, **options)
    counts = {row.part: (row.tokens, row.prompts) for row in report.masses}
    # Of the rest, a query sees the blank and the queries up to itself: 3 of 5 in the mean.
    assert counts == {"first": (3, 1), "other": (3, 1), "rest": ((5 + 3 + 2 + 3) / 2, 2)}
    # No chunk is whole, and no table was asked for.
    assert report.patterns == report.distances == ()
    report.write(tmp_path)
    assert read_report(tmp_path) == report


def test_a_short_text_is_no_mistake():
    model, params = make("rope", "repo", "nope")
    reading, report = analyse(model, params, byte_tokenizer(), "a", name="m", prompts=0)
    assert reading.positions.shape == (3, 4, 1)
    assert {row.tokens for row in report.ranges} == {1}
    assert {(row.pearson, row.spearman) for row in report.correlations} == {(None, None)}
    assert report.patterns == report.masses == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(chunk=0), "chunk is 0; it must be 1 or above"),
        (dict(eps=-1.0), "eps is -1.0; it must be 0 or above"),
        (dict(eps=math.nan), "eps is nan; it must be 0 or above"),
        (dict(prompts=-1), "prompts is -1; it must be 0 or above"),
        (dict(needle_length=20), "a needle prompt of 20 tokens is asked for; without filler it"),
    ],
)
def test_mistakes_are_told_before_anything_is_read(options, message):
    model, _ = make("rope", "repo", "nope")
    with pytest.raises(ConfigError, match=message):
        analyse(model, None, byte_tokenizer(), TEXT, name="m", **options)


def test_a_tokenizer_that_cannot_write_the_prompts_is_told():
    """It would read nothing but unknown words, of which no measure says anything."""
    model, params = make("rope", "repo", "nope")
    letters = Reversal().tokenizer()
    with pytest.raises(ConfigError, match=r"prompts is 1; it must be 0, .* no token for 'Some'"):
        analyse(model, params, letters, "a b", name="m", prompts=1)
    with pytest.raises(ConfigError, match="it must be 0"):
        analyse(model, params, letters, "a b", name="m", prompts=1, labelled=[None])
    assert analyse(model, params, letters, "a b", name="m", prompts=0)[1].ranges


@pytest.mark.parametrize(
    ("kind", "message"),
    [("repo", "positions in layer 0 that are not finite"), ("nope", "attention that is not a fin")],
)
def test_broken_weights_are_told(kind, message):
    model, params = make(*[kind] * 3)
    params = jax.tree.map(lambda x: x * np.nan, params)
    with pytest.raises(ConfigError, match=f"the model m gives {message}"):
        analyse(model, params, byte_tokenizer(), TEXT, name="m", needle_length=320, prompts=1)


MEASURE = """
import random, re
from pathlib import Path

import jax

from repo_jax.analysis import analyse
from repo_jax.analysis.reading import read_positions
from repo_jax.config import DecoderConfig, PositionConfig
from repo_jax.data import byte_tokenizer
from repo_jax.modeling import RePoLM, init_params

config = DecoderConfig(vocab_size=8192, d_model=512, n_layers=8, n_heads=8, d_ff=2048)
model = RePoLM(config)
params = init_params(model, jax.random.key(0))
text = "".join(random.Random(0).choices("abcdefgh \\n", k=16_384))
options = dict(needle_length=512, prompts=1)
reading, report = analyse(model, params, byte_tokenizer(), text, name="m", **options)
assert reading.positions.shape == (8, 8, 16_384)
assert max(row.tokens for row in report.ranges) == 16_384
# Not ru_maxrss, which begins with the peak of the process that started this one.
kib = re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]
print(int(kib) / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_sixteen_thousand_tokens_are_analysed_within_four_gibibytes():
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    # One matrix of all pairs of tokens, float32, would add 1 GiB, and each head has one.
    assert float(done.stdout) < 1.75
