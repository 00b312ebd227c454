"""A corpus: text, tokenised once into a folder that training reads from then on.

    train.bin  validation.bin    token files; every document is followed by eos
    tokenizer.json  tokenizer_config.json
    manifest.json                what is in them

build.py makes such folders.
"""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np

from repo_jax.data import token_files
from repo_jax.data.tokenizers import Tokenizer
from repo_jax.errors import ConfigError

VERSION = 1


@dataclasses.dataclass(frozen=True)
class Split:
    """What one split holds: tokens with the eos of each document, UTF-8 bytes without."""

    tokens: int
    documents: int
    utf8_bytes: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a corpus folder says of itself.

    Attributes:
      dtype: of the token files.
      vocab_size, eos_id: of the tokenizer.
      tokenizer: `bytes`, `bpe:N` or the path it came from.
      text: the sources as they were given.
      validation_fraction: of the documents that went to validation.
      fingerprint: of the sources' paths, sizes and times, and of the options.
      train, validation: the splits.
      version: of this layout.
    """

    dtype: str
    vocab_size: int
    eos_id: int
    tokenizer: str
    text: tuple[str, ...]
    validation_fraction: float
    fingerprint: str
    train: Split
    validation: Split
    version: int = VERSION


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A complete corpus folder."""

    folder: Path
    manifest: Manifest

    @property
    def train(self) -> np.ndarray:
        """Training tokens: [tokens], memory-mapped."""
        return self._open("train", self.manifest.train)

    @property
    def validation(self) -> np.ndarray:
        """Held-out tokens: [tokens], memory-mapped; there may be none."""
        return self._open("validation", self.manifest.validation)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens."""
        return Tokenizer.load(self.folder, eos_id=self.manifest.eos_id)

    def _open(self, name: str, split: Split) -> np.ndarray:
        if not split.tokens:  # An empty file cannot be mapped.
            return np.zeros(0, token_files.DTYPES[self.manifest.dtype])
        return token_files.open_tokens(
            self.folder / f"{name}.bin", self.manifest.dtype, self.manifest.vocab_size
        )


def open_corpus(folder: str | Path) -> Corpus:
    """Opens a folder that `build_corpus` wrote.

    Raises:
      ConfigError: it is no such folder, of another version, or a token file does not have
        the size that the manifest says.
    """
    folder = Path(folder)
    try:
        fields = json.loads((folder / "manifest.json").read_bytes())
    except FileNotFoundError:
        raise ConfigError(
            f"{folder} is not a tokenised corpus: it has no manifest.json; name token files "
            "themselves, or make one with python -m repo_jax.tokenize"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{folder / 'manifest.json'} is not JSON: {error}") from None
    if fields.get("version") != VERSION:
        raise ConfigError(
            f"{folder} is a corpus of version {fields.get('version')}; this program reads "
            f"version {VERSION}; tokenise the text again"
        )
    splits = {name: Split(**fields.pop(name)) for name in ("train", "validation")}
    manifest = Manifest(text=tuple(fields.pop("text")), **splits, **fields)
    for name, split in splits.items():
        file = folder / f"{name}.bin"
        size = file.stat().st_size if file.is_file() else 0
        expected = split.tokens * token_files.DTYPES[manifest.dtype].itemsize
        if size != expected:
            raise ConfigError(f"{file} has {size} bytes; its manifest says {expected}")
    return Corpus(folder, manifest)
