"""The weights that a run starts from: new ones, or a checkpoint's."""

import dataclasses
from pathlib import Path

import jax

from repo_jax import distributed
from repo_jax.config import TrainConfig
from repo_jax.errors import ConfigError
from repo_jax.training import run_dir as run_directory
from repo_jax.training.program import Program
from repo_jax.training.step import TrainState

# What a checkpoint to start from must have in common with the model to be trained.
_SHARED = (
    *("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff"),
    *("rope_theta", "norm_eps"),
)


def check(config: TrainConfig) -> None:
    """Raises ConfigError unless the model fits `init.checkpoint`; reads no weights."""
    if config.init.checkpoint is None:
        return
    from repo_jax.interop.checkpoint import Checkpoint
    from repo_jax.interop.hub import locate
    from repo_jax.interop.load import Source, resolve_config

    checkpoint = Checkpoint(locate(config.init.checkpoint, config.init.revision))
    stored, _ = resolve_config(checkpoint, None, None)
    for name in _SHARED:
        theirs, ours = getattr(stored, name), getattr(config.model, name)
        if theirs != ours:
            raise ConfigError(
                f"model.{name} is {ours}, but init.checkpoint {config.init.checkpoint} "
                f"has {theirs}; give that"
            )
    wanted = dataclasses.replace(stored, positions=config.model.positions)
    Source(checkpoint, stored, wanted, None)


def trained_length(config: TrainConfig, run_dir: Path) -> int:
    """Tokens that the weights to start from were trained on."""
    if (run_dir / "config.yaml").is_file():  # the checkpoint may be gone by now
        return run_directory.read_config(run_dir).model.max_length
    from repo_jax.interop import config_json
    from repo_jax.interop.hub import locate

    folder = locate(config.init.checkpoint, config.init.revision)
    return config_json.read_folder(folder, None).trained_length


def state(config: TrainConfig, program: Program) -> TrainState:
    """New weights, or those of `init.checkpoint`."""
    seed = config.training.seed
    rng = jax.random.key(seed)
    if config.init.checkpoint is None:
        return program.create_state(program.init_params(rng), seed)
    from repo_jax.interop import from_pretrained

    def load():
        _, params = from_pretrained(
            config.init.checkpoint,
            param_dtype=config.model.param_dtype,
            positions=config.model.positions,
            rng=rng,
            revision=config.init.revision,
            mesh=program.mesh,
        )
        return params

    return program.create_state(distributed.everywhere(load), seed)
