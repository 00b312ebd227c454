"""Token files: what is read, what is refused, and how they are written."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repo_jax.data import TokenWriter, check_ids, open_tokens, token_files
from repo_jax.errors import ConfigError


def test_layout_is_little_endian_ids_and_nothing_else(tmp_path):
    path = tmp_path / "a.npy"
    path.write_bytes(bytes([1, 0, 2, 1]))
    assert list(open_tokens(path, "uint16")) == [1, 258]
    assert list(open_tokens(path, "uint32")) == [1 + 2 * 2**16 + 2**24]


@given(parts=st.lists(st.lists(st.integers(0, 2**16 - 1))))
def test_what_is_written_is_read(parts, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "a.bin"
    with TokenWriter(path, "uint16") as writer:
        for part in parts:
            writer.write(part)
    assert np.array_equal(np.fromfile(path, "<u2"), [i for part in parts for i in part])
    assert writer.tokens == sum(map(len, parts))


def test_files_that_are_refused(tmp_path):
    path = tmp_path / "a.npy"
    with pytest.raises(ConfigError, match=r"a\.npy does not exist"):
        open_tokens(path, "uint32")
    path.touch()
    with pytest.raises(ConfigError, match=r"a\.npy is empty"):
        open_tokens(path, "uint32")
    path.write_bytes(bytes(10))
    with pytest.raises(ConfigError, match=r"has 10 bytes, which is no multiple of 4 \(uint32\)"):
        open_tokens(path, "uint32")
    np.save(path, np.arange(4, dtype=np.uint32))
    with pytest.raises(ConfigError, match=r"is in numpy's format; token files have no header"):
        open_tokens(path, "uint32")


@given(size=st.integers(1, 100), data=st.data())
def test_in_a_file_that_is_short_every_id_is_checked(size, data, tmp_path_factory):
    at = data.draw(st.integers(0, size - 1))
    tokens = np.zeros(size, np.uint32)
    tokens[at] = 50
    path = tmp_path_factory.mktemp("tokens") / "a.bin"
    tokens.tofile(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_files, "_BLOCK", 7)
        assert len(open_tokens(path, "uint32", vocab_size=51)) == size
        with pytest.raises(ConfigError, match=r"a\.bin has the token id 50; .* has 50 entries"):
            open_tokens(path, "uint32", vocab_size=50)


def test_a_long_file_is_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "_CHECKED_WHOLE", 1000)
    monkeypatch.setattr(token_files, "_BLOCK", 10)
    path = tmp_path / "a.bin"
    np.arange(10_000, dtype=np.uint16).tofile(path)
    with pytest.raises(ConfigError, match="has the token id 9999"):
        open_tokens(path, "uint16", vocab_size=9999)
    np.where(np.arange(10_000) == 300, 60_000, 0).astype("<u2").tofile(path)
    assert open_tokens(path, "uint16", vocab_size=9999).max() == 60_000


def test_ids_are_checked_against_the_vocabulary():
    check_ids(np.array([0, 9]), 10, "file")
    with pytest.raises(ConfigError, match="file has the token id 9; the vocabulary has 9 entries"):
        check_ids(np.array([0, 9]), 9, "file")


def test_ids_that_do_not_fit_the_dtype_are_not_written(tmp_path):
    for ids in ([70_000], [-1]):
        refused = pytest.raises(OverflowError, match="do not fit uint16")
        with refused, TokenWriter(tmp_path / "a.bin", "uint16") as writer:
            writer.write(ids)


def test_nothing_is_left_of_a_file_that_was_not_finished(tmp_path):
    def interrupted():
        with TokenWriter(tmp_path / "a.bin", "uint16") as writer:
            writer.write([1])
            assert not (tmp_path / "a.bin").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_existing_files_are_not_overwritten(tmp_path):
    path = tmp_path / "a.bin"
    refused = pytest.raises(ConfigError, match=r"a\.bin already exists and is not overwritten")
    with refused, TokenWriter(path, "uint16"):
        path.write_bytes(b"theirs")
    with refused, TokenWriter(path, "uint16"):
        pass
    assert path.read_bytes() == b"theirs"
    assert list(tmp_path.iterdir()) == [path]
