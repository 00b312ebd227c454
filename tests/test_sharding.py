"""On any mesh of eight devices a step is the step of one device; what does not fit is named."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

import repo_jax
from repo_jax import sharding
from repo_jax.config import (
    DataConfig,
    DecoderConfig,
    MeshConfig,
    OptimizerConfig,
    PositionConfig,
    SourceConfig,
    TrainConfig,
    TrainingConfig,
)
from repo_jax.errors import ConfigError
from repo_jax.modeling import RePoLM, abstract_params, boxed_params, init_params
from repo_jax.planning import cost, hlo
from repo_jax.training.program import make_program
from repo_jax.training.step import batch_hash, batch_loss, count_targets
from tests.golden_sets import ROOT, SETS, reference

B, T, V = 8, 64, 128
LAYOUTS = {
    "data 8": dict(data=8, fsdp=1),
    "fsdp 8": dict(fsdp=8),
    "tensor 8": dict(fsdp=1, tensor=8),
    "context 8": dict(fsdp=1, context=8),
    "data 2, fsdp 2, tensor 2": dict(data=2, fsdp=2, tensor=2),
    "fsdp 2, tensor 2, context 2": dict(fsdp=2, tensor=2, context=2),
}
GQA = {name: mesh for name, mesh in LAYOUTS.items() if name != "tensor 8"}  # 4 key/value heads
PER_HEAD = PositionConfig(preset="repo", start_layer=1)
SHARED = PositionConfig(layers=("repo", "nope", "rope"), heads="shared")


def config(mesh=None, *, documents=False, data=None, training=None, optimizer=None, **model):
    model = dict(vocab_size=V, d_model=64, n_layers=3, n_heads=8, d_ff=128) | model
    model = dict(positions=PER_HEAD) | model
    data = dict(sequence_length=T, batch_size=B, document_mask=documents) | (data or {})
    return TrainConfig(
        model=DecoderConfig(**model),
        data=DataConfig(tokens=("unread",), **data),
        optimizer=OptimizerConfig(**(optimizer or {})),
        training=TrainingConfig(**dict(steps=10, loss_chunk=64) | (training or {})),
        mesh=MeshConfig(**(mesh or {})),
    )


def host_batch(documents: bool):
    rng = np.random.default_rng(0)
    batch = {"tokens": rng.integers(0, V, (B, T)).astype(np.int32)}
    if documents:
        batch["segment_ids"] = 1 + np.cumsum(rng.random((B, T)) < 0.1, 1, dtype=np.int32)
    batch["valid"] = np.arange(B) != 3
    return batch


def loss_and_gradients(c: TrainConfig, devices=None):
    mesh = sharding.make_mesh(c.mesh, devices)
    model = RePoLM(c.model)
    params = init_params(
        model, jax.random.key(0), sharding.param_shardings(boxed_params(model), mesh)
    )

    def loss(params, batch):
        n = count_targets(batch)
        return batch_loss(model, params, batch, n_targets=n, z_loss=0.1, chunk=64).loss

    with sharding.use(mesh):
        batch = sharding.place_batch(mesh, host_batch(c.data.document_mask), B)
        return jax.device_get(jax.jit(jax.value_and_grad(loss))(params, batch))


@functools.cache
def on_one_device(documents: bool, n_kv_heads: int, positions: PositionConfig):
    c = config(documents=documents, n_kv_heads=n_kv_heads, positions=positions)
    return loss_and_gradients(c, jax.devices()[:1])


@pytest.mark.parametrize(
    ("layout", "documents", "n_kv_heads", "positions"),
    [
        *((name, False, 8, PER_HEAD) for name in LAYOUTS),
        *((name, True, 4, SHARED) for name in GQA),
        ("tensor 8", True, 8, SHARED),
    ],
)
def test_loss_and_every_gradient_equal_those_of_one_device(
    layout, documents, n_kv_heads, positions, capfd
):
    options = dict(documents=documents, n_kv_heads=n_kv_heads, positions=positions)
    expected_loss, expected = on_one_device(**options)
    capfd.readouterr()
    loss, grads = loss_and_gradients(config(LAYOUTS[layout], **options))
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    for (path, ours), theirs in zip(
        jax.tree.leaves_with_path(grads), jax.tree.leaves(expected), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert np.abs(theirs).max() > 0, name
        error = np.abs(ours - theirs).max() / np.abs(theirs).max()
        assert error < 2e-5, f"{name}: {error}"


def test_the_compiler_says_when_it_replicates_what_was_split(capfd):
    """So that the test above looks for the right words."""
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    place = lambda *axes: jax.NamedSharding(mesh, PartitionSpec(*axes))
    table = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=place("tensor", "fsdp"))
    tokens = jax.ShapeDtypeStruct((8, 16), jnp.int32, sharding=place(("data", "fsdp")))
    x = jax.ShapeDtypeStruct((8, 16, 64), jnp.float32, sharding=place(("data", "fsdp")))
    plain = lambda table, tokens, x: table.at[tokens].add(x)
    jax.jit(plain, out_shardings=table.sharding).lower(table, tokens, x).compile()
    assert "Involuntary full rematerialization" in capfd.readouterr().err


def compiled_step(c: TrainConfig):
    program = make_program(c, sharding.make_mesh(c.mesh))
    with sharding.use(program.mesh):
        return program.step.lower(program.state, program.batch)


# Where a transfer comes from, by the path of JAX's functions.
_PARTS = {
    "attention": "attention/",
    "mlp": "mlp/",
    "f_phi": "ContextRePositioning",
    "norms": "norm/reduce_sum",
    "embedding": "_walk/shard_map",
    "loss": "jvp()/shard_map",
}
_MATRICES = {"attention", "mlp", "f_phi", "embedding", "loss"}
# Parameters are gathered, their gradients end where the parameters are; those that are whole
# (norms, f_phi's last map) are summed, and so are norms and counts ("").
_FSDP = {
    "all-gather": _MATRICES,
    "reduce-scatter": _MATRICES,
    "all-reduce": {"attention", "f_phi", "norms", ""},
}
COLLECTIVES = {
    "data 8": {"all-reduce": _MATRICES | {"norms", ""}},
    "fsdp 8": _FSDP,
    "tensor 8": {"all-reduce": _MATRICES | {""}},
    # The loss of a row is a sum over devices.
    "context 8": _FSDP | {"all-reduce": _FSDP["all-reduce"] | {"loss"}},
}


def transfers(c: TrainConfig):
    """Of the compiled step, those among one device left out; a sharded batch has 48 tokens."""
    module = hlo.parse(compiled_step(c).compile().as_text())
    for computation in module.computations.values():
        for instruction in computation.values():
            for found in cost.collectives(module, instruction, jax.device_count()):
                if found.group_size > 1:
                    yield found


@pytest.mark.parametrize("layout", COLLECTIVES)
def test_collectives(layout):
    """Each layout sends what it must and nothing else."""
    # A length that no width of the model has tells activations from parameters.
    c = config(LAYOUTS[layout], data=dict(sequence_length=48), d_ff=192, vocab_size=256)
    found, of_activations = collections.defaultdict(set), set()
    for one in transfers(c):
        parts = {part for part, mark in _PARTS.items() if mark in one.op_name}
        found[one.kind] |= parts or {""}
        if any(48 in shape.dims for shape in one.shapes):
            of_activations |= {(one.kind, part) for part in parts}
    assert dict(found) == COLLECTIVES[layout]
    if layout == "tensor 8":
        # After a product over heads or columns, and before one in the backward pass; of f_phi
        # the gradient of r alone, which every device computes whole.
        assert of_activations == {("all-reduce", part) for part in _MATRICES}
    elif layout == "context 8":
        # Keys and values; what is reduced of their gradients is cut in parts of 6 tokens.
        assert of_activations == {("all-gather", "attention")}
    else:
        assert not of_activations


def test_constraints_reach_the_program():
    text = compiled_step(config(LAYOUTS["data 2, fsdp 2, tensor 2"])).as_text()
    assert text.count("@Sharding") + text.count("sharding_constraint") > 20


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("mesh", [dict(fsdp=2), dict(fsdp=1, tensor=4), dict(fsdp=2, tensor=4)])
def test_golden_training_trajectory(name, mesh):
    devices = jax.devices()[: int(np.prod(list(mesh.values())))]
    expected = reference(name)
    batches = expected["train_batches"]
    stored, _ = repo_jax.from_pretrained(ROOT / name)
    c = TrainConfig(
        model=stored.config,
        data=DataConfig(
            tokens=("unread",), batch_size=batches.shape[1], sequence_length=batches.shape[2]
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        training=TrainingConfig(steps=12, z_loss=1e-4, loss_chunk=100),
        mesh=MeshConfig(**mesh),
    )
    program = make_program(c, sharding.make_mesh(c.mesh, devices))
    _, params = repo_jax.from_pretrained(ROOT / name, mesh=program.mesh)
    state, seen = program.create_state(params, seed=0), []
    with sharding.use(program.mesh):
        for tokens in batches:
            batch = sharding.place_batch(program.mesh, {"tokens": tokens}, len(tokens))
            state, metrics = program.step(state, batch)
            seen.append(jax.device_get(metrics))
    column = lambda key: np.array([m[key] for m in seen])
    np.testing.assert_allclose(column("ce_loss"), expected["train_ce"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(column("z_loss"), expected["train_z_loss"], atol=1e-7, rtol=0)
    np.testing.assert_allclose(column("grad_norm"), expected["train_grad_norm"], rtol=2e-5)
    np.testing.assert_allclose(column("learning_rate"), expected["train_lr"], atol=1e-9, rtol=0)


def test_every_large_array_of_the_state_is_split():
    """Parameters and both moments over fsdp, context and tensor; only vectors are whole."""
    program = make_program(
        c := config(dict(fsdp=2, tensor=2, context=2)), sharding.make_mesh(c.mesh)
    )
    for path, leaf in jax.tree.leaves_with_path(program.state):
        name = jax.tree_util.keystr(path)
        share = np.prod(leaf.sharding.shard_shape(leaf.shape)) / max(1, np.prod(leaf.shape))
        wanted = 1 / 8
        if "norm" in name or leaf.ndim < 2:
            continue
        if "repositioning" in name:
            wanted = 1 / 2 if "final_map" in name else 1 / 4
        assert share == wanted, f"{name}: {leaf.sharding.spec}"
    moments = [leaf for leaf in jax.tree.leaves(program.state.opt_state) if leaf.ndim > 1]
    assert len(moments) == 2 * len(
        [leaf for leaf in jax.tree.leaves(program.state.params) if leaf.ndim > 1]
    )


def test_new_weights_do_not_depend_on_the_mesh():
    model = RePoLM(config().model)
    alone = init_params(model, jax.random.key(3))
    mesh = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))
    spread = init_params(
        model, jax.random.key(3), sharding.param_shardings(boxed_params(model), mesh)
    )
    jax.tree.map(np.testing.assert_array_equal, alone, jax.device_get(spread))
    assert not spread["head"]["kernel"].is_fully_replicated


def test_microbatches_and_sources_on_a_mesh():
    """Accumulated, and with the loss of each source, as on one device."""
    seen = []
    for mesh, devices in (({}, jax.devices()[:1]), (dict(data=2, tensor=2, fsdp=2), None)):
        c = config(mesh, training=dict(accumulation=2))
        sources = {name: SourceConfig(tokens=(name,)) for name in "abc"}
        c = dataclasses.replace(c, data=dataclasses.replace(c.data, tokens=(), sources=sources))
        program = make_program(c, sharding.make_mesh(c.mesh, devices))
        state = program.create_state(program.init_params(jax.random.key(0)), seed=0)
        batch = {"tokens": host_batch(False)["tokens"], "source": np.arange(B, dtype=np.int32) % 2}
        with sharding.use(program.mesh):
            _, metrics = program.step(state, sharding.place_batch(program.mesh, batch, B))
        seen.append(jax.device_get(metrics))
    for name in seen[0]:
        np.testing.assert_allclose(seen[1][name], seen[0][name], rtol=2e-6, err_msg=name)
    by_source = seen[0]["ce_loss_by_source"]
    np.testing.assert_allclose(by_source[:2].mean(), seen[0]["ce_loss"], rtol=1e-6)
    assert np.isnan(by_source[2])


@given(
    parts=st.integers(1, 8),
    chunk=st.integers(1, 5),
)
def test_balanced_order_gives_every_device_the_same_work(parts, chunk):
    order = sharding.balanced_order(2 * parts * chunk, parts)
    assert sorted(order) == list(range(2 * parts * chunk))
    seen_by = (order + 1).reshape(parts, -1).sum(1)  # keys that causal queries see
    assert len(set(seen_by)) == 1


def test_batch_hash_tells_batches_apart_and_not_meshes():
    tokens = host_batch(False)["tokens"]
    swapped = tokens.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    changed = tokens.copy()
    changed[2, 5] += 1
    values = {int(batch_hash(x)) for x in (tokens, swapped, changed, np.roll(tokens, 1, axis=1))}
    assert len(values) == 4
    mesh = sharding.make_mesh(MeshConfig(data=4, tensor=2))
    placed = sharding.place_batch(mesh, {"tokens": tokens}, B)["tokens"]
    assert int(jax.jit(batch_hash)(placed)) == int(batch_hash(tokens))


def test_place_batch_wants_the_rows_of_this_process_only():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert sharding.local_rows(mesh, 8).tolist() == list(range(8))
    placed = sharding.place_batch(mesh, {"x": np.arange(16).reshape(8, 2)}, 8)["x"]
    assert placed.sharding.spec == PartitionSpec(("data", "fsdp"), None)
    np.testing.assert_array_equal(placed, np.arange(16).reshape(8, 2))


def test_rows_are_rounded_to_what_devices_share_evenly():
    assert [sharding.even_rows(rows) for rows in (0, 1, 13)] == [1, 1, 13]
    with sharding.use(sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        assert [sharding.even_rows(rows) for rows in (0, 1, 13)] == [4, 4, 12]


@pytest.mark.parametrize(
    ("mesh", "shape"),
    [
        (dict(), (1, 8, 1, 1)),
        (dict(data=-1, fsdp=2), (4, 2, 1, 1)),
        (dict(tensor=2, context=-1, fsdp=1), (1, 1, 2, 4)),
    ],
)
def test_minus_one_takes_what_is_left(mesh, shape):
    assert tuple(sharding.make_mesh(MeshConfig(**mesh)).shape.values()) == shape


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (dict(fsdp=3), r"the mesh is data 1 x fsdp 3 x tensor 1 x context 1; it must use all 8"),
        (dict(fsdp=-1, tensor=3), r"it must use all 8 devices"),
        (dict(fsdp=-1, data=-1), r"mesh.data and mesh.fsdp are -1; only one"),
        (dict(tensor=0), r"mesh.tensor is 0; it must be positive, or -1"),
        (dict(data=4, slices=3), r"mesh.slices is 3; it must divide mesh.data \(4\)"),
        (dict(data=4, slices=2), r"mesh.slices is 2; the devices are in 1"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices(mesh, message):
    with pytest.raises(ConfigError, match=message):
        sharding.make_mesh(MeshConfig(**mesh))


def test_one_device_is_no_mesh_of_two():
    with pytest.raises(ConfigError, match=r"tensor 2 x context 1; there is only one device$"):
        sharding.make_mesh(MeshConfig(tensor=2), jax.devices()[:1])


@pytest.mark.parametrize(
    ("mesh", "options", "message"),
    [
        (dict(), dict(data=dict(batch_size=12)), r"mesh.data x mesh.fsdp is 8; it must divide"),
        (
            dict(fsdp=1, tensor=8),
            dict(n_heads=4),
            r"mesh.tensor is 8; it must divide model.n_heads",
        ),
        (dict(fsdp=1, tensor=8), dict(n_kv_heads=4), r"must divide model.n_kv_heads \(4\)"),
        (dict(fsdp=1, tensor=8), dict(vocab_size=100), r"must divide model.vocab_size \(100\)"),
        (dict(fsdp=1, tensor=8), dict(d_ff=100), r"must divide model.d_ff \(100\)"),
        (
            dict(fsdp=1, context=8),
            dict(data=dict(sequence_length=72)),
            r"2 x mesh.context is 16; it must divide data.sequence_length \(72\)",
        ),
        (
            dict(fsdp=8),
            dict(d_model=36, n_heads=2),
            r"mesh.fsdp x mesh.context is 8; it must divide model.d_model \(36\)",
        ),
    ],
)
def test_what_the_mesh_does_not_divide_is_named(mesh, options, message):
    c = config(mesh, **options)
    with pytest.raises(ConfigError, match=message):
        make_program(c, sharding.make_mesh(c.mesh))


def test_a_mesh_of_other_names_still_loads_and_runs():
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    model = RePoLM(config().model)
    places = sharding.param_shardings(boxed_params(model), mesh)
    assert all(place.is_fully_replicated for place in jax.tree.leaves(places))
    params = init_params(model, jax.random.key(0), places)
    with sharding.use(mesh):
        logits = jax.jit(model.apply)({"params": params}, jnp.ones((2, 8), jnp.int32)).logits
    assert logits.shape == (2, 8, V)
    assert abstract_params(model)["head"]["kernel"].shape == (64, V)
