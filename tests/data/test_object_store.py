"""Token files in object stores: s3fs against a server on this machine, fsspec's memory."""

import shutil
import sys
import threading

import fsspec
import numpy as np
import pytest
import s3fs

from repo_jax.config import DataConfig, SourceConfig
from repo_jax.data import StoredTokens, object_store, open_data
from repo_jax.errors import ConfigError, MissingPackageError, TrainingError
from tests.data import stores

T = 100


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with stores.serve(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def bucket(server, monkeypatch):
    """A folder that s3fs reads as s3://bucket."""
    for name, value in {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": "name",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    # What fails is to reach our own second attempts, and they are not to wait.
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setattr(object_store, "_WAITS", (0.0,) * 7)
    s3fs.S3FileSystem.clear_instance_cache()
    folder = server.root / "bucket"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    server.ranges.clear()
    server.failing.clear()
    return folder


def write(path, start, count, dtype="<u4"):
    np.arange(start, start + count).astype(dtype).tofile(path)


def both(bucket, **options):
    """The same files, from the store and from disk."""
    config = {"sequence_length": T, "batch_size": 8, "validation_fraction": 0.1, **options}
    return (
        open_data(DataConfig(tokens=f"{where}/*.npy", **config))
        for where in ("s3://bucket", bucket)
    )


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_store_gives_what_the_disk_gives(bucket, dtype):
    for i in range(3):
        write(bucket / f"{i}.npy", i * 5000, 5000 + i, dtype)
    stored, local = both(bucket, tokens_dtype=dtype)
    assert all(isinstance(array, StoredTokens) for array in stored.train)
    assert [len(array) for array in stored.train] == [len(array) for array in local.train]
    assert stored.fingerprint == local.fingerprint
    stream = stored.training_batches(rows=np.array([1, 4, 5])).iterate(3)
    for step in range(3, 20):
        expected = local.training_batches().at(step)["tokens"][[1, 4, 5]]
        assert np.array_equal(next(stream)["tokens"], expected)
    stream.close()
    pairs = zip(stored.validation_batches(), local.validation_batches(), strict=True)
    for ours, theirs in pairs:
        assert np.array_equal(ours["tokens"], theirs["tokens"])


def test_only_the_windows_that_are_needed_are_read(bucket, server):
    write(bucket / "a.npy", 0, 200_000)
    (data, _) = both(bucket)
    opened = sum(last - first + 1 for _, first, last in server.ranges)
    assert opened == 2 * 4096 * 4
    batches = data.training_batches(rows=slice(2, 5))
    server.ranges.clear()
    batch = batches.at(7)
    expected = [("a.npy", 4 * row[0], 4 * (row[0] + T) - 1) for row in batch["tokens"]]
    assert sorted(server.ranges) == sorted(expected)


def test_the_windows_of_a_batch_are_asked_for_at_once(bucket, server, monkeypatch):
    write(bucket / "a.npy", 0, 5000)
    (data, _) = both(bucket, batch_size=32)
    # Nothing is answered before all are asked.
    monkeypatch.setattr(server, "gate", threading.Barrier(32, timeout=30))
    assert data.training_batches().at(0)["tokens"].shape == (32, T)


def test_failures_that_pass_are_waited_for(bucket, server, capsys):
    write(bucket / "a.npy", 0, 5000)
    stored, local = both(bucket)
    batches = stored.training_batches()
    server.ranges.clear()
    server.failing += [503, 200, 500]  # 200: the answer is cut short
    assert np.array_equal(batches.at(1)["tokens"], local.training_batches().at(1)["tokens"])
    assert len(server.ranges) == 8 + 3  # What had come was not asked for again.
    assert capsys.readouterr().err == ""


def test_a_store_that_stays_silent_ends_the_run_by_name(bucket, server, capsys):
    write(bucket / "a.npy", 0, 5000)
    (data, _) = both(bucket)
    server.failing += [503] * 1000
    message = r"^s3://bucket/a\.npy cannot be read, in 8 attempts: OSError: "
    with pytest.raises(TrainingError, match=message):
        next(data.training_batches().iterate())
    assert "s3://bucket/a.npy could not be read 3 times (OSError" in capsys.readouterr().err


def test_a_file_that_vanishes_or_is_cut_is_named(bucket):
    write(bucket / "a.npy", 0, 5000)
    (data, _) = both(bucket)
    (bucket / "a.npy").unlink()
    with pytest.raises(ConfigError, match=r"token file s3://bucket/a\.npy does not exist"):
        data.training_batches().at(0)
    write(bucket / "a.npy", 0, 2)
    with pytest.raises(TrainingError, match=r"s3://bucket/a\.npy cannot be read, in 8 attempts"):
        data.training_batches().at(0)


def test_files_that_are_refused_when_they_are_opened(bucket):
    def refused(message, url="s3://bucket/a.npy", **options):
        with pytest.raises(ConfigError, match=message):
            open_data(DataConfig(tokens=url, **options), model)

    model = None
    refused(r"token file s3://bucket/a\.npy does not exist")
    refused(r"the token files 's3://bucket/a\*' match nothing", "s3://bucket/a*")
    (bucket / "a.npy").touch()
    refused(r"token file s3://bucket/a\.npy is empty")
    (bucket / "a.npy").write_bytes(bytes(6))
    refused(r"a\.npy has 6 bytes, which is no multiple of 4 \(uint32\)")
    np.save(bucket / "a.npy", np.zeros(5, np.uint32))
    refused(r"s3://bucket/a\.npy is in numpy's format; token files have no header")
    (bucket / "folder").mkdir()
    write(bucket / "folder" / "b.npy", 0, 100)
    refused("s3://bucket/folder is a folder; name token files, or a glob", "s3://bucket/folder")
    refused("nothing://a is of no kind of store that can be read", "nothing://a")


def test_ids_are_checked_at_both_ends_and_when_they_are_read(bucket):
    tokens = np.zeros(20_000, "<u4")
    tokens[[10_000, 19_999]] = 300
    tokens.tofile(bucket / "a.npy")
    options = dict(tokens="s3://bucket/a.npy", sequence_length=T, validation_fraction=0.0)
    file = object_store.find("s3://bucket/a.npy", "uint32")
    with pytest.raises(ConfigError, match=r"s3://bucket/a\.npy has the token id 300"):
        object_store.check(file, 300)
    tokens[19_999] = 0
    tokens.tofile(bucket / "a.npy")
    object_store.check(file, 300)
    batches = open_data(DataConfig(**options, batch_size=200)).training_batches()
    assert batches.at(0)["tokens"].max() == 300


def test_a_mixture_of_a_store_and_the_disk(bucket, tmp_path):
    write(bucket / "a.npy", 0, 10 * T)
    write(tmp_path / "b.npy", 10 * T, 10 * T)
    sources = {
        "store": SourceConfig(tokens="s3://bucket/a.npy"),
        "disk": SourceConfig(tokens=str(tmp_path / "b.npy")),
    }
    options = dict(sequence_length=T, batch_size=10, validation_fraction=0.0)
    batch = open_data(DataConfig(sources=sources, **options)).training_batches().at(0)
    assert np.array_equal(batch["tokens"][:, 0] >= 10 * T, batch["source"])
    assert np.bincount(batch["source"]).tolist() == [5, 5]


def test_whatever_fsspec_reads_is_a_store():
    memory = fsspec.filesystem("memory")
    memory.pipe("/tokens/a.bin", np.arange(1000, dtype="<u2").tobytes())
    config = DataConfig(
        tokens="memory://tokens/*.bin", tokens_dtype="uint16", sequence_length=T, batch_size=2
    )
    data = open_data(config)
    assert [len(part) for part in (*data.train, *data.validation)] == [900, 100]
    batch = data.training_batches().at(0)["tokens"]
    assert np.array_equal(batch, batch[:, :1] + np.arange(T))
    memory.rm("/tokens", recursive=True)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    for url, package, extra in (("gs://b/a", "gcsfs", "gcs"), ("s3://b/a", "s3fs", "s3")):
        message = rf"reading {url} needs the package '{package}', .*repo-jax\[{extra}\]"
        with pytest.raises(MissingPackageError, match=message):
            open_data(DataConfig(tokens=url))
    with pytest.raises(ConfigError, match="ftp://b/a is of no kind of store that can be read"):
        open_data(DataConfig(tokens="ftp://b/a"))
