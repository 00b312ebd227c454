"""`open_data` and `open_text`: from a data section to tokens."""

import json
import os
import resource

import numpy as np
import pytest

from repo_jax.config import DataConfig, DecoderConfig
from repo_jax.data import build_corpus, byte_tokenizer, open_data, open_text
from repo_jax.errors import ConfigError

MODEL = DecoderConfig(vocab_size=300, d_model=16, n_layers=1, n_heads=2, d_ff=16, eos_ids=(7, 8))


@pytest.fixture
def options(tmp_path):
    """Of a `DataConfig` on a hundred documents."""
    lines = [json.dumps({"text": f"document {i} " * 5}) for i in range(100)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    return {
        "text": str(tmp_path / "a.jsonl"),
        "cache_dir": str(tmp_path / "cache"),
        "sequence_length": 16,
        "batch_size": 4,
        "validation_fraction": 0.1,
    }


def token_file(path, count, dtype="<u4", start=0):
    (np.arange(start, start + count) % 250).astype(dtype).tofile(path)
    return str(path)


def test_text_to_batches(options):
    data = open_data(DataConfig(**options), MODEL)
    assert (data.eos_id, data.vocab_size) == (256, 300)
    assert data.byte_lengths.shape == (257,)
    assert data.training_batches().at(0)["tokens"].shape == (4, 16)
    text = data.tokenizer.decode(data.train[0])
    assert text.startswith("document 0 document 0")
    (validation,) = data.validation
    held_out = bytes(validation[validation < 256].astype(np.uint8)).decode()
    assert held_out[:100] not in text
    batch = next(iter(data.validation_batches(sequence_length=8, batch_size=2, max_windows=1)))
    assert batch["tokens"].shape == (2, 8)
    assert batch["valid"].tolist() == [True, False]


def test_the_config_reaches_the_batches(options):
    config = DataConfig(**options, document_mask=True, seed=5)
    data = open_data(config)
    batch = data.training_batches(rows=slice(1, 3)).at(2)
    assert batch["tokens"].shape == batch["segment_ids"].shape == (2, 16)
    assert "segment_ids" in next(iter(data.validation_batches()))
    other = open_data(DataConfig(**options, seed=6)).training_batches()
    assert not np.array_equal(other.at(2)["tokens"][1:3], batch["tokens"])


def test_a_single_document_is_validated_on_its_end(tmp_path, options):
    (tmp_path / "one.txt").write_text("abcdefgh" * 100)
    data = open_data(DataConfig(**{**options, "text": str(tmp_path / "one.txt")}))
    # 801 tokens with eos are 50 windows, of which 5 are held out.
    assert [len(array) for array in (*data.train, *data.validation)] == [45 * 16, 5 * 16 + 1]


def test_the_end_of_each_token_file_is_held_out(tmp_path):
    paths = [token_file(tmp_path / f"{i}.npy", n) for i, n in enumerate((1000, 35, 17))]
    config = DataConfig(tokens=paths, sequence_length=10, validation_fraction=0.2)
    data = open_data(config, MODEL)
    assert [len(array) for array in data.train] == [800, 20, 17]
    assert [len(array) for array in data.validation] == [200, 15]
    assert data.validation[0][0] == 800 % 250
    assert data.tokenizer is data.byte_lengths is None
    assert (data.eos_id, data.vocab_size) == (7, 300)
    assert open_data(config).vocab_size is None


def test_nothing_held_out(tmp_path):
    path = token_file(tmp_path / "a.npy", 1000)
    data = open_data(DataConfig(tokens=path, sequence_length=10, validation_fraction=0))
    assert len(data.train[0]) == 1000
    assert data.validation == ()
    with pytest.raises(ConfigError, match=r"nothing is held out .* \(it is 0\) or give data\.val"):
        data.validation_batches()


def test_validation_tokens_leave_the_rest_to_training(tmp_path, options):
    token_file(tmp_path / "a1.npy", 500)
    token_file(tmp_path / "a2.npy", 600)
    held_out = token_file(tmp_path / "v.npy", 70, start=100)
    config = DataConfig(
        tokens=str(tmp_path / "a*.npy"), validation_tokens=held_out, sequence_length=10
    )
    data = open_data(config)
    assert [len(array) for array in data.train] == [500, 600]
    assert [array[0] for array in data.validation] == [100]
    only = open_data(DataConfig(validation_tokens=held_out))
    assert only.train == ()
    assert len(only.validation[0]) == 70
    # A corpus may be on both sides, since what it holds out is another file.
    corpus = build_corpus(DataConfig(**options), tmp_path / "corpus").folder
    open_data(DataConfig(tokens=str(corpus), validation_tokens=str(corpus)))
    with pytest.raises(ConfigError, match=r"corpus/train\.bin is both trained on and in data\.val"):
        open_data(DataConfig(tokens=str(corpus), validation_tokens=str(corpus / "train.bin")))


def test_validation_files_are_looked_for_before_text_is_tokenised(tmp_path, options):
    missing = str(tmp_path / "v.npy")
    with pytest.raises(ConfigError, match=r"v\.npy does not exist"):
        open_data(DataConfig(**options, validation_tokens=missing))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("part", ["", "train.bin"])
def test_corpus_folders_bring_their_dtype_eos_and_tokenizer(tmp_path, options, part):
    corpus = build_corpus(DataConfig(**options), tmp_path / "corpus")
    path = str(corpus.folder / part)
    data = open_data(DataConfig(tokens=path, sequence_length=16, validation_fraction=0.1), MODEL)
    assert data.train[0].dtype.name == "uint16"
    assert (data.eos_id, data.tokenizer.eos_id) == (256, 256)
    kept = len(corpus.train)
    assert len(data.train[0]) == (kept if not part else round(0.9 * (kept // 16)) * 16)
    held_out = corpus.validation if not part else corpus.train[len(data.train[0]) :]
    assert np.array_equal(data.validation[0], held_out)
    validation = open_data(DataConfig(validation_tokens=str(corpus.folder))).validation
    assert np.array_equal(validation[0], corpus.validation)


def test_dtype_of_token_files(tmp_path):
    path = token_file(tmp_path / "a.bin", 100, "<u2")
    sixteen = DataConfig(tokens=path, tokens_dtype="uint16", sequence_length=10)
    assert sum(map(len, open_data(sixteen, MODEL).train)) == 90
    with pytest.raises(ConfigError, match=r"a\.bin has the token id \d+; .*not of the given dtype"):
        open_data(DataConfig(tokens=path, sequence_length=10), MODEL)


def test_the_fingerprint_tells_data_apart(tmp_path):
    def data(*arrays):
        for i, array in enumerate(arrays):
            np.array(array, "<u4").tofile(tmp_path / f"{i}.npy")
        paths = [str(tmp_path / f"{i}.npy") for i in range(len(arrays))]
        return open_data(DataConfig(tokens=paths, sequence_length=10))

    fingerprint = lambda *arrays: data(*arrays).fingerprint
    a, b, long = np.arange(100), np.arange(100) + 1, np.arange(20_000)
    assert fingerprint(a, b) == fingerprint(a, b)
    assert len({fingerprint(a, b), fingerprint(b, a), fingerprint(a), fingerprint(a[:50])}) == 4
    hole = np.where((long > 5000) & (long < 15_000), 0, long)  # as a copy that broke off may have
    assert fingerprint(hole, a) != fingerprint(long, a)

    # Of runs that began when it was of both ends alone.
    assert data(long, a).has_fingerprint("f65e48ad53f7a546")
    assert not data(long, b).has_fingerprint("f65e48ad53f7a546")


def test_data_that_does_not_fit_the_model(tmp_path, options):
    config = DataConfig(**options, tokenizer="bpe:301")
    with pytest.raises(ConfigError, match=r"bpe:301 has a vocabulary of 301; model\.vocab_size is"):
        open_data(config, MODEL)
    assert not (tmp_path / "cache").exists()
    corpus = build_corpus(config, tmp_path / "corpus")
    with pytest.raises(ConfigError, match=r"corpus .*corpus has a vocabulary of 301; model\.voc"):
        open_data(DataConfig(tokens=str(corpus.folder)), MODEL)


def test_corpora_that_contradict(tmp_path, options):
    one = str(build_corpus(DataConfig(**options), tmp_path / "one").folder)
    two = str(build_corpus(DataConfig(**options, tokenizer="bpe:300"), tmp_path / "two").folder)
    with pytest.raises(ConfigError, match=r"one and .*two have different tokenizers"):
        open_data(DataConfig(tokens=[one, two]))
    with pytest.raises(ConfigError, match=r"eos_id is 5; documents in .*one end with 256; leave"):
        open_data(DataConfig(tokens=one, eos_id=5))


def test_token_paths_that_give_nothing(tmp_path, options):
    with pytest.raises(ConfigError, match=r"'nothing\*' match nothing"):
        open_data(DataConfig(tokens="nothing*"))
    with pytest.raises(ConfigError, match=r"nothing\.npy does not exist"):
        open_data(DataConfig(tokens="nothing.npy"))
    with pytest.raises(ConfigError, match=r"none of data\.text, data\.tokens and"):
        open_data(DataConfig())
    config = DataConfig(**{**options, "validation_fraction": 0})
    corpus = build_corpus(config, tmp_path / "corpus")
    with pytest.raises(ConfigError, match="corpus has no validation tokens"):
        open_data(DataConfig(validation_tokens=str(corpus.folder)))


@pytest.fixture
def most_open_files():
    """A number of files that this process cannot open, as it has some open already."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = max(map(int, os.listdir("/dev/fd"))) + 9
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_more_files_than_a_process_may_open(tmp_path, monkeypatch, most_open_files):
    for i in range(most_open_files):
        token_file(tmp_path / f"{i}.npy", 30)
    config = DataConfig(tokens=str(tmp_path / "*.npy"), sequence_length=10)
    with monkeypatch.context() as patch:
        patch.setattr(resource, "setrlimit", lambda *_: None)  # as if that were the hard limit
        message = r"^(\d+) token files cannot be open at once, .* may have \1 open files here"
        with pytest.raises(ConfigError, match=message):
            open_data(config)
    assert len(open_data(config).train) == most_open_files


def test_text_to_evaluate_on(options, tmp_path):
    tokenizer, config = byte_tokenizer(), DataConfig(**options)
    whole = open_text(config, tokenizer, MODEL)
    texts = [json.loads(line)["text"] for line in (tmp_path / "a.jsonl").read_text().split("\n")]
    ids = [i for text in texts for i in (*text.encode(), 256)]
    assert whole.train == ()
    assert whole.validation[0].tolist() == ids
    assert open_text(config, tokenizer, max_tokens=99).validation[0].tolist() == ids[:99]
    small = DecoderConfig(vocab_size=256, d_model=16, n_layers=1, n_heads=2, d_ff=16)
    with pytest.raises(ConfigError, match=r"has a vocabulary of 257; model\.vocab_size is 256"):
        open_text(config, tokenizer, small)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ConfigError, match=r"the text .*empty\.txt is empty"):
        open_text(DataConfig(text=str(tmp_path / "empty.txt")), tokenizer)
