"""Corpora: what they hold, the split, and builds that are killed or race."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repo_jax.config import DataConfig
from repo_jax.data import build, build_corpus, cached_corpus, open_corpus
from repo_jax.errors import ConfigError


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def read_lines(path):
    return [json.loads(line)["text"] for line in Path(path).read_text().splitlines()]


@pytest.fixture
def config(tmp_path):
    texts = [f"document {i} é\n" * (1 + i % 5) for i in range(200)]
    source = write_lines(tmp_path / "source.jsonl", texts)
    return DataConfig(text=source, cache_dir=str(tmp_path / "cache"), validation_fraction=0.2)


def documents(tokens, corpus):
    """The texts in a token array, each of which must end with eos."""
    ends = np.flatnonzero(tokens == corpus.manifest.eos_id)
    assert len(tokens) == 0 or ends[-1] == len(tokens) - 1
    parts = np.split(np.asarray(tokens), ends + 1)[:-1]
    return [corpus.tokenizer.decode(part) for part in parts]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:400"])
def test_all_documents_are_there_in_order_and_counted(config, tmp_path, tokenizer):
    config = DataConfig(text=config.text, tokenizer=tokenizer, validation_fraction=0.2)
    corpus = build_corpus(config, tmp_path / "out")
    texts = read_lines(config.text[0])
    train, validation = (documents(t, corpus) for t in (corpus.train, corpus.validation))
    assert train == [text for text in texts if text in set(train)]
    assert validation == [text for text in texts if text in set(validation)]
    assert sorted(train + validation) == sorted(texts)
    assert 20 <= len(validation) <= 60
    for found, split in (
        (train, corpus.manifest.train),
        (validation, corpus.manifest.validation),
    ):
        assert split.documents == len(found)
        assert split.utf8_bytes == sum(len(text.encode()) for text in found)
    assert corpus.manifest.train.tokens == len(corpus.train)
    assert corpus.manifest.vocab_size == corpus.tokenizer.vocab_size
    assert corpus.manifest.dtype == "uint16" == corpus.train.dtype.name


@settings(max_examples=10, deadline=None)
@given(
    texts=st.lists(st.sampled_from([f"text {i}" for i in range(12)]), min_size=1, max_size=40),
    fraction=st.floats(0.0, 0.99),
)
def test_no_text_is_in_both_splits(texts, fraction, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    source = write_lines(folder / "a.jsonl", texts)
    corpus = build_corpus(DataConfig(text=source, validation_fraction=fraction), folder / "out")
    train, validation = (documents(t, corpus) for t in (corpus.train, corpus.validation))
    assert train[0] == texts[0]
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(texts)


def test_the_split_does_not_depend_on_other_documents(config, tmp_path):
    texts = read_lines(config.text[0])
    source = write_lines(tmp_path / "fewer.jsonl", texts[:1] + texts[50:])
    fewer = build_corpus(DataConfig(text=source, validation_fraction=0.2), tmp_path / "fewer")
    whole = cached_corpus(config)
    kept = set(documents(whole.validation, whole))
    assert set(documents(fewer.validation, fewer)) == kept & set(texts[50:])


def test_a_bpe_is_trained_without_the_held_out_documents(tmp_path):
    texts = ["plain words"] + [f"{chr(0x61 + i) * 4} secret" * 9 for i in range(26)]
    source = write_lines(tmp_path / "a.jsonl", texts)
    config = DataConfig(text=source, tokenizer="bpe:5000", validation_fraction=0.5)
    corpus = build_corpus(config, tmp_path / "out")
    words = {text[:4] for text in documents(corpus.validation, corpus)}
    assert len(words) > 5
    for word in words:
        assert len(corpus.tokenizer.encode(word)) > 1
    trained = {text[:4] for text in documents(corpus.train, corpus)} - {"plai"}
    assert all(len(corpus.tokenizer.encode(word)) == 1 for word in trained)


def test_a_large_vocabulary_needs_uint32(config, tmp_path):
    corpus = cached_corpus(config)
    content = json.loads((corpus.folder / "tokenizer.json").read_text())
    content["added_tokens"][0]["id"] = content["model"]["vocab"]["<|endoftext|>"] = 70_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    config = DataConfig(text=config.text, tokenizer=str(tmp_path))
    large = build_corpus(config, tmp_path / "large")
    assert large.train.dtype.name == large.manifest.dtype == "uint32"
    assert large.manifest.eos_id == 70_000 == large.train[-1]


@pytest.mark.parametrize("text", ["line\n" * 100, "é" * 300, "x" * 63 + "\n", "a\n" + "b" * 64])
def test_long_documents_are_encoded_in_pieces_that_lose_nothing(text, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_PIECE", 64)
    monkeypatch.setattr(build, "_BATCH", 100)
    source = write_lines(tmp_path / "a.jsonl", [text, text])
    corpus = build_corpus(DataConfig(text=source), tmp_path / "out")
    assert documents(corpus.train, corpus) == [text, text]
    assert corpus.manifest.train.documents == 2


def test_the_cache_is_used_until_something_changes(config, tmp_path, monkeypatch):
    folder = cached_corpus(config).folder
    assert folder.parent == tmp_path / "cache"
    assert folder.name.startswith("source.jsonl-bytes-")
    with monkeypatch.context() as patch:
        patch.setattr(build, "_tokenise", None)  # Would fail if it were called.
        assert cached_corpus(config).folder == folder
    folders = {folder}
    for change in ({"tokenizer": "bpe:300"}, {"validation_fraction": 0.3}):
        changed = DataConfig(text=config.text, cache_dir=config.cache_dir, **change)
        folders.add(cached_corpus(changed).folder)
    with open(config.text[0], "a") as file:
        file.write('{"text": "more"}\n')
    folders.add(cached_corpus(config).folder)
    os.utime(config.text[0], (1, 1))  # As after a change that keeps the size.
    folders.add(cached_corpus(config).folder)
    assert len(folders) == 5


def test_an_out_folder_with_something_in_it_is_refused(config, tmp_path):
    (tmp_path / "out").mkdir()
    build_corpus(config, tmp_path / "out")
    with pytest.raises(ConfigError, match="out is not an empty folder, and nothing is overwr"):
        build_corpus(config, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"source\.jsonl is not an empty folder"):
        build_corpus(config, config.text[0])


def test_an_out_folder_that_fills_up_meanwhile_is_left_alone(config, tmp_path, monkeypatch):
    def tokenise(*arguments):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()
        return original(*arguments)

    original = build._tokenise
    monkeypatch.setattr(build, "_tokenise", tokenise)
    with pytest.raises(ConfigError, match="out is not an empty folder"):
        build_corpus(config, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["theirs"]
    assert sorted(os.listdir(tmp_path)) == ["out", "source.jsonl"]


def test_a_build_that_was_killed_is_not_taken_for_a_corpus(config):
    script = """
import os, sys
from repo_jax.config import DataConfig
from repo_jax.data import build, cached_corpus
original = build._tokenise
def tokenise(*arguments):
    original(*arguments)
    os.kill(os.getpid(), 9)
build._tokenise = tokenise
cached_corpus(DataConfig(text=sys.argv[1], cache_dir=sys.argv[2], validation_fraction=0.2))
"""
    command = [sys.executable, "-c", script, config.text[0], config.cache_dir]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run(command, env=environment, check=False).returncode == -9
    (left,) = os.listdir(config.cache_dir)
    corpus = cached_corpus(config)
    assert corpus.folder.name != left
    assert len(documents(corpus.train, corpus)) == corpus.manifest.train.documents
    assert os.listdir(config.cache_dir) == [corpus.folder.name]


def test_of_two_builds_at_once_the_first_to_finish_wins(config, monkeypatch):
    def tokenise(*arguments):
        monkeypatch.setattr(build, "_tokenise", original)
        others.append((cached_corpus(config).folder / "train.bin").stat().st_ino)
        return original(*arguments)

    original, others = build._tokenise, []
    monkeypatch.setattr(build, "_tokenise", tokenise)
    corpus = cached_corpus(config)
    assert others == [(corpus.folder / "train.bin").stat().st_ino]
    assert os.listdir(config.cache_dir) == [corpus.folder.name]


def test_a_failed_build_leaves_nothing(config, tmp_path):
    with open(config.text[0], "a") as file:
        file.write("{")
    with pytest.raises(ConfigError, match=r"source\.jsonl:201: the line is not JSON"):
        build_corpus(config, tmp_path / "out")
    assert os.listdir(tmp_path) == ["source.jsonl"]


def test_text_without_documents(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(ConfigError, match="the text has no documents: 1 files, all of them empty"):
        build_corpus(DataConfig(text=str(tmp_path)), tmp_path / "out")


def test_folders_that_are_no_corpus(config):
    corpus = cached_corpus(config)
    manifest = corpus.folder / "manifest.json"
    with pytest.raises(ConfigError, match=r"is not a tokenised corpus: it has no manifest\.json"):
        open_corpus(corpus.folder.parent)

    os.truncate(corpus.folder / "train.bin", 100)
    with pytest.raises(ConfigError, match=r"train\.bin has 100 bytes; its manifest says \d+"):
        open_corpus(corpus.folder)

    manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 99'))
    with pytest.raises(ConfigError, match="is a corpus of version 99; this program reads version"):
        open_corpus(corpus.folder)

    manifest.write_text("{")
    with pytest.raises(ConfigError, match=r"manifest\.json is not JSON"):
        open_corpus(corpus.folder)


def test_progress_is_some_lines_where_there_is_no_terminal(config, monkeypatch, capsys):
    monkeypatch.setattr("repo_jax.progress._SECONDS_BETWEEN_LINES", 0.0)
    cached_corpus(config)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 200
    assert lines[-1].startswith("tokenising: 0 of 0 MB in ")
