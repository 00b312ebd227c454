import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file

from repo_jax.config import DecoderConfig, PositionConfig
from repo_jax.interop.names import parameter_shapes, stored_shapes, table
from repo_jax.modeling import RePoLM


@pytest.mark.parametrize(
    "changes",
    [
        {"positions": PositionConfig("rope")},
        {"positions": PositionConfig("r2n1")},
        {"positions": PositionConfig("repo")},
        {"positions": PositionConfig("repo", f_phi="linear", heads="shared")},
        {"positions": PositionConfig("repo", heads="query", d_position=5), "n_kv_heads": 2},
        {"positions": PositionConfig(layers=("repo", "nope", "rope", "repo")), "head_dim": 6},
    ],
)
def test_parameters_are_those_of_the_model(changes):
    config = DecoderConfig(vocab_size=50, d_model=32, n_layers=4, n_heads=4, d_ff=40, **changes)
    tokens = np.zeros((1, 2), np.int32)
    abstract = jax.eval_shape(RePoLM(config).init, jax.random.key(0), tokens)["params"]
    leaves = traverse_util.flatten_dict(nn.meta.unbox(abstract))
    assert {path: leaf.shape for path, leaf in leaves.items()} == parameter_shapes(config)


def test_names_and_shapes_are_those_of_the_reference(golden_repo):
    config = DecoderConfig(
        vocab_size=256, d_model=64, n_layers=4, n_heads=4, d_ff=176, positions=PositionConfig()
    )
    tensors = load_file(golden_repo / "model.safetensors")
    wanted = stored_shapes(table(config), "huggingface")
    assert wanted == {name: x.shape for name, x in tensors.items()}


def test_there_and_back_is_the_same():
    config = DecoderConfig(vocab_size=6, d_model=8, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=10)
    for entry in table(config):
        x = np.arange(np.prod(entry.stored)).reshape(entry.stored)
        ours = entry.to_ours(x)
        assert ours.shape == entry.ours
        np.testing.assert_array_equal(entry.to_stored(ours), x)


def test_a_head_is_a_block_of_rows():
    config = DecoderConfig(vocab_size=6, d_model=8, n_layers=1, n_heads=2, d_ff=10)
    entries = {entry.name: entry for entry in table(config)}
    x = np.arange(64).reshape(8, 8)  # [N * H, D]
    query = entries["model.layers.0.self_attn.q_proj.weight"].to_ours(x)  # [D, N, H]
    np.testing.assert_array_equal(query[:, 1], x[4:].T)
    out = entries["model.layers.0.self_attn.o_proj.weight"].to_ours(x)  # [N, H, D]
    np.testing.assert_array_equal(out[1], x[:, 4:].T)
