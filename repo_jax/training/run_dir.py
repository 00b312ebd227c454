"""The run directory: which config it was started with, and what may change later."""

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml

from repo_jax.config import TrainConfig, to_dict
from repo_jax.data import Tokenizer
from repo_jax.errors import ConfigError
from repo_jax.training import lock

# What a started run may change: none of it alters the mathematics of a step.
_FREE = {
    "data.cache_dir",
    "data.prefetch",
    "data.text",  # where data are kept; `Data.fingerprint` says whether they are the same
    "data.tokens",
    "data.validation_tokens",
    "init.checkpoint",  # read only before the first step
    "init.revision",
    "mesh.context",
    "mesh.data",
    "mesh.fsdp",
    "mesh.slices",
    "mesh.tensor",
    "model.attention",
    "model.max_length",  # a fact; where YaRN reads it, rope_scaling has a copy
    "model.remat",
    "training.accumulation",
    "training.checkpoint_dir",
    "training.checkpoint_every",
    "training.keep_last",
    "training.log_every",
    "training.loss_chunk",
    "training.position_stats_every",
    "training.profile_steps",
    "training.progress",
    "training.schedule_steps",  # compared as the length it stands for, see _mathematics
    "training.steps",
    "training.tensorboard",
    "training.validate_every",
    "training.validation_windows",
    "training.wandb_project",
}
# Likewise, by the name of the source.
_FREE_OF_SOURCES = re.compile(r"data\.sources\..*\.(text|tokens)")


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    # optimizer.rates is one value: its keys are patterns, not options.
    if prefix == "optimizer.rates":
        return {prefix: list(tree.items())}  # their order counts too
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat


def _mathematics(config: TrainConfig) -> dict[str, Any]:
    flat = {
        name: value
        for name, value in _flatten(to_dict(config)).items()
        if name not in _FREE and not _FREE_OF_SOURCES.fullmatch(name)
    }
    if not config.model.eos_ids:
        del flat["model.eos_ids"]
    tokenizer = config.data.tokenizer
    if tokenizer != "bytes" and not tokenizer.startswith("bpe:"):  # a place too
        flat["data.tokenizer"] = "tokenizer.json"
    training = config.training
    length = training.schedule_steps or training.steps
    return flat | {"training.schedule_steps (training.steps unless given)": length}


def read_config(run_dir: Path) -> TrainConfig:
    """The config of a started run.

    Raises:
      ConfigError: there is none, or it cannot be read.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run_dir} is no run directory: it has no config.yaml")
    # Imported here: reading a config that was written needs no command line otherwise.
    from repo_jax.cli import parse

    config, _ = parse(TrainConfig, str(path), "", ["--config", str(path)])
    return config


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """A config from what `config.to_dict` made, options that it does not name by default."""
    with tempfile.TemporaryDirectory() as folder:
        # Unsorted: the first pattern of optimizer.rates that matches counts.
        text = yaml.safe_dump(values, sort_keys=False)
        (Path(folder) / "config.yaml").write_text(text)
        return read_config(Path(folder))


def check_same(started: TrainConfig, config: TrainConfig, where: Any) -> None:
    """Raises ConfigError unless `config` continues the run in `where`, which has `started`."""
    ours, theirs = _mathematics(config), _mathematics(started)
    if not config.model.eos_ids:  # filled in from the data when the run started
        theirs.pop("model.eos_ids", None)
    for name in dict.fromkeys([*ours, *theirs]):
        if theirs.get(name) != ours.get(name):
            raise ConfigError(
                f"{name} is {ours.get(name)!r}, but the run in {where} was started with "
                f"{theirs.get(name)!r}; keep that, or name another --run_dir"
            )


def check(run_dir: Path, config: TrainConfig) -> None:
    """Raises ConfigError unless `config` can start a run in `run_dir` or continue the one there."""
    if (run_dir / "config.yaml").is_file():
        check_same(read_config(run_dir), config, run_dir)
    elif run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"--run_dir {run_dir} is a file; name a folder")
    elif run_dir.is_dir() and any(
        p.suffix != ".tmp" and p.name != lock.NAME for p in run_dir.iterdir()
    ):
        raise ConfigError(
            f"--run_dir {run_dir} is not empty and has no config.yaml, so it is no run; "
            "name a new folder"
        )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--run_dir {run_dir} cannot be made: {error}") from None
    if not os.access(run_dir, os.W_OK):
        raise ConfigError(f"--run_dir {run_dir} cannot be written")


def write(run_dir: Path, config: TrainConfig) -> None:
    """Writes the complete config, whole or not at all."""
    path = run_dir / "config.yaml"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
    temporary.replace(path)


def keep_tokenizer(run_dir: Path, tokenizer: Tokenizer) -> None:
    """Puts the tokenizer beside the config, so that the run is of use without its corpus."""
    if (run_dir / "tokenizer.json").exists():
        return
    temporary = run_dir / "tokenizer.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    tokenizer.save(temporary)
    # tokenizer.json comes last: where it is, the rest is there too.
    for file in sorted(temporary.iterdir(), key=lambda f: f.name == "tokenizer.json"):
        file.replace(run_dir / file.name)
    temporary.rmdir()
