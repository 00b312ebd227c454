"""Running a kernel on every device's part of batch, heads and tokens."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

MeshAxes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Partition:
    """Over which mesh axes batch, heads and tokens are split.

    Attributes:
      batch: mesh axis, or axes, of the batch; None: every device has all of it.
      heads: of query heads and of key/value heads alike.
      length: of the tokens of queries and of keys alike. Attention gathers the keys.
    """

    batch: MeshAxes = None
    heads: MeshAxes = None
    length: MeshAxes = None

    def spec(self, axes: str, shape: Sequence[int] | None = None) -> PartitionSpec:
        """The partition of an array whose axes are told by letter.

        B is split like the batch, N and K like the heads; P, of position columns, too, if
        there is more than one; T and S like the length; anything else is not split.
        """
        of = {"B": self.batch, "N": self.heads, "K": self.heads, "P": self.heads}
        of |= {"T": self.length, "S": self.length}
        one = lambda i: axes[i] == "P" and shape is not None and shape[i] == 1
        return PartitionSpec(*(None if one(i) else of.get(a) for i, a in enumerate(axes)))

    def apply(self, f: Callable, arrays: dict, axes: dict[str, str], out_axes: tuple[str, ...]):
        """f(**arrays) on each device's part, under the mesh of `jax.set_mesh`.

        Args:
          f: takes the parts by name and returns as many arrays as `out_axes` has. Inside it
            `jax.lax.psum` and the like may name mesh axes.
          arrays: by name; None stays None, and what is one object stays one.
          axes: by the same names, as `spec` takes them.
          out_axes: of each of f's outputs.

        Raises:
          ValueError: there is no mesh, or it does not divide an axis.
        """
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            raise ValueError(f"{self} is given, but no mesh is set; use jax.set_mesh")
        arrays = {name: x for name, x in arrays.items() if x is not None}
        specs = {name: self.spec(axes[name], jnp.shape(x)) for name, x in arrays.items()}
        for name, x in arrays.items():
            self._check(mesh, name, axes[name], jnp.shape(x), specs[name])
        same = {name: next(n for n, y in arrays.items() if y is x) for name, x in arrays.items()}
        once = {name: arrays[name] for name in same.values()}
        run = jax.shard_map(
            lambda parts: f(**{name: parts[first] for name, first in same.items()}),
            mesh=mesh,
            in_specs=({name: specs[name] for name in once},),
            out_specs=tuple(map(self.spec, out_axes)),
            check_vma=False,
        )
        return run(once)

    def _check(self, mesh, array: str, axes: str, shape, spec) -> None:
        for letter, size, names in zip(axes, shape, spec, strict=True):
            names = (names,) if isinstance(names, str) else names or ()
            for name in names:
                if name not in mesh.shape:
                    known = ", ".join(mesh.shape)
                    raise ValueError(f"{self} names mesh axis {name!r}; the mesh has {known}")
            parts = math.prod(mesh.shape[name] for name in names)
            if size % parts:
                raise ValueError(
                    f"mesh axes {', '.join(names)} of {parts} devices do not divide the "
                    f"{size} of axis {letter} of {array} {shape}"
                )
