"""What users do with rotary attention and rotation besides calling them with float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from pallas_kernels import dispatch, rotary_attention
from repo_jax import ContextRePositioning
from tests.kernels import attention_cases
from tests.kernels.attention_cases import Case

INV_FREQ = (10_000.0 ** (-np.arange(0, 8, 2) / 8)).astype(np.float32)


def arrays(T=12, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key, (1, T, 2, 8), dtype) for key in keys[:3])
    return q, k, v, 3.0 * jax.random.normal(keys[3], (1, T, 2))


def attend(q, k, v, z, **options):
    return rotary_attention(q, k, v, z, z, inv_freq=INV_FREQ, **options)


@pytest.mark.parametrize("H", [80, 128])  # whose scale is no power of 2
def test_in_bfloat16_both_passes_have_the_same_scores(H, monkeypatch):
    """Else a row's weights in the backward pass do not add up to 1: by more, the larger scores."""
    drawn = Case.arrays

    def larger(case, seed=0):
        found = drawn(case, seed)
        return found | {name: 2 * found[name] for name in ("q", "k")}

    monkeypatch.setattr(Case, "arrays", larger)
    case = Case(T=290, S=290, H=H, dtype="bfloat16")
    attention_cases.check(functools.partial(rotary_attention, implementation="xla"), case)


def test_x64_changes_nothing():
    q, k, v, z = arrays()

    def loss(z):
        out, lse = attend(q, k, v, z, return_lse=True)
        return (out**2).sum() + lse.sum(), lse

    plain = jax.grad(loss, has_aux=True)(z)
    with jax.enable_x64(True):
        wide = jax.grad(loss, has_aux=True)(z)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), wide, plain)
    assert {x.dtype for x in wide} == {np.dtype(np.float32)}


def test_hessian_vector_products_of_positions():
    q, k, v, z = arrays()
    slope = jax.grad(lambda z: (attend(q, k, v, z) ** 2).sum())
    check_grads(slope, (z,), order=1, modes=["fwd"], eps=1e-2, atol=2e-2, rtol=2e-2)


def test_hessian_vector_products_of_f_phi():
    module = ContextRePositioning(2, init_std=0.5)
    h = jax.random.normal(jax.random.key(1), (1, 5, 16))
    params = module.init(jax.random.key(2), h)
    slope = jax.grad(lambda params: (module.apply(params, h) ** 2).sum())
    check_grads(slope, (params,), order=1, modes=["fwd"], eps=1e-2, atol=2e-2, rtol=2e-2)


def test_segment_ids_of_any_integer_dtype():
    *given, ids = *arrays(), np.array([[1] * 5 + [255] * 4 + [0] * 3])
    found = [
        attend(*given, q_segment_ids=x, kv_segment_ids=x, return_lse=True)
        for x in (jnp.asarray(ids, jnp.int32), jnp.asarray(ids, jnp.uint8))
    ]
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.parametrize("implementation", [None, "xla", "reference", "cudnn", "pallas_gpu"])
def test_a_traced_scale_is_refused(implementation):
    run = jax.jit(lambda s: attend(*arrays(), scale=s, implementation=implementation))
    with pytest.raises(ValueError, match="scale is traced; it must be a number"):
        run(1.0)
    np.testing.assert_array_equal(
        attend(*arrays(), scale=np.float32(0.5)), attend(*arrays(), scale=0.5)
    )


def test_under_a_mesh_without_partition_plain_jax_stands_in_for_tpu_kernels(monkeypatch):
    given = arrays()
    expected = attend(*given)
    monkeypatch.setattr(dispatch, "on_known_tpu", lambda: True)
    monkeypatch.setattr(dispatch, "_said", set())
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh), pytest.warns(UserWarning, match="xla instead.*give `partition`"):
        np.testing.assert_allclose(attend(*given), expected, atol=1e-6)


def test_the_default_device_is_what_is_traced_for(monkeypatch):
    cpu = jax.devices()[0]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert dispatch.target()[0] == "gpu"
    for device in (cpu, "cpu"):
        with jax.default_device(device):
            assert dispatch.target() == ("cpu", cpu.device_kind)
