"""Under a mesh, each device runs on its part of batch and heads, and nothing changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Partition, rotary_attention, rotate
from tests.kernels import tpu_compile

B, T, N, K, H = 4, 24, 8, 4, 16
INV_FREQ = (10_000.0 ** (-np.arange(0, H, 2) / H)).astype(np.float32)


def arrays(P):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    z = 3.0 * normal(B, T, P)
    return dict(
        **dict(q=normal(B, T, N, H), k=normal(B, T, K, H), v=normal(B, T, K, H), z=z),
        **dict(q_norm=1 + 0.1 * normal(N, H), k_norm=1 + 0.1 * normal(K, H)),
    )


def mesh():
    types = (jax.sharding.AxisType.Auto,) * 3
    return jax.make_mesh((2, 1, 4), ("data", "fsdp", "tensor"), axis_types=types)


def attended(partition, segment_ids=None, implementation=None):
    def run(a):
        q, k = rotate(
            *(a["q"], a["k"], a["z"], a["z"]),
            inv_freq=INV_FREQ,
            q_norm=a["q_norm"],
            k_norm=a["k_norm"],
            implementation=implementation,
            partition=partition,
        )
        return rotary_attention(
            *(q, k, a["v"], a["z"], a["z"]),
            q_segment_ids=segment_ids,
            kv_segment_ids=segment_ids,
            inv_freq=INV_FREQ,
            implementation=implementation,
            partition=partition,
        )

    return jax.jit(jax.value_and_grad(lambda a: (run(a) ** 2).sum()))


@pytest.mark.parametrize("P", [1, K])
@pytest.mark.parametrize("documents", [False, True])
def test_equals_one_device(P, documents):
    """Forward and backward; the norm runs over all heads though a device has two of eight."""
    a = arrays(P)
    ids = jnp.array([[1] * 10 + [2] * 14] * B) if documents else None
    expected = attended(None, ids)(a)
    with jax.set_mesh(mesh()):
        partition = Partition(batch=("data", "fsdp"), heads="tensor")
        actual = attended(partition, ids)(a)
        text = attended(partition, ids).lower(a).as_text()
    assert "manual_axes" in text
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        np.testing.assert_allclose(one, other, atol=3e-5 * max(1.0, np.abs(other).max()))


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        (Partition(batch="rows"), "names mesh axis 'rows'; the mesh has data, fsdp, tensor"),
        (Partition(batch=("data", "tensor")), "8 devices do not divide the 4 of axis B of q"),
    ],
)
def test_what_does_not_fit_is_named(partition, message):
    a = arrays(1)
    with jax.set_mesh(mesh()), pytest.raises(ValueError, match=message):
        attended(partition)(a)


def test_needs_a_mesh():
    with pytest.raises(ValueError, match=r"no mesh is set; use jax\.set_mesh"):
        attended(Partition(batch="data"))(arrays(1))


def on_four_chips():
    """For `tpu_compile`."""
    spec = Partition(batch="data", heads="tensor").spec
    axes = dict(q="BTNH", k="BTKH", v="BTKH", z="BTP", q_norm="NH", k_norm="KH")
    a = jax.eval_shape(lambda: arrays(K))
    f = attended(Partition(batch="data", heads="tensor"), implementation="pallas_tpu")
    return [("norm, rotation, attention", f, (a,), ({n: spec(axes[n]) for n in a},))]


@tpu_compile.needs_libtpu
def test_the_tpu_kernels_compile_for_a_mesh_of_four():
    assert tpu_compile.failures("tests.kernels.test_partition:on_four_chips", ("v5e",)) == {}
