"""Reading a run or a model onto a mesh, and what is told before anything is read."""

import jax
import pytest

from repo_jax import save_pretrained
from repo_jax.config import MeshConfig, RopeScaling
from repo_jax.errors import ConfigError
from repo_jax.evaluation.config import EvalConfig
from repo_jax.inference.loading import check_step, config_of, load, open_mesh
from repo_jax.sharding import make_mesh
from repo_jax.training import run_dir
from tests.tiny_runs import assert_same_bits, make_run, parse, write_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run, the same exported, and a run without a checkpoint."""
    folder = tmp_path_factory.mktemp("loading")
    config = parse(write_config(folder), "--model.vocab_size", "272")
    model, params = make_run(folder / "run", config)
    save_pretrained(folder / "model", model, params, tokenizer_dir=folder / "run")
    (folder / "unread").mkdir()
    run_dir.write(folder / "unread", config)
    return folder


@pytest.mark.parametrize("kind", ["run", "model"])
def test_devices_share_the_parameters(folder, kind):
    named = EvalConfig(**{kind: str(folder / kind)})
    spread = load(named, mesh=open_mesh(named, MeshConfig(data=2, fsdp=2, tensor=2)))
    assert dict(spread.mesh.shape) == dict(data=2, fsdp=2, tensor=2, context=1)
    layers = spread.params["layers"]
    # Width over fsdp, heads and vocabulary over tensor; data splits no parameter.
    for x, part in (
        (spread.params["head"]["kernel"], (16, 136)),
        (layers["attention"]["query"]["kernel"], (2, 16, 1, 16)),
        (layers["repositioning"]["final_map"]["kernel"], (2, 4, 1)),
    ):
        assert len(x.sharding.device_set) == 8
        assert {shard.data.shape for shard in x.addressable_shards} == {part}
    alone = load(named)
    assert alone.mesh is None
    assert_same_bits(spread.params, alone.params)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(fsdp=3), "the mesh is data 1 x fsdp 3 x tensor 1 x context 1; it must use all 8 dev"),
        (dict(tensor=4), r"mesh.tensor is 4; it must divide model.n_heads \(2\)"),
        (
            dict(fsdp=4, context=2),
            "mesh.context is 2; it must be 1, as only training splits tokens",
        ),
        (dict(slices=2), "mesh.slices is 2; it must be 1, as only training runs on several slices"),
    ],
)
def test_a_mesh_that_does_not_fit_is_told_before_parameters_are_read(folder, sizes, message):
    unread = EvalConfig(run=str(folder / "unread"))
    with pytest.raises(ConfigError, match="unread has no checkpoints"):
        load(unread, mesh=open_mesh(unread, MeshConfig()))
    with pytest.raises(ConfigError, match=f"^{message}"):
        open_mesh(unread, MeshConfig(**sizes))


@pytest.mark.parametrize("kind", ["run", "model"])
def test_a_mesh_that_does_not_divide_the_model_is_no_damage(folder, kind):
    """For those who read without a command, too."""
    named = EvalConfig(**{kind: str(folder / kind)})
    with pytest.raises(ConfigError, match=r"^mesh.tensor is 8; it must divide model.n_heads \(2\)"):
        load(named, mesh=make_mesh(MeshConfig(tensor=8)))


def test_a_mesh_of_several_processes_is_refused(folder, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    named = EvalConfig(run=str(folder / "run"))
    with pytest.raises(ConfigError, match=r"^--mesh is given in 2 processes; only training"):
        open_mesh(named, MeshConfig())
    assert open_mesh(named, None) is None


@pytest.mark.parametrize("kind", ["run", "model"])
@pytest.mark.parametrize("scaling", [None, RopeScaling(4.0), RopeScaling(4.0, 8)])
def test_the_config_is_the_loaded_models(folder, kind, scaling):
    named = EvalConfig(**{kind: str(folder / kind)}, rope_scaling=scaling)
    told = config_of(named)
    assert told.rope_scaling == load(named).model.config.rope_scaling
    assert told.rope_scaling == (scaling and RopeScaling(4.0, scaling.original_length or 32))


def test_a_step_is_looked_for(folder):
    check_step(EvalConfig(run=str(folder / "run")))
    check_step(EvalConfig(model=str(folder / "model")))
    with pytest.raises(ConfigError, match=r"step '7': .* has the checkpoints 0; latest and best"):
        check_step(EvalConfig(run=str(folder / "run"), step="7"))
    with pytest.raises(ConfigError, match="unread has no checkpoints"):
        check_step(EvalConfig(run=str(folder / "unread")))
