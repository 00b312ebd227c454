"""Loss by distance: against the definition, and against the perplexity of the same tokens."""

import csv
import functools
import json

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repo_jax.config import DecoderConfig
from repo_jax.evaluation import command
from repo_jax.evaluation.by_position import score_by_position, split_documents, windows
from repo_jax.evaluation.perplexity import score
from repo_jax.modeling import RePoLM, init_params
from tests.tiny_runs import make_run, parse, write_config

VOCAB = 32


@pytest.fixture(scope="module")
def made():
    config = DecoderConfig(
        vocab_size=VOCAB, d_model=16, n_layers=2, n_heads=2, d_ff=24, init_std=0.3
    )
    return RePoLM(config), init_params(RePoLM(config), jax.random.key(0))


def documents_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, n) for n in lengths]


def losses_of(model, params, tokens):
    """Of all these tokens but the first, each after those before it."""
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(tokens)] = tokens
    logits = np.asarray(_apply(model, params, padded)[0, : len(tokens) - 1], np.float64)
    normal = np.log(np.exp(logits).sum(-1))
    return normal - logits[np.arange(len(tokens) - 1), tokens[1:]]


@functools.partial(jax.jit, static_argnums=0)
def _apply(model, params, tokens):
    return model.apply({"params": params}, tokens).logits


@given(length=st.integers(2, 80), context=st.integers(1, 40), stride=st.integers(1, 40))
def test_windows_predict_every_token_once_with_enough_context(length, context, stride):
    stride = min(stride, context)
    predicted = []
    for start, first, end in windows(length, context, stride):
        assert start < first < end <= length
        assert end - 1 - start <= context
        predicted += range(first, end)
        assert first - start >= min(first, context - stride + 1)
    assert predicted == list(range(1, length))


@pytest.mark.parametrize(("context", "stride"), [(64, None), (8, 8), (8, 3), (5, 1)])
def test_bins_are_the_definition(made, context, stride):
    documents = documents_of([40, 2, 17])
    expected: dict[int, list[float]] = {}
    for document in documents:
        for start, first, end in windows(len(document), context, stride or context // 2):
            losses = losses_of(*made, document[start:end])
            for at in range(first, end):
                expected.setdefault(at.bit_length() - 1, []).append(losses[at - start - 1])
    lengths = np.arange(VOCAB) % 3 + 1
    options = dict(context_length=context, stride=stride, batch_tokens=64, byte_lengths=lengths)
    bins = score_by_position(*made, documents, **options)
    assert [(b.first, b.last) for b in bins] == [(2**i, 2 ** (i + 1) - 1) for i in range(6)]
    for i, b in enumerate(bins):
        assert b.tokens == len(expected[i])
        assert b.documents == sum(len(d) > b.first for d in documents)
        np.testing.assert_allclose(b.loss, np.mean(expected[i]), rtol=1e-5)
        n_bytes = sum(lengths[d[b.first : b.last + 1]].sum() for d in documents)
        np.testing.assert_allclose(
            b.bits_per_byte, sum(expected[i]) / np.log(2) / n_bytes, rtol=1e-5
        )
        assert (b.low is None) == (b.documents == 1)
        assert b.low is None or b.low <= b.loss <= b.high


def test_bins_add_up_to_the_perplexity_of_whole_documents(made):
    lengths = [40, 2, 17, 5]
    documents = documents_of(lengths)
    bins = score_by_position(*made, documents, context_length=64)
    fill = lambda x: np.pad(x, (0, 64 - sum(lengths))).astype(np.int32)[None]
    row, segments = fill(np.concatenate(documents)), fill(np.repeat([1, 2, 3, 4], lengths))
    whole = score(*made, [{"tokens": row, "segment_ids": segments, "valid": np.array([True])}])
    assert sum(b.tokens for b in bins) == whole.targets
    np.testing.assert_allclose(sum(b.loss * b.tokens for b in bins), whole.nll, rtol=1e-5)


def test_alike_documents_leave_no_doubt_and_others_do(made):
    (document,) = documents_of([30])
    for b in score_by_position(*made, [document] * 4, context_length=32):
        np.testing.assert_allclose([b.low, b.high], b.loss, rtol=1e-6)
    widths = [
        b.high - b.low for b in score_by_position(*made, documents_of([30] * 4), context_length=32)
    ]
    assert min(widths) > 1e-3


def test_documents_end_with_eos():
    pieces = [np.array([1, 2, 0, 3, 0, 4, 5, 6]), np.array([7, 8, 9])]
    parts = lambda *args: [d.tolist() for d in split_documents(pieces, *args)]
    assert parts(0) == [[1, 2, 0], [3, 0], [4, 5, 6], [7, 8, 9]]
    assert parts(None) == [[1, 2, 0, 3, 0, 4, 5, 6], [7, 8, 9]]
    assert parts(0, 7) == [[1, 2, 0], [3, 0], [4, 5]]
    cut = split_documents(pieces, 0, cut=True)
    assert [d.tolist() for d in cut] == [[3, 0], [4, 5, 6]]


def test_wrong_arguments_are_named(made):
    with pytest.raises(ValueError, match=r"stride is 9; it must be 1 to context_length \(8\)"):
        score_by_position(*made, documents_of([4]), context_length=8, stride=9)
    with pytest.raises(ValueError, match="documents is empty"):
        score_by_position(*made, [], context_length=8)


def test_the_command_writes_table_and_plots(tmp_path, capsys):
    config = parse(write_config(tmp_path))
    make_run(tmp_path / "run", config)
    options = ["--run", str(tmp_path / "run"), "--by_position", "true"]
    command.main([*options, "--context_lengths", "[8, 32]", "--stride", "4"])
    folder = tmp_path / "run" / "evaluation"
    report = json.loads((folder / "by_position.json").read_text())
    assert (report["step"], report["stride"]) == (0, 4)
    rows = report["results"]
    with (folder / "by_position.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [int(line["tokens"]) for line in lines] == [row["tokens"] for row in rows]
    assert {row["context_length"] for row in rows} == {8, 32}
    assert all(row["bits_per_byte"] > 0 for row in rows)
    table = capsys.readouterr().out.splitlines()
    assert len(table) == len(rows) + 1
    assert (folder / "by_position.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (folder / "by_position.svg").read_text()
