"""Under a mesh, each device runs on its part of batch, heads and tokens, and nothing changes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import Partition, rotary_attention, rotate
from pallas_kernels.attention import masks, tpu, tpu_plan, xla
from tests.kernels import tpu_compile

B, T, N, K, H = 4, 32, 8, 4, 16
INV_FREQ = (10_000.0 ** (-np.arange(0, H, 2) / H)).astype(np.float32)
DOCUMENTS = np.array([[1] * 10 + [2] * 19 + [0] * 3] * 2 + [[1] * 32] * 2, np.int32)


def arrays(P, S=T):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    z = 3.0 * normal(B, S, P)
    return dict(
        **dict(q=normal(B, T, N, H), k=normal(B, S, K, H), v=normal(B, S, K, H), z=z),
        **dict(q_norm=1 + 0.1 * normal(N, H), k_norm=1 + 0.1 * normal(K, H)),
    )


def mesh(sizes=(2, 1, 4), names=("data", "fsdp", "tensor")):
    return jax.make_mesh(sizes, tuple(names), axis_types=(jax.sharding.AxisType.Auto,) * len(sizes))


def attended(partition, segment_ids=None, implementation=None, **options):
    """Norm, rotation (by z's; again by attention) and attention: loss, and all gradients."""

    def run(a):
        z_q = a["z"][:, -T:] if a["z"].shape[1] > T else a["z"]
        turn = a["z"].shape[-1] <= K
        q, k = rotate(
            *(a["q"], a["k"], z_q if turn else None, a["z"] if turn else None),
            inv_freq=INV_FREQ,
            q_norm=a["q_norm"],
            k_norm=a["k_norm"],
            implementation=implementation,
            partition=partition,
        )
        out, lse = rotary_attention(
            *(q, k, a["v"], z_q, a["z"]),
            q_segment_ids=segment_ids,
            kv_segment_ids=segment_ids,
            inv_freq=INV_FREQ,
            implementation=implementation,
            partition=partition,
            return_lse=True,
            **options,
        )
        lse = jnp.where(jnp.isneginf(lse), 0.0, lse)
        return (out**2).sum() + (lse**2).sum(), (out, lse.swapaxes(1, 2))

    return jax.jit(jax.value_and_grad(run, has_aux=True))


def check_equal(actual, expected):
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        np.testing.assert_allclose(one, other, atol=3e-5 * max(1.0, np.abs(other).max()))


@pytest.mark.parametrize("P", [1, K])
@pytest.mark.parametrize("documents", [False, True])
def test_equals_one_device(P, documents):
    """Forward and backward; the norm runs over all heads though a device has two of eight."""
    a = arrays(P)
    ids = DOCUMENTS if documents else None
    expected = attended(None, ids)(a)
    with jax.set_mesh(mesh()):
        partition = Partition(batch=("data", "fsdp"), heads="tensor")
        actual = attended(partition, ids)(a)
        text = attended(partition, ids).lower(a).as_text()
    assert "manual_axes" in text
    check_equal(actual, expected)


def zigzag(parts, length=T):
    """An early and a late chunk for each part, so that all have as much to attend to."""
    chunks = np.arange(length, dtype=np.int32).reshape(2 * parts, -1)
    return np.concatenate([chunks[[i, 2 * parts - 1 - i]].reshape(-1) for i in range(parts)])


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks far below the lengths, so that some are skipped."""
    blocks = xla.BlockSizes(query=8, key=8, window=2, scores=200)
    monkeypatch.setattr(xla, "default_blocks", lambda: blocks)


LAYOUTS = {
    "length 8": ((8,), 8, Partition(length="a")),
    "length 4, heads 2": ((4, 2), 4, Partition(length="a", heads="b")),
    "batch 2, heads 2, length 2": ((2, 2, 2), 2, Partition(batch="a", heads="b", length="c")),
    "length 2 x 2, heads 2": ((2, 2, 2), 4, Partition(length=("a", "b"), heads="c")),
}


@pytest.mark.parametrize(
    ("layout", "balanced", "P", "documents"),
    [
        ("length 8", False, K, False),
        ("length 8", True, 1, True),
        ("length 4, heads 2", False, 1, True),
        ("length 4, heads 2", True, K, False),
        ("length 4, heads 2", True, N, True),
        ("batch 2, heads 2, length 2", False, N, False),
        ("batch 2, heads 2, length 2", True, K, True),
        ("length 2 x 2, heads 2", True, 1, False),
    ],
)
def test_split_tokens_equal_one_device(layout, balanced, P, documents, small_blocks):
    """Also where they do not lie in order: value, logsumexp and every gradient."""
    sizes, parts, partition = LAYOUTS[layout]
    order = zigzag(parts) if balanced else np.arange(T)
    a, ids = arrays(P), DOCUMENTS if documents else None
    (loss, aux), grads = attended(None, ids)(a)
    moved = lambda tree: {n: x if "norm" in n else x[:, order] for n, x in tree.items()}
    expected = (loss, tuple(x[:, order] for x in aux)), moved(grads)
    index = dict(q_index=order, kv_index=order) if balanced else {}
    with jax.set_mesh(mesh(sizes, "abc"[: len(sizes)])):
        actual = attended(partition, ids[:, order] if documents else None, **index)(moved(a))
    check_equal(actual, expected)


@pytest.mark.parametrize("causal", [True, False])
def test_fewer_queries_than_keys_stand_at_the_end_of_the_whole(causal):
    a = arrays(1, S=2 * T)
    expected = attended(None, causal=causal)(a)
    with jax.set_mesh(mesh((4, 2), "ab")):
        actual = attended(Partition(length="a", batch="b"), causal=causal)(a)
    check_equal(actual, expected)


def test_rows_of_split_tokens_may_lie_each_its_own_way(small_blocks):
    rng = np.random.default_rng(0)
    index = jnp.asarray(np.stack([rng.permutation(T) for _ in range(B)]), jnp.int32)
    a = arrays(K)
    expected = attended(None, q_index=index, kv_index=index)(a)
    with jax.set_mesh(mesh((4, 2), "ab")):
        actual = attended(Partition(length="a", heads="b"), q_index=index, kv_index=index)(a)
    check_equal(actual, expected)


@given(seed=st.integers(0, 999), pieces=st.integers(1, 8))
def test_keys_are_put_in_order_by_moving_few_pieces(seed, pieces):
    rng = np.random.default_rng(seed)
    index = np.array_split(np.sort(rng.choice(40, T, replace=False)), pieces)
    index = np.concatenate([index[i] for i in rng.permutation(pieces)])
    sizes, order = masks.stretches(index)
    found = np.split(index, np.cumsum(sizes)[:-1])
    np.testing.assert_array_equal(np.concatenate([found[i] for i in order]), np.sort(index))
    assert len(sizes) <= pieces


@pytest.mark.parametrize("most_pieces", [8, 3])
def test_known_indices_do_not_need_a_mesh(most_pieces, monkeypatch):
    """Nor that the keys can be put in order; gaps and repeats are as good."""
    monkeypatch.setattr("pallas_kernels.attention.api._MOST_PIECES", most_pieces)
    index = zigzag(2) * 3 // 2
    rows = jnp.asarray(np.broadcast_to(index, (B, T)))
    a = arrays(K)
    expected = attended(None, DOCUMENTS, q_index=rows, kv_index=rows)(a)
    check_equal(attended(None, DOCUMENTS, q_index=index, kv_index=index)(a), expected)


def visits_of(implementation, block):
    """A stand-in for an implementation: as logsumexp, the key blocks that a query's visits."""

    def attend(q, k, v, mask, *, scale):
        (B, T, N, _), S = q.shape, k.shape[1]
        if implementation == "xla":
            first, last = masks.live_range(masks.block_plan(mask, block, block)[0])
            count = last - first
        else:
            count = tpu_plan.plan(mask, T, S, block, block)[0].sum(-1)
        count = jnp.repeat(count, block, axis=1)[:, None]
        return jnp.zeros_like(q), jnp.broadcast_to(count.astype(jnp.float32), (B, N, T))

    return attend


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
@pytest.mark.parametrize("balanced", [False, True])
def test_no_key_block_is_visited_in_vain(implementation, balanced, monkeypatch):
    """A block of queries visits keys up to its own place; balanced, all devices as many."""
    block, parts = 4, 4
    module = {"xla": xla, "pallas_tpu": tpu}[implementation]
    monkeypatch.setattr(module, "attend", visits_of(implementation, block))
    order = zigzag(parts) if balanced else np.arange(T)
    index = dict(q_index=order, kv_index=order) if balanced else {}
    with jax.set_mesh(mesh((4, 2), "ab")):
        _, visits = rotary_attention(
            *(arrays(1)[n] for n in "qkv"),
            *(None, None),
            **index,
            inv_freq=INV_FREQ,
            return_lse=True,
            implementation=implementation,
            partition=Partition(length="a", heads="b"),
        )
    assert (visits == (order // block + 1)[None, None]).all()
    if balanced:
        each = visits[0, 0].reshape(parts, -1).sum(-1)
        assert (each == each[0]).all()


def test_what_split_tokens_send():
    """Keys and values, there and back; once more forth in the backward pass of a layer."""
    a = arrays(1)
    a = {n: x.astype(jnp.bfloat16) if n in "qkv" else x for n, x in a.items()}

    def layers(a):
        def layer(x, _):
            attend = lambda q, k, v: rotary_attention(
                *(q, k, v, None, None),
                inv_freq=INV_FREQ,
                partition=Partition(length="a"),
                implementation="xla",
            )
            return attend(x, a["k"], a["v"]), None

        return jax.lax.scan(layer, a["q"], length=3)[0].astype(jnp.float32).sum()

    with jax.set_mesh(mesh((8,), ("a",))):
        text = jax.jit(jax.grad(layers)).lower(a).as_text()
    sent = re.findall(r'"stablehlo\.(all_\w+|reduce_\w+|collective_\w+)"', text)
    assert sorted(sent) == ["all_gather"] * 4 + ["reduce_scatter"] * 2
    sums = re.findall(r"stablehlo\.reduce_scatter.*?\}\) : \((\S+)\)", text, re.DOTALL)
    assert sums == [f"tensor<8x{B}x{T // 8}x{K * H}xf32>"] * 2  # sums of 8, so not in bf16


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        (Partition(batch="rows"), "names mesh axis 'rows'; the mesh has data, fsdp, tensor"),
        (Partition(batch=("data", "tensor")), "8 devices do not divide the 4 of axis B of q"),
        (Partition(length=("data", "tensor")), "8 devices do not divide the 20 of axis T of q"),
    ],
)
def test_what_does_not_fit_is_named(partition, message):
    a = {n: x if "norm" in n else x[:, :20] for n, x in arrays(1).items()}
    with jax.set_mesh(mesh()), pytest.raises(ValueError, match=message):
        attended(partition)(a)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kv_length=jnp.full(B, T)), "kv_length is given, but .* splits the keys"),
        (
            dict(kv_index=np.arange(T + 1)),
            r"kv_index has shape \(33,\); it must be \(4, 32\), or a numpy array \(32,\)",
        ),
        (dict(q_index=jnp.arange(T)), r"q_index has shape \(32,\); it must be \(4, 32\), or a nu"),
    ],
)
def test_mistakes_with_split_tokens_are_named(options, message):
    with jax.set_mesh(mesh()), pytest.raises(ValueError, match=message):
        attended(Partition(length="data"), **options)(arrays(1))


def test_needs_a_mesh():
    with pytest.raises(ValueError, match=r"no mesh is set; use jax\.set_mesh"):
        attended(Partition(batch="data"))(arrays(1))


def on_four_chips():
    """For `tpu_compile`."""
    axes = dict(q="BTNH", k="BTKH", v="BTKH", z="BTP", q_norm="NH", k_norm="KH")
    a = jax.eval_shape(lambda: arrays(K))
    order = zigzag(2)
    for partition, index in (
        (Partition(batch="data", heads="tensor"), {}),
        (Partition(length="data", heads="tensor"), dict(q_index=order, kv_index=order)),
    ):
        f = attended(partition, implementation="pallas_tpu", **index)
        specs = {n: partition.spec(axes[n]) for n in a}
        yield f"norm, rotation, attention: {partition}", f, (a,), (specs,)


@tpu_compile.needs_libtpu
def test_the_tpu_kernels_compile_for_a_mesh_of_four():
    assert tpu_compile.failures("tests.kernels.test_partition:on_four_chips", ("v5e",)) == {}
