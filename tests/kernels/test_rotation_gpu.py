"""The Mosaic GPU kernels of rotate: numbers in jax's interpreter on CPU, lowering for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic_gpu, rotate
from pallas_kernels.attention import api as attention_api
from pallas_kernels.rotation import api, gpu
from tests.kernels import rotation_cases
from tests.kernels.rotation_cases import Case


@pytest.fixture(autouse=True)
def few_blocks(monkeypatch):
    """Fewer than there are tiles, so that blocks walk over several."""
    monkeypatch.setattr(gpu, "default_blocks", lambda: gpu.BlockSizes(blocks=2, sum_blocks=2))


CASES = (
    Case(T=3, N=16, K=16, H=128, norm=True, dtype="bfloat16"),
    Case(B=2, T=3, N=8, K=2, H=64, scale=1.14),
    Case(T=5, N=4, K=2, H=96, columns="shared", norm=True, given=True, scale=1.14),
    Case(T=2, N=4, K=4, H=80, columns="none", norm=True),
    Case(T=7, N=4, K=1, H=256, dtype="bfloat16"),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_match_float64(case):
    with mosaic_gpu.interpreted():
        errors = rotation_cases.errors(case, "pallas_gpu")
    assert max(errors.values()) < rotation_cases.TOLERANCE[case.dtype], errors


def test_sine_and_cosine_are_exact_for_large_angles():
    """x = (1, 0) turns into (cos, sin) of the angle."""
    T, N, H = 4, 16, 128
    z = np.random.default_rng(0).uniform(-20_000, 20_000, (1, T, N)).astype(np.float32)
    freq = np.ones(H // 2, np.float32)
    freq[1:] = np.random.default_rng(1).uniform(0, 1, H // 2 - 1)
    x = jnp.zeros((1, T, N, H)).at[..., : H // 2].set(1.0)
    with mosaic_gpu.interpreted():
        y, _ = rotate(x, x, z, z, inv_freq=freq, implementation="pallas_gpu")
    angle = (z[..., None] * freq).astype(np.float64)
    np.testing.assert_allclose(y[..., : H // 2], np.cos(angle), atol=1e-6, rtol=0)
    np.testing.assert_allclose(y[..., H // 2 :], np.sin(angle), atol=1e-6, rtol=0)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("N", "K", "columns", "H", "dtype"),
    [
        (16, 16, "kv", 128, "bfloat16"),
        (16, 4, "kv", 64, "float32"),
        (8, 8, "shared", 80, "bfloat16"),
        (40, 8, "kv", 96, "bfloat16"),
        (16, 1, "shared", 256, "bfloat16"),
    ],
)
def test_lowers_for_cuda(N, K, columns, H, dtype, norm):
    case = Case(T=3, N=N, K=K, H=H, columns=columns, norm=norm, dtype=dtype)

    def step(args):
        out, vjp = jax.vjp(lambda a: rotation_cases.call(case, a, "pallas_gpu"), args)
        return vjp(out)

    text = jax.jit(step).trace(case.arrays()).lower(lowering_platforms=("cuda",)).as_text()
    assert "rotate_forward" in text
    assert "rotate_backward" in text


@pytest.mark.parametrize(
    ("H", "dtypes", "message"),
    [
        (20, ("float32", "float32"), "head dim 20 is not a multiple of 8"),
        (64, ("float32", "bfloat16"), "float32 and bfloat16"),
    ],
)
def test_what_it_cannot_do_is_said(H, dtypes, message):
    q, k = (jnp.zeros((1, 2, 4, H), dtype) for dtype in dtypes)
    z = jnp.zeros((1, 2, 1))
    with pytest.raises(NotImplementedError, match=message):
        rotate(q, k, z, z, inv_freq=np.ones(H // 2), implementation="pallas_gpu")


def test_a_norm_too_wide_for_the_registers_is_refused():
    case = Case(T=1, N=128, K=4, H=128, norm=True)
    with pytest.raises(NotImplementedError, match="128 and 4 heads of 128 do not fit"):
        rotation_cases.call(case, case.arrays(), "pallas_gpu")


def test_it_is_not_tried_unless_named(monkeypatch):
    """Until a dated result shows it correct on a GPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert api.automatic() == ("xla",)
    assert attention_api.automatic() == ("cudnn", "xla")
    assert gpu.CAPABILITIES == (9,)
