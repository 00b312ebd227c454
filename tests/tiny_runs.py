"""Runs small enough to be made again and again: a corpus, a config, a run directory."""

import random
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import yaml

from repo_jax import cli
from repo_jax.config import TrainConfig
from repo_jax.data import open_data
from repo_jax.modeling import RePoLM
from repo_jax.training import run_dir as run_directory
from repo_jax.training.checkpoints import Checkpoints
from repo_jax.training.step import create_state, make_train_step

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
            batch_size=4,
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
    tokens = jnp.zeros((1, 2), jnp.int32)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(seed), tokens)["params"])
    optimizer, _ = make_train_step(model, config.optimizer, config.training, params)
    with Checkpoints(run_dir, keep_last=1) as checkpoints:
        checkpoints.save(create_state(params, optimizer, seed), {}, None)
        checkpoints.wait()
    return model, params
