"""Two real processes, four CPU devices each, train as one with eight does."""

import json
import signal
import socket

import numpy as np
import pytest

from tests.tiny_runs import (
    TrainProcess,
    free_address,
    last_checkpoint,
    last_line,
    lines_of,
    write_config,
)

STEPS = 12
OPTIONS = [
    *(f"--training.steps={STEPS}", "--training.validate_every=6", "--data.batch_size=8"),
    "--model.vocab_size=258",
    *("--mesh.fsdp=4", "--mesh.tensor=2", "--training.checkpoint_every=4"),
]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Has tiny.yaml, its corpus, and the compiled programs of the processes started here."""
    folder = tmp_path_factory.mktemp("hosts")
    write_config(folder)
    return folder


@pytest.fixture(scope="module")
def alone(workspace):
    """The run of one process."""
    TrainProcess(workspace, workspace / "alone", *OPTIONS, devices=8).finish()
    return workspace / "alone"


class Pair:
    """Two processes that train one run.

    Args:
      workspace, run_dir, options: as of `TrainProcess`.
      second: options that the second process has besides.
      hosts: folder that each is in, as if it were a machine of its own.
    """

    def __init__(self, workspace, run_dir, *options, second=(), hosts=(None, None)):
        address = free_address()
        self.processes = [
            TrainProcess(
                workspace,
                run_dir,
                *(*OPTIONS, *options, "--coordinator", address),
                *("--num_processes", "2", "--process_id", str(i)),
                *(second if i else ()),
                devices=4,
                name=f"{run_dir.name}-{i}",
                cwd=hosts[i],
            )
            for i in range(2)
        ]

    def wait_until(self, condition):
        self.processes[0].wait_until(condition)

    def finish(self):
        return [process.finish() for process in self.processes]


def assert_same_course(run_dir, alone):
    """The same batches in the same order, and the same numbers but for rounding."""
    ours, theirs = lines_of(run_dir), lines_of(alone)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        assert one.get("batch_hash") == other.get("batch_hash")
        for name in {"loss", "val_loss", "grad_norm"} & one.keys():
            np.testing.assert_allclose(one[name], other[name], rtol=1e-5, err_msg=name)


def test_two_processes_train_as_one(workspace, alone):
    run_dir = workspace / "pair"
    cache = f"--data.cache_dir={workspace / 'cache-1'}"  # machines may have their own
    first, second = Pair(workspace, run_dir, second=[cache]).finish()
    assert f"finished at step {STEPS}" in first
    mesh = "mesh data 1 x fsdp 4 x tensor 2 x context 1"
    assert f"from step 0 to {STEPS}, {mesh}: 8 devices (cpu), 2 processes\n" in first
    assert "step" not in second  # one process speaks for all
    assert_same_course(run_dir, alone)


def test_killed_they_go_on_as_one_process_in_the_same_order(workspace, alone):
    run_dir = workspace / "killed-pair"
    pair = Pair(workspace, run_dir)
    pair.wait_until(lambda: last_checkpoint(run_dir) >= 4)
    for process in pair.processes:
        process.kill()
    assert last_line(run_dir) < STEPS
    TrainProcess(workspace, run_dir, *OPTIONS, devices=8).finish()
    assert_same_course(run_dir, alone)


def test_a_notice_to_one_process_stops_both_at_the_same_step(workspace, alone):
    run_dir = workspace / "preempted"
    pair = Pair(workspace, run_dir, "--training.checkpoint_every=1000")
    pair.wait_until(lambda: last_line(run_dir) >= 1)
    pair.processes[1].signal(signal.SIGTERM)
    first, _ = pair.finish()
    stopped_at = last_checkpoint(run_dir)
    assert 0 < stopped_at < STEPS
    assert f"saved step {stopped_at} to {run_dir}; the same command goes on" in first
    Pair(workspace, run_dir).finish()
    assert_same_course(run_dir, alone)


def refused(pair) -> tuple[str, ...]:
    """What each process says before it ends, as for a user's mistake."""
    outputs = [process.finish(code=2) for process in pair.processes]
    assert all("Traceback" not in output for output in outputs)
    return tuple(output.splitlines()[-1] for output in outputs)


def test_a_mistake_in_the_run_directory_stops_both(workspace):
    run_dir = workspace / "no-run"
    run_dir.mkdir()
    (run_dir / "notes.txt").write_text("mine")
    said = refused(Pair(workspace, run_dir))
    assert all("is not empty and has no config.yaml" in line for line in said)


@pytest.fixture
def hosts(tmp_path):
    """Two folders with the same token files."""
    folders = tmp_path / "host0", tmp_path / "host1"
    for folder in folders:
        folder.mkdir()
        for name in ("train-0", "train-1", "held-0", "held-1"):
            np.full(1000, 7, np.uint32).tofile(folder / f"{name}.npy")
    return folders


TOKENS = (
    *("--data.text=[]", "--data.tokens=[train-*.npy]"),
    "--data.validation_tokens=[held-*.npy]",
)


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("optimizer.learning_rate", 0.1, 1.0),
        ("mesh.fsdp", 4, 2),
        ("optimizer.rates", {"head/.*": 0.0, ".*": 1.0}, {".*": 1.0, "head/.*": 0.0}),
    ],
)
def test_processes_with_other_options_train_nothing(workspace, name, first, second):
    run_dir = workspace / "other-options"
    options = [f"--{name}={json.dumps(value)}" for value in (first, second)]
    said = refused(Pair(workspace, run_dir, options[0], second=options[1:]))
    assert said == 2 * (
        f"error: {name} is {second} in process 1, but {first} in process 0; start all processes "
        "with the same options",
    )
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("missing", "what"), [("train-1.npy", "train on"), ("held-0.npy", "validate on")]
)
def test_processes_with_other_data_train_nothing(workspace, hosts, missing, what):
    (hosts[1] / missing).unlink()
    run_dir = hosts[0].parent / "other-data"
    host = socket.gethostname()
    assert refused(Pair(workspace, run_dir, *TOKENS, hosts=hosts)) == 2 * (
        f"error: the tokens to {what} of process 1 on {host} (1,000 in 1 files) are not those of "
        f"process 0 on {host} (2,000 in 2 files); bring the same files to every machine",
    )
    assert not (run_dir / "config.yaml").exists()


def test_checkpoints_go_to_a_place_that_all_processes_see(workspace, hosts, tmp_path):
    run_dir = tmp_path / "not-shared"
    pair = Pair(workspace, run_dir, "--training.checkpoint_dir=kept/here", hosts=hosts)
    host = socket.gethostname()
    assert refused(pair) == 2 * (
        f"error: process 1 on {host} does not see what process 0 on {host} writes to "
        f"{hosts[0]}/kept/here; training.checkpoint_dir must name a folder that all machines "
        "share, or an object store",
    )
    assert not any(run_dir.iterdir())
    assert all(path.suffix == ".npy" for host in hosts for path in host.iterdir())
