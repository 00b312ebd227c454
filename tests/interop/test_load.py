import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from repo_jax.config import PositionConfig, RopeScaling
from repo_jax.errors import ConfigError, MissingPackageError
from repo_jax.interop import from_pretrained, save_pretrained


@pytest.fixture(autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def broken(golden_repo, tmp_path):
    """Writes the reference's RePo checkpoint with its tensors changed."""

    def write(change):
        tensors = load_file(golden_repo / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors")
        shutil.copy(golden_repo / "config.json", tmp_path)
        return tmp_path

    return write


def test_logits_are_the_reference(golden):
    model, params = from_pretrained(golden)
    reference = np.load(golden / "reference.npz")
    logits = model.apply({"params": params}, reference["tokens"]).logits
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, reference["logits"], rtol=0, atol=2e-5)


def test_yarn_logits_are_the_reference(golden, tmp_path):
    reference = np.load(golden / "reference.npz")
    scaling = RopeScaling(float(reference["yarn_factor"]), 256)
    model, params = from_pretrained(golden, rope_scaling=scaling)
    logits = model.apply({"params": params}, reference["tokens"]).logits
    np.testing.assert_allclose(logits, reference["logits_yarn"], rtol=0, atol=2e-5)
    save_pretrained(tmp_path / "yarn", model, params)
    again, _ = from_pretrained(tmp_path / "yarn")
    assert again.config == model.config


def test_dtypes(golden_rope):
    model, params = from_pretrained(golden_rope, dtype="bfloat16", param_dtype=jnp.bfloat16)
    assert (model.config.dtype, model.config.param_dtype) == ("bfloat16", "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    stored = load_file(golden_rope / "model.safetensors")["lm_head.weight"]
    np.testing.assert_array_equal(params["head"]["kernel"], stored.T.astype(ml_dtypes.bfloat16))
    model, params = from_pretrained(golden_rope)
    assert (model.config.dtype, model.config.param_dtype) == ("float32", "float32")
    with pytest.raises(ConfigError, match="param_dtype is 'float64'; it must be float32 or"):
        from_pretrained(golden_rope, param_dtype=np.float64)
    with pytest.raises(ConfigError, match="dtype is 'float16'; it must be float32 or bfloat16"):
        from_pretrained(golden_rope, dtype="half")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files(broken, dtype):
    def halve(tensors):
        for name, x in tensors.items():
            tensors[name] = x.astype(dtype)

    folder = broken(halve)
    _, params = from_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    embedding = params["embedding"]["embedding"]
    assert embedding.dtype == jnp.float32
    np.testing.assert_array_equal(
        embedding, tensors["model.embed_tokens.weight"].astype(np.float32)
    )
    np.testing.assert_array_equal(
        params["layers"]["repositioning"]["final_map"]["kernel"][1],
        tensors["model.layers.2.self_attn.final_map.weight"].T.astype(np.float32),
    )


def test_rotary_buffers_are_ignored(broken, golden_repo, assert_same):
    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
        tensors["model.rotary_emb.inv_freq"] = np.ones(8, np.float64)

    _, params = from_pretrained(broken(add))
    assert_same(params, from_pretrained(golden_repo)[1])


@pytest.mark.parametrize("own_std", [None, 0.3])
def test_repo_on_a_rope_checkpoint(golden_rope, assert_same, own_std):
    positions = PositionConfig("repo", start_layer=1, init_std=own_std)
    model, params = from_pretrained(golden_rope, positions=positions, rng=jax.random.key(3))
    assert model.config.positions == positions
    f_phi = params["layers"].pop("repositioning")
    assert_same(params, from_pretrained(golden_rope)[1])
    shapes = {path[0]: x.shape for path, x in traverse_util.flatten_dict(f_phi).items()}
    assert shapes == {"gate_map": (2, 64, 8), "content_map": (2, 64, 8), "final_map": (2, 8, 4)}
    weights = np.concatenate([np.ravel(x) for x in jax.tree.leaves(f_phi)])
    assert model.config.init_std == 0.06
    std = own_std or 0.06
    assert abs(weights).max() < 3 * std
    assert 0.9 * std < weights.std() < 1.05 * std  # cut at 3 sigma: 0.986 of it
    assert len(np.unique(weights)) > 0.99 * len(weights)  # no two maps or layers alike


def test_new_weights_come_from_the_key(golden_rope, assert_same):
    load = lambda **options: from_pretrained(
        golden_rope, positions=PositionConfig("repo", start_layer=1), **options
    )[1]
    assert_same(load(), load(rng=jax.random.key(0)))
    gate = lambda params: params["layers"]["repositioning"]["gate_map"]["kernel"]
    assert not np.array_equal(gate(load()), gate(load(rng=jax.random.key(1))))


def test_f_phi_that_exists_is_kept(golden_repo):
    _, old = from_pretrained(golden_repo)
    _, new = from_pretrained(golden_repo, positions=PositionConfig("repo", start_layer=0))
    old, new = (p["layers"]["repositioning"]["gate_map"]["kernel"] for p in (old, new))
    np.testing.assert_array_equal(new[1:], old)
    model, params = from_pretrained(golden_repo, positions=PositionConfig("rope"))
    assert "repositioning" not in params["layers"]
    assert model.config.kinds == ("rope",) * 4


def test_f_phi_of_another_shape_is_refused(golden_repo):
    message = r"gate_map.weight \[8, 64\] where the positions asked for need \[16, 64\]"
    with pytest.raises(ConfigError, match=message):
        from_pretrained(golden_repo, positions=PositionConfig("repo", d_position=16))


@pytest.mark.parametrize("axis", ["data", "fsdp"])
def test_devices_of_a_mesh_share_parameters_as_its_axes_say(golden_rope, assert_same, axis):
    mesh = jax.make_mesh((jax.device_count(),), (axis,), axis_types=(jax.sharding.AxisType.Auto,))
    _, params = from_pretrained(golden_rope, mesh=mesh)
    head, norm = params["head"]["kernel"], params["final_norm"]["scale"]
    parts = {"data": 1, "fsdp": 8}[axis]
    assert head.sharding.shard_shape(head.shape) == (head.shape[0] // parts, head.shape[1])
    assert norm.is_fully_replicated
    assert len(norm.sharding.device_set) == 8
    assert_same(params, from_pretrained(golden_rope)[1])


F_PHI = "model.layers.1.self_attn.final_map.weight"


@pytest.mark.parametrize("positions", [None, PositionConfig("repo", start_layer=1)])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.norm.weight"),
            "does not fit its config: it lacks model.norm.weight",
        ),
        (lambda t: t.pop(F_PHI), f"it lacks {F_PHI}"),
        (
            lambda t: t.update({"model.layers.0.mlp.bias": np.ones(3, np.float32)}),
            "it has model.layers.0.mlp.bias, of which the config knows nothing",
        ),
        (
            lambda t: t.update({F_PHI: np.ones((5, 8), np.float32)}),
            r"final_map.weight \[5, 8\] where the config needs \[4, 8\]",
        ),
        (
            lambda t: t.update({F_PHI: np.ones((4, 8), np.int8)}),
            "final_map.weight has the dtype I8; it must be one of F32, F16, BF16",
        ),
        (
            lambda t: [t.pop(name) for name in list(t) if "mlp.up" in name or "mlp.gate" in name],
            "it lacks model.layers.0.mlp.* and 4 more",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(broken, change, message, positions):
    with pytest.raises(ConfigError, match=message):
        from_pretrained(broken(change), positions=positions)


def test_config_and_tensors_must_agree(broken):
    folder = broken(lambda tensors: None)
    data = json.loads((folder / "config.json").read_text())
    del data["pe_config"]
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(
        ConfigError, match=r"content_map.weight.* of which the config knows nothing"
    ):
        from_pretrained(folder)


def test_truncated_file(broken):
    folder = broken(lambda tensors: None)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"model.safetensors is truncated or not a safetensors"):
        from_pretrained(folder)
    path.write_bytes(b"not safetensors")
    with pytest.raises(ConfigError, match=r"model.safetensors is truncated or not a safetensors"):
        from_pretrained(folder)


def test_files_that_are_not_there(broken):
    folder = broken(lambda tensors: None)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "model-00001-of-00001.safetensors"}}))
    with pytest.raises(ConfigError, match=r"names model-00001-of-00001.safetensors, which is miss"):
        from_pretrained(folder)
    index.write_text(json.dumps({"weight_map": {"x": "../model.safetensors"}}))
    with pytest.raises(ConfigError, match=r"'../model.safetensors', which is outside its folder"):
        from_pretrained(folder)
    index.write_text("[]")
    with pytest.raises(ConfigError, match="is no index of safetensors files"):
        from_pretrained(folder)
    index.unlink()
    path = folder / "model.safetensors"
    shutil.copy(path, folder / "a.safetensors")
    path.rename(folder / "b.safetensors")
    with pytest.raises(
        ConfigError, match=r"has 2 safetensors files but no model.safetensors.index"
    ):
        from_pretrained(folder)


def test_pickles_are_refused(golden_repo, tmp_path):
    shutil.copy(golden_repo / "config.json", tmp_path)
    with pytest.raises(ConfigError, match=r"has no .safetensors file"):
        from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ConfigError, match=r"has pytorch_model.bin but no safetensors; pickled"):
        from_pretrained(tmp_path)


def test_paths(golden_repo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for missing in ("./x", "/no/such/folder", "x", "a/b/c", "~/no-such-folder", ""):
        with pytest.raises(ConfigError, match=r"there is no folder|has no .safetensors"):
            from_pretrained(missing)
    with pytest.raises(ConfigError, match="there is no folder owner/name"):
        from_pretrained(tmp_path.__class__("owner/name"))
    with pytest.raises(ConfigError, match=r"model.safetensors is a file; name the folder"):
        from_pretrained(golden_repo / "model.safetensors")
    with pytest.raises(ConfigError, match=r"revision is 'main', but .* is a folder here"):
        from_pretrained(golden_repo, revision="main")
    # What exists here wins over a hub id of that name.
    shutil.copytree(golden_repo, tmp_path / "owner" / "name")
    model, _ = from_pretrained("owner/name")
    assert model.config.n_layers == 4


def test_hub_needs_its_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(MissingPackageError, match=r"'huggingface_hub'.*repo-jax\[hub\]"):
        from_pretrained("owner/name")
