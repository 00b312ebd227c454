"""The configs that come along say what the paper says, and are complete but for the data."""

import math
from types import SimpleNamespace

import pytest

from repo_jax import cli, sharding
from repo_jax.config import PRESETS, MeshConfig, TrainConfig, decoder_config
from tests.tiny_runs import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
RECIPES = [path for path in CONFIGS if path.stem.startswith("olmo2_")]


def read(path) -> TrainConfig:
    options = ["--config", str(path)]
    names_data = any(line.startswith("  text:") for line in path.read_text().splitlines())
    options += [] if names_data else ["--data.tokens", "x"]
    config, _ = cli.parse(TrainConfig, "train.py", "", options)
    return config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_windows_are_as_long_as_the_model_was_made_for(path):
    config = read(path)
    assert config.data.sequence_length == config.model.max_length


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipe(path):
    size, positions = path.stem.removeprefix("olmo2_").split("_")
    config = read(path)
    model, training = config.model, config.training
    changes = dict(positions=model.positions, dtype="bfloat16", remat="attention")
    assert model == decoder_config(f"olmo2_{size}", **changes)
    assert model.positions.preset == positions
    assert config.data.sequence_length == 4096
    assert config.data.batch_size == {"1b": 512, "7b": 1024}[size]
    tokens_per_step = config.data.batch_size * 4096
    assert training.schedule_steps == math.ceil(50e9 / tokens_per_step)
    assert training.steps == training.schedule_steps + 10
    optimizer = config.optimizer
    assert optimizer.learning_rate == {"1b": 7.4487e-5, "7b": 6.1499e-5}[size]
    assert (optimizer.schedule, optimizer.warmup_steps) == ("linear", 0)
    assert (optimizer.final_fraction, optimizer.clip_norm) == (0.0, 1.0)
    assert (optimizer.b1, optimizer.b2, optimizer.eps) == (0.9, 0.95, 1e-8)
    assert optimizer.weight_decay == 0.1
    assert training.z_loss == 1e-4
    assert not config.data.document_mask
    assert config.data.repetition_filter == {"1b": 32, "7b": None}[size]
    assert (
        config.init.checkpoint
        == {
            "1b": "allenai/OLMo-2-0425-1B",
            "7b": "allenai/OLMo-2-1124-7B",
        }[size]
    )


@pytest.mark.parametrize(
    ("size", "presets"),
    [("1b", {"rope", "nope", "r2n1", "n2r1", "repo"}), ("7b", {"rope", "repo"})],
)
def test_baselines_differ_in_their_positions_alone(size, presets):
    configs = [read(path) for path in RECIPES if path.stem.startswith(f"olmo2_{size}_")]
    assert {config.model.positions.preset for config in configs} == presets
    as_repo = [repr(config).replace(repr(config.model.positions), "") for config in configs]
    assert len(set(as_repo)) == 1


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_fit_the_mesh_of_sixteen_devices_or_more(path):
    config = read(path)
    n_devices = 16 if "1b" in path.stem else 64
    sizes = dict(zip(sharding.AXES, (1, n_devices, 1, 1), strict=True))
    assert config.mesh == MeshConfig()
    sharding.check(config, SimpleNamespace(shape=sizes))


def test_recipes_save_about_every_half_hour_on_the_pods_of_the_guide():
    lines = (ROOT / "docs" / "8-planning.md").read_text().splitlines()
    plans = [line.split(" | ") for line in lines if line.startswith("| olmo2_")]
    assert len(plans) > 5
    for plan in plans:
        name, seconds_per_step = plan[0].strip("| "), float(plan[10])
        every = read(ROOT / "configs" / f"{name}.yaml").training.checkpoint_every
        assert every * seconds_per_step / 60 < 35


def test_every_size_with_a_recipe_is_a_published_one():
    assert {f"olmo2_{path.stem.split('_')[1]}" for path in RECIPES} <= set(PRESETS)
