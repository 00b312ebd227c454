"""From a data section to tokens: the one entry point for training and evaluation."""

import dataclasses
import functools
import glob
import hashlib
import itertools
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from repo_jax.config import DataConfig, DecoderConfig, SourceConfig
from repo_jax.data import object_store
from repo_jax.data.batches import TrainingBatches, ValidationBatches
from repo_jax.data.build import cached_corpus, planned_vocab_size
from repo_jax.data.corpus import Corpus, open_corpus
from repo_jax.data.mixture import Mixture
from repo_jax.data.object_store import StoredTokens, Tokens
from repo_jax.data.text import find_files, read_documents
from repo_jax.data.token_files import open_tokens, opening
from repo_jax.data.tokenizers import Tokenizer
from repo_jax.errors import ConfigError

# What a fingerprint is made of: so many blocks of each file, from its first token to its last.
_BLOCKS = 8
_BLOCK = 4096


@dataclasses.dataclass(frozen=True)
class Data:
    """Tokens to train and to validate on, and what is known of them.

    Attributes:
      config: the data section it came from.
      train: token arrays, [tokens] each, mapped from disk or in an object store.
      validation: likewise, none of them in `train`; may be empty.
      tokenizer: that made the tokens; None for token files.
      eos_id: the id that ends a document, if known.
      vocab_size: ids are below it: the model's where one was given, else the tokenizer's.
      source_of: number of the source of each array of `train`, ascending; () unless the
        config names sources.
    """

    config: DataConfig
    train: tuple[Tokens, ...]
    validation: tuple[Tokens, ...]
    tokenizer: Tokenizer | None
    eos_id: int | None
    vocab_size: int | None
    source_of: tuple[int, ...] = ()

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names by the numbers in a batch's `source`; () where there is one source only."""
        return tuple(self.config.sources)

    @property
    def byte_lengths(self) -> np.ndarray | None:
        """UTF-8 bytes of each id, int32 [entries of the tokenizer], where they are known."""
        return None if self.tokenizer is None else self.tokenizer.byte_lengths

    @functools.cached_property
    def fingerprint(self) -> str:
        """A short hash of the training tokens: their number, and blocks from all over each file.

        Of a mixture also the names and weights of its sources. For a run to notice that it is
        continued on other data, wherever these are kept. Begins with the number of blocks.
        """
        return f"{_BLOCKS}-{self._digest(_BLOCKS)}"

    def has_fingerprint(self, fingerprint: str) -> bool:
        """Whether it is that of these data; once it was of both ends, and had no number."""
        blocks, _, digest = fingerprint.rpartition("-")
        return self._digest(int(blocks or 2)) == digest

    def _digest(self, blocks: int) -> str:
        digest = hashlib.blake2b(digest_size=8)
        if self.config.sources:
            weights = {name: source.weight for name, source in self.config.sources.items()}
            digest.update(json.dumps([list(weights.items()), self.source_of]).encode())
        starts = lambda array: np.linspace(0, max(0, len(array) - _BLOCK), blocks).astype(int)
        parts = [array[i : i + _BLOCK] for array in self.train for i in starts(array)]
        found = iter(object_store.read(parts))
        for array in self.train:
            digest.update(str(len(array)).encode())
            for part in itertools.islice(found, blocks):
                digest.update(part.astype("<u4").tobytes())
        return digest.hexdigest()

    @property
    def _windows(self) -> list[int]:
        """Training windows of each source, or of the only one."""
        counts = [0] * max(1, len(self.config.sources))
        for array, source in zip(self.train, self.source_of or itertools.repeat(0), strict=False):
            counts[source] += len(array) // self.config.sequence_length
        return counts

    @functools.cached_property
    def _mixture(self) -> Mixture | None:
        weights = [source.weight for source in self.config.sources.values()]
        if not weights:
            return None
        return Mixture(self._windows if None in weights else weights)

    def describe(self, steps: int) -> list[str]:
        """A line for each source: its size, its share, and how often `steps` steps read it."""
        T = self.config.sequence_length
        lines = []
        names, shares = ("data",), [1.0]
        if self._mixture is not None:
            names, shares = self.source_names, self._mixture.shares
        for name, windows, share in zip(names, self._windows, shares, strict=True):
            epochs = steps * self.config.batch_size * share / windows
            lines.append(
                f"{name}: {windows * T:,} tokens in {windows:,} windows, "
                f"{100 * share:.4g} % of the run, {epochs:.3g} epochs"
            )
        return lines

    def training_batches(self, rows: slice | np.ndarray = slice(None)) -> TrainingBatches:
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
            mixture=self._mixture,
            source_of=self.source_of,
            repetition_filter=self.config.repetition_filter,
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
      MissingPackageError: an object store needs a package that is not installed.
      TrainingError: an object store does not answer.
    """
    sources = list(config.sources.values()) or [SourceConfig(config.text, config.tokens)]
    if any(source.text for source in sources) and model is not None:
        check_vocabulary(f"data.tokenizer {config.tokenizer}", planned_vocab_size(config), model)
    # First, since text to train on may take long to tokenise.
    held_out = _find(SourceConfig(tokens=config.validation_tokens), 0, config)
    files = [
        file for number, source in enumerate(sources) for file in _find(source, number, config)
    ]
    if not files and not held_out:
        raise ConfigError("none of data.text, data.tokens and data.validation_tokens is given")
    corpora = [file.corpus for file in (*files, *held_out) if file.corpus is not None]
    _check_corpora(corpora, config, model)

    eos_id = corpora[0].manifest.eos_id if corpora else config.eos_id
    if eos_id is None and model is not None and model.eos_ids:
        eos_id = model.eos_ids[0]
    vocab_size = corpora[0].manifest.vocab_size if corpora else None
    vocab_size = vocab_size if model is None else model.vocab_size

    everything = (file.tokens for file in (*files, *held_out))
    object_store.check([tokens for tokens in everything if tokens is not None], vocab_size)
    train, validation = [], []
    with opening(sum(file.path is not None for file in (*files, *held_out))):
        for file in files:
            if held_out:
                train.append(_open(file, "train", config, vocab_size))
                continue
            kept, held = _hold_out(file, config, vocab_size)
            train.append(kept)
            validation += [held] if len(held) else []
        validation += [_open(file, "validation", config, vocab_size) for file in held_out]
    if held_out:
        for name in {tokens.filename for tokens in train} & {held.filename for held in validation}:
            raise ConfigError(
                f"{name} is both trained on and in data.validation_tokens; leave it out of one"
            )
    tokenizer = corpora[0].tokenizer if corpora else None
    source_of = tuple(file.source for file in files) if config.sources else ()
    parts = (tuple(train), tuple(validation))
    data = Data(config, *parts, tokenizer, eos_id, vocab_size, source_of)
    for name, windows in zip(data.source_names, data._windows, strict=False):
        if not windows:
            raise ConfigError(
                f"data.sources.{name} has no window of sequence_length {config.sequence_length} "
                "to train on"
            )
    return data


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
        check_vocabulary("the tokenizer", tokenizer.vocab_size, model)
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
    """A token file or a corpus folder.

    Attributes:
      path: of a local one.
      corpus: of which it is, or which it is part of.
      tokens: of one in an object store.
      source: its number.
    """

    path: Path | None
    corpus: Corpus | None
    tokens: StoredTokens | None
    source: int


def _find(source: SourceConfig, number: int, config: DataConfig) -> list[_File]:
    if source.text:
        corpus = cached_corpus(dataclasses.replace(config, text=source.text, sources={}))
        return [_File(corpus.folder, corpus, None, number)]
    files = []
    for pattern in source.tokens:
        if object_store.is_url(pattern):
            dtype = "uint32" if config.tokens_dtype == "auto" else config.tokens_dtype
            stored = object_store.find(pattern, dtype)
            files += [_File(None, None, tokens, number) for tokens in stored]
        else:
            files += [_File(path, _corpus_of(path), None, number) for path in _expand(pattern)]
    return files


def _expand(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.exists():
        return [path]
    if not glob.has_magic(pattern):
        raise ConfigError(f"token file {path} does not exist")
    matches = sorted(glob.glob(str(path), recursive=True))
    if not matches:
        raise ConfigError(f"the token files {pattern!r} match nothing")
    return [*map(Path, matches)]


def _corpus_of(path: Path) -> Corpus | None:
    """The corpus that is this folder, or that this file is part of."""
    if path.is_dir():
        return open_corpus(path)
    if path.name in ("train.bin", "validation.bin") and path.with_name("manifest.json").exists():
        return open_corpus(path.parent)
    return None


def check_vocabulary(what: str, vocab_size: int, model: DecoderConfig) -> None:
    """Refuses tokens that a model may not know: it has no embedding of an id beyond its own.

    Raises:
      ConfigError: `vocab_size`, which `what` has, is more than the model's.
    """
    if vocab_size > model.vocab_size:
        raise ConfigError(
            f"{what} has a vocabulary of {vocab_size}; model.vocab_size is {model.vocab_size} "
            "and must be at least that"
        )


def _check_corpora(corpora: list[Corpus], config: DataConfig, model: DecoderConfig | None) -> None:
    for corpus in corpora:
        if model is not None:
            check_vocabulary(f"the corpus {corpus.folder}", corpus.manifest.vocab_size, model)
        if config.eos_id not in (None, corpus.manifest.eos_id):
            raise ConfigError(
                f"data.eos_id is {config.eos_id}; documents in {corpus.folder} end with "
                f"{corpus.manifest.eos_id}; leave it out"
            )
        if corpus.tokenizer.to_json() != corpora[0].tokenizer.to_json():
            raise ConfigError(
                f"the corpora {corpora[0].folder} and {corpus.folder} have different tokenizers"
            )


def _open(file: _File, split: str, config: DataConfig, vocab_size: int | None) -> Tokens:
    if file.tokens is not None:
        return file.tokens
    if file.path.is_dir():
        tokens = getattr(file.corpus, split)
        if not len(tokens):
            raise ConfigError(f"the corpus {file.path} has no {split} tokens")
        return tokens
    dtype = config.tokens_dtype
    if dtype == "auto":
        dtype = "uint32" if file.corpus is None else file.corpus.manifest.dtype
    return open_tokens(file.path, dtype, vocab_size)


def _hold_out(file: _File, config: DataConfig, vocab_size: int | None) -> tuple[Tokens, Tokens]:
    """Tokens to train on and tokens to validate on."""
    tokens = _open(file, "train", config, vocab_size)
    folder = file.path is not None and file.path.is_dir()
    if folder and len(file.corpus.validation) >= config.sequence_length:
        return tokens, file.corpus.validation
    windows = len(tokens) // config.sequence_length
    held = min(max(1, round(windows * config.validation_fraction)), windows - 1)
    if config.validation_fraction == 0 or held < 1:
        return tokens, tokens[:0]
    cut = (windows - held) * config.sequence_length
    return tokens[:cut], tokens[cut:]
