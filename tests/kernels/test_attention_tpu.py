"""The TPU attention kernels: numbers in Pallas' interpreter on CPU, and the real compiler."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import rotary_attention
from pallas_kernels.attention import masks, tpu, tpu_plan
from tests.kernels import attention_cases, tpu_compile
from tests.kernels.attention_cases import Case

TINY = tpu.BlockSizes(*(128,) * 4, span=2)
# Blocks on the diagonal in two strips; queries and keys of a block differ, so no diagonal.
STRIPS = tpu.BlockSizes(*(512,) * 4, span=1)
UNEVEN = tpu.BlockSizes(query=128, key=256, query_backward=256, key_backward=128, span=2)
# dq of 256 rows at a time.
STRETCHES = tpu.BlockSizes(*(128,) * 4, span=2, gathered=256)

CASES = [
    (Case(300, 300, H=128, dtype="bfloat16", K=2, positions="kv"), TINY),
    (Case(7, 300, group=8, cache=True, dtype="bfloat16"), TINY),
    (Case(1, 300, H=256, documents=True, cache=True, B=2), TINY),
    (Case(130, 7, group=3), TINY),
    (Case(130, 400, H=80, cache=True, dtype="bfloat16"), TINY),
    (Case(300, 300, H=96, causal=False, yarn=True), UNEVEN),
    (Case(300, 300, group=2, positions="query", documents=True, permuted=True), UNEVEN),
    (Case(300, 513, documents=True, dtype="bfloat16", positions="none"), UNEVEN),
    (Case(1000, 1000, H=128, dtype="bfloat16"), STRIPS),
    (Case(300, 556), STRETCHES),
    (Case(300, 300, group=2, cache=True, documents=True, permuted=True), STRETCHES),
]


@pytest.mark.parametrize(("case", "blocks"), CASES, ids=[str(case) for case, _ in CASES])
def test_matches_float64(case, blocks):
    attend = functools.partial(tpu.attend, blocks=blocks)
    with pltpu.force_tpu_interpret_mode():
        attention_cases.check(attention_cases.through(attend), case)


def test_as_the_named_implementation():
    """Rotation and attention both by kernel, gradients to the positions included."""
    case = Case(300, 300, H=128, group=2, positions="kv", documents=True)
    with pltpu.force_tpu_interpret_mode():
        call = functools.partial(rotary_attention, implementation="pallas_tpu")
        attention_cases.check(call, case)


def test_plans_too_large_for_scalar_memory_go_by_rows(monkeypatch):
    monkeypatch.setattr(tpu, "_MOST_VISITS", 3)
    case = Case(256, 256, B=2, documents=True, dtype="bfloat16")
    with pltpu.force_tpu_interpret_mode():
        attend = functools.partial(tpu.attend, blocks=TINY)
        attention_cases.check(attention_cases.through(attend), case)
    monkeypatch.setattr(tpu, "_MOST_VISITS", 1)
    x = jnp.zeros((1, 300, 1, 64))
    with pytest.raises(NotImplementedError, match="does not fit the scalar memory"):
        tpu.attend(x, x, x, masks.Default(True), scale=1.0, blocks=TINY)


def poisoned(T, S, bad_keys, bad_queries=slice(0, 0), **options):
    """out, lse and gradients with NaN in some keys and values and some queries."""
    rng = np.random.default_rng(0)
    normal = lambda n: jnp.asarray(rng.normal(size=(1, n, 1, 128)), jnp.float32)
    q, k, v = normal(T), normal(S), normal(S)
    q = q.at[:, bad_queries].set(jnp.nan)
    k, v = (x.at[:, bad_keys].set(jnp.nan) for x in (k, v))
    names = ("q_index", "kv_index", "q_segment_ids", "kv_segment_ids", "kv_length")
    mask = masks.build((1, T, S), causal=True, **{n: options.get(n) for n in names})

    @jax.jit
    def run(q, k, v):
        attend = lambda *qkv: tpu.attend(*qkv, mask, scale=0.1, blocks=TINY)
        (out, lse), vjp = jax.vjp(attend, q, k, v)
        return out, lse, *vjp((jnp.ones_like(out), jnp.ones_like(lse)))

    with pltpu.force_tpu_interpret_mode():
        return run(q, k, v)


def test_keys_beyond_the_cache_are_not_touched():
    """0 * NaN is NaN, so only blocks that are left out altogether give finite results."""
    out, lse, dq, dk, dv = poisoned(128, 512, slice(256, 512), kv_length=jnp.array([200]))
    for x in (out, lse, dq):
        assert np.isfinite(x).all()
    for x in (dk, dv):
        assert np.isfinite(x).all()
        assert x[:, :200].any()
        assert not x[:, 200:].any()


def test_other_documents_are_not_touched():
    ids = jnp.repeat(jnp.arange(1, 4, dtype=jnp.int32), 128)[None]
    bad = slice(128, 256)
    results = poisoned(384, 384, bad, bad, q_segment_ids=ids, kv_segment_ids=ids)
    for x in results:
        x = x.swapaxes(1, 2) if x.ndim == 3 else x  # lse [B, N, T]
        assert np.isfinite(x[:, :128]).all()
        assert np.isfinite(x[:, 256:]).all()
        assert np.isnan(x[:, bad]).any()


@settings(max_examples=30)
@given(seed=st.integers(0, 999), span=st.sampled_from([1, 3, 16]), keep_empty=st.booleans())
def test_a_plan_visits_what_is_live_once_and_nothing_else(seed, span, keep_empty):
    rng = np.random.default_rng(seed)
    live = rng.random((2, 4, 7)) < rng.choice([0.0, 0.1, 0.6])
    full = rng.random(live.shape) < 0.5
    plan = jax.jit(tpu_plan.visits, static_argnames=("span", "keep_empty"))
    visits, count = jax.device_get(plan(live, full, span=span, keep_empty=keep_empty))
    for row in range(2):
        seen, masked = np.zeros_like(live[0]), np.zeros_like(live[0])
        begun, ended = [], []
        for t, (where, bits) in enumerate(visits[row].T):
            i, j = tpu_plan.outer(where), tpu_plan.inner(where)
            begun += [i] if where & tpu_plan.FIRST else []
            assert t >= count[row] or begun[-1] == i  # blocks follow one another
            ended += [i] if where & tpu_plan.LAST else []
            for sub in range(span):
                if tpu_plan.live(bits, sub):
                    assert not seen[i, j * span + sub]
                    seen[i, j * span + sub] = True
                    masked[i, j * span + sub] = not tpu_plan.full(bits, sub)
        np.testing.assert_array_equal(seen, live[row])
        np.testing.assert_array_equal(masked, live[row] & ~full[row])
        assert begun == ended
        expected = [i for i in range(4) if keep_empty or live[row, i].any()]
        assert begun == (expected or [0])
        assert not visits[row, 1, count[row] :].any()


@pytest.mark.parametrize("T", [128, 4096, 4097])
def test_causal_plans_are_static_and_padding_costs_no_mask(T):
    live, full = tpu_plan.plan(masks.Default(True), T, T, 128, 128)
    assert isinstance(live, np.ndarray)
    n = -(-T // 128)
    np.testing.assert_array_equal(live[0], np.tril(np.ones((n, n), bool)))
    np.testing.assert_array_equal(full[0], np.tril(np.ones((n, n), bool), -1))


def test_says_what_it_cannot_do():
    x = jnp.zeros((1, 8, 128, 64), jnp.float16)
    with pytest.raises(
        NotImplementedError, match=r"all bfloat16 or all float32, not \['float16'\]"
    ):
        tpu.attend(x, x, x, masks.Default(True), scale=1.0)
    x = x.astype(jnp.float32)
    with pytest.raises(NotImplementedError, match="up to 32 query heads to a key head, not 128"):
        tpu.attend(x, x[:, :, :1], x[:, :, :1], masks.Default(True), scale=1.0)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with (
        jax.set_mesh(mesh),
        pytest.raises(NotImplementedError, match="cannot split a kernel over data of the mesh"),
    ):
        tpu.attend(x, x, x, masks.Default(True), scale=1.0)


def program(T, S, N, K, H, dtype, blocks, *, documents=False, B=1):
    """(function, structs) of output and gradients."""
    struct = jax.ShapeDtypeStruct
    structs = [struct((B, T, N, H), dtype), *[struct((B, S, K, H), dtype)] * 2]
    marks = ("limit", "index", "q_segment", "kv_segment") if documents else ()
    structs += [
        struct((B, S if name in ("index", "kv_segment") else T), jnp.int32) for name in marks
    ]

    def f(q, k, v, *arrays):
        mask = dict(zip(marks, arrays, strict=True)) if documents else masks.Default(True)
        attend = functools.partial(tpu.attend, mask=mask, scale=H**-0.5, blocks=blocks)
        out, vjp = jax.vjp(attend, q, k, v)
        return out, vjp(out)

    return f, tuple(structs)


def compiled():
    """What every generation has to accept."""
    bf16, fp32 = jnp.bfloat16, jnp.float32
    for T, S, N, K, H, dtype, documents in (
        (4096, 4096, 2, 2, 128, bf16, False),
        (300, 1024, 4, 1, 80, bf16, True),
        (1024, 1024, 2, 1, 256, fp32, True),
    ):
        blocks = tpu.default_blocks("v5e", dtype, H, T)
        blocks = dataclasses.replace(blocks, limit_bytes=50 * 2**20)  # v5p has less
        name = f"T{T} S{S} {N}/{K}x{H} {jnp.dtype(dtype).name} {documents=}"
        yield name, *program(T, S, N, K, H, dtype, blocks, documents=documents)


def compiled_v6e():
    """With the larger blocks that it has for these."""
    blocks = tpu.default_blocks("v6e", jnp.bfloat16, 128, 4096)
    assert blocks.query == 1024
    for documents in (False, True):
        f, structs = program(4096, 4096, 2, 1, 128, jnp.bfloat16, blocks, documents=documents)
        yield f"{documents=}", f, structs


def compiled_long():
    """As many tokens as one chip of a v5p has to take, forward and backward."""
    T, H = 131_072, 128
    blocks = tpu.default_blocks("v5p", jnp.bfloat16, H, T)
    yield f"T{T}", *program(T, T, 16, 16, H, jnp.bfloat16, blocks, documents=True)


@tpu_compile.needs_libtpu
@pytest.mark.parametrize(
    ("function", "generations"),
    [("compiled", ("v5e", "v5p", "v6e")), ("compiled_v6e", ("v6e",)), ("compiled_long", ("v5p",))],
)
def test_the_real_compiler_accepts(function, generations):
    target = f"tests.kernels.test_attention_tpu:{function}"
    assert tpu_compile.failures(target, generations) == {}
