import json

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from repo_jax.config import PositionConfig, RopeScaling
from repo_jax.errors import ConfigError
from repo_jax.interop import checkpoint, from_pretrained, save_pretrained

EXPRESSIBLE = [
    PositionConfig("rope"),
    PositionConfig("nope"),
    PositionConfig("r2n1"),
    PositionConfig("n2r1"),
    PositionConfig("repo"),
    PositionConfig("repo", heads="query"),
    PositionConfig("repo", start_layer=0),
    PositionConfig(layers=("rope", "repo", "rope", "repo")),
    PositionConfig(layers=("nope", "rope", "rope", "rope")),
    PositionConfig("repo", f_phi="linear"),
    PositionConfig("repo", f_phi="linear", heads="shared"),
]


@pytest.mark.parametrize("positions", EXPRESSIBLE)
def test_round_trip_in_hugging_faces_format(positions, make_model, tmp_path, assert_same):
    model, params = make_model(positions, eos_ids=(3, 5), pad_id=7)
    save_pretrained(tmp_path / "a", model, params)
    again, loaded = from_pretrained(tmp_path / "a")
    assert again.config.kinds == model.config.kinds
    assert again.config.position_columns == model.config.position_columns
    assert again.config.positions.f_phi == positions.f_phi or "repo" not in model.config.kinds
    assert_same(loaded, params)
    save_pretrained(tmp_path / "b", again, loaded)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"positions": PositionConfig("repo"), "n_kv_heads": 2},
        {"positions": PositionConfig("repo", heads="query"), "n_kv_heads": 2},
        {"positions": PositionConfig("repo", heads="shared", d_position=5)},
        {"positions": PositionConfig(layers=("repo", "nope", "rope", "repo")), "head_dim": 6},
        {"rope_scaling": RopeScaling(1.3, 100, beta_fast=20.0)},
    ],
)
def test_round_trip_in_our_format(changes, make_model, tmp_path, assert_same):
    model, params = make_model(**changes)
    with pytest.raises(ConfigError, match="save with format='repo_jax'"):
        save_pretrained(tmp_path / "a", model, params)
    assert not (tmp_path / "a").exists()
    save_pretrained(tmp_path / "a", model, params, format="repo_jax")
    again, loaded = from_pretrained(tmp_path / "a")
    assert again.config == model.config
    assert_same(loaded, params)


def test_parameters_as_the_model_makes_them(make_model, tmp_path, assert_same):
    model, _ = make_model()
    boxed = model.init(jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
    save_pretrained(tmp_path / "a", model, boxed)
    assert_same(from_pretrained(tmp_path / "a")[1], nn.meta.unbox(boxed))


def test_tensors_are_the_references(golden, tmp_path):
    model, params = from_pretrained(golden)
    save_pretrained(tmp_path / "out", model, params)
    ours = load_file(tmp_path / "out" / "model.safetensors")
    theirs = load_file(golden / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        np.testing.assert_array_equal(ours[name], x, err_msg=name)
    with safe_open(tmp_path / "out" / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses files without it


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision(dtype, make_model, tmp_path, assert_same):
    model, params = make_model(dtype=dtype)
    save_pretrained(tmp_path / "a", model, params)
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    assert {x.dtype for x in tensors.values()} == {np.dtype(dtype)}
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["torch_dtype"] == np.dtype(dtype).name
    _, loaded = from_pretrained(tmp_path / "a")
    wide = lambda tree: {
        k: wide(v) if isinstance(v, dict) else np.float32(v) for k, v in tree.items()
    }
    assert_same(loaded, wide(params))


def test_mixed_dtypes_stay_aligned(make_model, tmp_path):
    model, params = make_model(PositionConfig("rope"), d_model=33, head_dim=4)
    for norm, dtype in (
        (params["final_norm"], ml_dtypes.bfloat16),
        (params["layers"]["mlp_norm"], np.float16),
    ):
        norm["scale"] = norm["scale"].astype(dtype)
    save_pretrained(tmp_path / "a", model, params, format="repo_jax")
    path = tmp_path / "a" / "model.safetensors"
    tensors = load_file(path)
    np.testing.assert_array_equal(tensors["model.norm.weight"], params["final_norm"]["scale"])
    np.testing.assert_array_equal(tensors["lm_head.weight"], params["head"]["kernel"].T)
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    for name, x in tensors.items():
        assert (8 + size + header[name]["data_offsets"][0]) % x.itemsize == 0, name


def test_shards(make_model, tmp_path, assert_same):
    model, params = make_model()
    save_pretrained(tmp_path / "one", model, params)
    save_pretrained(tmp_path / "many", model, params, max_shard_bytes=9000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    names = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(names) > 5
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == names
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in whole.values())
    for name in names:
        tensors = load_file(tmp_path / "many" / name)
        assert sum(x.nbytes for x in tensors.values()) <= 9000
        for key, x in tensors.items():
            assert index["weight_map"].pop(key) == name
            np.testing.assert_array_equal(whole[key], x)
    assert not index["weight_map"]
    assert_same(from_pretrained(tmp_path / "many")[1], params)


def test_nothing_is_overwritten(make_model, tmp_path):
    model, params = make_model()
    save_pretrained(tmp_path / "a", model, params)
    before = {path: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    for keep in before:
        folder = tmp_path / keep.name.replace(".", "_")
        folder.mkdir()
        (folder / keep.name).write_bytes(b"mine")
        with pytest.raises(ConfigError, match=f"{keep.name} exists; nothing is overwritten"):
            save_pretrained(folder, model, params)
        assert [path.read_bytes() for path in folder.iterdir()] == [b"mine"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="file is a file; name a folder"):
        save_pretrained(tmp_path / "file", model, params)


def test_a_failure_leaves_nothing(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "notes.txt").write_text("mine")
    tensors = [checkpoint.Tensor(name, (2, 3), np.dtype(np.float32)) for name in "ab"]

    def rows(tensor):
        if tensor.name == "b":
            raise KeyboardInterrupt
        yield np.zeros((2, 3), np.float32)

    for name in ("new", "kept"):
        with pytest.raises(KeyboardInterrupt):
            checkpoint.write(tmp_path / name, {}, tensors, rows, max_shard_bytes=1)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["kept", "notes.txt"]


def test_a_full_disk_is_seen_before(make_model, tmp_path, monkeypatch):
    model, params = make_model()
    usage = lambda folder: type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", usage)
    with pytest.raises(ConfigError, match=r"needs 0.0 GB; its disk has 0.0 GB free"):
        save_pretrained(tmp_path / "a", model, params)
    assert not (tmp_path / "a").exists()


def test_tokenizer_files_come_along(make_model, tmp_path):
    source = tmp_path / "tokenizer"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "README.md", "model.py"):
        (source / name).write_text(name)
    model, params = make_model()
    save_pretrained(tmp_path / "a", model, params, tokenizer_dir=source)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    }
    with pytest.raises(ConfigError, match=r"tokenizer_dir is .*none; there is no such folder"):
        save_pretrained(tmp_path / "b", model, params, tokenizer_dir=tmp_path / "none")


def test_parameters_must_be_the_models(make_model, tmp_path):
    def refused(change, message):
        model, params = make_model()
        change(params)
        with pytest.raises(ConfigError, match=message):
            save_pretrained(tmp_path / "a", model, params)
        assert not (tmp_path / "a").exists()

    refused(lambda p: p.pop("head"), "the parameters lack head/kernel")
    refused(lambda p: p.update(params=dict(p)), "the parameters have the unknown params/")
    refused(lambda p: p.update(x={"y": np.ones(2)}), "the parameters have the unknown x/y")
    refused(
        lambda p: p["final_norm"].update(scale=np.ones(31, np.float32)),
        r"final_norm/scale is \[31\]; the model's is \[32\]",
    )
    refused(
        lambda p: p["final_norm"].update(scale=np.ones(32)),
        "final_norm/scale is float64; it must be float32, bfloat16 or float16",
    )
