import base64
import pickle

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from repo_jax import convert
from repo_jax.config import PositionConfig
from repo_jax.errors import ConfigError
from repo_jax.interop import from_pretrained, olmo, save_pretrained

CONFIG = """
run_name: a test
model:
  d_model: {d_model}
  n_heads: {n_heads}
  n_kv_heads: {n_kv_heads}
  n_layers: {n_layers}
  mlp_hidden_size: {two_d_ff}
  weight_tying: false
  rope: true
  rope_theta: 500000
  include_bias: false
  layer_norm_type: rms
  layer_norm_eps: 1e-6
  attention_layer_norm: true
  norm_after: true
  activation_type: swiglu
  max_sequence_length: {max_length}
  vocab_size: {vocab_size_less_1}
  embedding_size: {vocab_size}
  eos_token_id: 2
  pad_token_id: 1
  init_std: 0.06
{pe}
"""


def pickled_key(name, protocol=4):
    return base64.urlsafe_b64encode(pickle.dumps(((name,), False), protocol)).decode()


def to_olmo(folder, out, config, pe="", key=pickled_key):
    """Writes a checkpoint with Hugging Face's names as OLMo's trainer has it."""
    hf = load_file(folder / "model.safetensors")
    layer = lambda i, name: hf.pop(f"model.layers.{i}.{name}.weight")
    tensors = {
        "transformer.wte.weight": hf.pop("model.embed_tokens.weight"),
        "transformer.ln_f.weight": hf.pop("model.norm.weight"),
        "transformer.ff_out.weight": hf.pop("lm_head.weight"),
    }
    for i in range(config.n_layers):
        q, k, v = (layer(i, f"self_attn.{x}_proj") for x in "qkv")
        up, gate = layer(i, "mlp.up_proj"), layer(i, "mlp.gate_proj")
        block = {
            "att_proj": np.concatenate([q, k, v]),
            "ff_proj": np.concatenate([up, gate]),
            "attn_out": layer(i, "self_attn.o_proj"),
            "ff_out": layer(i, "mlp.down_proj"),
            "q_norm": layer(i, "self_attn.q_norm"),
            "k_norm": layer(i, "self_attn.k_norm"),
            "attn_norm": layer(i, "post_attention_layernorm"),
            "ff_norm": layer(i, "post_feedforward_layernorm"),
        }
        for name in ("gate_map", "content_map", "final_map"):
            if f"model.layers.{i}.self_attn.{name}.weight" in hf:
                block[name] = layer(i, f"self_attn.{name}")
        tensors |= {f"transformer.blocks.{i}.{name}.weight": x for name, x in block.items()}
    assert not hf
    out.mkdir()
    save_file({key(name): x for name, x in tensors.items()}, out / "model.safetensors")
    text = CONFIG.format(
        d_model=config.d_model,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        n_layers=config.n_layers,
        two_d_ff=2 * config.d_ff,
        max_length=config.max_length,
        vocab_size=config.vocab_size,
        vocab_size_less_1=config.vocab_size - 1,
        pe=pe,
    )
    (out / "config.yaml").write_text(text)


PE = "  dynamic_pe_mode: swigluex_multihead\n  dynamic_pe_start_layer: 1"


@pytest.mark.parametrize("key", [pickled_key, str])
def test_same_model_under_both_names(golden_repo, tmp_path, assert_same, key):
    model, params = from_pretrained(golden_repo)
    to_olmo(golden_repo, tmp_path / "olmo", model.config, PE, key)
    olmo_model, olmo_params = from_pretrained(tmp_path / "olmo")
    assert olmo_model.config == model.config
    assert_same(olmo_params, params)


def test_conversion_gives_hugging_faces_tensors(golden_repo, tmp_path):
    model, _ = from_pretrained(golden_repo)
    to_olmo(golden_repo, tmp_path / "olmo", model.config, PE)
    convert.convert(str(tmp_path / "olmo"), str(tmp_path / "hf"))
    ours = load_file(tmp_path / "hf" / "model.safetensors")
    theirs = load_file(golden_repo / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        np.testing.assert_array_equal(ours[name], x, err_msg=name)
    assert from_pretrained(tmp_path / "hf")[0].config == model.config


def test_grouped_heads_are_split_where_they_belong(make_model, tmp_path, assert_same):
    positions = PositionConfig("rope")
    model, params = make_model(positions, n_kv_heads=2, eos_ids=(2,), pad_id=1, init_std=0.06)
    save_pretrained(tmp_path / "hf", model, params)
    to_olmo(tmp_path / "hf", tmp_path / "olmo", model.config)
    olmo_model, olmo_params = from_pretrained(tmp_path / "olmo")
    assert olmo_model.config == model.config
    assert_same(olmo_params, params)


def test_stacked_shapes_are_checked(golden_repo, tmp_path):
    model, _ = from_pretrained(golden_repo)
    to_olmo(golden_repo, tmp_path / "olmo", model.config, PE)
    path = tmp_path / "olmo" / "config.yaml"
    path.write_text(path.read_text().replace("mlp_hidden_size: 352", "mlp_hidden_size: 350"))
    message = r"transformer.blocks.0.ff_proj.weight \[352, 64\] where the config needs \[350, 64\]"
    with pytest.raises(ConfigError, match=message):
        from_pretrained(tmp_path / "olmo")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("norm_after: true", "norm_after: false", "norm_after is False; only True"),
        ("  attention_layer_norm: true\n", "", "attention_layer_norm is None; only True"),
        ("weight_tying: false", "weight_tying: true", "weight_tying is True"),
        ("activation_type: swiglu", "activation_type: gelu", "activation_type is 'gelu'"),
        ("d_model: 64", "", "model: d_model is missing"),
        ("model:", "models:", "has no section 'model'"),
        ("model:", "model: [", "config.yaml is not YAML"),
    ],
)
def test_config_is_refused_by_name(golden_repo, tmp_path, old, new, message):
    model, _ = from_pretrained(golden_repo)
    to_olmo(golden_repo, tmp_path / "olmo", model.config, PE)
    path = tmp_path / "olmo" / "config.yaml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=message):
        from_pretrained(tmp_path / "olmo")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_names_are_decoded_without_unpickling(protocol):
    encode = lambda value: base64.urlsafe_b64encode(pickle.dumps(value, protocol)).decode()
    assert olmo.decode_name(encode((("transformer.wte.weight",), False))) == (
        "transformer.wte.weight"
    )
    twice = "a"
    assert olmo.decode_name(encode(((twice, twice, "b", "c", "ü" * 300), False))) == (
        "a.a.b.c." + "ü" * 300
    )
    with pytest.raises(ConfigError, match="is a pickled object"):
        olmo.decode_name(encode((("state",), True)))
    for value in [("a", "b"), (("a",), "b"), ((), False), "a", ((("a",),), False)]:
        with pytest.raises(ConfigError, match="is not one of OLMo's"):
            olmo.decode_name(encode(value))


def test_a_name_cannot_run_code():
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("the name was unpickled",))

    key = base64.urlsafe_b64encode(pickle.dumps(((Trap(),), False))).decode()
    with pytest.raises(ConfigError, match="opcode STACK_GLOBAL; only names in tuples are read"):
        olmo.decode_name(key)


@pytest.mark.parametrize(
    "pickled", [b"\x80\x04", b"\x80\x04\x85.", b"\x80\x04h\x05.", b"\x80\x04t."]
)
def test_a_broken_name(pickled):
    with pytest.raises(ConfigError, match=r"is a broken pickle|is not one of OLMo's"):
        olmo.decode_name(base64.urlsafe_b64encode(pickled).decode())


@pytest.mark.parametrize("name", ["model.norm.weight", "AAAA", "lm_head", "x"])
def test_other_names_are_left_alone(name):
    assert olmo.decode_name(name) == name
