"""CoPE against its definition, and in the model."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

import repo_jax
from repo_jax.config import DecoderConfig, OptimizerConfig, PositionConfig, TrainingConfig
from repo_jax.errors import ConfigError
from repo_jax.flops import model_flops_per_token
from repo_jax.modeling import RePoLM, capture_positions, init_params
from repo_jax.modeling.cope import cope_attention
from repo_jax.training.step import create_state, make_train_step


def dense(q, k, v, kernel, visible, scale):
    """The definition, one query and one head after the other, in float64."""
    q, k, v, kernel = (np.asarray(x, np.float64) for x in (q, k, v, kernel))
    B, T, N, _ = q.shape
    group = N // k.shape[2]
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(B, T, N):
        keys = np.flatnonzero(visible[b, t])
        if not len(keys):
            continue
        scores = scale * k[b, keys, n // group] @ q[b, t, n]
        gates = 1 / (1 + np.exp(-scores))
        position = np.minimum(np.cumsum(gates[::-1])[::-1], kernel.shape[1] - 1)
        below = np.floor(position).astype(int)
        above = np.minimum(below + 1, kernel.shape[1] - 1)
        whole = q[b, t, n] @ kernel
        scores += (1 - (position - below)) * whole[below] + (position - below) * whole[above]
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ v[b, keys, n // group]
    return out


def arrays(T, S, K, P, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (2, T, 4, 8), (2, S, K, 8), (2, S, K, 8), (8, P)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@settings(max_examples=25, deadline=None)
@given(
    T=st.sampled_from([1, 5, 24]),
    extra=st.sampled_from([0, 7]),
    kv_heads=st.sampled_from([4, 2, 1]),
    P=st.sampled_from([2, 6, 64]),
    n_documents=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_it_is_the_definition(T, extra, kv_heads, P, n_documents, seed):
    S = T + extra
    q, k, v, kernel = arrays(T, S, kv_heads, P, seed)
    visible = np.broadcast_to(np.arange(S) <= np.arange(extra, S)[:, None], (2, T, S))
    documents = {}
    if n_documents:
        rng = np.random.default_rng(seed)
        of = np.sort(rng.integers(0, n_documents + 1, (2, S)), axis=1)  # 0 is padding
        visible = visible & (of[:, extra:, None] == of[:, None]) & (of[:, None] > 0)
        documents = dict(q_segment_ids=of[:, extra:], kv_segment_ids=of)
        documents = jax.tree.map(jnp.asarray, documents)
    out = cope_attention(q, k, v, kernel, scale=0.4, **documents)
    np.testing.assert_allclose(out, dense(q, k, v, kernel, visible, 0.4), atol=3e-5)


def test_blocks_of_queries_change_nothing():
    q, k, v, kernel = arrays(300, 300, 2, 16)
    visible = np.broadcast_to(np.tri(300, dtype=bool), (2, 300, 300))
    out = cope_attention(q, k, v, kernel, scale=0.4)
    np.testing.assert_allclose(out, dense(q, k, v, kernel, visible, 0.4), atol=5e-5)


def test_keys_out_of_order_are_put_in_order():
    q, k, v, kernel = arrays(12, 12, 2, 6)
    order = np.random.default_rng(1).permutation(12)
    shuffled = cope_attention(
        *(q[:, order], k[:, order], v[:, order], kernel),
        q_index=order,
        kv_index=order,
        scale=0.4,
    )
    np.testing.assert_allclose(
        shuffled, cope_attention(q, k, v, kernel, scale=0.4)[:, order], atol=1e-5
    )


def test_gradients():
    q, k, v, kernel = arrays(6, 6, 2, 12)
    with jax.enable_x64(True):
        wide = [jnp.asarray(x, jnp.float64) for x in (q, k, v, kernel)]
        check_grads(
            lambda *x: cope_attention(*x, scale=0.3), wide, order=1, modes=["rev"], eps=1e-6
        )


@pytest.fixture(scope="module")
def made():
    positions = PositionConfig("cope", cope_positions=16)
    config = DecoderConfig(
        vocab_size=32, d_model=32, n_layers=2, n_heads=4, d_ff=48, positions=positions
    )
    return RePoLM(config), init_params(RePoLM(config), jax.random.key(0))


def test_only_its_own_models_have_its_parameter(made):
    _, params = made
    assert params["layers"]["attention"].pop("position_kernel").shape == (2, 8, 16)
    rope = init_params(RePoLM(DecoderConfig(32, 32, 2, 4, 48, positions=PositionConfig("rope"))),
                       jax.random.key(0))  # fmt: skip
    assert jax.tree.structure(params) == jax.tree.structure(rope)


def test_it_learns_and_no_token_sees_a_later_one(made):
    model, _ = made
    params = init_params(model, jax.random.key(0))
    tokens = np.tile(np.arange(16, dtype=np.int32), (4, 2))
    optimizer, step = make_train_step(
        model, OptimizerConfig(learning_rate=1e-2), TrainingConfig(), params
    )
    state, step = create_state(params, optimizer, seed=0), jax.jit(step)
    losses = []
    for _ in range(8):
        state, metrics = step(state, {"tokens": tokens})
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.5
    assert np.abs(state.params["layers"]["attention"]["position_kernel"]).max() > 0.02
    apply = jax.jit(lambda tokens: model.apply({"params": state.params}, tokens).logits)
    changed = tokens.copy()
    changed[:, 20:] = 3
    np.testing.assert_allclose(apply(changed)[:, :20], apply(tokens)[:, :20], atol=1e-5)
    assert np.isnan(capture_positions(model, state.params, tokens)).all()


def test_checkpoints_keep_it_and_upstream_is_refused(tmp_path, made):
    model, _ = made
    params = init_params(model, jax.random.key(0))
    with pytest.raises(ConfigError, match=r"positions is CoPE, which upstream's readers cannot"):
        repo_jax.save_pretrained(tmp_path / "no", model, params)
    repo_jax.save_pretrained(tmp_path / "yes", model, params, format="repo_jax")
    again, loaded = repo_jax.from_pretrained(tmp_path / "yes")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, nn.unbox(loaded), params)
    # A RoPE checkpoint becomes a CoPE model with new position kernels.
    rope = RePoLM(DecoderConfig(32, 32, 2, 4, 48, positions=PositionConfig("rope")))
    repo_jax.save_pretrained(tmp_path / "rope", rope, init_params(rope, jax.random.key(1)))
    _, grown = repo_jax.from_pretrained(tmp_path / "rope", positions=model.config.positions)
    kernel = grown["layers"]["attention"]["position_kernel"]
    assert kernel.shape == (2, 8, 16)
    assert 0.01 < float(kernel.std()) < 0.03
    assert not np.array_equal(kernel[0], kernel[1])


def test_other_kinds_beside_it_are_refused():
    with pytest.raises(ConfigError, match=r"positions.layers has cope and rope; cope must be"):
        PositionConfig(layers=("cope", "rope"))


def test_flops_count_the_products_with_whole_positions(made):
    model, _ = made
    c = model.config
    rope = DecoderConfig(32, 32, 2, 4, 48, positions=PositionConfig("rope"))
    more = model_flops_per_token(c, 64) - model_flops_per_token(rope, 64)
    assert more == 6 * c.n_layers * c.n_heads * c.head_dim * 16
