"""Text to token ids and back, with the `tokenizers` library underneath.

Three kinds, all held in one class: `byte_tokenizer()`, whose ids are the bytes;
`train_bpe()`, a byte-level BPE; and `Tokenizer.load()` of any tokenizer.json.
"""

import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from repo_jax.errors import ConfigError

EOS = "<|endoftext|>"

# What tokenizers name their end of text, for those that come without a configuration.
_USUAL_EOS = (EOS, "</s>", "<|end_of_text|>", "<eos>", "[EOS]")


class Tokenizer:
    """Text to ids and back.

    Text is only ever text: a special token's name in a document is encoded like any other
    characters, nothing is added at the ends, and nothing is cut or padded.

    Args:
      backend: a `tokenizers.Tokenizer`. It is taken over: its settings are changed.
      eos_id: the id that ends a document.
    """

    def __init__(self, backend: tokenizers.Tokenizer, eos_id: int):
        name = backend.id_to_token(eos_id)
        if name is None:
            raise ConfigError(f"eos_id is {eos_id}; the tokenizer has no such id")
        # Some files list their eos as an ordinary added token, which text could then spell.
        backend.add_special_tokens([name])
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._eos_id = eos_id

    @classmethod
    def load(cls, path: str | Path, eos_id: int | None = None) -> "Tokenizer":
        """Reads a tokenizer.json, or the one in a folder.

        Args:
          path: the file or the folder.
          eos_id: the id that ends a document. None: what tokenizer_config.json,
            special_tokens_map.json or config.json beside the file say, in this order, else
            the first of the usual names that the vocabulary has.

        Raises:
          ConfigError: there is no such file, it is no tokenizer, or its eos is unknown.
        """
        file = Path(path).expanduser()
        file = file / "tokenizer.json" if file.is_dir() else file
        if not file.is_file():
            raise ConfigError(
                f"tokenizer {str(path)!r}: there is no file {file}; give a tokenizer.json or a "
                "folder that has one (for training also bytes or bpe:N)"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:
            raise ConfigError(f"{file} is not a tokenizer.json: {error}") from None
        # The library numbers added tokens anew, silently, where their ids leave a gap.
        for token in json.loads(file.read_bytes())["added_tokens"]:
            index = backend.token_to_id(token["content"])
            if index != token["id"]:
                raise ConfigError(
                    f"{file} gives {token['content']!r} the id {token['id']}; the tokenizers "
                    f"library reads it as {index} unless model.vocab has it too"
                )
        return cls(backend, _find_eos(backend, file) if eos_id is None else eos_id)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; some of the smaller ids may be unused."""
        return max(self._backend.get_vocab().values()) + 1

    @property
    def eos_id(self) -> int:
        """The id that ends a document."""
        return self._eos_id

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray | None:
        """UTF-8 bytes that each id stands for: int32 [vocab_size], special tokens 0.

        They add up to the bytes of the text as the model of the tokenizer sees it, that is
        after its normalizer, if it has one. None for a tokenizer that is not byte-level,
        whose ids have no length of their own.
        """
        return _byte_lengths(self._backend, self.vocab_size)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without eos."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without eos; uses all cores."""
        # The fast variant leaves out the offsets, which cost most of the time and memory.
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_with_spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a text, int32 [T], and which characters each stands for, int32 [T, 2].

        A span is the first character and one past the last. Where one character takes several
        tokens, they have the same span.
        """
        encoding = self._backend.encode(text, add_special_tokens=False)
        return np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int32).reshape(-1, 2)

    def unknown_in(self, text: str) -> str | None:
        """The first part of a text that the vocabulary has no token for, or None."""
        name = getattr(self._backend.model, "unk_token", None)
        unknown = None if name is None else self._backend.token_to_id(name)
        if unknown is None:
            return None
        ids, spans = self.encode_with_spans(text)
        found = spans[ids == unknown]
        return text[slice(*found[0])] if len(found) else None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens give nothing, incomplete UTF-8 gives U+FFFD.

        `decode(encode(text)) == text` for byte-level tokenizers without a normalizer.
        """
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which names the eos.

        Raises:
          ConfigError: the folder already has one of them.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # The class name lets AutoTokenizer of transformers read the folder.
        config = {
            "eos_token": self._backend.id_to_token(self._eos_id),
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        contents = {
            "tokenizer.json": self.to_json(),
            "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        }
        for name in contents:
            if (folder / name).exists():
                raise ConfigError(f"{folder / name} already exists and is not overwritten")
        for name, content in contents.items():
            (folder / name).write_text(content, encoding="utf-8")

    def to_json(self) -> str:
        """The content of tokenizer.json."""
        return self._backend.to_str(pretty=True)


def byte_tokenizer() -> Tokenizer:
    """Ids 0 to 255 are the bytes of UTF-8, 256 is eos."""
    vocab = {character: byte for byte, character in enumerate(_byte_alphabet())}
    # Without merges a BPE leaves bytes as they are.
    return _byte_level(tokenizers.models.BPE(vocab=vocab, merges=[]), use_regex=False)


def train_bpe(texts: Iterable[str], size: int) -> Tokenizer:
    """A byte-level BPE with GPT-2's splitting of words, trained on `texts`.

    Args:
      texts: read once, as a stream.
      size: entries of the vocabulary, at least 257: the 256 bytes, merges, and eos, which is
        the last. Fewer come out where the texts have too few different words.
    """
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size - 1, initial_alphabet=_byte_alphabet(), show_progress=False
    )
    untrained = tokenizers.Tokenizer(tokenizers.models.BPE())
    untrained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    untrained.train_from_iterator(texts, trainer)
    return _byte_level(untrained.model, use_regex=True)


def _byte_level(model: Any, use_regex: bool) -> Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=use_regex
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([EOS])
    return Tokenizer(backend, backend.token_to_id(EOS))


def _byte_alphabet() -> list[str]:
    """GPT-2's printable character for each byte.

    Bytes that print in Latin-1 stand for themselves, the others for the characters from
    U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    alphabet, following = [], 0x100
    for byte in range(256):
        alphabet.append(chr(byte if byte in printable else following))
        following += byte not in printable
    return alphabet


def _byte_lengths(backend: tokenizers.Tokenizer, vocab_size: int) -> np.ndarray | None:
    vocab, added = backend.get_vocab(), backend.get_added_tokens_decoder()
    alphabet = set(_byte_alphabet())
    description = json.loads(backend.to_str())
    stages = [description["normalizer"], description["pre_tokenizer"]]
    if not (_has_byte_level(stages) and alphabet <= vocab.keys()):
        return None
    lengths = np.zeros(vocab_size, np.int32)
    for token, index in vocab.items():
        if index not in added:
            # One character is one byte. Entries with others cannot come from text.
            lengths[index] = len(token) if alphabet.issuperset(token) else 0
        elif not added[index].special:
            lengths[index] = len(token.encode())
    return lengths


def _has_byte_level(stage: Any) -> bool:
    if isinstance(stage, list):
        return any(_has_byte_level(part) for part in stage)
    if isinstance(stage, dict):
        parts = (stage.get("normalizers"), stage.get("pretokenizers"))
        return stage["type"] == "ByteLevel" or any(_has_byte_level(part) for part in parts)
    return False


def _find_eos(backend: tokenizers.Tokenizer, file: Path) -> int:
    for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json"):
        beside = file.with_name(name)
        if not beside.is_file():
            continue
        try:
            config = json.loads(beside.read_bytes())
        except ValueError as error:
            raise ConfigError(f"{beside} is not JSON: {error}") from None
        token = config.get("eos_token")
        token = token["content"] if isinstance(token, dict) else token
        index = backend.token_to_id(token) if token else config.get("eos_token_id")
        index = index[0] if isinstance(index, list) else index
        if index is not None:
            return index
    for token in _USUAL_EOS:
        if backend.token_to_id(token) is not None:
            return backend.token_to_id(token)
    raise ConfigError(
        f"{file}: cannot tell which token ends a document; give eos_id, or name eos_token in a "
        "tokenizer_config.json beside it"
    )
