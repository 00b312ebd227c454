"""The TPU kernels of `rotate`: numbers in Pallas' interpreter on CPU, and the real compiler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import rotate
from pallas_kernels.rotation import tpu, tpu_tables
from tests.kernels import rotation_cases, tpu_compile
from tests.kernels.rotation_cases import Case

CASES = [
    Case(7, 4, 2, 128, norm=True, B=2, spread=300.0),
    Case(5, 4, 4, 128, norm=True, given=True, dtype="bfloat16"),
    Case(5, 3, 3, 128, scale=1.1386),
    Case(5, 4, 2, 64, "shared", norm=True, scale=1.1386, dtype="bfloat16"),
    Case(5, 6, 2, 64, norm=True, given=True),  # three heads a position: slabs of two positions
    Case(5, 3, 1, 64, dtype="bfloat16"),  # an odd head: padded
    Case(9, 2, 1, 256, norm=True, dtype="bfloat16"),
    Case(5, 2, 2, 512, norm=True, given=True),
    Case(5, 2, 2, 80, norm=True, dtype="bfloat16"),
    Case(5, 2, 1, 96),
    Case(5, 2, 2, 64, "none", norm=True, dtype="bfloat16"),
]


def check(case):
    with pltpu.force_tpu_interpret_mode():
        errors = rotation_cases.errors(case, "pallas_tpu")
    assert max(errors.values()) < rotation_cases.TOLERANCE[case.dtype], errors


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case):
    check(case)


@pytest.mark.parametrize("tokens", [61, 64])
def test_blocks_and_loops(tokens, monkeypatch):
    """Four blocks of which the last is cut short; four, whose sums two cores would share."""
    small = lambda *_: tpu.BlockSizes(tokens=16, slabs=4)
    monkeypatch.setattr(tpu, "default_blocks", small)
    check(Case(tokens, 4, 4, 128, norm=True))


def test_sincos_is_exact_to_float32_far_from_zero():
    rng = np.random.default_rng(0)
    near_half_turns = np.arange(0, 20_000, np.pi / 2)
    angle = np.concatenate([rng.uniform(-20_000, 20_000, 200_000), near_half_turns])
    angle = angle.astype(np.float32)
    sin, cos = jax.jit(tpu_tables.sincos)(angle, tpu_tables.ROUNDER)
    np.testing.assert_allclose(sin, np.sin(angle.astype(np.float64)), atol=1e-6, rtol=0)
    np.testing.assert_allclose(cos, np.cos(angle.astype(np.float64)), atol=1e-6, rtol=0)


def test_says_what_it_cannot_do():
    q = jnp.zeros((1, 4, 2, 64), jnp.float16)
    z = jnp.zeros((1, 4, 1))
    with pytest.raises(NotImplementedError, match="bfloat16 and float32, not float16"):
        rotate(q, q, z, z, inv_freq=np.ones(32), implementation="pallas_tpu")
    q = jnp.zeros((1, 4, 256, 64))
    z = jnp.zeros((1, 4, 256))
    with pytest.raises(NotImplementedError, match="128 columns of positions, not 256"):
        rotate(q, q, z, z, inv_freq=np.ones(32), implementation="pallas_tpu")


def compiled():
    """What has to compile: forward and backward over lanes, dtypes, norms and odd lengths."""
    cases = [
        Case(300, 4, 2, 128, norm=True, dtype="bfloat16"),
        Case(1, 2, 2, 128, norm=True, given=True),
        Case(7, 6, 2, 64, norm=True, dtype="bfloat16"),
        Case(128, 4, 4, 64),
        Case(129, 2, 1, 256, norm=True, dtype="bfloat16"),
        Case(16, 2, 2, 80, dtype="bfloat16"),
        Case(256, 40, 40, 128, norm=True),  # OLMo 2 13B in float32, the most vector memory
    ]
    for case in cases:

        def both(args, cotangents, case=case):
            out, vjp = jax.vjp(lambda args: rotation_cases.call(case, args, "pallas_tpu"), args)
            return out, vjp(cotangents)

        yield str(case), both, (case.arrays(), case.cotangents())


@tpu_compile.needs_libtpu
def test_compiles_for_tpus():
    assert tpu_compile.failures("tests.kernels.test_rotation_tpu:compiled") == {}
