import dataclasses
import json

import pytest

from repo_jax.config import DecoderConfig, PositionConfig, RopeScaling, decoder_config
from repo_jax.errors import ConfigError
from repo_jax.interop import config_json


@pytest.fixture
def data():
    """An OLMo-2 config.json of 6 layers."""
    return {
        "model_type": "olmo2",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500000,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def read(data):
    return config_json.read(data, "config.json")


def test_reads_the_reference_config(golden_repo):
    config = config_json.read_folder(golden_repo)
    assert config == DecoderConfig(
        vocab_size=256,
        d_model=64,
        n_layers=4,
        n_heads=4,
        d_ff=176,
        max_length=256,
        init_std=0.06,
        positions=PositionConfig("repo", start_layer=1),
        eos_ids=(2,),
        pad_id=1,
    )


def test_writes_the_reference_config(golden):
    written = config_json.write(config_json.read_folder(golden), "float32", "huggingface")
    wanted = json.loads((golden / "config.json").read_text())
    del wanted["transformers_version"]
    assert written == wanted


def test_without_pe_config_it_is_rope(data):
    assert read(data).positions == PositionConfig("rope")


@pytest.mark.parametrize(
    ("pe", "positions"),
    [
        ({"dynamic_pe_mode": "none"}, PositionConfig("rope")),
        ({"dynamic_pe_mode": "nope"}, PositionConfig("nope")),
        ({"dynamic_pe_mode": "nope", "dynmaic_pe_layer_ids": "2,5"}, PositionConfig("r2n1")),
        ({"dynamic_pe_mode": "nope", "dynamic_pe_layer_ids": [2, 5]}, PositionConfig("r2n1")),
        (
            {"dynamic_pe_mode": "nope", "dynmaic_pe_layer_ids": "0, 1, 3, 4"},
            PositionConfig("n2r1"),
        ),
        (
            {"dynamic_pe_mode": "nope", "dynmaic_pe_start_layer": 4},
            PositionConfig("rope", layers=("rope",) * 4 + ("nope",) * 2),
        ),
        (
            {"dynamic_pe_mode": "swigluex_multihead", "dynamic_pe_start_layer": 2},
            PositionConfig("repo", start_layer=2),
        ),
        (
            # What transformers writes when only the misspelt key was given: a default beside it.
            {
                "dynamic_pe_mode": "swigluex_multihead",
                "dynamic_pe_start_layer": 0,
                "dynmaic_pe_start_layer": 2,
                "dynamic_pe_layer_ids": "",
                "dynmaic_pe_layer_ids": "1,3,5",
            },
            PositionConfig("repo", layers=("rope", "rope", "rope", "repo", "rope", "repo")),
        ),
        (
            {"dynamic_pe_mode": "continuous", "dynmaic_pe_start_layer": 3},
            PositionConfig("repo", start_layer=3, f_phi="linear", heads="shared"),
        ),
        (
            {"dynamic_pe_mode": "multihead_continuous", "dynmaic_pe_start_layer": 0},
            PositionConfig("repo", start_layer=0, f_phi="linear"),
        ),
    ],
)
def test_reads_positions(data, pe, positions):
    assert read(data | {"pe_config": pe}).positions == positions


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; only 'olmo2'"),
        ({"model_type": None}, "model_type is None; only 'olmo2'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"hidden_size": None}, "config.json: hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size is '64'; it must be a whole number"),
        ({"rope_theta": "big"}, "rope_theta is 'big'; it must be a number"),
        ({"eos_token_id": ["x"]}, "eos_token_id is"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'; only 'yarn'"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_type is missing"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}},
            "truncate is False",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.0}},
            "attention_factor is 1.0",
        ),
        ({"pe_config": {"dynamic_pe_mode": "cope"}}, "dynamic_pe_mode is 'cope'; known are none"),
        (
            {"pe_config": {"dynamic_pe_mode": "nope", "dynmaic_pe_layer_ids": "2,6"}},
            "dynmaic_pe_layer_ids is '2,6'; the layers are 0 to 5",
        ),
        (
            {"pe_config": {"dynamic_pe_mode": "nope", "dynmaic_pe_layer_ids": "2-5"}},
            "dynmaic_pe_layer_ids is '2-5'",
        ),
        (
            {
                "pe_config": {
                    "dynamic_pe_mode": "nope",
                    "dynamic_pe_start_layer": 3,
                    "dynmaic_pe_start_layer": 4,
                }
            },
            "dynamic_pe_start_layer is 3; dynmaic_pe_start_layer, which upstream reads, is 4",
        ),
        (
            {"num_key_value_heads": 2, "pe_config": {"dynamic_pe_mode": "swigluex_multihead"}},
            "not defined for 4 query heads and 2 key/value heads",
        ),
    ],
)
def test_refuses_by_name(data, change, message):
    with pytest.raises(ConfigError, match=message):
        read(data | change)


def test_yarn_is_read_as_both_upstream_readers_do(data):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    config = read(data | {"rope_scaling": yarn, "max_position_embeddings": 16384})
    assert config.rope_scaling == RopeScaling(4.0, 4096)
    assert config.max_length == 4096
    with pytest.raises(
        ConfigError, match=r"factor is 4.0; max_position_embeddings / .* 4096 / 4096"
    ):
        read(data | {"rope_scaling": yarn})


def test_yarn_without_original_length(data):
    config = read(data | {"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 16}})
    assert config.rope_scaling == RopeScaling(2.0, 4096, beta_fast=16.0)
    with pytest.raises(ConfigError, match="factor is missing"):
        read(data | {"rope_scaling": {"type": "yarn"}})


def test_yarn_can_be_overridden(data):
    broken = data | {"rope_scaling": {"rope_type": "yarn"}}
    config = config_json.read(broken, "config.json", RopeScaling(2.0, 4096))
    assert config.rope_scaling == RopeScaling(2.0, 4096)


def test_reads_transformers_5(data):
    del data["rope_theta"]
    plain = {"rope_type": "default", "rope_theta": 500000.0}
    assert read(data | {"rope_parameters": plain}).rope_theta == 500000.0
    yarn = plain | {"rope_type": "yarn", "factor": 2.0}
    assert read(data | {"rope_parameters": yarn}).rope_scaling == RopeScaling(2.0, 4096)


@pytest.mark.parametrize("eos", [(), (2,), (2, 7)])
def test_eos_ids(data, eos):
    config = read(data | {"eos_token_id": list(eos)})
    assert config.eos_ids == eos
    written = config_json.write(config, "float32", "huggingface")
    assert written["eos_token_id"] == {0: None, 1: 2, 2: [2, 7]}[len(eos)]
    assert read(written).eos_ids == eos


@pytest.mark.parametrize("size", ["olmo2_1b", "olmo2_7b"])
def test_published_shapes_survive(size):
    config = decoder_config(
        size,
        positions=PositionConfig("repo", start_layer=5),
        rope_scaling=RopeScaling(4.0, 4096, beta_fast=24.0),
    )
    written = json.loads(json.dumps(config_json.write(config, "bfloat16", "huggingface")))
    assert written["max_position_embeddings"] == 16384
    assert written["torch_dtype"] == "bfloat16"
    assert read(written) == config


REPO = PositionConfig("repo")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": REPO, "n_kv_heads": 2}, "n_kv_heads is 2 with 4 heads"),
        (
            {"positions": PositionConfig("repo", heads="shared")},
            "positions.heads is 'shared'; upstream's swiglu",
        ),
        (
            {"positions": PositionConfig("repo", heads="query"), "n_kv_heads": 2},
            "n_kv_heads is 2 with 4 heads",
        ),
        ({"positions": PositionConfig("repo", d_position=5)}, "d_position is 5"),
        (
            {"positions": PositionConfig(layers=("rope", "nope", "repo", "repo"))},
            "both nope and repo layers",
        ),
        ({"head_dim": 6}, "head_dim is 6"),
        (
            {"rope_scaling": RopeScaling(2.0, 2048), "max_length": 4096},
            "original_length is 2048 and model.max_length is 4096",
        ),
        ({"rope_scaling": RopeScaling(1.3, 4096)}, "rope_scaling.factor is 1.3"),
    ],
)
def test_what_upstream_cannot_express(changes, message):
    config = DecoderConfig(
        **{"vocab_size": 48, "d_model": 32, "n_layers": 4, "n_heads": 4, "d_ff": 40} | changes
    )
    with pytest.raises(ConfigError, match=message):
        config_json.write(config, "float32", "huggingface")
    ours = json.loads(json.dumps(config_json.write(config, "float32", "repo_jax")))
    assert read(ours) == config
    assert ours["model_type"] != "olmo2"  # or transformers would run it as something else


def test_our_format_keeps_every_field():
    config = DecoderConfig(
        vocab_size=48,
        d_model=32,
        n_layers=2,
        n_heads=4,
        d_ff=40,
        positions=PositionConfig("repo", start_layer=None),
        eos_ids=(1, 2),
        dtype="bfloat16",
        remat="attention",
    )
    changed = {f.name for f in dataclasses.fields(config) if f.default != getattr(config, f.name)}
    assert {"eos_ids", "dtype", "remat"} <= changed
    ours = json.loads(json.dumps(config_json.write(config, "float32", "repo_jax")))
    assert read(ours) == config
    ours["repo_jax"]["n_layer"] = 3
    with pytest.raises(ConfigError, match="repo_jax: n_layer is unknown"):
        read(ours)


def test_unknown_format():
    with pytest.raises(ConfigError, match="format is 'gguf'; it must be huggingface or repo_jax"):
        config_json.write(decoder_config("olmo2_1b"), "float32", "gguf")


def test_folder_without_config(tmp_path):
    with pytest.raises(ConfigError, match=r"has no config.json"):
        config_json.read_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.json is not JSON"):
        config_json.read_folder(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="holds no object"):
        config_json.read_folder(tmp_path)
