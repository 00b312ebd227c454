"""What a decoder promises, for every kind of position."""

import dataclasses
import functools
from typing import get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pallas_kernels.attention.api import IMPLEMENTATIONS
from repo_jax import DecoderBlock, DecoderConfig, PositionConfig, RePoLM, capture_positions
from repo_jax.config import (
    PRESETS,
    AttentionName,
    OptimizerConfig,
    TrainingConfig,
    decoder_config,
)
from repo_jax.modeling import abstract_params, init_params
from repo_jax.training.step import create_state, make_train_step

PRESET_NAMES = ("rope", "nope", "r2n1", "n2r1", "repo", "cope")
TINY = dict(vocab_size=64, d_model=32, n_layers=8, n_heads=4, d_ff=48)
# Spread weights: with std 0.02 hidden states and positions hardly differ.
WIDE = dict(TINY, init_std=0.3)


def config(preset="repo", **changes):
    settings = {**WIDE, **changes}
    positions = settings.pop("positions", PositionConfig(preset=preset))
    return DecoderConfig(positions=positions, **settings)


@functools.cache
def made(config):
    model = RePoLM(config)
    return model, init_params(model, jax.random.key(1))


TOKENS = jax.random.randint(jax.random.key(0), (2, 24), 0, 64)

VARIANTS = {
    **{name: PositionConfig(preset=name) for name in PRESET_NAMES},
    "repo from 0": PositionConfig(start_layer=0),
    "shared z": PositionConfig(heads="shared"),
    "z per query head": PositionConfig(heads="query"),
    "linear": PositionConfig(f_phi="linear"),
    "linear shared": PositionConfig(f_phi="linear", heads="shared"),
    "narrow": PositionConfig(d_position=3),
    "mixed": PositionConfig(
        layers=("repo", "nope", "rope", "repo", "nope", "rope", "repo", "repo")
    ),
}


def test_weights_can_be_made_within_a_traced_function():
    model, params = made(config("repo", n_layers=2))
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(1)))
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)
    keys = jax.random.split(jax.random.key(0), 2)
    stacked = jax.vmap(lambda key: init_params(model, key))(keys)
    one = init_params(model, keys[1])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x[1], y, rtol=1e-6), stacked, one)


def sensitivity(model, params, **kwargs):
    """[T out, T in]: how far the hidden state at one token moves with another's embedding."""

    def run(embedding):
        shifted = {**params, "embedding": {"embedding": embedding}}
        tokens = jnp.arange(16)[None]  # each token its own row of the embedding
        return model.apply({"params": shifted}, tokens, method="hidden", **kwargs)[0]

    # One cotangent at a time: vmapped (jax.jacrev), XLA's CPU compiler in jaxlib 0.10.2 gets
    # these gradients wrong unless XLA_FLAGS has --xla_cpu_experimental_ynn_fusion_type= .
    @jax.jit
    def moved(embedding):
        out, vjp = jax.vjp(run, embedding)
        units = jnp.eye(out.size).reshape(-1, *out.shape)
        rows = jax.lax.map(lambda unit: jnp.abs(vjp(unit)[0]).sum(-1), units)  # [T * D, V]
        return rows.reshape(*out.shape, -1).sum(1)[:, :16]

    return np.asarray(moved(params["embedding"]["embedding"]))


@pytest.mark.parametrize("name", VARIANTS)
def test_no_token_depends_on_a_later_one(name):
    """Not even through positions, which may stand in any order."""
    model, params = made(config(positions=VARIANTS[name], n_kv_heads=2))
    moved = sensitivity(model, params)
    assert not np.triu(moved, 1).any()
    assert (moved[np.tril_indices(16)] > 0).all()


@pytest.mark.parametrize("name", ["rope", "nope", "n2r1", "repo", "z per query head", "cope"])
def test_documents_do_not_see_each_other(name):
    model, params = made(config(positions=VARIANTS[name]))
    ids = jnp.array([[1] * 5 + [2] * 7 + [0] * 4])
    moved = sensitivity(model, params, segment_ids=ids)
    same = np.equal.outer(ids[0], ids[0]) & (np.asarray(ids[0]) != 0)[None]
    own = np.eye(16, dtype=bool)  # padding still has its own residual stream
    assert not moved[~(same | own)].any()
    assert (moved[same & np.tri(16, dtype=bool)] > 0).all()


def test_a_document_reads_the_same_alone_and_packed():
    for name in ("repo", "rope", "cope"):
        model, params = made(config(name))
        ids = jnp.array([[1] * 10 + [2] * 14] * 2)
        packed = model.apply({"params": params}, TOKENS, ids).logits
        alone = model.apply({"params": params}, TOKENS[:, 10:]).logits
        np.testing.assert_allclose(packed[:, 10:], alone, atol=2e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_scanned_layers_equal_layers_one_by_one(name):
    c = config(positions=VARIANTS[name], n_kv_heads=2)
    model, params = made(c)
    x = params["embedding"]["embedding"][TOKENS]
    layers = dict(params["layers"])
    f_phi = layers.pop("repositioning", None)
    n_repo = 0
    for i, kind in enumerate(c.kinds):
        layer = jax.tree.map(lambda p, i=i: p[i], layers)
        if kind == "repo":
            layer["repositioning"] = jax.tree.map(lambda p, i=n_repo: p[i], f_phi)
            n_repo += 1
        x, _ = DecoderBlock(c, kind).apply({"params": layer}, x)
    scanned, _ = model.apply(
        {"params": params}, TOKENS, None, 0.0, keep_positions=False, method="_walk"
    )
    np.testing.assert_allclose(scanned, x, atol=1e-5 * float(np.abs(x).max()))


@pytest.mark.parametrize("remat", ["full", "attention", "dots"])
def test_remat_changes_no_gradient(remat):
    _, params = made(config())

    def grads(c):
        model = RePoLM(c)
        loss = lambda p: (model.apply({"params": p}, TOKENS).logits ** 2).mean()
        return jax.jit(jax.grad(loss))(params)

    plain, saved = grads(config()), grads(config(remat=remat))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(saved), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-6 * max(1.0, float(np.abs(a).max())))


def test_attention_remat_keeps_attention_and_less_than_everything():
    def saved_bytes(remat):
        c = config(remat=remat, n_layers=8)
        model, params = made(c)
        loss = lambda p: (model.apply({"params": p}, TOKENS, method="hidden") ** 2).mean()
        return jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis().temp_size_in_bytes

    full, attention, none = map(saved_bytes, ("full", "attention", "none"))
    assert full < attention < none


@pytest.mark.parametrize("positions", [PositionConfig(), PositionConfig("cope")])
def test_weights_that_make_positions_may_have_a_spread_of_their_own(positions):
    drawn = []
    for std in (None, 0.1):
        own = dataclasses.replace(positions, init_std=std)
        _, params = made(config(positions=own, init_std=0.02))
        drawn.append(
            jax.tree_util.tree_map_with_path(lambda p, x: (p, np.asarray(x).std()), params)
        )
    pairs = zip(
        *(jax.tree.leaves(d, is_leaf=lambda x: isinstance(x, tuple)) for d in drawn), strict=True
    )
    for (path, before), (_, after) in pairs:
        is_position = "_map" in str(path) or "position_kernel" in str(path)
        assert after == pytest.approx(5 * before if is_position else before, rel=1e-3), path


def test_the_embedding_may_have_a_spread_of_its_own():
    (_, before), (_, after) = (made(config(embedding_init_std=std)) for std in (None, 1.0))
    spread = lambda params: float(np.asarray(params["embedding"]["embedding"]).std())
    assert spread(after) == pytest.approx(spread(before) / config().init_std, rel=1e-5)
    jax.tree.map(
        np.testing.assert_array_equal, {**after, "embedding": 0}, {**before, "embedding": 0}
    )


def test_bfloat16_activations_are_close_to_float32():
    model, params = made(config(init_std=0.02))
    halved = RePoLM(dataclasses.replace(model.config, dtype="bfloat16"))
    exact = model.apply({"params": params}, TOKENS).logits
    out = halved.apply({"params": params}, TOKENS).logits
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, exact, atol=0.03 * float(np.abs(exact).max()))


@pytest.mark.parametrize("name", ["rope", "repo"])
def test_a_bfloat16_train_step_is_close_to_float32(name):
    """Its loss, and its gradients, which after one step are Adam's first moment."""
    model, params = made(config(name, n_layers=2, init_std=0.02))

    def step(dtype):
        halved = RePoLM(dataclasses.replace(model.config, dtype=dtype))
        optimizer, step = make_train_step(
            halved, OptimizerConfig(), TrainingConfig(steps=10, z_loss=1e-4), params
        )
        state, metrics = jax.jit(step)(create_state(params, optimizer, 0), {"tokens": TOKENS})
        return metrics, optax.tree.get(state.opt_state, "mu")

    (exact, gradients), (metrics, found) = step("float32"), step("bfloat16")
    np.testing.assert_allclose(metrics["loss"], exact["loss"], rtol=2e-4)
    np.testing.assert_allclose(metrics["grad_norm"], exact["grad_norm"], rtol=0.03)
    pairs = zip(jax.tree.leaves_with_path(gradients), jax.tree.leaves(found), strict=True)
    for (path, one), other in pairs:
        assert other.dtype == jnp.float32
        atol = 0.03 * float(np.abs(one).max())
        np.testing.assert_allclose(
            other, one, atol=atol, rtol=0, err_msg=jax.tree_util.keystr(path)
        )


def test_positions_are_float32_under_bfloat16_activations():
    """z of a bf16 model is not rounded to bf16: it takes values between bf16's."""
    model, params = made(config(dtype="bfloat16"))
    z = np.asarray(capture_positions(model, params, TOKENS))[:, -1]
    assert z.dtype == np.float32
    assert (z != z.astype(jnp.bfloat16).astype(np.float32)).mean() > 0.5
    text = str(jax.make_jaxpr(lambda p: model.apply({"params": p}, TOKENS).logits)(params))
    angles = [line for line in text.splitlines() if "round" in line]
    assert angles, "the range reduction of sincos is not where this test looks for it"
    assert all("bf16" not in line for line in angles)


def test_index_weight_blends_from_learned_positions_to_the_index():
    model, params = made(config(positions=PositionConfig(start_layer=0)))
    z = [capture_positions(model, params, TOKENS, index_weight=w)[:, 0] for w in (0.0, 0.25, 1.0)]
    index = np.broadcast_to(np.arange(24, dtype=np.float32), z[0].shape)
    np.testing.assert_allclose(z[1], 0.75 * z[0] + 0.25 * index, atol=1e-5)
    np.testing.assert_allclose(z[2], index)
    rope = RePoLM(config("rope"))
    layers = {k: v for k, v in params["layers"].items() if k != "repositioning"}
    as_rope = rope.apply({"params": {**params, "layers": layers}}, TOKENS).logits
    blended = model.apply({"params": params}, TOKENS, index_weight=1.0).logits
    np.testing.assert_allclose(blended, as_rope, atol=2e-5)
    traced = jax.jit(lambda w: model.apply({"params": params}, TOKENS, index_weight=w).logits)
    np.testing.assert_allclose(traced(jnp.float32(1.0)), blended, atol=2e-5)


def test_a_new_repo_layer_starts_near_nope():
    model, params = made(config(positions=PositionConfig(start_layer=0), init_std=0.02))
    z = np.asarray(capture_positions(model, params, TOKENS))
    assert np.ptp(z, axis=-1).max() < 0.05  # radians, for the fastest pair of channels


def test_positions_per_query_head():
    """z has one column per key/value head and is shared by its queries; or one per query head."""
    grouped, params = made(config(n_kv_heads=2))
    z = np.asarray(capture_positions(grouped, params, TOKENS))[:, -1]  # [B, N, T]
    np.testing.assert_array_equal(z[:, 0], z[:, 1])
    assert np.abs(z[:, 0] - z[:, 2]).max() > 1e-2
    each, params = made(config(positions=PositionConfig(heads="query"), n_kv_heads=2))
    z = np.asarray(capture_positions(each, params, TOKENS))[:, -1]
    assert np.abs(z[:, 0] - z[:, 1]).max() > 1e-2


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_the_compiled_step_does_not_grow_with_depth(name):
    """Instruction counts at 8 and 32 layers, of the whole train step."""

    def instructions(n_layers):
        model = RePoLM(config(name, n_layers=n_layers))
        abstract = abstract_params(model)
        optimizer, step = make_train_step(
            model, OptimizerConfig(), TrainingConfig(steps=10), abstract
        )
        state = jax.eval_shape(lambda p: create_state(p, optimizer, 0), abstract)
        batch = {"tokens": jax.ShapeDtypeStruct((2, 16), jnp.int32)}
        text = jax.jit(step).lower(state, batch).compile().as_text()
        return text.count(" = ")

    assert instructions(8) == instructions(32)


@pytest.mark.parametrize(
    ("preset", "billions"), [("olmo2_1b", 1.485), ("olmo2_7b", 7.299), ("olmo2_13b", 13.716),
                             ("olmo2_32b", 32.234)]
)  # fmt: skip
def test_published_sizes(preset, billions):
    """Parameter counts of the published checkpoints; nothing is allocated."""
    c = decoder_config(preset, positions=PositionConfig(preset="rope"))
    count = sum(np.prod(p.shape) for p in jax.tree.leaves(abstract_params(RePoLM(c))))
    assert round(count / 1e9, 3) == billions


def test_repo_adds_what_the_paper_says_and_leaves_the_rest_of_the_tree():
    """1,052,672 parameters in each of 11 layers of the 1B model, from layer 5."""
    c = decoder_config("olmo2_1b")
    assert c.kinds.index("repo") == 5
    with_repo = abstract_params(RePoLM(c))
    without = abstract_params(
        RePoLM(dataclasses.replace(c, positions=PositionConfig(preset="rope")))
    )
    f_phi = with_repo["layers"].pop("repositioning")
    assert with_repo == without
    assert sum(np.prod(p.shape) for p in jax.tree.leaves(f_phi)) == 11 * 1_052_672
    assert decoder_config("olmo2_7b").kinds.index("repo") == 10
    assert set(PRESETS) == {"olmo2_1b", "olmo2_7b", "olmo2_13b", "olmo2_32b"}


def test_new_weights_are_truncated_normal():
    _, params = made(config(init_std=0.02))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if path[-1].key == "scale":
            np.testing.assert_array_equal(leaf, 1.0)
            continue
        assert float(np.abs(leaf).max()) <= 0.06
        if leaf.size > 4000:
            assert 0.0185 < float(leaf.std()) < 0.0205
    kernel = params["layers"]["mlp"]["up"]["kernel"]
    assert not np.array_equal(kernel[0], kernel[1])


def test_the_config_knows_the_implementations_of_attention():
    assert set(get_args(AttentionName)) == set(IMPLEMENTATIONS)


def test_activations_carry_logical_constraints():
    """For `jax.sharding` to place them; a mesh and rules make them real constraints."""
    model, params = made(config())
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rules = (("batch", "data"), ("heads", "tensor"), ("kv_heads", "tensor"), ("mlp", "tensor"))
    run = lambda p: model.apply({"params": p}, TOKENS).logits
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        text = str(jax.make_jaxpr(run)(params))
    # The embedding, and in the one body q, k, v, gate, up and the output.
    assert text.count("sharding_constraint") == 1 + 6


@pytest.mark.parametrize("attention", ["cudnn", "pallas_gpu"])
def test_new_weights_do_not_depend_on_what_runs_attention(attention):
    """And need no GPU: flax traces the initializer whenever the model is applied."""
    drawn = init_params(RePoLM(config(attention=attention)), jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, drawn, made(config())[1])
