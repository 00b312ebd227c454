"""Which files text sources stand for, and the documents in them."""

import builtins
import gzip
import json
import os

import pytest
import zstandard

from repo_jax.data import find_files, read_documents
from repo_jax.errors import ConfigError, MissingPackageError

SUFFIXES = (".txt", ".jsonl")
COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path, **options):
    return [document.text for document in read_documents(path, **options)]


def json_lines(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def test_files_of_a_folder(tmp_path):
    names = ["b.txt", "a/z.txt.gz", "a/y.jsonl.zst", "c.jsonl", "no.bin", ".hidden/a.txt", ".b.txt"]
    for name in names:
        write(tmp_path / name, "x")
    found = [str(file.relative_to(tmp_path)) for file in find_files([str(tmp_path)], SUFFIXES)]
    assert found == ["b.txt", "c.jsonl", "a/y.jsonl.zst", "a/z.txt.gz"]


def test_files_and_globs_are_read_whatever_their_suffix_and_each_once(tmp_path):
    for name in ("2.log", "1.log", "deep/down/3.log"):
        write(tmp_path / name, "x")
    sources = [str(tmp_path / "2.log"), str(tmp_path / "**" / "*.log")]
    found = [file.name for file in find_files(sources, SUFFIXES)]
    assert found == ["2.log", "1.log", "3.log"]


def test_a_name_that_looks_like_a_glob_is_a_file_if_there_is_one(tmp_path):
    file = write(tmp_path / "a[1].txt", "x")
    assert find_files([str(file)], SUFFIXES) == [file]


def test_the_standard_library():
    files = find_files(["python-stdlib"], SUFFIXES)
    names = [str(file) for file in files]
    # Its sources are 9 to 14 MB from Python 3.11 to 3.14.
    assert 8e6 < sum(file.stat().st_size for file in files) < 20e6
    assert any(name.endswith(os.path.join("json", "decoder.py")) for name in names)
    assert not [
        name for name in names if "site-packages" in name or f"{os.sep}test{os.sep}" in name
    ]
    assert find_files(["python-stdlib"], SUFFIXES) == files
    assert "def loads" in read(next(f for f in files if f.parts[-2:] == ("json", "__init__.py")))[0]


def test_sources_that_give_nothing(tmp_path):
    with pytest.raises(ConfigError, match=r"'nowhere' does not exist; give a file, a folder"):
        find_files(["nowhere"], SUFFIXES)
    with pytest.raises(ConfigError, match=r"'nowhere/\*' matches no file"):
        find_files(["nowhere/*"], SUFFIXES)
    with pytest.raises(ConfigError, match=r"no file ending in \.txt, \.jsonl .*\.gz or \.zst"):
        find_files([str(tmp_path)], SUFFIXES)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_plain_text_is_one_document_byte_for_byte(tmp_path, suffix):
    content = "café\r\n\r\n東京 🎉\n".encode()
    file = write(tmp_path / f"a.txt{suffix}", COMPRESS[suffix](content))
    (document,) = read_documents(file)
    assert document.text.encode() == content
    assert document.disk_bytes == file.stat().st_size


@pytest.mark.parametrize("suffix", COMPRESS)
def test_each_json_line_is_a_document(tmp_path, suffix):
    texts = [f"line {i}\nof é" * 100 for i in range(500)]
    content = COMPRESS[suffix](json_lines(*texts, "") + b"\n  \n")
    assert read(write(tmp_path / f"a.jsonl{suffix}", content)) == texts


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert read(write(tmp_path / "a.txt", b"\xef\xbb\xbfa")) == ["a"]
    assert read(write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + json_lines("a"))) == ["a"]


def test_an_empty_file_has_no_document(tmp_path):
    assert read(write(tmp_path / "a.txt", "")) == []


def test_half_a_surrogate_pair_in_json_becomes_encodable(tmp_path):
    (text,) = read(write(tmp_path / "a.jsonl", '{"text": "a\\ud83d"}'))
    assert text.encode() == b"a?"


def test_compressed_frames_one_after_the_other_are_all_read(tmp_path):
    for suffix in (".gz", ".zst"):
        content = b"".join(COMPRESS[suffix](part) for part in (b"ab", b"", b"cd"))
        assert read(write(tmp_path / f"a.txt{suffix}", content)) == ["abcd"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_compressed_file_that_is_cut_short_or_no_such_file(tmp_path, suffix, name):
    whole = COMPRESS[suffix](json_lines(*map(str, range(30_000))))
    for content in (whole[: len(whole) // 2], whole[:-3], b"not compressed"):
        file = write(tmp_path / (name + suffix), content)
        with pytest.raises(ConfigError, match=rf"{name}{suffix} is damaged or cut short"):
            read(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', r"a\.jsonl:2: the line is not JSON: Expecting value"),
        (b'\n{"body": "a", "id": 3}', r"a\.jsonl:2: .* no text field 'text'; .* id \(int\)"),
        (b'{"text": 3}', r"a\.jsonl:1: .* no text field 'text'; it has text \(int\)"),
        (b'["text"]', r"a\.jsonl:1: .* no text field 'text'; it has a JSON list and no fields"),
        (b'{"text": "\xff"}', r"a\.jsonl:1: the line is not UTF-8: invalid start .* byte 10"),
    ],
)
def test_bad_json_lines(tmp_path, content, message):
    with pytest.raises(ConfigError, match=message):
        read(write(tmp_path / "a.jsonl", content))


def test_another_text_field(tmp_path):
    assert read(write(tmp_path / "a.jsonl", '{"body": "b"}'), text_field="body") == ["b"]


def test_text_that_is_not_utf8(tmp_path):
    with pytest.raises(ConfigError, match=r"a\.txt is not UTF-8 text: .* at byte 3"):
        read(write(tmp_path / "a.txt", "caf\xe9 au lait".encode("latin-1")))


def test_zst_without_zstandard(tmp_path, monkeypatch):
    def without(name, *arguments):
        if name == "zstandard":
            raise ImportError(name)
        return original(name, *arguments)

    original = builtins.__import__
    file = write(tmp_path / "a.txt.zst", zstandard.compress(b"a"))
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingPackageError, match=r"\.zst files needs the package 'zstandard'"):
        read(file)
