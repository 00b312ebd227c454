"""What is counted in a compiled program is what it does: loops, branches, products, transfers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from repo_jax import flops
from repo_jax.config import (
    DataConfig,
    DecoderConfig,
    OptimizerConfig,
    PositionConfig,
    TrainConfig,
    TrainingConfig,
)
from repo_jax.modeling import RePoLM, abstract_params
from repo_jax.planning import cost, hlo, plan
from repo_jax.training.step import create_state, make_train_step

pytestmark = pytest.mark.usefixtures("optimized")


def compiled_text(f, *args) -> str:
    return jax.jit(f).lower(*args).compile().as_text()


def total_flops(text: str, weights=lambda instruction, branches: None) -> float:
    module = hlo.parse(text)
    runs = hlo.executed(module, weights)
    return sum(run.times * cost.flops(module, run.instruction, run.computation) for run in runs)


def struct(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize(
    ("product", "left", "right"),
    [
        ("ij,jk->ik", (24, 40), (40, 56)),
        ("bij,bjk->bik", (3, 24, 40), (3, 40, 56)),
        ("bijk,jkl->bil", (3, 5, 4, 8), (4, 8, 7)),
    ],
)
def test_a_product_is_two_flop_for_each_factor_pair(product, left, right):
    text = compiled_text(functools.partial(jnp.einsum, product), struct(*left), struct(*right))
    sizes = {
        letter: n
        for x, s in zip(product.split("->")[0].split(","), (left, right), strict=True)
        for letter, n in zip(x, s, strict=True)
    }
    assert total_flops(text) == 2 * math.prod(sizes.values())


@pytest.mark.parametrize(
    "options",
    [
        dict(padding=[(0, 0)]),
        dict(padding=[(3, 3)]),
        dict(padding=[(15, 15)], window_strides=(2,)),
        dict(padding=[(2, 5)], lhs_dilation=(3,), rhs_dilation=(2,)),
        dict(padding=[(1, 1)], feature_group_count=2),
    ],
)
def test_a_convolution_counts_what_xla_counts(options):
    options = dict(window_strides=(1,)) | options
    groups = options.get("feature_group_count", 1)
    f = functools.partial(jax.lax.conv_general_dilated, **options)
    lowered = jax.jit(f).lower(struct(4, 6, 16), struct(10, 6 // groups, 5))
    assert total_flops(lowered.compile().as_text()) == lowered.cost_analysis()["flops"]


def test_a_loop_counts_each_turn_and_loops_in_it():
    def f(x, y):
        inner = lambda x, _: (x @ y, None)
        outer = lambda x, _: (jax.lax.scan(inner, x, None, length=3)[0] + 1.0, None)
        return jax.lax.scan(outer, x, None, length=5)[0] @ y

    text = compiled_text(f, struct(32, 32), struct(32, 32))
    assert total_flops(text) == (5 * 3 + 1) * 2 * 32**3


LOOP = """
HloModule m

%cond (p: (s32[], f32[8,8])) -> pred[] {{
  %p = (s32[]{{:T(128)}}, f32[8,8]{{1,0:T(8,128)}}) parameter(0)
  %n = s32[] constant(9)
  %i = s32[]{{:T(128)}} get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %n), direction={direction}
}}

%body (p: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {{
  %p = (s32[], f32[8,8]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %step = s32[] constant(2)
  %next = s32[] add(%i, %step)
  %x = f32[8,8]{{1,0}} get-tuple-element(%p), index=1
  %y = f32[8,8]{{1,0}} dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  ROOT %t = (s32[], f32[8,8]{{1,0}}) tuple(%next, %y)
}}

ENTRY %main (x: f32[8,8]) -> (s32[], f32[8,8]) {{
  %x = f32[8,8]{{1,0}} parameter(0)
  %zero = s32[] constant(0)
  %start = s32[] copy(%zero)
  %t = (s32[], f32[8,8]{{1,0}}) tuple(%start, %x)
  ROOT %loop = (s32[], f32[8,8]{{1,0}}) while(%t), condition=%cond, body=%body
}}
"""


def test_the_length_of_a_loop_is_read_off_its_counter():
    assert total_flops(LOOP.format(direction="LT")) == 5 * 2 * 8**3  # 0, 2, 4, 6, 8


def test_a_loop_of_unknown_length_is_refused():
    with pytest.raises(ValueError, match="loop has no known length"):
        hlo.executed(hlo.parse(LOOP.format(direction="NE")))


def model_config(preset: str, **changes) -> DecoderConfig:
    sizes = dict(vocab_size=160, d_model=64, n_layers=6, n_heads=4, d_ff=96)
    options = dict(positions=PositionConfig(preset=preset), attention="reference")
    return DecoderConfig(**(sizes | options | changes))


def forward_text(config: DecoderConfig) -> str:
    model = RePoLM(config)
    tokens = jax.ShapeDtypeStruct((2, 32), jnp.int32)
    f = lambda params, tokens: model.apply({"params": params}, tokens).logits
    return compiled_text(f, abstract_params(model), tokens)


def of_run(config: DecoderConfig) -> TrainConfig:
    return TrainConfig(model=config, data=DataConfig(tokens="x"))


@pytest.mark.parametrize("preset", ["rope", "r2n1", "repo"])
def test_the_forward_pass_is_the_analytic_count(preset):
    config = model_config(preset)
    found = total_flops(forward_text(config), plan.shares(of_run(config)))
    # `model_flops_per_token` is forward and backward, three times the forward pass.
    assert found == pytest.approx(2 * 32 * flops.model_flops_per_token(config, 32) / 3, rel=1e-12)


def step_text(config: DecoderConfig) -> str:
    model = RePoLM(config)
    params = abstract_params(model)
    training = TrainingConfig(accumulation=2, steps=4, loss_chunk=24)
    optimizer, step = make_train_step(model, OptimizerConfig(), training, params)
    state = jax.eval_shape(lambda p: create_state(p, optimizer, 0), params)
    return compiled_text(step, state, {"tokens": jax.ShapeDtypeStruct((4, 32), jnp.int32)})


@pytest.mark.parametrize("preset", ["rope", "repo"])
def test_a_scanned_step_counts_as_much_as_an_unrolled_one(monkeypatch, preset):
    config = model_config(preset, n_layers=4)
    scanned = total_flops(step_text(config), plan.shares(of_run(config)))
    scan = jax.lax.scan
    unrolled_scan = lambda *args, **options: scan(*args, **(options | {"unroll": True}))
    monkeypatch.setattr(jax.lax, "scan", unrolled_scan)
    text = step_text(config)
    assert "RePoLM._walk/while" not in text
    # One body for all layers has the gradient of positions in a RoPE layer too, where nothing
    # needs it: a product for q and one for k, of half a head for each token and head.
    learned = preset == "repo"
    in_vain = learned * config.kinds.count("rope") * 2 * (2 * 4 * 32 * config.d_model // 2)
    assert scanned == total_flops(text) + in_vain


def test_unrolled_xla_counts_the_same_and_what_is_no_product_besides():
    f = lambda x, y: jax.lax.scan(lambda x, _: (x @ y, None), x, None, length=4, unroll=True)[0]
    g = lambda x, y: jax.lax.scan(lambda x, _: (x @ y, None), x, None, length=4)[0]
    args = struct(64, 64), struct(64, 64)
    xla = jax.jit(f).lower(*args).compile().cost_analysis()["flops"]
    assert total_flops(compiled_text(g, *args)) == xla


def test_branches_count_as_often_as_they_are_taken():
    def f(which, x):
        return jax.lax.switch(which, (lambda x: x @ x, lambda x: x @ x @ x), x)

    text = compiled_text(f, jax.ShapeDtypeStruct((), jnp.int32), struct(16, 16))
    one = 2 * 16**3
    assert total_flops(text, lambda i, n: [0.75, 0.25]) == 0.75 * one + 0.25 * 2 * one
    assert total_flops(text) == 2 * one


def mesh_of_eight() -> Mesh:
    auto = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=auto)


def transfers(f, x, spec, out_spec) -> dict[str, tuple[float, int, float]]:
    """{kind: (times, group size, bytes sent in all)}."""
    mesh = mesh_of_eight()
    run = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=out_spec, check_vma=False)
    module = hlo.parse(compiled_text(run, x))
    found = {}
    for each in hlo.executed(module):
        for c in cost.collectives(module, each.instruction, 8):
            times, _, sent = found.get(c.kind, (0.0, 0, 0.0))
            found[c.kind] = (times + each.times, c.group_size, sent + each.times * c.sent)
    return found


def repeat(f, n):
    return lambda x: jax.lax.scan(lambda x, _: (f(x), None), x, None, length=n)[0]


P = PartitionSpec
WHOLE = 8 * 64 * 4  # bytes of the array [8, 64] below


@pytest.mark.parametrize(
    ("f", "spec", "out_spec", "kind", "expected"),
    [
        (lambda x: jax.lax.psum(x, "b"), P(), P(), "all-reduce", (1, 4, 2 * WHOLE * 3 / 4)),
        (
            repeat(lambda x: jax.lax.psum(x, ("a", "b")) * 0.5, 5),
            *(P(), P(), "all-reduce", (5, 8, 5 * 2 * WHOLE * 7 / 8)),
        ),
        (
            lambda x: jax.lax.all_gather(x, "b", tiled=True),
            *(P("b"), P(), "all-gather", (1, 4, WHOLE * 3 / 4)),
        ),
        (
            lambda x: jax.lax.psum_scatter(x, "a", tiled=True),
            *(P(), P("a"), "reduce-scatter", (1, 2, WHOLE / 2)),
        ),
        (
            lambda x: jax.lax.ppermute(x, "b", [(i, (i + 1) % 4) for i in range(4)]),
            *(P(), P(), "collective-permute", (1, 8, WHOLE)),
        ),
    ],
)
def test_transfers_are_found_with_their_bytes(f, spec, out_spec, kind, expected):
    found = transfers(f, jnp.zeros((8, 64)), spec, out_spec)
    assert found == {kind: expected}


# As TPU's compiler spreads an all-gather over fusions, and fuses a reduction with a slice.
FUSIONS = """
HloModule m

%start (p: bf16[1,128]) -> (bf16[1,128], bf16[16,128]) {
  %p = bf16[1,128]{1,0} parameter(0)
  %g.1 = bf16[16,128]{1,0} all-gather(%p), channel_id=7, replica_groups=MESH, dimensions={0}
  ROOT %c = (bf16[1,128]{1,0}, bf16[16,128]{1,0}) custom-call(%g.1), custom_call_target="START"
}

%middle (p: bf16[1,128]) -> bf16[16,128] {
  %p = bf16[1,128]{1,0} parameter(0)
  ROOT %g.2 = bf16[16,128]{1,0} all-gather(%p), channel_id=7, replica_groups=MESH, dimensions={0}
}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%scatter (p: f32[64,128], i: s32[]) -> f32[4,128] {
  %p = f32[64,128]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %r = f32[64,128]{1,0} all-reduce(%p), replica_groups=[2,8]<=[8,2]T(1,0), to_apply=%sum
  ROOT %d = f32[4,128]{1,0} dynamic-slice(%r, %i, %i), dynamic_slice_sizes={4,128}
}

ENTRY %main (x: bf16[1,128], y: f32[64,128], i: s32[]) -> f32[4,128] {
  %x = bf16[1,128]{1,0} parameter(0)
  %y = f32[64,128]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %f.1 = (bf16[1,128]{1,0}, bf16[16,128]{1,0}) fusion(%x), kind=kCustom, calls=%start
  %f.2 = bf16[16,128]{1,0} fusion(%x), kind=kOutput, calls=%middle
  ROOT %f.3 = f32[4,128]{1,0} fusion(%y, %i), kind=kCustom, calls=%scatter
}
"""


def test_a_transfer_spread_over_fusions_counts_once():
    text = FUSIONS.replace("MESH", "mesh['x'=16,'y'=1] {'x'}")
    module = hlo.parse(text.replace("START", "AsyncCollectiveStart"))
    found = [
        c for run in hlo.executed(module) for c in cost.collectives(module, run.instruction, 16)
    ]
    gather, scatter = found
    assert (gather.kind, gather.overlaps, gather.sent) == ("all-gather", True, 15 * 256)
    assert gather.groups == (tuple(range(16)),)
    assert (scatter.kind, scatter.overlaps) == ("reduce-scatter", False)
    assert scatter.groups == (tuple(range(0, 16, 2)), tuple(range(1, 16, 2)))
    assert scatter.sent == 64 * 128 * 4 * 7 / 8


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("{{0,2},{1,3}}", ((0, 2), (1, 3))),
        ("{}", ((0, 1, 2, 3),)),
        ("[2,2]<=[4]", ((0, 1), (2, 3))),
        ("[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("mesh['x'=2,'y'=2] {'y'}", ((0, 1), (2, 3))),
        ("mesh['x'=2,'y'=2] {'x'}", ((0, 2), (1, 3))),
        ("mesh['x'=2,'y'=2], device_ids=([2,2]T(1,0)) {'y'}", ((0, 2), (1, 3))),
        ("mesh['x'=2,'y'=2], device_ids=(3,2,1,0) {'y'}", ((3, 2), (1, 0))),
        ("mesh['x'=4] {'x':(2)2}", ((0, 1), (2, 3))),
        ("mesh['x'=4] {'x':(1)2}", ((0, 2), (1, 3))),
    ],
)
def test_groups_in_every_way_xla_writes_them(written, groups):
    line = f"%r = f32[8]{{0}} all-reduce(%x), replica_groups={written}, to_apply=%sum"
    module = hlo.parse(
        f"HloModule m\n\nENTRY %main (x: f32[8]) -> f32[8] {{\n"
        f"  %x = f32[8]{{0}} parameter(0)\n  ROOT {line}\n}}\n"
    )
    instruction = module.computations["main"]["r"]
    (found,) = cost.collectives(module, instruction, 4)
    assert found.groups == groups


def test_memory_that_is_only_sliced_is_not_read_whole():
    def f(stack):
        return jax.lax.scan(lambda x, layer: (jnp.sin(x + layer), None), jnp.zeros(4096), stack)[0]

    module = hlo.parse(compiled_text(f, struct(50, 4096)))
    moved = sum(run.times * cost.main_memory_bytes(module, run) for run in hlo.executed(module))
    # Each turn reads a layer and x, and writes x; a little for counters.
    turn = 3 * 4096 * 4
    assert 50 * turn <= moved <= 50 * (turn + 64) + 2 * 4096 * 4


def test_arrays_in_vector_memory_move_nothing():
    line = "%y = f32[64,128]{1,0:T(8,128)S(1)} add(%x, %x)"
    module = hlo.parse(
        f"HloModule m\n\nENTRY %main (x: f32[64,128]) -> f32[64,128] {{\n"
        f"  %x = f32[64,128]{{1,0:T(8,128)}} parameter(0)\n  ROOT {line}\n}}\n"
    )
    moved = sum(cost.main_memory_bytes(module, run) for run in hlo.executed(module))
    assert moved == 2 * 64 * 128 * 4  # x, twice; y stays


def test_shapes_have_their_bytes():
    sizes = {"pred": 1, "s4": 0.5, "bf16": 2, "f8e4m3fn": 1, "f32": 4, "c64": 8, "token": 0}
    for dtype, size in sizes.items():
        assert hlo.Shape(dtype, (3, 8)).bytes == 24 * size
    assert np.prod(()) == hlo.Shape("f32", ()).size
