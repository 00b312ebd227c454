"""The reference implementation's numbers, at the tolerances its README asks for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repo_jax
from repo_jax.config import OptimizerConfig, RopeScaling, TrainingConfig
from repo_jax.interop.names import table
from repo_jax.training.step import batch_loss, count_targets, create_state, make_train_step
from tests.golden_sets import ROOT, SETS, grad_norms, reference

pytestmark = [pytest.mark.parametrize("name", SETS), pytest.mark.usefixtures("optimized")]


def test_logits(name):
    model, params = repo_jax.from_pretrained(ROOT / name)
    expected = reference(name)
    logits = jax.jit(model.apply)({"params": params}, expected["tokens"]).logits
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected["logits"], atol=2e-5, rtol=0)


def test_yarn_logits(name):
    expected = reference(name)
    yarn = RopeScaling(factor=float(expected["yarn_factor"]), original_length=256)
    model, params = repo_jax.from_pretrained(ROOT / name, rope_scaling=yarn)
    logits = jax.jit(model.apply)({"params": params}, expected["tokens"]).logits
    np.testing.assert_allclose(logits, expected["logits_yarn"], atol=2e-5, rtol=0)
    assert np.abs(expected["logits_yarn"] - expected["logits"]).max() > 1e-2


def test_positions(name):
    model, params = repo_jax.from_pretrained(ROOT / name)
    expected = reference(name)
    z = np.asarray(repo_jax.capture_positions(model, params, expected["tokens"]))
    assert z.dtype == np.float32
    assert z.shape == expected["positions"].shape
    for layer, kind in enumerate(model.config.kinds):
        ours, theirs = z[:, layer], expected["positions"][:, layer]
        if kind == "repo":
            assert np.all(np.abs(ours - theirs) <= 1e-4 * (1 + np.abs(theirs)))
        elif kind == "rope":
            np.testing.assert_array_equal(ours, np.broadcast_to(np.arange(z.shape[-1]), ours.shape))
        else:
            assert np.isnan(ours).all()


def test_gradient_of_every_parameter(name):
    model, params = repo_jax.from_pretrained(ROOT / name)
    expected = reference(name)
    batch = {"tokens": jnp.asarray(expected["tokens"])}

    def loss(params):
        sums = batch_loss(
            model, params, batch, n_targets=count_targets(batch), z_loss=0.0, chunk=64
        )
        return sums.loss

    ce, grads = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(ce, expected["ce"], atol=1e-5, rtol=0)
    norms = grad_norms(name)
    entries = table(model.config)
    assert {entry.name for entry in entries} == set(norms)
    for entry in entries:
        grad = grads
        for key in entry.path:
            grad = grad[key]
        grad = grad if entry.index is None else grad[entry.index]
        norm = np.linalg.norm(np.asarray(grad, np.float64))
        np.testing.assert_allclose(norm, norms[entry.name], rtol=1e-4, err_msg=entry.name)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_trajectory(name, accumulation):
    model, params = repo_jax.from_pretrained(ROOT / name)
    expected = reference(name)
    batches = expected["train_batches"]
    assert batches.shape[1] % accumulation == 0
    training = TrainingConfig(steps=12, accumulation=accumulation, z_loss=1e-4, loss_chunk=100)
    optimizer, step = make_train_step(model, OptimizerConfig(learning_rate=3e-3), training, params)
    step = jax.jit(step)
    state = create_state(params, optimizer, seed=0)
    seen = []
    for tokens in batches:
        state, metrics = step(state, {"tokens": jnp.asarray(tokens)})
        seen.append(jax.device_get(metrics))
    column = lambda key: np.array([m[key] for m in seen])
    np.testing.assert_allclose(column("ce_loss"), expected["train_ce"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(column("z_loss"), expected["train_z_loss"], atol=1e-7, rtol=0)
    np.testing.assert_allclose(column("grad_norm"), expected["train_grad_norm"], rtol=2e-5)
    np.testing.assert_allclose(column("learning_rate"), expected["train_lr"], atol=1e-9, rtol=0)
    np.testing.assert_allclose(column("loss"), column("ce_loss") + column("z_loss"), rtol=1e-6)
