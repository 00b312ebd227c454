"""Runs small enough to be made again and again: a corpus, a config, a run directory."""

import contextlib
import multiprocessing
import os
import random
import socket
import sys
import time
from pathlib import Path

import jax
import numpy as np
import yaml

from repo_jax import cli
from repo_jax.config import TrainConfig
from repo_jax.data import open_data
from repo_jax.modeling import RePoLM, abstract_params, init_params
from repo_jax.training import command
from repo_jax.training import run_dir as run_directory
from repo_jax.training.checkpoints import Checkpoints
from repo_jax.training.metrics import read_metrics
from repo_jax.training.step import TrainState, create_state, make_train_step

ROOT = Path(__file__).parents[1]


def write_config(folder: Path) -> Path:
    """Writes a corpus and `tiny.yaml` into `folder`; returns the latter."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=3)) for _ in range(40)]
    corpus = folder / "corpus"
    corpus.mkdir()
    for i in range(20):
        (corpus / f"{i:02}.txt").write_text(" ".join(draw.choices(words, k=250)))
    sections = {
        "model": dict(vocab_size=257, d_model=32, n_layers=2, n_heads=2, d_ff=64, rope_theta=1e4),
        "data": dict(
            text=[str(corpus)],
            tokenizer="bytes",
            cache_dir=str(folder / "cache"),
            validation_fraction=0.2,
            sequence_length=32,
            batch_size=8,
        ),
        "optimizer": dict(learning_rate=1e-2),
        "training": dict(
            steps=40, validate_every=8, validation_windows=8, checkpoint_every=1, loss_chunk=64
        ),
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def parse(path: Path, *options: str) -> TrainConfig:
    """The config in `path` with options as on the command line."""
    config, _ = cli.parse(TrainConfig, "train.py", "", ["--config", str(path), *options])
    return config


def make_run(run_dir: Path, config: TrainConfig, seed: int = 0):
    """A run directory with one checkpoint of untrained weights; returns model and weights."""
    run_dir.mkdir()
    run_directory.write(run_dir, config)
    data = open_data(config.data, config.model)
    run_directory.keep_tokenizer(run_dir, data.tokenizer)
    model = RePoLM(config.model)
    params = init_params(model, jax.random.key(seed))
    optimizer, _ = make_train_step(model, config.optimizer, config.training, params)
    with Checkpoints(run_dir, keep_last=1) as checkpoints:
        checkpoints.save(create_state(params, optimizer, seed), {}, None)
        checkpoints.wait()
    return model, params


# Processes that train. They are forked from one that has imported what they need.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["repo_jax.training.command", "grain"])


class TrainProcess:
    """`train.py` in a process of its own.

    Args:
      folder: has tiny.yaml; keeps compiled programs for those that come later.
      run_dir, options: of the command line.
      devices: CPUs that JAX sees.
      name: of the file with what it prints; None: the run directory's.
      cwd: where paths that are not absolute begin.
    """

    def __init__(
        self,
        folder: Path,
        run_dir: Path,
        *options: str,
        devices: int = 1,
        name: str | None = None,
        cwd: Path | None = None,
    ):
        arguments = ["--config", str(folder / "tiny.yaml"), "--run_dir", str(run_dir), *options]
        self._output = folder / f"{name or run_dir.name}.out"
        self._process = _SERVER.Process(
            target=_train, args=(arguments, self._output, folder / "programs", devices, cwd)
        )
        self._process.start()

    def signal(self, number: int) -> None:
        """Sends a signal."""
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        """Kills, as SIGKILL does."""
        assert self._process.is_alive(), f"ended too early: {self.output()}"
        self._process.kill()
        self._process.join()

    def wait_until(self, condition) -> None:
        """Returns as soon as `condition()` holds."""
        deadline = time.monotonic() + 240
        while not condition():
            assert self._process.is_alive(), f"ended too early: {self.output()}"
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def finish(self, code: int = 0) -> str:
        """Waits for the end; what was printed."""
        self._process.join(240)
        assert self._process.exitcode == code, self.output()
        return self.output()

    def output(self) -> str:
        """What was printed so far."""
        return self._output.read_text() if self._output.exists() else ""


def _train(arguments, output: Path, programs: Path, devices: int, cwd: Path | None) -> None:
    if cwd is not None:
        os.chdir(cwd)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    keep_programs(programs)
    sys.argv = ["train.py", *arguments]
    command.run()


def free_address() -> str:
    """On this machine, which nobody listens at."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def keep_programs(folder: Path | None) -> None:
    """Has JAX keep what it compiles in `folder`, or no longer."""
    jax.config.update("jax_compilation_cache_dir", folder and str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def train_here(folder: Path, run_dir: Path, *options: str) -> None:
    """`train.py` in this process, on its eight devices."""
    command.main(["--config", str(folder / "tiny.yaml"), "--run_dir", str(run_dir), *options])


def checkpoints_of(run_dir: Path) -> set[str]:
    """What is in `checkpoints/`."""
    folder = run_dir / "checkpoints"
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def last_checkpoint(run_dir: Path) -> int:
    """The newest step; 0 where there is none."""
    return max((int(name) for name in checkpoints_of(run_dir) if name.isdigit()), default=0)


def lines_of(run_dir: Path) -> list[dict]:
    """Of metrics.jsonl, without what differs from run to run."""
    return [
        {k: v for k, v in line.items() if k not in ("tokens_per_second", "step_seconds")}
        for line in read_metrics(run_dir / "metrics.jsonl")
    ]


def last_line(run_dir: Path) -> int:
    """The last step in metrics.jsonl; 0 where there is none."""
    return max((line["step"] for line in lines_of(run_dir)), default=0)


def state_of(run_dir: Path, step: int) -> TrainState:
    """What a checkpoint holds."""
    config = run_directory.read_config(run_dir)
    model = RePoLM(config.model)
    abstract = abstract_params(model)
    optimizer, _ = make_train_step(model, config.optimizer, config.training, abstract)
    shapes = jax.eval_shape(lambda params: create_state(params, optimizer, 0), abstract)
    with Checkpoints(run_dir) as checkpoints:
        return checkpoints.restore(shapes, step)[0]


def assert_same_bits(one, other) -> None:
    """Of two trees."""
    ours, theirs = jax.tree.leaves_with_path(one), jax.tree.leaves_with_path(other)
    assert [path for path, _ in ours] == [path for path, _ in theirs]
    for (path, x), (_, y) in zip(ours, theirs, strict=True):
        assert x.dtype == y.dtype, path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), jax.tree_util.keystr(path)


def assert_same_run(run_dir: Path, undisturbed: Path, steps: int) -> None:
    """Parameters, optimizer state and numbers, all as they would have been."""
    assert_same_bits(state_of(run_dir, steps), state_of(undisturbed, steps))
    assert lines_of(run_dir) == lines_of(undisturbed)
