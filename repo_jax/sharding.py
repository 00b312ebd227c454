"""The device mesh, and what is placed where on it: the one place that knows.

The model names the axes of its arrays (`batch`, `heads`, `mlp`, ...); `RULES` says which axes
of the mesh each is split over. To be traced inside `use(mesh)`.

    data, fsdp   rows of the batch
    context      tokens of a sequence, in `balanced_order`
    tensor       heads (of z, too), columns of the MLP, vocabulary
    fsdp and context together split the width of every matrix as it is stored
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Self

import flax.linen as nn
import jax
import numpy as np
from jax import lax
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from repo_jax.config import DecoderConfig, MeshConfig, TrainConfig
from repo_jax.errors import ConfigError

AXES = ("data", "fsdp", "tensor", "context")

# The last three are not split.
RULES = (
    ("batch", ("data", "fsdp")),
    ("length", "context"),
    ("embed", ("fsdp", "context")),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("norm", None),
    ("position", None),
    ("layers", None),
)


def rules_for(mesh: Mesh):
    """`RULES` for the axes that `mesh` has, in the form that Flax takes."""

    def present(axes):
        axes = (axes,) if isinstance(axes, str) else axes or ()
        return tuple(axis for axis in axes if axis in mesh.shape) or None

    return tuple((name, present(axes)) for name, axes in RULES)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes `AXES`, laid over the devices so that neighbours are close.

    Args:
      config: sizes; -1 is filled in.
      devices: to use, all of them; None: all that JAX sees, over all processes.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices, or `slices` does not
        divide `data` or is not how many slices there are.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [getattr(config, axis) for axis in AXES]
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    asked = " x ".join(f"{axis} {getattr(config, axis)}" for axis in AXES)
    if math.prod(sizes) != len(devices):
        if len(devices) == 1:
            raise ConfigError(f"the mesh is {asked}; there is only one device")
        raise ConfigError(
            f"the mesh is {asked}; it must use all {len(devices)} devices, so the sizes must "
            "multiply to that, or one be -1 and the others divide it"
        )
    if sizes[0] % config.slices:
        raise ConfigError(
            f"mesh.slices is {config.slices}; it must divide mesh.data ({sizes[0]}), "
            "which is what is split over slices"
        )
    if config.slices == 1:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        grid = _over_slices(sizes, config.slices, devices)
    return Mesh(grid, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def _over_slices(sizes, slices: int, devices) -> np.ndarray:
    found = len({getattr(device, "slice_index", 0) for device in devices})
    if found != slices:
        raise ConfigError(f"mesh.slices is {slices}; the devices are in {found}")
    return mesh_utils.create_hybrid_device_mesh(
        (sizes[0] // slices, *sizes[1:]),
        (slices, 1, 1, 1),
        devices,
        allow_split_physical_axes=True,
    )


@contextlib.contextmanager
def use(mesh: Mesh | None) -> Iterator[None]:
    """Inside, what is traced is placed on `mesh` by `RULES`; None changes nothing."""
    if mesh is None:
        yield
        return
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules_for(mesh)):
        yield


def check(config: TrainConfig, mesh: Mesh) -> None:
    """Raises ConfigError for whatever of model and batch the mesh does not divide."""
    data, shape = config.data, mesh.shape
    micro = data.batch_size // config.training.accumulation
    rows = shape["data"] * shape["fsdp"]
    _must_divide("mesh.data x mesh.fsdp", rows, "data.batch_size / training.accumulation", micro)
    if shape["context"] > 1:
        length = data.sequence_length
        _must_divide("2 x mesh.context", 2 * shape["context"], "data.sequence_length", length)
    check_model(config.model, mesh)


def check_model(model: DecoderConfig, mesh: Mesh) -> None:
    """Raises ConfigError for whatever of the parameters the mesh, of any axes, does not divide."""
    size = lambda axis: mesh.shape.get(axis, 1)
    width = size("fsdp") * size("context")
    _must_divide("mesh.fsdp x mesh.context", width, "model.d_model", model.d_model)
    for name in ("n_heads", "n_kv_heads", "d_ff", "vocab_size"):
        _must_divide("mesh.tensor", size("tensor"), f"model.{name}", getattr(model, name))


def _must_divide(axes: str, count: int, name: str, size: int) -> None:
    if size % count:
        raise ConfigError(f"{axes} is {count}; it must divide {name} ({size})")


def sharding(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """Of an array whose axes have these logical names."""
    return NamedSharding(mesh, nn.logical_to_mesh_axes(axes, rules_for(mesh)))


def param_shardings(boxed_params, mesh: Mesh):
    """Where each parameter goes: a tree of `NamedSharding` like the plain parameters.

    Args:
      boxed_params: with logical names, as `modeling.boxed_params` gives them.
      mesh: of any axes; those that `RULES` does not name split nothing.
    """
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed_params), mesh, rules_for(mesh))


def like_params(tree, params, shardings, mesh: Mesh):
    """Shardings for `tree`, say an optimizer's state: a parameter's for what is like it.

    A leaf is like a parameter if its path ends in that parameter's and their shapes agree.
    Everything else, such as counters and factored moments, is whole on every device.

    Args:
      tree: of arrays, abstract ones too.
      params, shardings: the parameters and where they go.
      mesh: of the shardings.
    """
    keys = lambda path: tuple(getattr(key, "key", None) for key in path)
    leaves = zip(jax.tree.leaves_with_path(params), jax.tree.leaves(shardings), strict=True)
    of = {keys(path): (leaf.shape, sharding) for (path, leaf), sharding in leaves}

    def place(path, leaf):
        path = keys(path)
        for start in range(len(path)):
            shape, sharding = of.get(path[start:], (None, None))
            if shape == leaf.shape:
                return sharding
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map_with_path(place, tree)


def batch_sharding(mesh: Mesh, ndim: int = 2) -> NamedSharding:
    """Of an array [B, ...] of a batch: rows are split, tokens are not.

    Tokens are integers, so that every device may hold all of its rows; the model splits what
    it makes of them.
    """
    return sharding(mesh, "batch", *(None,) * (ndim - 1))


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which rows of a batch the devices of this process need: int [rows], ascending."""
    parts = batch_sharding(mesh, 1).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in parts]))


def even_rows(rows: int) -> int:
    """A multiple of the parts that the mesh in context splits a batch into: at most `rows`, but
    one row for each part at least. Without a mesh `rows`, or 1.
    """
    n = parts(split_axes("batch"))
    return max(1, rows // n) * n


def place_batch(mesh: Mesh, batch: dict[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
    """Makes the arrays of a global batch from this process's rows of it.

    Args:
      mesh: to put them on.
      batch: arrays [len(local_rows), ...], of the rows that `local_rows` names.
      batch_size: B of the global batch.

    Returns:
      Arrays [B, ...] over all processes.
    """
    at = np.full(batch_size, -1)
    rows = local_rows(mesh, batch_size)
    at[rows] = np.arange(len(rows))

    def place(x):
        return jax.make_array_from_callback(
            (batch_size, *x.shape[1:]), batch_sharding(mesh, x.ndim), lambda i: x[at[i[0]]]
        )

    return {name: place(x) for name, x in batch.items()}


def split_axes(name: str) -> tuple[str, ...]:
    """Axes of the mesh in context, with more than one device, that this logical axis is split
    over by the rules in context; () where there is no mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return ()
    (axes,) = nn.logical_to_mesh_axes((name,))
    axes = (axes,) if isinstance(axes, str) else axes or ()
    return tuple(axis for axis in axes if mesh.shape.get(axis, 1) > 1)


def parts(axes: Sequence[str]) -> int:
    """How many parts these axes of the mesh in context make."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in axes)


class TokenSplit(NamedTuple):
    """The axes of the mesh in context that split what a function of all tokens reads.

    For functions that sum over tokens, such as the gradient of an embedding: they run on each
    device's part and reduce once, where XLA's partitioner would gather tokens, or reduce in
    each turn of a loop.

    Attributes:
      batch, length: of the tokens.
      vocab, embed: of the table or head, [V, D] or [D, V].
    """

    batch: tuple[str, ...]
    length: tuple[str, ...]
    vocab: tuple[str, ...]
    embed: tuple[str, ...]

    @classmethod
    def of(cls, batch_size: int, length: int) -> Self:
        """For tokens [B, T]; nothing is split where the mesh does not divide them."""
        split = cls(*map(split_axes, ("batch", "length", "vocab", "embed")))
        if batch_size % parts(split.batch) or length % parts(split.length):
            return cls((), (), (), ())
        # Devices that share a part of the width must differ in tokens; else XLA gathers it.
        return split if {*split.embed} <= {*split.tokens} else split._replace(embed=())

    @property
    def tokens(self) -> tuple[str, ...]:
        """All axes that split tokens."""
        return (*self.batch, *self.length)

    def apply(self, f: Callable, inputs: Sequence[str], outputs: Sequence[str]) -> Callable:
        """f on each device's part. Axes are told by letter: B, T, V; d, the width of the table;
        others are whole.
        """
        of = dict(B=self.batch, T=self.length, V=self.vocab, d=self.embed)
        spec = lambda letters: [of.get(letter, ()) for letter in letters]
        return self.run(f, [*map(spec, inputs)], [*map(spec, outputs)])

    def run(self, f: Callable, inputs: Sequence, outputs: Sequence) -> Callable:
        """f on each device's part; for each array, the axes of the mesh that split each axis."""
        if not any(self):
            return f
        spec = lambda axes: PartitionSpec(*(names or None for names in axes))
        specs = tuple(map(spec, inputs)), tuple(map(spec, outputs))
        return jax.shard_map(f, in_specs=specs[0], out_specs=specs[1], check_vma=False)

    def whole(self, x, axis: int):
        """Inside `apply`: x with all parts of the width along `axis`."""
        return lax.all_gather(x, self.embed, axis=axis, tiled=True) if self.embed else x

    def sum_tokens(self, x, axis: int):
        """Inside `apply`: x summed over all tokens, a part of the width along `axis` on each."""
        # Scattered first, the rest of the sum is of a part only, and XLA moves it out of a loop
        # over microbatches.
        rest = tuple(name for name in self.tokens if name not in self.embed)
        if self.embed:
            x = lax.psum_scatter(x, self.embed, scatter_dimension=axis, tiled=True)
        return self.sum(x, rest)

    @staticmethod
    def sum(x, axes: tuple[str, ...]):
        """Inside `apply`: the sum over axes of the mesh, perhaps none."""
        return lax.psum(x, axes) if axes else x


def balanced_order(length: int, parts: int) -> np.ndarray:
    """The order in which `parts` devices hold a sequence so that each has as much to attend to.

    Under a causal mask late tokens see more than early ones. Of 2 * `parts` chunks, device i
    holds chunks i and 2 * `parts` - 1 - i, one early, one late.

    Returns:
      int32 [length]: which token each place holds.
    """
    chunks = np.arange(length, dtype=np.int32).reshape(2 * parts, length // (2 * parts))
    return np.stack([chunks[:parts], chunks[: parts - 1 : -1]], 1).reshape(length)


def token_order(length: int) -> np.ndarray | None:
    """`balanced_order` for the mesh in context; None where sequences are not split."""
    axes = split_axes("length")
    return balanced_order(length, parts(axes)) if axes else None
