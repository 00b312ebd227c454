"""Attention mass against all weights written out, for every kind of positions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repo_jax.analysis.attention_mass import _layer, attention_mass, visible_tokens
from repo_jax.config import DecoderConfig, PositionConfig, RopeScaling
from repo_jax.modeling import DecoderBlock, RePoLM, init_params
from repo_jax.modeling.cache import split_layers
from repo_jax.modeling.rope import rotary_frequencies

SHAPE = dict(vocab_size=64, d_model=32, n_layers=3, n_heads=4, d_ff=48, init_std=0.25)
YARN = RopeScaling(factor=4.0, original_length=16)
KINDS = {
    "rope": dict(preset="rope"),
    "nope": dict(preset="nope"),
    "r2n1": dict(preset="r2n1"),
    "repo": dict(preset="repo", start_layer=1),
    "repo-shared": dict(preset="repo", start_layer=0, heads="shared"),
    "repo-query": dict(preset="repo", start_layer=1, heads="query"),
    "cope": dict(preset="cope", cope_positions=6),
}
T = 37


@functools.cache
def make(kind, **changes):
    config = DecoderConfig(**SHAPE | changes, positions=PositionConfig(**KINDS[kind]))
    model = RePoLM(config)
    return model, init_params(model, jax.random.key(1))


def rotate(x_TNH, z_TN, config):
    """The rotation, in float64: channel c is paired with c + H/2."""
    inv_freq, scale = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    angle = z_TN[:, :, None] * inv_freq.astype(np.float64)  # [T, N, H/2]
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    a, b = np.split(x_TNH, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def rms(x, eps):
    return x / np.sqrt((x * x).mean((-2, -1), keepdims=True) + eps)


def dense(model, params, tokens):
    """All attention weights, float64 [L, N, T, T], from the inputs of the model's layers."""
    c = model.config
    run = jax.jit(lambda block, params, x: block.apply({"params": params}, x), static_argnums=0)
    x_BTD = jnp.asarray(params["embedding"]["embedding"])[tokens[None]]
    weights = []
    for kind, layer in zip(c.kinds, split_layers(c, params)["layers"], strict=True):
        after_BTD, z_BTP = run(DecoderBlock(c, kind), layer, x_BTD)
        weights.append(layer_weights(c, layer["attention"], x_BTD[0], z_BTP))
        x_BTD = after_BTD
    return np.stack(weights)


def layer_weights(c, params, x_TD, z_BTP):
    x_TD, w = jax.tree.map(lambda x: np.asarray(x, np.float64), (x_TD, params))
    q, k = (np.einsum("TD,DNH->TNH", x_TD, w[name]["kernel"]) for name in ("query", "key"))
    q = rms(q, c.norm_eps) * w["query_norm"]["scale"]
    k = rms(k, c.norm_eps) * w["key_norm"]["scale"]
    k = np.repeat(k, c.n_heads // c.n_kv_heads, axis=1)
    if z_BTP is not None:
        z_TN = np.repeat(np.asarray(z_BTP[0], np.float64), c.n_heads // z_BTP.shape[-1], axis=1)
        q, k = (rotate(x, z_TN, c) for x in (q, k))
    scores = np.einsum("TNH,SNH->NTS", q, k) / np.sqrt(c.head_dim)
    visible = np.tri(len(x_TD), dtype=bool)
    if "position_kernel" in w:
        scores = scores + cope_scores(q, scores, visible, w["position_kernel"])
    scores = np.where(visible, scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def cope_scores(q, scores, visible, kernel):
    """What CoPE adds (arXiv 2405.18719): gates summed from a key to the query, interpolated."""
    gates = np.where(visible, 1 / (1 + np.exp(-scores)), 0)
    position = np.minimum(np.cumsum(gates[..., ::-1], -1)[..., ::-1], kernel.shape[1] - 1)
    below = np.floor(position).astype(int)
    above = np.minimum(below + 1, kernel.shape[1] - 1)
    at = np.einsum("TNH,HP->NTP", q, kernel)
    take = lambda i: np.take_along_axis(at, i, -1)
    return (1 - (position - below)) * take(below) + (position - below) * take(above)


def text(parts, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, SHAPE["vocab_size"], T).astype(np.int32)
    labels = rng.permutation(np.arange(T) % (parts + 1) - 1)
    return tokens, labels, np.arange(T) >= T - 5


@pytest.mark.parametrize(
    ("kind", "n_kv_heads"), [*((kind, 2) for kind in KINDS), ("rope", 4), ("repo", 4)]
)
def test_it_is_the_sum_of_the_dense_weights(kind, n_kv_heads):
    scaling = YARN if kind in ("rope", "r2n1", "repo-query") else None
    model, params = make(kind, n_kv_heads=n_kv_heads, rope_scaling=scaling)
    tokens, labels, queries = text(parts=3)
    weights = dense(model, params, tokens)[:, :, queries].mean(2)
    expected = np.stack([weights[..., labels == part].sum(-1) for part in range(3)], -1)
    found = attention_mass(model, params, tokens, labels, queries)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-6)
    # The reference could tell: heads and parts differ by far more than that.
    assert expected.std(axis=(0, 1)).min() > 1e-3


def test_more_parts_than_a_head_has_channels():
    model, params = make("repo", n_kv_heads=2)
    tokens, labels, queries = text(parts=19)
    assert model.config.head_dim < 19
    weights = dense(model, params, tokens)[:, :, queries].mean(2)
    expected = np.stack([weights[..., labels == part].sum(-1) for part in range(19)], -1)
    found = attention_mass(model, params, tokens, labels, queries)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-6)


@settings(max_examples=10)
@given(st.integers(1, 11), st.integers(0, T - 1), st.integers(0, 99))
def test_all_parts_together_get_everything(parts, query, seed):
    model, params = make("repo")
    tokens = text(parts, seed)[0]
    labels = np.random.default_rng(seed).integers(0, parts, T)
    labels[0] = parts - 1
    found = attention_mass(model, params, tokens, labels, np.arange(T) == query)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
    later = [part for part in range(parts) if not (labels[: query + 1] == part).any()]
    assert (found[..., later] == 0).all()  # a query sees nothing after it


def test_bfloat16_differs_by_its_rounding_only():
    model, params = make("repo")
    narrow = RePoLM(dataclasses.replace(model.config, dtype="bfloat16"))
    tokens, labels, queries = text(parts=3)
    wide, rounded = (attention_mass(m, params, tokens, labels, queries) for m in (model, narrow))
    assert rounded.dtype == np.float32
    # The first layer's input is the same; further up the models themselves differ.
    np.testing.assert_allclose(rounded[0], wide[0], rtol=0.05, atol=0.01)
    assert not np.array_equal(rounded, wide)


def test_each_kind_of_layer_is_compiled_once():
    model, params = make("r2n1", n_layers=6, d_ff=40)
    before = _layer._cache_size()
    for seed in range(2):
        attention_mass(model, params, *text(3, seed))
    assert _layer._cache_size() == before + 2


def test_visible_tokens_are_those_up_to_the_query():
    labels = np.array([0, 1, 0, -1, 1, 1])
    count = lambda *at: visible_tokens(labels, np.isin(np.arange(6), at)).tolist()
    assert count(0) == [1, 0]
    assert count(5) == [2, 3]
    assert count(2, 4) == [2, 1.5]


def test_what_cannot_be_measured_is_refused():
    model, params = make("rope")
    tokens, labels, queries = text(parts=2)
    with pytest.raises(ValueError, match="at least one query and one labelled token"):
        attention_mass(model, params, tokens, labels, queries & False)
    with pytest.raises(ValueError, match="at least one query and one labelled token"):
        attention_mass(model, params, tokens, labels * 0 - 1, queries)
    tokens[3] = 64
    with pytest.raises(ValueError, match="there is token 64; the model knows 64"):
        attention_mass(model, params, tokens, labels, queries)


@pytest.mark.parametrize("kind", ["repo", "cope"])
def test_the_probe_changes_nothing_and_nothing_is_there_without_it(kind):
    model, params = make(kind)
    given = {"params": split_layers(model.config, params)["layers"][2]}
    block = DecoderBlock(model.config, kind)
    x = jnp.ones((1, 8, 32))
    assert list(jax.eval_shape(block.init, jax.random.key(0), x)) == ["params"]
    apply = jax.jit(functools.partial(block.apply, mutable="intermediates"))
    (out, _), sown = apply(given, x)
    assert not sown.get("intermediates")
    probe = {"probe": {"attention": {"values": jnp.ones((1, 8, 8))}}}
    (probed, _), sown = apply(given | probe, x)
    assert jax.tree.map(jnp.shape, sown["intermediates"]) == {
        "attention": {"probed": ((1, 8, 4, 8),)}
    }
    np.testing.assert_array_equal(probed, out)
