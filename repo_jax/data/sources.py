"""From a data section to tokens: the one entry point for training and evaluation."""

import dataclasses
import glob
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from repo_jax.config import DataConfig, DecoderConfig
from repo_jax.data.batches import TrainingBatches, ValidationBatches
from repo_jax.data.build import cached_corpus, planned_vocab_size
from repo_jax.data.corpus import Corpus, open_corpus
from repo_jax.data.text import find_files, read_documents
from repo_jax.data.token_files import open_tokens
from repo_jax.data.tokenizers import Tokenizer
from repo_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Data:
    """Tokens to train and to validate on, and what is known of them.

    Attributes:
      config: the data section it came from.
      train: token arrays, [tokens] each, mapped from disk.
      validation: likewise, none of them in `train`; may be empty.
      tokenizer: that made the tokens; None for token files.
      eos_id: the id that ends a document, if known.
      vocab_size: ids are below it: the model's where one was given, else the tokenizer's.
    """

    config: DataConfig
    train: tuple[np.ndarray, ...]
    validation: tuple[np.ndarray, ...]
    tokenizer: Tokenizer | None
    eos_id: int | None
    vocab_size: int | None

    @property
    def byte_lengths(self) -> np.ndarray | None:
        """UTF-8 bytes of each id, int32 [entries of the tokenizer], where they are known."""
        return None if self.tokenizer is None else self.tokenizer.byte_lengths

    @property
    def fingerprint(self) -> str:
        """A short hash of the training tokens: their number, first and last of each file.

        For a run to notice that it is continued on other data.
        """
        digest = hashlib.blake2b(digest_size=8)
        for array in self.train:
            digest.update(str(len(array)).encode())
            digest.update(array[:4096].astype("<u4").tobytes())
            digest.update(array[-4096:].astype("<u4").tobytes())
        return digest.hexdigest()

    def training_batches(self, rows: slice = slice(None)) -> TrainingBatches:
        """Batches of `train` as the config says; `rows` of each, see `TrainingBatches`."""
        return TrainingBatches(
            self.train,
            sequence_length=self.config.sequence_length,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            document_mask=self.config.document_mask,
            eos_id=self.eos_id,
            vocab_size=self.vocab_size,
            prefetch=self.config.prefetch,
            rows=rows,
        )

    def validation_batches(
        self,
        *,
        sequence_length: int | None = None,
        batch_size: int | None = None,
        max_windows: int | None = None,
    ) -> ValidationBatches:
        """Batches of `validation`, with the config's length and batch size unless given."""
        if not self.validation:
            raise ConfigError(
                "nothing is held out to validate on; raise data.validation_fraction (it is "
                f"{self.config.validation_fraction}) or give data.validation_tokens"
            )
        return ValidationBatches(
            self.validation,
            sequence_length=sequence_length or self.config.sequence_length,
            batch_size=batch_size or self.config.batch_size,
            document_mask=self.config.document_mask,
            eos_id=self.eos_id,
            vocab_size=self.vocab_size,
            max_windows=max_windows,
        )


def open_data(config: DataConfig, model: DecoderConfig | None = None) -> Data:
    """Opens what `config` names; text is tokenised on first use.

    Held out for validation are, in this order: `validation_tokens`; the documents that a
    corpus kept back, if they fill a window; else the last `validation_fraction` of the
    windows of each token file, at least one if it has two. Only `validation_tokens` may be
    given, to evaluate on.

    Args:
      config: the data section.
      model: whose vocabulary the ids must fit, and whose first eos is taken if neither the
        config nor a manifest has one.

    Raises:
      ConfigError: a file is missing or unfit, or the data does not fit the model.
    """
    if config.text and model is not None:
        _fits(f"data.tokenizer {config.tokenizer}", planned_vocab_size(config), model)
    train_paths = [cached_corpus(config).folder] if config.text else _expand(config.tokens)
    held_out_paths = _expand(config.validation_tokens)
    if not train_paths and not held_out_paths:
        raise ConfigError("none of data.text, data.tokens and data.validation_tokens is given")
    files = [_File(path, _corpus_of(path)) for path in train_paths]
    held_out = [_File(path, _corpus_of(path)) for path in held_out_paths]
    corpora = [file.corpus for file in (*files, *held_out) if file.corpus is not None]
    _check_corpora(corpora, config, model)

    eos_id = corpora[0].manifest.eos_id if corpora else config.eos_id
    if eos_id is None and model is not None and model.eos_ids:
        eos_id = model.eos_ids[0]
    vocab_size = corpora[0].manifest.vocab_size if corpora else None
    vocab_size = vocab_size if model is None else model.vocab_size

    train, validation = [], []
    for file in files:
        if held_out:
            train.append(_open(file, "train", config, vocab_size))
            continue
        kept, held = _hold_out(file, config, vocab_size)
        train.append(kept)
        validation += [held] if len(held) else []
    validation += [_open(file, "validation", config, vocab_size) for file in held_out]
    tokenizer = corpora[0].tokenizer if corpora else None
    return Data(config, tuple(train), tuple(validation), tokenizer, eos_id, vocab_size)


def open_text(
    config: DataConfig,
    tokenizer: Tokenizer,
    model: DecoderConfig | None = None,
    *,
    max_tokens: int | None = None,
) -> Data:
    """Tokenises `config.text` in memory, all of it to validate on.

    Args:
      config: of which `text`, `text_suffixes` and `text_field` are read here.
      tokenizer: of the model that is evaluated.
      model: whose vocabulary the ids must fit.
      max_tokens: stop after so many; None: all of the text.

    Returns:
      `Data` with nothing to train on, and one array to validate on.

    Raises:
      ConfigError: the text cannot be read or is empty, or the ids do not fit the model.
    """
    if model is not None:
        _fits("the tokenizer", tokenizer.vocab_size, model)
    documents, count = [], 0
    for file in find_files(config.text, config.text_suffixes):
        for document in read_documents(file, config.text_field):
            ids = [*tokenizer.encode(document.text), tokenizer.eos_id]
            documents.append(np.array(ids, np.uint32))
            count += len(ids)
            if max_tokens is not None and count >= max_tokens:
                break
        if max_tokens is not None and count >= max_tokens:
            break
    if not documents:
        raise ConfigError(f"the text {', '.join(config.text)} is empty")
    tokens = np.concatenate(documents)[:max_tokens]
    return Data(config, (), (tokens,), tokenizer, tokenizer.eos_id, tokenizer.vocab_size)


class _File(NamedTuple):
    path: Path
    corpus: Corpus | None


def _expand(patterns: Sequence[str]) -> list[Path]:
    paths = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.exists() or not glob.has_magic(pattern):
            paths.append(path)
            continue
        matches = sorted(glob.glob(str(path), recursive=True))
        if not matches:
            raise ConfigError(f"the token files {pattern!r} match nothing")
        paths += map(Path, matches)
    return paths


def _corpus_of(path: Path) -> Corpus | None:
    """The corpus that is this folder, or that this file is part of."""
    if path.is_dir():
        return open_corpus(path)
    if path.name in ("train.bin", "validation.bin") and path.with_name("manifest.json").exists():
        return open_corpus(path.parent)
    return None


def _fits(what: str, vocab_size: int, model: DecoderConfig) -> None:
    if vocab_size > model.vocab_size:
        raise ConfigError(
            f"{what} has a vocabulary of {vocab_size}; model.vocab_size is {model.vocab_size} "
            "and must be at least that"
        )


def _check_corpora(corpora: list[Corpus], config: DataConfig, model: DecoderConfig | None) -> None:
    for corpus in corpora:
        if model is not None:
            _fits(f"the corpus {corpus.folder}", corpus.manifest.vocab_size, model)
        if config.eos_id not in (None, corpus.manifest.eos_id):
            raise ConfigError(
                f"data.eos_id is {config.eos_id}; documents in {corpus.folder} end with "
                f"{corpus.manifest.eos_id}; leave it out"
            )
        if corpus.tokenizer.to_json() != corpora[0].tokenizer.to_json():
            raise ConfigError(
                f"the corpora {corpora[0].folder} and {corpus.folder} have different tokenizers"
            )


def _open(file: _File, split: str, config: DataConfig, vocab_size: int | None) -> np.ndarray:
    if file.path.is_dir():
        tokens = getattr(file.corpus, split)
        if not len(tokens):
            raise ConfigError(f"the corpus {file.path} has no {split} tokens")
        return tokens
    dtype = config.tokens_dtype
    if dtype == "auto":
        dtype = "uint32" if file.corpus is None else file.corpus.manifest.dtype
    return open_tokens(file.path, dtype, vocab_size)


def _hold_out(
    file: _File, config: DataConfig, vocab_size: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens to train on and tokens to validate on."""
    tokens = _open(file, "train", config, vocab_size)
    if file.path.is_dir() and len(file.corpus.validation) >= config.sequence_length:
        return tokens, file.corpus.validation
    windows = len(tokens) // config.sequence_length
    held = min(max(1, round(windows * config.validation_fraction)), windows - 1)
    if config.validation_fraction == 0 or held < 1:
        return tokens, tokens[:0]
    cut = (windows - held) * config.sequence_length
    return tokens[:cut], tokens[cut:]
