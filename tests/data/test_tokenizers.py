"""Tokenizers: round trips, bytes per id, eos, and files of other makers."""

import functools
import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from repo_jax.data import Tokenizer, byte_tokenizer, train_bpe
from repo_jax.errors import ConfigError

TEXTS = ["the cat sat on the mat\n" * 20, "naïve café, 東京 🎉 <|endoftext|>", "x = [i for i in y]"]

# What has gone wrong in byte-level tokenizers: Latin-1, characters beyond the BMP, control
# characters, runs of blanks, and the names of special tokens.
texts = st.one_of(
    st.text(),
    st.text(alphabet="a é\u00ad\x00\r\n\t東🎉"),
    st.lists(st.sampled_from(["<|endoftext|>", "<pad>", "the", " cat", "\n"])).map("".join),
)


ADDED = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
ADDED["special"] = True


@functools.cache
def bpe():
    return train_bpe(TEXTS, 300)


@functools.cache
def foreign():
    """Like OLMo-2's: words split by a regex before bytes, specials inside the vocabulary."""
    model = json.loads(bpe().to_json())["model"]
    vocab = {**model["vocab"], "<|endoftext|>": 350, "<pad>": 351, "é🎉": 352}
    merges = [tuple(pair) for pair in model["merges"]]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\w+|\W"), "isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<pad>"])
    backend.add_tokens(["é🎉"])
    return backend


def load(backend, folder, **files):
    """Saves a tokenizer with JSON files beside it, and loads it."""
    backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return Tokenizer.load(folder)


def words(*names):
    """Not byte-level."""
    vocab = {name: i for i, name in enumerate(("the", "cat", *names))}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="the"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return backend


KINDS = {
    "bytes": functools.cache(byte_tokenizer),
    "bpe": bpe,
    "foreign": functools.cache(lambda: Tokenizer(foreign(), 350)),
}


@pytest.mark.parametrize("kind", KINDS)
@given(text=texts)
def test_text_comes_back_and_its_bytes_add_up(kind, text):
    tokenizer = KINDS[kind]()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
    assert tokenizer.eos_id not in ids


@given(text=texts)
def test_ids_of_the_byte_tokenizer_are_the_bytes(text):
    assert KINDS["bytes"]().encode(text) == list(text.encode())


@given(batch=st.lists(texts, max_size=4))
def test_a_batch_is_encoded_like_its_texts(batch):
    assert bpe().encode_batch(batch) == [bpe().encode(text) for text in batch]


def test_sizes_and_eos():
    tokenizer = byte_tokenizer()
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)
    assert (bpe().vocab_size, bpe().eos_id) == (300, 299)
    assert len(bpe().encode(TEXTS[0])) < len(TEXTS[0]) / 3
    # Ids without a token below the largest one count.
    assert KINDS["foreign"]().vocab_size == 353


def test_special_tokens_have_no_bytes_and_no_text():
    tokenizer = KINDS["foreign"]()
    lengths = tokenizer.byte_lengths
    assert lengths.dtype == np.int32
    assert lengths.shape == (353,)
    assert list(lengths[[350, 351, 352]]) == [0, 0, len("é🎉".encode())]
    assert tokenizer.decode([350, *tokenizer.encode("cat"), 351]) == "cat"


def test_decoding_half_a_character_does_not_fail():
    assert byte_tokenizer().decode([0x61, 0xE6, 0x62]) == "a\ufffdb"


def test_training_twice_gives_the_same_tokenizer():
    assert train_bpe(TEXTS, 300).to_json() == bpe().to_json()


def test_a_small_text_gives_a_smaller_vocabulary():
    tokenizer = train_bpe(["ab"], 1000)
    assert tokenizer.vocab_size == 258
    assert tokenizer.eos_id == 257


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_is_the_same(kind, tmp_path):
    tokenizer = KINDS[kind]()
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.eos_id == tokenizer.eos_id
    assert np.array_equal(loaded.byte_lengths, tokenizer.byte_lengths)
    assert loaded.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])
    with pytest.raises(ConfigError, match=r"tokenizer\.json already exists and is not overw"):
        tokenizer.save(tmp_path)


def test_settings_of_a_file_that_change_the_text_are_switched_off(tmp_path):
    backend = tokenizers.Tokenizer.from_str(foreign().to_str())
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<pad> $A", special_tokens=[("<pad>", 351)]
    )
    loaded, plain = load(backend, tmp_path), KINDS["foreign"]()
    assert loaded.encode_batch(["a", TEXTS[0]]) == plain.encode_batch(["a", TEXTS[0]])


def test_eos_that_is_not_marked_special_is_still_not_read_from_text(tmp_path):
    backend = words("[EOS]")
    backend.add_tokens(["[EOS]"])
    tokenizer = load(backend, tmp_path)
    assert tokenizer.eos_id == 2
    assert 2 not in tokenizer.encode("the [EOS] cat")


def test_where_eos_is_found(tmp_path):
    def found(**files):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        return load(words("</s>", "<a>", "<b>", "<c>"), folder, **files).eos_id

    config = {"eos_token_id": [4, 5]}
    assert found() == 2
    assert found(config=config) == 4
    assert found(config=config, special_tokens_map={"eos_token": "<a>"}) == 3
    assert found(config=config, tokenizer_config={"eos_token": {"content": "<c>"}}) == 5
    assert found(config=config, tokenizer_config={"eos_token": None}) == 4


def test_ids_of_a_tokenizer_that_is_not_byte_level_have_no_length(tmp_path):
    assert load(words("</s>"), tmp_path).byte_lengths is None


def test_an_unknown_eos_is_refused_unless_it_is_given(tmp_path):
    with pytest.raises(ConfigError, match="cannot tell which token ends a document; give eos_id"):
        load(words(), tmp_path)
    assert Tokenizer.load(tmp_path, eos_id=1).eos_id == 1
    with pytest.raises(ConfigError, match="eos_id is 7; the tokenizer has no such id"):
        Tokenizer.load(tmp_path, eos_id=7)


def test_ids_that_the_library_would_change_are_refused(tmp_path):
    content = json.loads(words("</s>").to_str())
    content["added_tokens"] = [{**ADDED, "content": "</s>", "id": 2}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer.load(tmp_path).eos_id == 2
    content["added_tokens"].append({**ADDED, "content": "<late>", "id": 10})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"gives '<late>' the id 10; .* reads it as 3 unless"):
        Tokenizer.load(tmp_path)


def test_what_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer 'bpe': there is no file bpe; give a tok"):
        Tokenizer.load("bpe")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json is not a tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    words().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"config\.json is not JSON"):
        Tokenizer.load(tmp_path)
