"""Documents from text files: which files, and what is in them.

A file of plain text is one document. In JSON lines (.jsonl, .json) each line is one, its
text being a field. Either may be compressed (.gz, .zst).
"""

import contextlib
import glob
import gzip
import io
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from repo_jax.errors import ConfigError, MissingPackageError

STDLIB = "python-stdlib"

_JSON_LINES = (".jsonl", ".json")
_COMPRESSED = (".gz", ".zst")
_NOT_STDLIB = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")


class Document(NamedTuple):
    """One document.

    Attributes:
      text: never empty, and encodable as UTF-8.
      disk_bytes: bytes read from disk since the document before, for showing progress.
    """

    text: str
    disk_bytes: int


def find_files(sources: Sequence[str], suffixes: Sequence[str]) -> list[Path]:
    """The files that `sources` stand for, each once, in an order that does not vary.

    Args:
      sources: files and globs (`**` included), read whatever their suffix; folders, of which
        all files with one of `suffixes` are read, hidden ones excepted; or `python-stdlib`,
        the sources of the running Python's standard library without its tests.
      suffixes: such as `.txt`; compressed files count by the suffix before .gz or .zst.

    Raises:
      ConfigError: a source does not exist or gives no files.
    """
    found = (file for source in sources for file in _source_files(source, tuple(suffixes)))
    return list({file.resolve(): file for file in found}.values())


def read_documents(file: Path, text_field: str = "text") -> Iterator[Document]:
    """The documents of one file, in order; empty ones are left out.

    Args:
      file: plain text or JSON lines, perhaps compressed.
      text_field: the field of a JSON line that holds the text.

    Raises:
      ConfigError: the file is damaged, is not UTF-8, or a line is not a JSON object with
        `text_field`; names the file and the line.
      MissingPackageError: a .zst file without the package zstandard.
    """
    read = _read_json_lines if _plain_name(file).endswith(_JSON_LINES) else _read_text
    try:
        with file.open("rb") as raw, _decompressed(file, raw) as stream:
            position = 0
            for text in read(file, stream, text_field):
                if text:
                    yield Document(text, raw.tell() - position)
                    position = raw.tell()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ConfigError(f"{file} is damaged or cut short: {error}") from None


def _source_files(source: str, suffixes: tuple[str, ...]) -> list[Path]:
    if source == STDLIB:
        return _walk(Path(sysconfig.get_path("stdlib")), (".py",), skip=_NOT_STDLIB)
    path = Path(source).expanduser()
    if path.is_dir():
        return _walk(path, suffixes)
    if path.exists():
        return [path]
    if not glob.has_magic(source):
        raise ConfigError(
            f"text source {source!r} does not exist; give a file, a folder, a glob or {STDLIB}"
        )
    matches = sorted(glob.glob(str(path), recursive=True))
    files = [match for match in map(Path, matches) if match.is_file()]
    if not files:
        raise ConfigError(f"text source {source!r} matches no file")
    return files


def _walk(folder: Path, suffixes: tuple[str, ...], skip: Sequence[str] = ()) -> list[Path]:
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in skip and not f.startswith("."))
        files += [
            Path(parent, name)
            for name in sorted(names)
            if _plain_name(Path(name)).endswith(suffixes) and not name.startswith(".")
        ]
    if not files:
        raise ConfigError(
            f"the folder {folder} has no file ending in {', '.join(suffixes)} "
            f"(or one of these with {' or '.join(_COMPRESSED)})"
        )
    return files


def _plain_name(file: Path) -> str:
    return file.stem if file.suffix in _COMPRESSED else file.name


@contextlib.contextmanager
def _decompressed(file: Path, raw: BinaryIO) -> Iterator[BinaryIO]:
    if file.suffix == ".gz":
        with gzip.GzipFile(fileobj=raw) as stream:
            yield stream
    elif file.suffix == ".zst":
        with io.BufferedReader(_ZstdStream(raw)) as stream:
            yield stream
    else:
        yield raw


def _read_text(file: Path, stream: BinaryIO, text_field: str) -> Iterator[str]:
    yield stream.read().decode("utf-8-sig")


def _read_json_lines(file: Path, stream: BinaryIO, text_field: str) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{file}:{number}: the line is not UTF-8: {error.reason} at its byte {error.start}"
            ) from None
        except ValueError as error:
            raise ConfigError(f"{file}:{number}: the line is not JSON: {error}") from None
        text = record.get(text_field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise ConfigError(
                f"{file}:{number}: the line has no text field {text_field!r}; it has "
                f"{_fields(record)}"
            )
        # JSON may escape half of a surrogate pair, which is no character and has no UTF-8.
        yield text.encode("utf-8", "replace").decode("utf-8")


def _fields(record: Any) -> str:
    if not isinstance(record, dict):
        return f"a JSON {type(record).__name__} and no fields"
    return ", ".join(f"{name} ({type(value).__name__})" for name, value in record.items())


class _ZstdStream(io.RawIOBase):
    """Reads zstd frames one after the other.

    zstandard's own reader takes a frame that is cut short for its end, which would lose the
    rest of a damaged corpus without a word; this one raises EOFError.
    """

    def __init__(self, raw: BinaryIO):
        try:
            import zstandard
        except ImportError:
            raise MissingPackageError("zstandard", "reading .zst files", "zstd") from None
        # Frames written with --long have windows beyond the default limit.
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
        self._error = zstandard.ZstdError
        self._raw = raw
        self._frame = None
        self._compressed = b""
        self._text = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            self._compressed = self._compressed or self._raw.read(2**16)
            if not self._compressed and self._frame is not None:
                raise EOFError("the last zstd frame has no end")
            if not self._compressed:
                return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            frame = self._frame
            try:
                self._text = frame.decompress(self._compressed)
            except self._error as error:
                raise EOFError(str(error)) from None
            self._compressed = frame.unused_data
            if frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._text))
        buffer[:size] = self._text[:size]
        self._text = self._text[size:]
        return size
