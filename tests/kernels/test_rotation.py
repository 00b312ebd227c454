"""rotate and its sincos against float64."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import rotate
from pallas_kernels.rotation.sincos import sincos
from tests.kernels import rotation_cases
from tests.kernels.rotation_cases import Case

pytestmark = pytest.mark.usefixtures("optimized")

INV_FREQ = (10_000.0 ** (-np.arange(0, 8, 2) / 8)).astype(np.float32)


def turned(x, positions, inv_freq, scale=1.0):
    """Rotation by complex multiplication in float64; positions [B, T, heads of x]."""
    x = np.asarray(x, np.float64)
    half = x.shape[-1] // 2
    angle = np.asarray(positions, np.float64)[..., None] * np.asarray(inv_freq, np.float64)
    pair = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle) * scale
    return np.concatenate([pair.real, pair.imag], -1)


def arrays(seed, *shapes, spread=1.0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=s) * spread, jnp.float32) for s in shapes]


@pytest.mark.parametrize(("most", "error"), [(500, 2e-7), (20_000, 2e-7), (200_000, 1e-6)])
def test_sincos_is_exact_to_float32_far_from_zero(most, error):
    rng = np.random.default_rng(0)
    near_half_turns = np.arange(0, most, np.pi / 2)[:200_000]
    angle = np.concatenate([rng.uniform(-most, most, 200_000), near_half_turns])
    angle = angle.astype(np.float32)
    sin, cos = jax.jit(sincos)(angle)
    np.testing.assert_allclose(sin, np.sin(angle.astype(np.float64)), atol=error, rtol=0)
    np.testing.assert_allclose(cos, np.cos(angle.astype(np.float64)), atol=error, rtol=0)


@given(
    heads=st.sampled_from([(4, 4), (4, 2), (6, 3), (4, 1)]),
    columns=st.sampled_from(["one", "kv", "query"]),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1.0, 1.1386]),
)
def test_matches_complex_rotation(heads, columns, seed, scale):
    n, k = heads
    p = {"one": 1, "kv": k, "query": n}[columns]
    q, keys, z = arrays(seed, (2, 5, n, 8), (2, 5, k, 8), (2, 5, p), spread=3.0)
    # Keys take a column per key head; a column per query head is the queries' alone here.
    z_k = z if p <= k else z[..., :k]
    q_out, k_out = rotate(q, keys, z, z_k, inv_freq=INV_FREQ, rope_scale=scale)
    expected_q = turned(q, np.repeat(z, n // p, -1), INV_FREQ, scale)
    expected_k = turned(keys, np.repeat(z_k, k // z_k.shape[-1], -1), INV_FREQ, scale)
    np.testing.assert_allclose(q_out, expected_q, atol=5e-6)
    np.testing.assert_allclose(k_out, expected_k, atol=5e-6)


def test_gradients_match_automatic_differentiation_in_float64():
    q, k, z = arrays(0, (2, 5, 4, 8), (2, 5, 2, 8), (2, 5, 2), spread=5.0)
    d_q, d_k = arrays(1, q.shape, k.shape)

    def ours(q, k, z):
        q, k = rotate(q, k, z, z, inv_freq=INV_FREQ, rope_scale=1.2)
        return jnp.vdot(q, d_q) + jnp.vdot(k, d_k)

    def plain(q, k, z):
        def turn(x):
            angle = jnp.repeat(z, x.shape[2] // 2, -1)[..., None] * INV_FREQ[None, None, None]
            cos, sin = 1.2 * jnp.cos(angle), 1.2 * jnp.sin(angle)
            a, b = jnp.split(x, 2, -1)
            return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

        return jnp.vdot(turn(q), d_q) + jnp.vdot(turn(k), d_k)

    grads = jax.grad(ours, (0, 1, 2))(q, k, z)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x), jnp.float64) for x in (q, k, z)]
        expected = jax.grad(plain, (0, 1, 2))(*wide)
    for grad, true in zip(grads, expected, strict=True):
        np.testing.assert_allclose(grad, true, rtol=1e-5, atol=1e-5)


def test_only_differences_of_positions_reach_the_scores():
    q, k, z = arrays(0, (1, 6, 2, 8), (1, 6, 2, 8), (1, 6, 2), spread=2.0)

    def scores(z):
        q_turned, k_turned = rotate(q, k, z, z, inv_freq=INV_FREQ)
        return jnp.einsum("BTNH,BSNH->BNTS", q_turned, k_turned)

    np.testing.assert_allclose(scores(z), scores(z + 17.25), atol=1e-4)
    assert np.abs(scores(z) - scores(2 * z)).max() > 0.1


def test_bfloat16_is_rounded_once_at_the_end():
    """Angles stay float32: at z = 300 a bf16 angle would be off by up to a radian."""
    q, k = (x.astype(jnp.bfloat16) for x in arrays(0, (1, 4, 2, 8), (1, 4, 2, 8)))
    z = jnp.full((1, 4, 1), 300.7, jnp.float32)
    out, _ = rotate(q, k, z, z, inv_freq=INV_FREQ)
    assert out.dtype == jnp.bfloat16
    expected = turned(q, np.repeat(z, 2, -1), INV_FREQ)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=0.02, rtol=2**-8)


def test_none_leaves_as_it_is():
    q, k = arrays(0, (1, 4, 2, 8), (1, 4, 2, 8))
    out_q, out_k = rotate(q, k, None, None, inv_freq=INV_FREQ)
    assert out_q is q
    assert out_k is k


@pytest.mark.parametrize(
    "case",
    [
        Case(7, 4, 2, 64, norm=True, B=2),
        Case(5, 4, 4, 80, "shared", norm=True, given=True, dtype="bfloat16", scale=1.1386),
        Case(5, 2, 2, 64, dtype="bfloat16"),
        Case(5, 4, 1, 128, "none", norm=True),
    ],
    ids=str,
)
def test_with_norms_matches_float64(case):
    errors = rotation_cases.errors(case, "xla")
    assert max(errors.values()) < rotation_cases.TOLERANCE[case.dtype], errors


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
def test_shards_with_their_summed_mean_square_are_the_whole(implementation):
    """Tensor parallelism: half the heads here, half there, outputs and gradients alike."""
    q, k, z, q_norm, k_norm = arrays(0, (2, 5, 4, 64), (2, 5, 4, 64), (2, 5, 4), (4, 64), (4, 64))
    cotangents = tuple(arrays(1, q.shape, k.shape))
    options = dict(inv_freq=Case(5, 4, 4, 64).frequencies(), implementation=implementation)

    def whole(q, k, z, q_norm, k_norm):
        return rotate(q, k, z, z, q_norm=q_norm, k_norm=k_norm, **options)

    def halves(q, k, z, q_norm, k_norm):
        mean_square = lambda x: sum(
            0.5 * jnp.mean(half**2, (2, 3)) for half in jnp.split(x, 2, axis=2)
        )
        common = dict(q_mean_square=mean_square(q), k_mean_square=mean_square(k))
        outputs = []
        for part in (slice(0, 2), slice(2, 4)):
            z_part = z[:, :, part]
            norms = dict(q_norm=q_norm[part], k_norm=k_norm[part])
            out = rotate(
                *(q[:, :, part], k[:, :, part], z_part, z_part), **norms, **common, **options
            )
            outputs.append(out)
        return tuple(jnp.concatenate(x, axis=2) for x in zip(*outputs, strict=True))

    def everything(f):
        outputs, vjp = jax.vjp(f, q, k, z, q_norm, k_norm)
        return outputs, vjp(cotangents)

    tpu = implementation == "pallas_tpu"
    with pltpu.force_tpu_interpret_mode() if tpu else contextlib.nullcontext():
        found, expected = (jax.jit(everything, static_argnums=0)(f) for f in (halves, whole))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def test_one_of_two_may_have_a_norm_or_positions():
    q, k, z, norm = arrays(0, (1, 4, 2, 8), (1, 4, 2, 8), (1, 4, 2), (2, 8))
    both_q, both_k = rotate(q, k, z, z, inv_freq=INV_FREQ, q_norm=norm, k_norm=norm)
    out_q, out_k = rotate(q, k, z, None, inv_freq=INV_FREQ, q_norm=norm)
    np.testing.assert_allclose(out_q, both_q, atol=1e-6)
    assert out_k is k
    out_q, out_k = rotate(q, k, None, z, inv_freq=INV_FREQ, k_norm=norm)
    np.testing.assert_allclose(out_k, both_k, atol=1e-6)
    assert out_q is q


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"q_norm": np.ones((4, 7))}, r"q_norm has shape \(4, 7\).* must be \(4, 8\)"),
        ({"k_mean_square": np.ones((1, 4))}, "k_mean_square is given without k_norm"),
        (
            {"q_norm": np.ones((4, 8)), "q_mean_square": np.ones((1, 5))},
            r"q_mean_square has shape \(1, 5\).* must be \(1, 4\)",
        ),
        ({"implementation": "cuda"}, "'cuda' is unknown; known: xla, pallas_tpu, pallas_gpu"),
    ],
)
def test_wrong_options_are_named(options, message):
    q, k = arrays(0, (1, 4, 4, 8), (1, 4, 4, 8))
    with pytest.raises(ValueError, match=message):
        rotate(q, k, None, None, inv_freq=INV_FREQ, **options)


@pytest.mark.parametrize(
    ("shape", "inv_freq", "message"),
    [
        ((1, 4, 3), INV_FREQ, "3 columns, which do not divide the 4 heads of q"),
        ((1, 5, 1), INV_FREQ, r"positions_q has shape \(1, 5, 1\)"),
        ((1, 4, 1), INV_FREQ[:2], r"inv_freq has shape \(2,\); head dim 8 needs \(4,\)"),
    ],
)
def test_wrong_shapes_are_named(shape, inv_freq, message):
    q, k = arrays(0, (1, 4, 4, 8), (1, 4, 4, 8))
    z = jnp.zeros(shape)
    with pytest.raises(ValueError, match=message):
        rotate(q, k, z, z, inv_freq=inv_freq)
