"""The loss against the formula in float64, and the memory it promises not to take."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repo_jax.training.loss import cross_entropy, next_token_targets

pytestmark = pytest.mark.usefixtures("optimized")


def inputs(B, T, V, D=6, seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(B, T, D)).astype(np.float32)
    kernel = rng.normal(size=(D, V)).astype(np.float32)
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    # Some do not count at all, and those that do count differently.
    weights = (rng.uniform(0.1, 2.0, (B, T)) * (rng.random((B, T)) < 0.7)).astype(np.float32)
    return hidden, kernel, targets, weights


def reference(hidden, kernel, targets, weights, z_loss):
    """ce, z, and the gradients of ce + z to hidden and kernel, all float64."""
    h, k, w = (np.asarray(x, np.float64) for x in (hidden, kernel, weights))
    logits = h @ k
    top = logits.max(-1, keepdims=True)
    lse = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    chosen = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    onehot = np.eye(k.shape[1])[targets]
    p = np.exp(logits - lse[..., None])
    d_logits = w[..., None] * (p * (1 + 2 * z_loss * lse)[..., None] - onehot)
    return (
        np.sum(w * (lse - chosen)),
        z_loss * np.sum(w * lse**2),
        d_logits @ k.T,
        np.einsum("btd,btv->dv", h, d_logits),
    )


def value_and_grads(hidden, kernel, targets, weights, *, z_loss, chunk):
    def loss(hidden, kernel):
        sums = cross_entropy(hidden, kernel, targets, weights, z_loss=z_loss, chunk=chunk)
        return sums.loss, sums

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, kernel)


@settings(max_examples=12)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 9),
    V=st.integers(2, 11),
    chunk=st.integers(1, 30),
    z_loss=st.sampled_from([0.0, 1e-2]),
    seed=st.integers(0, 2**31),
)
def test_sums_and_gradients_are_the_formulas_whatever_the_chunk(B, T, V, chunk, z_loss, seed):
    arrays = inputs(B, T, V, seed=seed)
    (loss, sums), (d_hidden, d_kernel) = value_and_grads(*arrays, z_loss=z_loss, chunk=chunk)
    ce, z, expected_hidden, expected_kernel = reference(*arrays, z_loss)
    near = dict(rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sums.ce, ce, **near)
    np.testing.assert_allclose(sums.z, z, **near)
    np.testing.assert_allclose(loss, ce + z, **near)
    np.testing.assert_allclose(d_hidden, expected_hidden, **near)
    np.testing.assert_allclose(d_kernel, expected_kernel, **near)


def test_large_logits_do_not_overflow():
    hidden, kernel, targets, weights = inputs(2, 5, 7)
    arrays = (hidden * 1e3, kernel, targets, weights)
    (_, sums), _ = value_and_grads(*arrays, z_loss=0.0, chunk=4)
    np.testing.assert_allclose(sums.ce, reference(*arrays, 0.0)[0], rtol=1e-5)


@pytest.mark.parametrize("kernel_dtype", [jnp.float32, jnp.bfloat16])
def test_bfloat16_activations(kernel_dtype):
    hidden, kernel, targets, weights = inputs(2, 33, 40, D=16)
    hidden, rounded = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(kernel, jnp.bfloat16)
    kernel = jnp.asarray(kernel, kernel_dtype)
    (_, sums), grads = value_and_grads(hidden, kernel, targets, weights, z_loss=1e-3, chunk=20)
    ce, z, *expected = reference(hidden, rounded, targets, weights, 1e-3)
    # Products of bfloat16 are exact in float32, in which they are summed.
    np.testing.assert_allclose(sums.ce, ce, rtol=1e-5)
    np.testing.assert_allclose(sums.z, z, rtol=1e-5)
    # The gradient of the logits is rounded to 8 bits, and so is what leaves in bfloat16.
    for grad, right, primal in zip(grads, expected, (hidden, kernel), strict=True):
        assert grad.dtype == primal.dtype
        error = np.linalg.norm(np.asarray(grad, np.float64) - right) / np.linalg.norm(right)
        assert error < 2**-8


def test_gradient_is_scaled_by_what_comes_after():
    hidden, kernel, targets, weights = inputs(2, 6, 5)
    loss = lambda h: cross_entropy(h, kernel, targets, weights, z_loss=1e-2, chunk=4).loss
    once, thrice = jax.grad(loss)(hidden), jax.grad(lambda h: 3.0 * loss(h))(hidden)
    np.testing.assert_allclose(thrice, 3.0 * once, rtol=1e-6)


def largest_array(function, *args) -> int:
    """Elements of the largest array in the optimised program."""
    text = jax.jit(function).lower(*args).compile().as_text()
    shapes = re.findall(r"\b(?:f32|f16|bf16|s32|u32|pred)\[([\d,]+)\]", text)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def test_no_array_holds_the_logits_of_a_batch():
    B, T, V, chunk = 2, 256, 512, 64
    hidden, kernel, targets, weights = inputs(B, T, V, D=8)

    def chunked(hidden, kernel):
        return cross_entropy(hidden, kernel, targets, weights, z_loss=1e-4, chunk=chunk).loss

    def naive(hidden, kernel):
        log_p = jax.nn.log_softmax(hidden @ kernel)
        return -(weights * jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]).sum()

    both = (0, 1)
    assert largest_array(jax.value_and_grad(chunked, both), hidden, kernel) == chunk * V
    assert largest_array(jax.value_and_grad(naive, both), hidden, kernel) == B * T * V


@settings(max_examples=15)
@given(
    st.lists(st.lists(st.integers(1, 3), min_size=0, max_size=6), min_size=1, max_size=3),
    st.integers(0, 2),
)
def test_no_target_across_a_boundary_or_in_padding(lengths, padding):
    rows = [np.repeat(np.arange(len(row)) + 1, row) for row in lengths]
    width = max(map(len, rows)) + padding + 1
    segments = np.stack([np.pad(row, (0, width - len(row))) for row in rows]).astype(np.int32)
    tokens = np.arange(segments.size, dtype=np.int32).reshape(segments.shape)
    targets, valid = next_token_targets(tokens, segments)
    targets, valid = np.asarray(targets), np.asarray(valid)
    # A document of n tokens has n - 1 targets, each the token that follows.
    assert valid.sum() == sum(n - 1 for row in lengths for n in row)
    for b, t in zip(*np.nonzero(valid), strict=True):
        assert segments[b, t] == segments[b, t + 1] != 0
        assert targets[b, t] == tokens[b, t + 1]


def test_all_but_the_last_token_have_a_target_without_segments():
    tokens = np.array([[5, 6, 7], [8, 9, 10]], np.int32)
    targets, valid = next_token_targets(tokens)
    np.testing.assert_array_equal(valid, [[True, True, False]] * 2)
    np.testing.assert_array_equal(np.asarray(targets)[:, :2], tokens[:, 1:])


def test_what_does_not_count_is_not_felt():
    hidden, kernel, targets, _ = inputs(2, 8, 9)
    segments = np.array([[1, 1, 1, 2, 2, 2, 0, 0], [1] * 8], np.int32)
    _, valid = next_token_targets(targets, segments)
    valid = np.asarray(valid)
    other = np.where(valid, targets, (targets + 1) % 9)
    one = value_and_grads(hidden, kernel, targets, valid, z_loss=1e-2, chunk=5)
    two = value_and_grads(hidden, kernel, other, valid, z_loss=1e-2, chunk=5)
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert not np.asarray(one[1][0])[~valid].any()
