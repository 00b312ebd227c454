"""Schedules, groups, rates, and accumulation."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repo_jax.config import DecoderConfig, OptimizerConfig, TrainingConfig
from repo_jax.errors import ConfigError
from repo_jax.modeling import RePoLM
from repo_jax.training.checkpoints import abstract_params
from repo_jax.training.optimizer import learning_rates, make_optimizer, parameter_paths
from repo_jax.training.step import create_state, make_train_step

MODEL = DecoderConfig(vocab_size=23, d_model=16, n_layers=1, n_heads=2, d_ff=24, rope_theta=1e4)
F_PHI = "layers/repositioning/.*"


def random_params(seed=0):
    rng = np.random.default_rng(seed)
    shapes = abstract_params(RePoLM(MODEL))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.1, x.dtype), shapes)


def by_path(params):
    return dict(zip(parameter_paths(params), map(np.asarray, jax.tree.leaves(params)), strict=True))


def update(config: OptimizerConfig, params, grads, steps=10):
    """The update of the first step, and the state after it."""
    optimizer = make_optimizer(config, TrainingConfig(steps=steps), params)
    return jax.jit(optimizer.update)(grads, optimizer.init(params), params)


# Learning rates.


def rate(config, steps, step):
    """Of step `step`, counted from 1."""
    return float(learning_rates(config, steps)(step - 1))


schedules = st.sampled_from(["linear", "cosine", "constant"])


@given(schedules, st.integers(1, 500), st.data())
def test_formulas(schedule, steps, data):
    warmup = data.draw(st.integers(0, steps - 1))
    step = data.draw(st.integers(1, steps))
    final = data.draw(st.sampled_from([0.0, 0.1]))
    peak = 3e-3
    config = OptimizerConfig(
        learning_rate=peak, schedule=schedule, warmup_steps=warmup, final_fraction=final
    )
    s = (step - warmup) / (steps - warmup)
    fall = {
        "linear": 1 - s * (1 - final),
        "cosine": final + (1 - final) * (1 + math.cos(math.pi * s)) / 2,
        "constant": 1.0,
    }[schedule]
    expected = peak * (step / warmup if step < warmup else fall)
    np.testing.assert_allclose(rate(config, steps, step), expected, rtol=1e-5, atol=peak * 1e-6)


def test_the_papers_schedule():
    config = OptimizerConfig(learning_rate=3e-3)
    seen = [rate(config, 12, s) for s in range(1, 13)]
    expected = [3e-3 * (1 - s / 12) for s in range(1, 13)]
    np.testing.assert_allclose(seen, expected, rtol=0, atol=1e-9)


@settings(max_examples=20)
@given(
    st.sampled_from(["linear", "cosine"]),
    st.integers(1, 30_000),
    st.integers(0, 20),
    st.floats(1e-6, 1.0),
)
def test_exactly_zero_at_the_end_and_after(schedule, steps, beyond, peak):
    config = OptimizerConfig(learning_rate=peak, schedule=schedule)
    done = steps - 1 + beyond
    for of in (learning_rates(config, steps), jax.jit(learning_rates(config, steps))):
        at_end = np.float32(of(jnp.int32(done)))
        assert at_end == 0.0
        assert not np.signbit(at_end)


# Groups.


def test_decay_is_on_all_but_the_embedding():
    params = random_params()
    zeros = jax.tree.map(jnp.zeros_like, params)
    config = OptimizerConfig(learning_rate=0.5, schedule="constant", weight_decay=0.1)
    updates, _ = update(config, params, zeros)
    params = by_path(params)
    assert {"final_norm/scale", "head/kernel", "embedding/embedding"} < set(params)
    for path, step in by_path(updates).items():
        expected = 0.0 if path == "embedding/embedding" else -0.05 * params[path]
        np.testing.assert_allclose(step, expected, rtol=1e-6, err_msg=path)


def test_a_factor_multiplies_the_learning_rate_of_what_it_names():
    params, grads = random_params(0), random_params(1)
    plain, _ = update(OptimizerConfig(), params, grads)
    faster, _ = update(OptimizerConfig(rates={F_PHI: 10.0}), params, grads)
    plain, faster = by_path(plain), by_path(faster)
    for path in plain:
        if path.startswith("layers/repositioning/"):
            np.testing.assert_allclose(faster[path], 10 * plain[path], rtol=1e-6)
        else:
            np.testing.assert_array_equal(faster[path], plain[path])


def test_the_first_pattern_that_matches_the_whole_path_counts():
    params, grads = random_params(0), random_params(1)
    plain, _ = update(OptimizerConfig(), params, grads)
    rates = {"head": 7.0, "head/kernel|embedding": 2.0, "head/.*": 5.0}
    with pytest.raises(ConfigError, match="'head', which matches no parameter"):
        update(OptimizerConfig(rates=rates), params, grads)
    del rates["head"]
    faster, _ = update(OptimizerConfig(rates=rates), params, grads)
    np.testing.assert_allclose(faster["head"]["kernel"], 2 * plain["head"]["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(faster["embedding"]["embedding"], plain["embedding"]["embedding"])


def test_an_unknown_pattern_is_named_with_the_parameters_there_are():
    config = OptimizerConfig(rates={"layers/positioning/.*": 2.0})
    message = r"optimizer.rates .*'layers/positioning/.\*', which matches no .*final_norm/scale"
    with pytest.raises(ConfigError, match=message):
        make_optimizer(config, TrainingConfig(), random_params())


def moments(opt_state, name):
    """`mu` or `nu` of the parameters that have it."""
    return jax.tree.leaves(optax.tree.get(opt_state, name))


def test_f_phi_alone():
    config = OptimizerConfig(learning_rate=1e-2, rates={F_PHI: 1.0, ".*": 0.0})
    training = TrainingConfig(steps=10)
    params = random_params()
    optimizer, step = make_train_step(RePoLM(MODEL), config, training, params)
    tokens = np.random.default_rng(0).integers(0, 23, (2, 12)).astype(np.int32)
    before = by_path(params)
    state = create_state(params, optimizer, seed=0)
    step = jax.jit(step)
    for _ in range(2):
        state, metrics = step(state, {"tokens": tokens})
    after = by_path(state.params)
    trained = {path for path in after if after[path].tobytes() != before[path].tobytes()}
    f_phi = {path for path in before if path.startswith("layers/repositioning/")}
    assert trained == f_phi
    assert float(metrics["grad_norm"]) > 0
    sizes = sorted(before[path].size for path in f_phi)
    for name in ("mu", "nu"):
        assert sorted(leaf.size for leaf in moments(state.opt_state, name)) == sizes


# Accumulation.


def documents(B, T, mask):
    if not mask:
        return {}
    # Odd rows are many short documents and padding, so that microbatches of every n-th row
    # have very different numbers of targets.
    segments = np.ones((B, T), np.int32)
    segments[1::2] = np.arange(T) // 2 + 1
    segments[1::2, T // 2 :] = 0
    return {"segment_ids": segments}


@pytest.mark.parametrize("mask", [False, True])
def test_accumulation_is_one_large_batch(mask):
    B, T = 8, 12
    rng = np.random.default_rng(0)
    batch = {"tokens": rng.integers(0, 23, (B, T)).astype(np.int32)} | documents(B, T, mask)
    results = []
    for accumulation in (1, 4):
        training = TrainingConfig(steps=10, accumulation=accumulation, z_loss=1e-2, loss_chunk=16)
        optimizer, step = make_train_step(
            RePoLM(MODEL), OptimizerConfig(clip_norm=None), training, random_params()
        )
        state, metrics = jax.jit(step)(create_state(random_params(), optimizer, 0), batch)
        # The first moment is the gradient, scaled; parameters would show its sign only.
        results.append((moments(state.opt_state, "mu"), metrics))
    (whole, whole_metrics), (parts, parts_metrics) = results
    for name, value in whole_metrics.items():
        np.testing.assert_allclose(parts_metrics[name], value, rtol=1e-6, err_msg=name)
    targets = 4 * (T - 1) + 4 * (T // 4) if mask else B * (T - 1)
    assert float(whole_metrics["targets"]) == targets
    scale = max(float(jnp.abs(x).max()) for x in whole)
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=scale * 1e-6)


# Less memory.


def moment_share(config):
    params = abstract_params(
        RePoLM(dataclasses.replace(MODEL, vocab_size=256, d_model=256, d_ff=512))
    )
    optimizer = make_optimizer(config, TrainingConfig(steps=10), params)
    state = jax.eval_shape(optimizer.init, params)
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    return size(state) / size(params)


def test_moments_take_what_the_choice_of_optimizer_says():
    assert moment_share(OptimizerConfig()) == pytest.approx(2.0, abs=1e-3)
    assert moment_share(OptimizerConfig(mu_dtype="bfloat16")) == pytest.approx(1.5, abs=1e-3)
    assert moment_share(OptimizerConfig(name="adafactor")) < 0.1


def test_adafactor_moves_every_weight_at_the_learning_rate_and_decays():
    params = random_params()
    grads = jax.tree.map(lambda p: 10.0 * p, random_params(seed=1))
    config = OptimizerConfig(name="adafactor", learning_rate=1e-3, weight_decay=0.0)
    for path, u in by_path(update(config, params, grads)[0]).items():
        rms = np.sqrt(np.mean(u**2))
        assert 0.2e-3 < rms < 1.01e-3, path
    decayed = dataclasses.replace(config, weight_decay=0.1)
    plain = by_path(update(config, params, grads)[0])
    for path, u in by_path(update(decayed, params, grads)[0]).items():
        expected = 0.0 if path.startswith("embedding/") else -1e-3 * 0.9 * 0.1
        np.testing.assert_allclose(u - plain[path], expected * by_path(params)[path], atol=1e-8)
