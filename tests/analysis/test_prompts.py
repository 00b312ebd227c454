"""Prompts: parts are where their characters are, whatever the tokenizer."""

import functools
import json
import re

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from repo_jax.analysis.prompts import labelled, needle_prompt, read_labelled, table_prompt
from repo_jax.data import Tokenizer, byte_tokenizer, train_bpe
from repo_jax.errors import ConfigError

CODE = [
    "def f(x):\n    return [x | 1 for x in range(10)]\n" * 9,
    "import os, re\nthe_code = 71\n" * 9,
]


@functools.cache
def tokenizer(name):
    if name == "bytes":
        return byte_tokenizer()
    if name == "code":
        return train_bpe(CODE, 340)
    # Merges across words: tokens such as "y is 9" have characters of two parts.
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    texts = [needle_prompt(byte_tokenizer(), 600, seed=i).text for i in range(100, 130)]
    backend.train_from_iterator(texts, trainer)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(backend, backend.token_to_id("<|endoftext|>"))


all_tokenizers = pytest.mark.parametrize("name", ["bytes", "code", "across-words"])


def characters(name, text, chosen):
    """Those of the chosen tokens, in order."""
    spans = tokenizer(name).encode_with_spans(text)[1][chosen]
    return "".join(text[start:end] for start, end in spans)


@all_tokenizers
@settings(max_examples=12)
@given(
    length=st.integers(300, 900), kind=st.sampled_from(["single", "multikey"]), seed=st.integers(0)
)
def test_a_needle_prompt_has_its_parts_where_they_are(name, length, kind, seed):
    length += 200 * (kind == "multikey")
    prompt = needle_prompt(tokenizer(name), length, kind=kind, seed=seed)
    ids, _ = tokenizer(name).encode_with_spans(prompt.text)
    np.testing.assert_array_equal(prompt.ids, ids)
    # Another sentence of 40 to 80 characters did not fit.
    assert length - 80 < len(ids) <= length
    assert prompt.names == ("needle", "query", "rest")
    assert prompt.labels.shape == prompt.queries.shape == ids.shape
    answer = prompt.text.rsplit(" ", 1)[1]
    assert len(answer) == 7
    assert prompt.text.count(answer) == 2
    needle, query, rest = (
        characters(name, prompt.text, prompt.labels == part) for part in range(3)
    )
    if name == "across-words":  # "y is 7" and "9.\nThe" are of the rest
        digits = re.sub(r"\D", "", needle)
        assert digits in answer
        assert len(digits) >= 3
    else:
        assert needle.strip() == answer
        assert query.strip().startswith("Question: what is the code of the")
        assert query.endswith("is")
        assert characters(name, prompt.text, prompt.queries).strip() == answer
    key = prompt.text.rsplit(" ", 3)[1]
    hidden = f"The code of the {key} is {answer}."
    assert prompt.text.count(hidden) == 1
    assert prompt.text.count("\nThe code of the ") == {"single": 1, "multikey": 4}[kind]
    assert len(rest) > 100
    # The queries are the last tokens, after the needle and the question.
    assert prompt.queries[-1]
    assert np.flatnonzero(prompt.queries)[0] > np.flatnonzero(prompt.labels < 2)[-1]


def test_a_needle_prompt_depends_on_its_arguments_alone():
    make = lambda seed, kind="single": needle_prompt(byte_tokenizer(), 900, kind=kind, seed=seed)
    assert make(3).text == make(3).text
    assert len({make(3).text, make(4).text, make(3, "multikey").text}) == 3


def test_needles_lie_at_many_depths():
    depths = [
        np.flatnonzero(needle_prompt(byte_tokenizer(), 2000, seed=seed).labels == 0)[0] / 2000
        for seed in range(40)
    ]
    assert min(depths) < 0.2
    assert max(depths) > 0.75
    assert 0.3 < np.mean(depths) < 0.7


def test_too_short_a_needle_prompt_is_refused():
    with pytest.raises(
        ConfigError, match=r"prompt of 50 tokens is asked for; without filler it ha"
    ):
        needle_prompt(byte_tokenizer(), 50)


@all_tokenizers
@settings(max_examples=10)
@given(rows=st.integers(2, 6), columns=st.integers(2, 7), seed=st.integers(0))
def test_cells_of_a_table_have_their_tokens(name, rows, columns, seed):
    if name == "across-words":
        rows = columns = 2
    table = table_prompt(tokenizer(name), rows, columns, seed)
    header, *lines = [line.split(" | ") for line in table.text.split("\n")]
    assert len(set(header)) == columns
    assert (table.rows, table.columns) == (rows, columns)
    assert {len(line) for line in lines} == {columns}
    assert len(lines) == rows
    for cell in range(rows * columns):
        found = characters(name, table.text, table.cells == cell).strip(" \n")
        value = lines[cell // columns][cell % columns]
        # Tokens that reach into another cell are of neither.
        assert found == value or (name == "across-words" and found in value)
    before = characters(name, table.text, table.cells == -1)
    assert before.startswith(" | ".join(header))
    assert table.text == table_prompt(tokenizer(name), rows, columns, seed).text


def test_a_table_needs_two_rows_and_columns():
    with pytest.raises(ConfigError, match="a table has 3 rows and 1 columns; it needs 2 of each"):
        table_prompt(byte_tokenizer(), 3, 1)


TEXT = "naïve 🎉 x=12; x?12"


def test_spans_are_characters_and_all_tokens_of_one_belong_to_it():
    prompt = labelled(byte_tokenizer(), TEXT, {"party": [(6, 7)], "code": [(10, 12)]}, (16, 18))
    assert prompt.names == ("party", "code", "rest")
    assert bytes(prompt.ids[prompt.labels == 0].tolist()).decode() == "🎉"
    assert bytes(prompt.ids[prompt.labels == 1].tolist()) == b"12"
    assert np.flatnonzero(prompt.queries).tolist() == [len(prompt.ids) - 2, len(prompt.ids) - 1]
    assert (prompt.labels[prompt.queries] == 2).all()


def test_a_token_of_two_parts_belongs_to_the_one_with_more_of_it():
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"abcde": 0, "fg": 1, " ": 2, "<|endoftext|>": 3}, "fg")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "isolated")
    words = Tokenizer(backend, 3)
    of = lambda spans, queries: labelled(words, "abcde fg abcde", spans, queries)
    both = {"a": [(0, 2), (6, 8)], "b": [(2, 5)]}
    assert of(both, (9, 14)).labels.tolist() == [1, 2, 0, 2, 2]
    assert of({"a": [(0, 3)]}, (9, 14)).labels.tolist() == [0, 1, 1, 1, 1]
    assert of({"a": [(6, 7)]}, (9, 14)).labels.tolist() == [1, 1, 0, 1, 1]  # half is enough
    assert of({"all": [(0, 14)]}, (9, 14)).names == ("all",)
    with pytest.raises(ConfigError, match="part 'a' has no token of its own"):
        of({"a": [(0, 2)]}, (9, 14))
    with pytest.raises(ConfigError, match=r"queries has the span \[9, 11\], which has no token"):
        of({"a": [(0, 5)]}, (9, 11))


WRONG = {
    "{}": "must be a list of at least one object",
    "[]": "must be a list of at least one object",
    "[": "is not JSON",
    "[3]": "prompt 0 .from 0.: it must be an object with text, parts and queries",
    '[{"text": "abc"}]': "it must be an object with text, parts and queries",
    '[{"text": 3, "parts": {"a": [[0, 1]]}, "queries": [1, 2]}]': "text is 3; it must be a string",
    '[{"text": "abc", "parts": {}, "queries": [1, 2]}]': "parts is {}; it must be an object",
    '[{"text": "abc", "parts": {"a": [0, 1]}, "queries": [1, 2]}]': "must be a list of spans",
    '[{"text": "abc", "parts": {"a": [[0, 1.5]]}, "queries": [1, 2]}]': "must be a list of spans",
    '[{"text": "abc", "parts": {"a": [[0, 1]]}, "queries": 2}]': "queries is 2; it must be a span",
    '[{"text": "abc", "parts": {"a": [[0, 4]]}, "queries": [1, 2]}]': (
        r"part 'a' has the span \[0, 4\]; it must be \[first, one past the last\] within the 3 char"
    ),
    '[{"text": "abc", "parts": {"a": [[1, 1]]}, "queries": [1, 2]}]': r"'a' has the span \[1, 1\];",
    '[{"text": "abc", "parts": {"a": [[0, 1]]}, "queries": [-1, 2]}]': r"queries has the span \[-1",
    '[{"text": "abc", "parts": {"rest": [[0, 1]]}, "queries": [1, 2]}]': "a part is named 'rest'",
    '[{"text": "abc", "parts": {"a": [[0, 2]], "b": [[1, 2]]}, "queries": [2, 3]}]': (
        r"part 'b' has the span \[1, 2\], which overlaps another"
    ),
    '[{"text": "abc", "parts": {"a": []}, "queries": [2, 3]}]': "part 'a' has no token of its own",
    '[{"text": "abc", "parts": {"a": [[2, 3]]}, "queries": [0, 2]}]': "lies after all queries",
}


@pytest.mark.parametrize("content", WRONG)
def test_files_of_spans_that_are_wrong_say_where(tmp_path, content):
    file = tmp_path / "spans.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=WRONG[content]) as raised:
        read_labelled(file, byte_tokenizer())
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_of_spans_is_read(tmp_path):
    with pytest.raises(ConfigError, match=r"spans\.json cannot be read: No such file"):
        read_labelled(tmp_path / "spans.json", byte_tokenizer())
    content = [
        {
            "text": "The code is 417. The code is 417",
            "parts": {"needle": [[12, 15]], "query": [[17, 28]]},
            "queries": [29, 32],
        }
    ]
    file = tmp_path / "spans.json"
    file.write_text(json.dumps(content))
    (prompt,) = read_labelled(file, byte_tokenizer())
    text = np.array(list(prompt.text))
    assert prompt.names == ("needle", "query", "rest")
    parts = ["".join(text[prompt.labels == part]) for part in range(3)]
    assert parts == ["417", "The code is", "The code is .  417"]
    assert "".join(text[prompt.queries]) == "417"
