"""Attention by the Hopper kernels: numbers in jax's interpreter on CPU, lowering for CUDA.

In jax 0.10.2 the interpreter runs loads, barriers, loops, masks and stores as they are, but
wgmma only on untransposed shared memory, and `pl.run_state` and writing to an accumulator not
at all. `gpu_common` has stand-ins for these; the last test does without where it can.
"""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import thread_map
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu
from pallas_kernels.attention import gpu, gpu_common, masks
from tests.kernels import attention_cases
from tests.kernels.attention_cases import Case

# Small, so that short sequences are many blocks, and buffers are used again.
SMALL = gpu.BlockSizes(gpu.Blocks(64, 64, 2), gpu.Blocks(64, 64, 2), gpu.Blocks(64, 64, 2))
small = functools.partial(gpu.attend, blocks=SMALL)


@pytest.fixture(autouse=True)
def compile_kernels_once(monkeypatch):
    """The interpreter compiles a kernel again for every thread of every block of the grid."""
    compiled, lock = {}, threading.Lock()

    def run(jaxpr, consts, *args):
        with lock:
            if jaxpr not in compiled:
                f = jax.jit(lambda consts, *args: jax.core.eval_jaxpr(jaxpr, consts, *args))
                compiled[jaxpr] = f.lower(consts, *args).compile()
        compiled[jaxpr](consts, *args)

    monkeypatch.setattr(thread_map, "_run_jaxpr", run)


CASES = (
    Case(T=300, S=300, H=64, group=2, dtype="bfloat16", positions="shared"),
    Case(T=300, S=128, H=80, causal=False, dtype="bfloat16", positions="none"),
    Case(T=300, S=128, H=64, dtype="bfloat16", positions="none"),
    Case(T=128, S=1024, H=64, documents=True, group=3, dtype="bfloat16", positions="none"),
    Case(T=128, S=300, H=64, permuted=True, cache=True, B=2, dtype="bfloat16", positions="none"),
    Case(T=7, S=1, H=64, documents=True, permuted=True, dtype="bfloat16", positions="none"),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_match_float64(case):
    with mosaic_gpu.interpreted():
        attention_cases.check(attention_cases.through(small), case)


@pytest.mark.parametrize("H", [128, 256])
def test_default_blocks_match_float64(H):
    case = Case(T=128, S=128, H=H, dtype="bfloat16", positions="none")
    with mosaic_gpu.interpreted():
        attention_cases.check(attention_cases.through(gpu.attend), case)


def test_float16_is_float16():
    q = jax.random.normal(jax.random.key(0), (1, 64, 1, 64), jnp.float16)
    with mosaic_gpu.interpreted():
        out, _ = small(q, q, q, masks.Default(True), scale=0.125)
    assert out.dtype == jnp.float16
    np.testing.assert_array_equal(out[:, 0], q[:, 0])  # the first sees itself alone


def test_blocks_that_nothing_sees_are_not_read():
    """NaN in the second half of a cache and in queries of padding stays where it is."""
    T = S = 256
    half = jnp.arange(T) < T // 2
    q, k = (jax.random.normal(jax.random.key(i), (1, T, 1, 64), jnp.bfloat16) for i in (0, 1))
    q, k = (jnp.where(half[None, :, None, None], x, jnp.nan) for x in (q, k))
    options = dict.fromkeys(("q_index", "kv_index"))
    segments = jnp.asarray(half, jnp.int32)[None]
    options |= {"q_segment_ids": segments, "kv_segment_ids": jnp.ones_like(segments)}
    mask = masks.build((1, T, S), kv_length=jnp.array([S // 2]), causal=False, **options)

    @jax.jit
    def step(q, k):
        out, vjp = jax.vjp(lambda q, k: small(q, k, k, mask, scale=0.125)[0], q, k)
        return out, *vjp(jnp.ones_like(out))

    with mosaic_gpu.interpreted():
        out, dq, dk = step(q, k)
    for x in (out, dq, dk):
        assert np.isfinite(np.asarray(x, np.float32)).all()
        assert not np.asarray(x[:, T // 2 :], np.float32).any()
        assert np.asarray(x[:, : T // 2], np.float32).any()


def _step(case):
    arrays = [case.arrays()[name] for name in "qkv"]
    options = {name: case.options().get(name) for name in attention_cases.OPTIONS}

    def step(q, k, v, options, cotangents):
        shapes = (case.B, case.T, case.S)
        mask = masks.build(shapes, causal=case.causal, **options)
        out, vjp = jax.vjp(lambda *x: gpu.attend(*x, mask, scale=case.H**-0.5), q, k, v)
        return out, vjp(cotangents)

    return jax.jit(step).trace(*arrays, options, case.cotangents())


@pytest.mark.parametrize(
    "case",
    [
        Case(T=4097, S=4097, H=128, K=2, group=2, dtype="bfloat16"),
        Case(T=300, S=1024, H=64, documents=True, cache=True, dtype="bfloat16"),
        Case(T=7, S=300, H=96, permuted=True, causal=False, dtype="bfloat16"),
        Case(T=1024, S=1024, H=256, dtype="bfloat16"),
    ],
    ids=str,
)
def test_lowers_for_cuda(case):
    text = _step(case).lower(lowering_platforms=("cuda",)).as_text()
    for name in ("attention_forward", "attention_backward_dkv", "attention_backward_dq"):
        assert name in text


@pytest.mark.parametrize(
    ("H", "dtype", "scale", "message"),
    [
        (64, "float32", 0.1, "float32, float32, float32: all must be bfloat16 or all float16"),
        (320, "bfloat16", 0.1, "head dimension 320"),
        (64, "bfloat16", -0.1, "scale=-0.1 must be positive"),
    ],
)
def test_what_it_cannot_do_is_said(H, dtype, scale, message):
    x = jnp.zeros((1, 8, 1, H), dtype)
    with pytest.raises(NotImplementedError, match=message):
        gpu.attend(x, x, x, masks.Default(True), scale=scale)


def _wgmma_everywhere():
    """Why the interpreter cannot run the products as they are written; None if it can."""

    def body(out_ref, tile):
        tile[...] = jnp.ones((64, 64), jnp.bfloat16)

        def products(acc):
            acc[...] = gpu_common.filled((64, 64), 1.0, gpu_common.TILE)
            gpu_common.mma(acc, tile, tile, transposed=True)
            gpu_common.mma(acc, gpu_common.value(acc).astype(jnp.bfloat16), tile)
            return gpu_common.value(acc)

        x = gpu_common.accumulate(products, (64, 64), stand_ins=None, wg=0)
        tile[...] = x.astype(jnp.bfloat16)
        plgpu.copy_smem_to_gmem(tile, out_ref)
        plgpu.wait_smem_to_gmem(0)

    call = mosaic_gpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((64, 64), jnp.bfloat16),
        scratch_types=[gpu_common.smem((64, 64), jnp.bfloat16)],
        grid=(1,),
        grid_names=("tile",),
        num_threads=1,
        thread_name="wg",
        name="probe",
    )
    try:
        jax.block_until_ready(jax.jit(call)())
    except Exception as e:  # whatever an interpreter says that lacks a rule
        return f"{type(e).__name__}: {e}".splitlines()[0]


def test_the_kernels_products_run_as_they_are_where_the_interpreter_can(monkeypatch):
    monkeypatch.setattr(gpu_common, "_emulated", lambda: False)
    with mosaic_gpu.interpreted():
        reason = _wgmma_everywhere()
        if reason is not None:
            pytest.skip(f"jax {jax.__version__}: {reason}")
        attention_cases.check(attention_cases.through(small), CASES[0])
