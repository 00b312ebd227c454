"""`model.max_length` of a run: what it was trained on, whoever asks."""

import dataclasses
import json
import shutil

import pytest
import yaml

from repo_jax import load_run, save_pretrained
from repo_jax.config import DataConfig, DecoderConfig, RopeScaling, TrainConfig, decoder_config
from repo_jax.training.run_dir import read_config
from tests.tiny_runs import keep_programs, parse, train_here, write_config

# A step of a longer schedule, so that the same run may go on.
SMALL = (
    "--model.n_layers",
    "1",
    "--model.positions.preset",
    "rope",
    "--training.schedule_steps",
    "40",
)
ONE, TWO = ((*SMALL, "--training.steps", n) for n in "12")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lengths")
    write_config(folder)  # windows of 32 tokens; it does not name model.max_length
    keep_programs(folder / "programs")
    train_here(folder, folder / "run", *ONE)
    yield folder
    keep_programs(None)


@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({}, 32),
        ({"model.max_length": 64}, 64),
        ({"model.max_length": 16}, 32),
        ({"data.sequence_length": 131072}, 131072),
        ({"model.max_length": 64, "data.sequence_length": 128}, 128),
        # The windows are longer than what YaRN stretches, and say nothing of it.
        ({"model.rope_scaling.factor": 4, "model.rope_scaling.original_length": 8}, 8),
    ],
)
def test_it_is_at_least_the_length_of_the_windows(folder, options, length):
    given = [f"--{name}={value}" for name, value in options.items()]
    assert parse(folder / "tiny.yaml", *given).model.max_length == length


@pytest.mark.parametrize(("sequence_length", "length"), [(1024, 4096), (8192, 8192)])
def test_a_preset_keeps_what_it_was_trained_on_and_may_be_trained_on_more(sequence_length, length):
    data = DataConfig(tokens="x", sequence_length=sequence_length)
    assert TrainConfig(decoder_config("olmo2_1b"), data).model.max_length == length


def test_without_a_run_it_is_taken_to_be_olmo_2s():
    config = DecoderConfig(vocab_size=9, d_model=8, n_layers=2, n_heads=2, d_ff=8)
    assert (config.max_length, config.trained_length) == (None, 4096)
    stretched = dataclasses.replace(config, rope_scaling=RopeScaling(2.0))
    assert (stretched.max_length, stretched.rope_scaling.original_length) == (4096, 4096)


def test_whoever_loads_the_run_is_told(folder, tmp_path):
    model, params = load_run(folder / "run")
    assert model.config.max_length == 32
    scaled, _ = load_run(folder / "run", rope_scaling=RopeScaling(2.0))
    assert scaled.config.rope_scaling.original_length == 32
    save_pretrained(tmp_path / "exported", model, params)
    written = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert written["max_position_embeddings"] == 32


def test_a_run_that_was_started_with_another_goes_on(folder, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "run")
    path = tmp_path / "run" / "config.yaml"
    sections = yaml.safe_load(path.read_text())
    sections["model"]["max_length"] = 4096
    path.write_text(yaml.safe_dump(sections))
    assert load_run(tmp_path / "run")[0].config.max_length == 4096
    train_here(folder, tmp_path / "run", *TWO)
    assert read_config(tmp_path / "run").model.max_length == 32


def test_weights_trained_on_longer_texts_keep_their_length(folder, tmp_path):
    model, params = load_run(folder / "run")
    longer = type(model)(dataclasses.replace(model.config, max_length=64))
    save_pretrained(tmp_path / "longer", longer, params, tokenizer_dir=folder / "run")
    init = ("--init.checkpoint", str(tmp_path / "longer"))
    train_here(folder, tmp_path / "run", *ONE, *init)
    assert read_config(tmp_path / "run").model.max_length == 64
    shutil.rmtree(tmp_path / "longer")  # not needed to go on
    train_here(folder, tmp_path / "run", *TWO, *init)
    assert read_config(tmp_path / "run").model.max_length == 64
