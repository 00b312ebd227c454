"""Checkpoints that are damaged, elsewhere, of another mesh, or cannot be written."""

import os
import resource
import shutil
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repo_jax import cli, load_run
from repo_jax.config import MeshConfig
from repo_jax.errors import ConfigError, MissingPackageError, TrainingError
from repo_jax.sharding import make_mesh, sharding
from repo_jax.training import lock
from repo_jax.training.checkpoint_files import checkpoint_folder
from repo_jax.training.checkpoints import Checkpoints, _checksums
from repo_jax.training.step import TrainState
from tests.tiny_runs import (
    TrainProcess,
    assert_same_bits,
    assert_same_run,
    checkpoints_of,
    keep_programs,
    last_checkpoint,
    lines_of,
    state_of,
    train_here,
    write_config,
)

# Reads of damaged files that are given up leave coroutines that nobody awaits.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

STEPS = 6
HALF = 3
SIZE = ("--training.validate_every", "4")
WHOLE = (*SIZE, "--training.steps", f"{STEPS}")
# The same schedule, but stopped in the middle.
FIRST = (*SIZE, "--training.steps", f"{HALF}", "--training.schedule_steps", f"{STEPS}")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    write_config(folder)
    keep_programs(folder / "programs")
    yield folder
    keep_programs(None)


@pytest.fixture(scope="module")
def undisturbed(workspace):
    train_here(workspace, workspace / "undisturbed", *WHOLE)
    return workspace / "undisturbed"


@pytest.fixture(scope="module")
def stopped(workspace):
    """Has the checkpoints 2 and 3."""
    train_here(workspace, workspace / "stopped", *FIRST)
    assert checkpoints_of(workspace / "stopped") == {"2", "3"}
    return workspace / "stopped"


@pytest.fixture
def half(stopped, tmp_path):
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(stopped, tmp_path / "half"))


# Damage.


def arrays(checkpoint: Path, item: str) -> list[Path]:
    """The files that hold an item's numbers.

    How tensorstore divides these among files differs from one save to the next, and parts that
    it wrote anew elsewhere stay behind unused, so that damage to one file may be to nothing.
    """
    files = [file for file in (checkpoint / item).rglob("d/*") if file.is_file()]
    assert files
    return files


def truncate(checkpoint: Path) -> None:
    for file in arrays(checkpoint, "params"):
        os.truncate(file, file.stat().st_size // 2)


def flip_bits(item: str):
    def damage(checkpoint: Path) -> None:
        for file in arrays(checkpoint, item):
            content = bytearray(file.read_bytes())
            # One bit here and there: single bytes of the file may belong to nothing.
            content[::97] = bytes(byte ^ 1 for byte in content[::97])
            file.write_bytes(content)

    return damage


def remove_file(checkpoint: Path) -> None:
    for file in arrays(checkpoint, "state"):
        file.unlink()


def remove_all(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def cut_record(checkpoint: Path) -> None:
    os.truncate(checkpoint / "data" / "metadata", 40)


def change_record(checkpoint: Path) -> None:
    file = checkpoint / "data" / "metadata"
    file.write_text(file.read_text().replace('"next_step": 3', '"next_step": 4'))


DAMAGES = {
    "truncated": truncate,
    "flipped-params": flip_bits("params"),
    "flipped-state": flip_bits("state"),
    "missing-file": remove_file,
    "empty": remove_all,
    "cut-record": cut_record,
    "changed-record": change_record,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_named_and_passed_over(
    workspace, undisturbed, half, damage, capsys
):
    newest = half / "checkpoints" / "3"
    damage(newest)
    train_here(workspace, half, *WHOLE)
    lines = capsys.readouterr().err.splitlines()
    (told,) = (line for line in lines if " is damaged (" in line)
    assert told.startswith(f"the checkpoint {newest} is damaged (")
    assert told.endswith("it is set aside as 3.corrupt, and the one before is taken")
    assert "3.corrupt" in checkpoints_of(half)
    # Step 3 ended the stopped run with a validation, which the undisturbed one has not.
    assert_same_run(half, undisturbed, STEPS)


def test_reading_passes_over_a_damaged_checkpoint_and_leaves_it(half, capsys):
    truncate(half / "checkpoints" / "3")
    before = checkpoints_of(half)
    _, params = load_run(half)
    assert_same_bits(params, state_of(half, 2).params)
    said = capsys.readouterr().err
    assert f"{half / 'checkpoints' / '3'} is damaged" in said
    assert said.endswith("; step 2 is taken\n")
    assert checkpoints_of(half) == before
    with pytest.raises(ConfigError, match=r"checkpoints/3 is damaged .*; name another step"):
        load_run(half, 3)


def test_a_run_without_a_whole_checkpoint_is_not_started_anew(workspace, half):
    for step in (2, 3):
        truncate(half / "checkpoints" / f"{step}")
    lines = lines_of(half)
    for _ in range(2):
        with pytest.raises(
            TrainingError, match=r"no checkpoint in .* is whole; bring one back, or"
        ):
            train_here(workspace, half, *WHOLE)
    assert checkpoints_of(half) == {"2.corrupt", "3.corrupt"}
    assert lines_of(half) == lines


def small_state(**params) -> TrainState:
    params = params or {"w": jnp.arange(6.0).reshape(2, 3)}
    return TrainState(jnp.int32(1), params, (), jnp.zeros(2, jnp.uint32))


def test_another_shape_is_not_taken_for_damage(tmp_path):
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.save(small_state(), {}, None)
        checkpoints.wait()
        for params, message in {
            "w": jnp.zeros((3, 2)),
            "v": jnp.zeros((2, 3)),
        }.items():
            with pytest.raises(ConfigError, match="it is of another model or optimizer"):
                checkpoints.restore_newest(small_state(**{params: message}))
    assert checkpoints_of(tmp_path) == {"1"}


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), ValueError("UNAVAILABLE: x")]
)
def test_a_store_that_does_not_answer_is_not_taken_for_damage(tmp_path, monkeypatch, error):
    import orbax.checkpoint as ocp

    def fail(*_, **__):
        raise error

    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.save(small_state(), {}, None)
        checkpoints.wait()
        monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", fail)
        with pytest.raises(TrainingError, match=r"a checkpoint cannot be read: (Perm|UNAV)"):
            checkpoints.restore_newest(small_state())
    assert checkpoints_of(tmp_path) == {"1"}


@given(st.sampled_from(["float32", "bfloat16", "int32", "uint32"]), st.integers(0), st.data())
def test_checksums_see_each_bit_and_each_place(dtype, seed, data):
    draw = np.random.default_rng(seed)
    x = jnp.asarray(draw.integers(0, 256, (4, 3 * jnp.dtype(dtype).itemsize), np.uint8))
    x = jax.lax.bitcast_convert_type(x.reshape(4, 3, -1), dtype)
    (sum_before,) = _checksums({"x": x}).values()
    raw = np.asarray(x).view(np.uint8).copy()
    byte = data.draw(st.integers(0, raw.size - 1))
    raw.flat[byte] ^= 1 << data.draw(st.integers(0, 7))
    assert _checksums({"x": jnp.asarray(raw.view(x.dtype))}) != {"['x']": sum_before}
    if (x[0, 0] != x[2, 1]).item():
        swapped = x.at[0, 0].set(x[2, 1]).at[2, 1].set(x[0, 0])
        assert _checksums({"x": swapped}) != {"['x']": sum_before}


def test_checksums_do_not_depend_on_the_mesh():
    x = jax.random.normal(jax.random.key(0), (16, 32))
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    split = jax.device_put(x, sharding(mesh, "embed", "heads"))
    assert len(split.sharding.device_set) == 8
    assert _checksums({"x": split}) == _checksums({"x": x})


# Other meshes and other places.


def test_a_run_goes_on_on_other_meshes_in_the_same_order(workspace, undisturbed, half):
    # From 8 devices to 4 x 2, then to one.
    to_five = ("--training.steps", "5", "--training.schedule_steps", f"{STEPS}", *SIZE)
    train_here(workspace, half, *to_five, "--mesh.fsdp", "4", "--mesh.context", "2")
    TrainProcess(workspace, half, *WHOLE).finish()
    ours, theirs = lines_of(half), lines_of(undisturbed)
    hashes = [
        [line.get("batch_hash") for line in lines if "loss" in line] for lines in (ours, theirs)
    ]
    assert hashes[0] == hashes[1]
    np.testing.assert_allclose(
        [line["loss"] for line in ours if "loss" in line],
        [line["loss"] for line in theirs if "loss" in line],
        rtol=1e-6,
    )
    params = [state_of(run_dir, STEPS).params for run_dir in (half, undisturbed)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *params)


def test_checkpoints_may_be_elsewhere(workspace, undisturbed, tmp_path):
    # As on a pod that is made anew: only the store outlives it.
    store = ("--training.checkpoint_dir", str(tmp_path / "store"))
    # Rates whose order counts, as the first that matches does; sorted they would change places.
    rates, others = '{"head/.*": 1, ".*": 1}', '{".*": 1, "head/.*": 1}'
    store += ("--optimizer.rates", rates)
    train_here(workspace, tmp_path / "one", *FIRST, *store)
    assert not (tmp_path / "one" / "checkpoints").exists()
    for option, value in {"data.seed": "1", "optimizer.rates": others}.items():
        refused = rf"^{option} is .*, but the run in .*store was started"
        with pytest.raises(ConfigError, match=refused):
            train_here(workspace, tmp_path / "two", *WHOLE, *store, f"--{option}", value)
    assert not (tmp_path / "two" / "config.yaml").exists()
    train_here(workspace, tmp_path / "two", *WHOLE, *store)
    assert [line["step"] for line in lines_of(tmp_path / "two") if "loss" in line] == [4, 5, 6]
    _, params = load_run(tmp_path / "two")
    assert_same_bits(params, state_of(undisturbed, STEPS).params)


def test_a_run_is_not_started_anew_where_its_checkpoints_are_not(workspace, half, tmp_path):
    before = lines_of(half)
    elsewhere = ("--training.checkpoint_dir", str(tmp_path / "elsewhere"))
    with pytest.raises(ConfigError, match=r"which has no checkpoints; those of the run in .* went"):
        train_here(workspace, half, *WHOLE, *elsewhere)
    assert lines_of(half) == before


def test_checkpoint_folders_by_url(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", types.ModuleType("gcsfs"))
    assert str(checkpoint_folder(Path("runs/x"), "gs://bucket/x")) == "gs://bucket/x"
    with pytest.raises(ConfigError, match=r"is ftp://x; it must be a folder, or start with gs://"):
        checkpoint_folder(Path("runs/x"), "ftp://x")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(MissingPackageError, match=r"needs the package 's3fs'.*repo-jax\[s3\]"):
        checkpoint_folder(Path("runs/x"), "s3://bucket/x")


# Writing.


@pytest.fixture
def small_files():
    """Files end at 10 kB, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_the_run_and_spares_the_last_checkpoint(tmp_path, small_files):
    big = {"w": jax.random.normal(jax.random.key(0), (64, 64))}
    message = (
        r"the checkpoint of step 2 cannot be written to .*checkpoints: File too large; the last "
        r"good one is .*checkpoints/1, and the same command goes on from there"
    )

    def save():
        with Checkpoints(tmp_path, 1) as checkpoints:
            checkpoints.save(small_state(**big), {}, None)
            checkpoints.wait()
            small_files()
            checkpoints.save(small_state(**big).replace(step=jnp.int32(2)), {}, None)
            checkpoints.save(small_state(**big).replace(step=jnp.int32(3)), {}, None)

    with pytest.raises(TrainingError, match=message):
        save()
    with Checkpoints(tmp_path, 1) as checkpoints:
        assert checkpoints.latest == 1
        state, _ = checkpoints.restore_newest(small_state(**big))
    assert_same_bits(state.params, big)


def test_a_folder_that_cannot_be_written(workspace, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"checkpoints cannot be written to .*file/x: Not a dir"):
        Checkpoints(tmp_path, 1, str(tmp_path / "file" / "x"))


def test_a_second_process_is_refused(workspace, half):
    with (
        lock.hold(half),
        pytest.raises(ConfigError, match=rf"half is being written by process {os.getpid()} on"),
    ):
        train_here(workspace, half, *WHOLE)
    train_here(workspace, half, *WHOLE)
    assert last_checkpoint(half) == STEPS


def test_a_full_disk_is_one_sentence(workspace, half, capsys, small_files):
    small_files()
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: train_here(workspace, half, *WHOLE))
    assert ended.value.code == 1
    assert "Traceback" not in capsys.readouterr().err
