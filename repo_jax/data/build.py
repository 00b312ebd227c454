"""Tokenises text into corpus folders, as a stream.

A folder is made under another name and renamed when it is complete, so that whatever kills
the process, a folder under its own name is whole. Several processes may make the same one:
the first to finish wins. What a killed process left is removed by the next that makes the same
folder on the same host: the processes hold locks on what they write.
"""

import contextlib
import dataclasses
import fcntl
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from repo_jax.config import DataConfig
from repo_jax.data import text, token_files
from repo_jax.data.corpus import VERSION, Corpus, Manifest, Split, open_corpus
from repo_jax.data.tokenizers import Tokenizer, byte_tokenizer, train_bpe
from repo_jax.errors import ConfigError
from repo_jax.progress import progress

# Characters of a longer document that are encoded on their own, and characters that are
# encoded at a time: they bound memory and keep all cores busy. Pieces end after a line, so
# that a long document's tokens hardly differ from those it would get in one go.
_PIECE = 2**18
_BATCH = 2**20


def cached_corpus(config: DataConfig) -> Corpus:
    """The corpus of `config.text` in `config.cache_dir`, tokenised now if it is not there.

    The folder's name has a hash of the options and of the sources' paths, sizes and
    modification times, so changed text is tokenised anew, into another folder.

    Raises:
      ConfigError: the text or the tokenizer cannot be read.
    """
    files = text.find_files(config.text, config.text_suffixes)
    tokenizer = _ready_tokenizer(config)
    fingerprint = _fingerprint(config, files, tokenizer)
    source = f"{Path(config.text[0]).name}-{Path(config.tokenizer).name}"
    readable = re.sub(r"[^\w.-]+", "-", source).strip("-.")
    folder = Path(config.cache_dir).expanduser() / f"{readable}-{fingerprint}"
    if not folder.exists():
        # Otherwise another process was faster, and its folder is as good.
        with contextlib.suppress(FileExistsError):
            _build(config, folder, files, tokenizer, fingerprint)
    return open_corpus(folder)


def build_corpus(config: DataConfig, folder: str | Path) -> Corpus:
    """Tokenises `config.text` into `folder`.

    Read are `text`, `text_suffixes`, `text_field`, `tokenizer`, `eos_id` (for a
    tokenizer.json) and `validation_fraction`. A hash of its text decides where a document
    goes, so no text is in both splits, however often it occurs; the first document is always
    trained on. A BPE is trained on the training documents. Memory does not grow with the
    text, except that each document is read whole.

    Args:
      folder: must not exist, or be empty.

    Raises:
      ConfigError: `folder` has something in it, or the text or the tokenizer cannot be read.
    """
    folder = Path(folder).expanduser()
    taken = ConfigError(f"{folder} is not an empty folder, and nothing is overwritten")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise taken
    files = text.find_files(config.text, config.text_suffixes)
    tokenizer = _ready_tokenizer(config)
    try:
        _build(config, folder, files, tokenizer, _fingerprint(config, files, tokenizer))
    except FileExistsError:
        raise taken from None
    return open_corpus(folder)


def planned_vocab_size(config: DataConfig) -> int:
    """The most entries that the tokenizer of `config` will have; reads no text."""
    tokenizer = _ready_tokenizer(config)
    return int(config.tokenizer[4:]) if tokenizer is None else tokenizer.vocab_size


def _ready_tokenizer(config: DataConfig) -> Tokenizer | None:
    """The tokenizer, or None if it has to be trained."""
    if config.tokenizer == "bytes":
        return byte_tokenizer()
    if config.tokenizer.startswith("bpe:"):
        return None
    return Tokenizer.load(config.tokenizer, config.eos_id)


def _fingerprint(config: DataConfig, files: list[Path], tokenizer: Tokenizer | None) -> str:
    named = config.tokenizer == "bytes" or tokenizer is None
    status = [(str(file.resolve()), file.stat()) for file in files]
    facts = [
        VERSION,
        [(path, stat.st_size, stat.st_mtime_ns) for path, stat in status],
        config.tokenizer if named else [tokenizer.to_json(), tokenizer.eos_id],
        config.validation_fraction,
        config.text_field,
        config.text_suffixes,
    ]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=5).hexdigest()


def _build(
    config: DataConfig,
    folder: Path,
    files: list[Path],
    tokenizer: Tokenizer | None,
    fingerprint: str,
) -> None:
    """Raises FileExistsError if another process has filled `folder` in the meantime."""
    n_bytes = sum(file.stat().st_size for file in files)
    with _partial(folder) as partial:
        if tokenizer is None:
            with progress("training the tokenizer", n_bytes, "B") as read:
                documents = _documents(config, files, read)
                training = (document.text for document in documents if not document.held_out)
                tokenizer = train_bpe(training, int(config.tokenizer.removeprefix("bpe:")))
        tokenizer.save(partial)
        dtype = token_files.smallest_dtype(tokenizer.vocab_size)
        with progress("tokenising", n_bytes, "B") as read:
            train, validation = _tokenise(
                _documents(config, files, read), tokenizer, partial, dtype
            )
        manifest = Manifest(
            dtype=dtype,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            tokenizer=config.tokenizer,
            text=config.text,
            validation_fraction=config.validation_fraction,
            fingerprint=fingerprint,
            train=train,
            validation=validation,
        )
        content = json.dumps(dataclasses.asdict(manifest), indent=2) + "\n"
        (partial / "manifest.json").write_text(content, encoding="utf-8")
        try:
            os.rename(partial, folder)  # Refused if there is a folder with something in it.
        except OSError:
            if folder.exists():
                raise FileExistsError(folder) from None
            raise


@contextlib.contextmanager
def _partial(folder: Path) -> Iterator[Path]:
    """A folder beside `folder`, empty and locked; removed unless it has been renamed."""
    # Locks may not be seen by other hosts that share the disk.
    name = f".{folder.name}.{socket.gethostname()}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f"{glob.escape(name)}.*.partial"):
        with _locked(left, fcntl.LOCK_EX | fcntl.LOCK_NB) as mine:
            if mine:
                shutil.rmtree(left, ignore_errors=True)
    while True:
        partial = folder.with_name(f"{name}.{secrets.token_hex(4)}.partial")
        partial.mkdir()
        with _locked(partial, fcntl.LOCK_EX):
            if not partial.exists():
                continue  # taken for a leftover before it was locked
            try:
                yield partial
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            return


@contextlib.contextmanager
def _locked(folder: Path, how: int) -> Iterator[bool]:
    """Locks a folder for the block; False where that cannot be done."""
    try:
        number = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        try:
            fcntl.flock(number, how)
            locked = True
        except OSError:  # held by another process, or no locks on this kind of disk
            locked = False
        yield locked
    finally:
        os.close(number)


class _Document(NamedTuple):
    text: str
    held_out: bool


class _Piece(NamedTuple):
    text: str
    held_out: bool
    ends_document: bool


def _documents(
    config: DataConfig, files: list[Path], read: Callable[[int], None]
) -> Iterator[_Document]:
    first = None
    for file in files:
        for document in text.read_documents(file, config.text_field):
            digest = hashlib.blake2b(document.text.encode(), digest_size=8).digest()
            # Some document must be trained on, even if there is only one.
            first = first or digest
            share = int.from_bytes(digest, "little") / 2**64
            yield _Document(document.text, digest != first and share < config.validation_fraction)
            read(document.disk_bytes)
    if first is None:
        raise ConfigError(f"the text has no documents: {len(files)} files, all of them empty")


def _tokenise(
    documents: Iterable[_Document], tokenizer: Tokenizer, folder: Path, dtype: str
) -> list[Split]:
    """Writes train.bin and validation.bin into `folder`."""
    count, utf8_bytes = [0, 0], [0, 0]
    with (
        token_files.TokenWriter(folder / "train.bin", dtype) as train,
        token_files.TokenWriter(folder / "validation.bin", dtype) as validation,
    ):
        writers = [train, validation]
        for batch in _batches(documents):
            encoded = tokenizer.encode_batch([piece.text for piece in batch])
            for piece, ids in zip(batch, encoded, strict=True):
                writers[piece.held_out].write(
                    [*ids, tokenizer.eos_id] if piece.ends_document else ids
                )
                count[piece.held_out] += piece.ends_document
                utf8_bytes[piece.held_out] += len(piece.text.encode())
    return [Split(writers[i].tokens, count[i], utf8_bytes[i]) for i in (False, True)]


def _batches(documents: Iterable[_Document]) -> Iterator[list[_Piece]]:
    batch, characters = [], 0
    for document in documents:
        pieces = _pieces(document.text)
        for number, piece in enumerate(pieces, start=1):
            batch.append(_Piece(piece, document.held_out, number == len(pieces)))
            characters += len(piece)
            if characters >= _BATCH:
                yield batch
                batch, characters = [], 0
    yield batch


def _pieces(document: str) -> list[str]:
    """Cuts after the last end of line of each `_PIECE` characters, if there is one."""
    pieces, start = [], 0
    while len(document) - start > _PIECE:
        end = document.rfind("\n", start, start + _PIECE) + 1 or start + _PIECE
        pieces.append(document[start:end])
        start = end
    return [*pieces, document[start:]]
