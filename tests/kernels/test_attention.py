"""rotary_attention: every implementation against float64, and what its mask promises."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import dispatch, rotary_attention
from pallas_kernels.attention import masks, xla
from tests.kernels import attention_cases

pytestmark = pytest.mark.usefixtures("optimized")

H = 8
INV_FREQ = (10_000.0 ** (-np.arange(0, H, 2) / H)).astype(np.float32)


def case(seed, *, T=19, S=None, N=4, K=2, P=2, spread=3.0):
    S = S or T
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    positions = spread * normal(2, max(S, T), P)
    return dict(
        q_BTNH=normal(2, T, N, H),
        k_BSKH=normal(2, S, K, H),
        v_BSKH=normal(2, S, K, H),
        positions_q=positions[:, -T:],
        positions_k=positions[:, -S:],
    )


def exact(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    positions_q,
    positions_k,
    *,
    visible,
    inv_freq=INV_FREQ,
    rope_scale=1.0,
):
    """Plain attention in whatever precision jax has; `visible` bool [B, T, S]."""
    N, K = q_BTNH.shape[2], k_BSKH.shape[2]

    def turn(x, z):
        if z is None:
            return x
        z = jnp.repeat(z, x.shape[2] // z.shape[2], -1)
        angle = z[..., None] * jnp.asarray(inv_freq)[None, None, None]
        cos, sin = rope_scale * jnp.cos(angle), rope_scale * jnp.sin(angle)
        a, b = jnp.split(x, 2, -1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    k, v = (jnp.repeat(x, N // K, 2) for x in (k_BSKH, v_BSKH))
    s = jnp.einsum("BTNH,BSNH->BNTS", turn(q_BTNH, positions_q), turn(k, positions_k)) * H**-0.5
    s = jnp.where(visible[:, None], s, -1e30)
    w = jnp.where(visible[:, None], jax.nn.softmax(s, -1), 0.0)
    return jnp.einsum("BNTS,BSNH->BTNH", w, v)


@functools.cache
def compiled(implementation, causal=True):
    """Output and gradients to q, k, v and both positions, one program for each set of shapes."""

    def loss(arrays, cotangent, options):
        out = rotary_attention(
            **arrays, **options, inv_freq=INV_FREQ, causal=causal, implementation=implementation
        )
        return jnp.vdot(out, cotangent), out

    return jax.jit(jax.grad(loss, has_aux=True))


@functools.cache
def compiled_exact():
    def loss(arrays, cotangent, visible):
        out = exact(**arrays, visible=visible)
        return jnp.vdot(out, cotangent), out

    return jax.jit(jax.grad(loss, has_aux=True))


def check(arrays, visible, *, causal=True, tolerance=3e-6, **options):
    """Both implementations, forward and all gradients, against float64."""
    cotangent = np.random.default_rng(9).normal(size=arrays["q_BTNH"].shape)
    with jax.enable_x64(True):
        wide = {n: np.asarray(x, np.float64) for n, x in arrays.items()}
        expected = jax.device_get(compiled_exact()(wide, cotangent, visible))
    for implementation in ("reference", "xla"):
        run = compiled(implementation, causal)
        grads, out = run(arrays, cotangent.astype(np.float32), options)
        np.testing.assert_allclose(out, expected[1], atol=tolerance, err_msg=implementation)
        for name, true in expected[0].items():
            scale = max(1.0, np.abs(true).max())
            message = f"{implementation} d{name}"
            np.testing.assert_allclose(
                grads[name] / scale, true / scale, atol=tolerance, err_msg=message
            )


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks far below the lengths, so that skipping and partial blocks happen."""
    monkeypatch.setattr(
        xla, "default_blocks", lambda: xla.BlockSizes(query=8, key=8, window=2, scores=200)
    )


def causal(T, S=None):
    S = S or T
    return np.broadcast_to(np.arange(S)[None] <= np.arange(T)[:, None] + S - T, (2, T, S))


@pytest.mark.parametrize("case", attention_cases.COVERING, ids=str)
def test_matches_float64(case, monkeypatch):
    monkeypatch.setattr(xla, "default_blocks", xla.BlockSizes)
    attention_cases.check(functools.partial(rotary_attention, implementation="xla"), case)


@settings(max_examples=12)
@given(
    seed=st.integers(0, 99),
    T=st.sampled_from([1, 8, 19, 40]),
    heads=st.sampled_from([(4, 4, 4), (4, 2, 2), (4, 2, 1), (4, 1, 1), (4, 4, 1), (6, 2, 2)]),
)
def test_causal(seed, T, heads):
    N, K, P = heads
    check(case(seed, T=T, N=N, K=K, P=P), causal(T))


# Several rows of the batch run at a time on accelerators, with all their heads.
@pytest.mark.parametrize(("window", "rows"), [(1, 1), (3, 1), (4, 1), (4, 2)])
@pytest.mark.parametrize(
    ("T", "S", "options"),
    [
        (100, 100, {}),  # stairs, whole windows and single blocks; the last tile ends in padding
        (100, 100, dict(causal=False)),
        (100, 100, dict(documents=True)),
        (72, 72, dict(q_index=np.random.default_rng(3).permutation(72))),  # no stairs
        (24, 80, dict(q_index=np.arange(40, 64))),  # queries in the middle of the keys
        (80, 24, dict(q_index=np.arange(80))),
    ],
)
def test_every_way_through_tiles_and_windows(window, rows, T, S, options, monkeypatch):
    scores = 1000 if rows == 1 else 2**20
    blocks = xla.BlockSizes(query=8, key=8, window=window, scores=scores, rows=rows)
    monkeypatch.setattr(xla, "default_blocks", lambda: blocks)
    options, random = dict(options), np.random.default_rng(window)
    if options.pop("documents", False):
        ids = jnp.asarray(np.cumsum(random.random((2, T)) < 0.05, -1), jnp.int32)
        options |= dict(q_segment_ids=ids, kv_segment_ids=ids)
    if "q_index" in options:
        index = jnp.asarray(options["q_index"], jnp.int32)
        options["q_index"] = jnp.broadcast_to(index, (2, T))
        options["kv_index"] = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (2, S))
    q, k, v = (random.normal(size=(2, n, 2, H)).astype(np.float32) for n in (T, S, S))
    cotangent = random.normal(size=q.shape).astype(np.float32)

    def results(implementation):
        def attend(q, k, v):
            return rotary_attention(
                *(q, k, v, None, None),
                inv_freq=INV_FREQ,
                implementation=implementation,
                **options,
            )

        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(cotangent)

    for ours, true in zip(results("xla"), results("reference"), strict=True):
        np.testing.assert_allclose(ours, true, atol=1e-5)


def test_one_position_per_query_head_rotates_each_key_for_its_query():
    arrays = case(0, N=4, K=2, P=4)
    repeated = arrays | {n: jnp.repeat(arrays[n], 2, 2) for n in ("k_BSKH", "v_BSKH")}
    expected = exact(**repeated, visible=causal(19))
    for implementation in ("reference", "xla"):
        out = rotary_attention(**arrays, inv_freq=INV_FREQ, implementation=implementation)
        np.testing.assert_allclose(out, expected, atol=3e-6)


def test_without_positions():
    arrays = case(1) | {"positions_q": None, "positions_k": None}
    expected = exact(**arrays, visible=causal(19))
    for implementation in ("reference", "xla"):
        out = rotary_attention(**arrays, inv_freq=INV_FREQ, implementation=implementation)
        np.testing.assert_allclose(out, expected, atol=3e-6)


def test_fewer_queries_than_keys_stand_at_the_end():
    check(case(2, T=5, S=23), causal(5, 23))


def test_not_causal():
    check(case(3), np.ones((2, 19, 19), bool), causal=False)


@given(seed=st.integers(0, 99))
def test_permuted_indices(seed):
    """Context parallelism balances the causal mask by giving a device scattered tokens."""
    rng = np.random.default_rng(seed)
    T = 24
    order = np.stack([rng.permutation(T) for _ in range(2)]).astype(np.int32)
    visible = order[:, None, :] <= order[:, :, None]
    check(case(seed, T=T), visible, q_index=jnp.asarray(order), kv_index=jnp.asarray(order))


@given(seed=st.integers(0, 99))
def test_documents_and_padding(seed):
    rng = np.random.default_rng(seed)
    T = 33
    ids = np.sort(rng.integers(1, 5, (2, T)), axis=1).astype(np.int32)
    ids[1, -rng.integers(1, 9) :] = 0
    visible = causal(T) & (ids[:, :, None] == ids[:, None, :]) & (ids[:, :, None] != 0)
    ids = jnp.asarray(ids)
    check(case(seed, T=T), visible, q_segment_ids=ids, kv_segment_ids=ids)


def test_cache_filled_in_part():
    length = jnp.array([7, 12], jnp.int32)
    slots = np.arange(16)
    visible = np.stack([slots[None] <= np.arange(n - 3, n)[:, None] for n in (7, 12)]) & (
        slots[None, None] < np.asarray(length)[:, None, None]
    )
    check(case(4, T=3, S=16), visible, kv_length=length)


PARTS = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@settings(max_examples=12, deadline=None)
@given(sizes=PARTS, T=st.sampled_from([1, 3]), rotated=st.booleans(), data=st.data())
def test_parts_of_keys_are_what_they_are_together(sizes, T, rotated, data):
    S = sum(sizes)
    arrays = case(S, T=T, S=S, K=data.draw(st.sampled_from([2, 4])))
    if rotated:
        arrays |= dict(positions_q=None, positions_k=None)
    rng = np.random.default_rng(S)
    options = dict(kv_index=rng.permutation(S)[None].repeat(2, 0).astype(np.int32))
    options |= dict(q_index=rng.integers(-1, S, (2, T)).astype(np.int32))

    def split(x):
        return tuple(jnp.split(x, np.cumsum(sizes)[:-1].tolist(), axis=1))

    def gradients(cut):
        def loss(q, k, v):
            given = arrays | dict(q_BTNH=q, k_BSKH=cut(k), v_BSKH=cut(v))
            out, lse = rotary_attention(**given, **options, inv_freq=INV_FREQ, return_lse=True)
            lse = jnp.where(lse == -jnp.inf, 0.0, lse)  # rows that see nothing
            return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum() + lse.sum(), out

        given = (arrays[name] for name in ("q_BTNH", "k_BSKH", "v_BSKH"))
        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*given)

    for found, wanted in zip(
        *map(jax.tree.leaves, map(gradients, (split, lambda x: x))), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_step_does_not_read_parts_that_nothing_sees():
    """If it did, 0 times what is not a number would show."""
    arrays = case(0, T=1, S=12) | dict(positions_q=None, positions_k=None)
    names = ("k_BSKH", "v_BSKH")
    parts = {name: tuple(jnp.split(arrays[name], [4, 8], axis=1)) for name in names}
    nothing = {name: (x[0], x[1], jnp.full_like(x[2], jnp.nan)) for name, x in parts.items()}
    options = dict(kv_length=jnp.array([3, 7]), inv_freq=INV_FREQ)
    found = rotary_attention(**arrays | nothing, **options)
    np.testing.assert_allclose(found, rotary_attention(**arrays, **options), atol=1e-6)
    seen = dict(options, kv_length=jnp.array([3, 9]))
    assert np.isnan(rotary_attention(**arrays | nothing, **seen)[1]).any()


def test_queries_that_see_nothing_are_zero_and_give_no_gradient():
    arrays = case(5)
    ids = jnp.zeros((2, 19), jnp.int32).at[:, :4].set(1)

    def out(**a):
        return rotary_attention(
            **a, inv_freq=INV_FREQ, q_segment_ids=ids, kv_segment_ids=ids, return_lse=True
        )

    values, lse = out(**arrays)
    assert not values[:, 4:].any()
    assert np.isneginf(lse[..., 4:]).all()
    assert np.isfinite(lse[..., :4]).all()
    grads = jax.grad(lambda a: out(**a)[0].sum())(arrays)
    for grad in jax.tree.leaves(grads):
        assert np.isfinite(grad).all()
        assert not grad[:, 4:].any()


def test_logsumexp_and_its_gradient():
    """Context parallelism combines partial results by lse, so it is differentiated too."""
    arrays = case(6)
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 19)), jnp.float32)
    both = lambda implementation: jax.value_and_grad(
        lambda a: jnp.vdot(
            rotary_attention(
                **a, inv_freq=INV_FREQ, return_lse=True, implementation=implementation
            )[1],
            weights,
        )
    )(arrays)
    (value, grads), (expected, expected_grads) = both("xla"), both("reference")
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, expected_grads[name], atol=1e-5, err_msg=name)


def test_bfloat16_is_close_to_float32():
    arrays = case(7, T=64)
    half = lambda n, x: x if n.startswith("positions") else x.astype(jnp.bfloat16)
    halved = {n: half(n, x) for n, x in arrays.items()}
    out = rotary_attention(**halved, inv_freq=INV_FREQ)
    assert out.dtype == jnp.bfloat16
    expected = rotary_attention(**arrays, inv_freq=INV_FREQ)
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.05)


def test_blocks_that_see_nothing_are_left_out():
    """Causal attention over n x n blocks visits the lower triangle; four documents their own."""
    T = 64
    build = lambda ids: masks.build(
        (1, T, T),
        q_index=None,
        kv_index=None,
        q_segment_ids=ids,
        kv_segment_ids=ids,
        kv_length=None,
        causal=True,
    )
    live, full = masks.block_plan(build(None).arrays(T, T), 8, 8)
    np.testing.assert_array_equal(live[0], np.tril(np.ones((8, 8), bool)))
    np.testing.assert_array_equal(full[0], np.tril(np.ones((8, 8), bool), -1))
    documents = jnp.repeat(jnp.arange(1, 5, dtype=jnp.int32), 16)[None]
    live, full = masks.block_plan(build(documents), 8, 8)
    own = np.kron(np.eye(4, dtype=bool), np.ones((2, 2), bool))
    np.testing.assert_array_equal(live[0], own & np.tril(np.ones((8, 8), bool)))
    np.testing.assert_array_equal(full[0], own & np.tril(np.ones((8, 8), bool), -1))


def test_memory_grows_with_length_not_its_square(monkeypatch):
    monkeypatch.undo()  # the block sizes that users get

    def temporary_bytes(T):
        x = jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32)
        z = jax.ShapeDtypeStruct((1, T, 2), jnp.float32)
        freq = np.ones(8, np.float32)
        loss = lambda q, k, v, z: rotary_attention(q, k, v, z, z, inv_freq=freq).sum()
        compiled = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(x, x, x, z).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporary_bytes(4096), temporary_bytes(16_384)
    assert large < 4.5 * small
    assert large < 16_384**2  # one byte a pair


def test_a_scan_over_layers_does_not_keep_masks(monkeypatch):
    """JAX takes what no layer changes out of a scan, which would store masks for all blocks."""
    monkeypatch.undo()
    T, freq = 8192, np.ones(8, np.float32)

    def loss(x):
        attend = lambda x: rotary_attention(x, x, x, None, None, inv_freq=freq)
        return jax.lax.scan(lambda x, _: (attend(x), None), x, length=2)[0].sum()

    x = jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32)
    compiled = jax.jit(jax.grad(loss)).lower(x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < T**2  # one byte a pair


@pytest.mark.parametrize("documents", [False, True])
def test_on_accelerators_rows_and_heads_are_not_taken_one_after_the_other(documents, monkeypatch):
    """There each operation has a price of its own."""
    monkeypatch.undo()
    index = jnp.broadcast_to(jnp.arange(19, dtype=jnp.int32), (3, 19))
    ids = dict(q_segment=index // 7, kv_segment=index // 7)
    mask = dict(limit=index, index=index) | ids if documents else masks.Default(True)

    def longest_loop():
        loss = lambda x: xla.attend(x, x, x, mask, scale=1.0)[0].sum()
        jaxpr = str(jax.make_jaxpr(jax.grad(loss))(jnp.zeros((3, 19, 4, H))))
        return max(int(n) for n in re.findall(r"\blength=(\d+)", jaxpr))

    assert longest_loop() == 3
    monkeypatch.setattr(dispatch, "target", lambda: ("gpu", "NVIDIA H200"))
    assert longest_loop() == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(implementation="nope"),
            "implementation 'nope' is unknown; known: reference, xla, pallas_tpu, pallas_gpu, cu",
        ),
        (
            dict(k_BSKH=jnp.zeros((2, 19, 3, H)), v_BSKH=jnp.zeros((2, 19, 3, H))),
            "3 key/value heads do not",
        ),
        (dict(positions_q=jnp.zeros((2, 19, 3))), "3 columns, which do not divide the 4 heads"),
        (dict(positions_q=None), "must both be given or both be None"),
        (dict(q_index=jnp.zeros((2, 19))), "q_index has dtype float32"),
        (dict(kv_length=jnp.zeros((3,), jnp.int32)), r"kv_length has shape \(3,\)"),
        (dict(q_segment_ids=jnp.zeros((2, 19), jnp.int32)), "kv_segment_ids must both be given"),
        (dict(v_BSKH=(jnp.zeros((2, 19, 2, H)),)), r"k has parts \(2, 19, 2, 8\), but v \[\(2, 19"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        rotary_attention(**(case(0) | dict(inv_freq=INV_FREQ) | change))
