"""Which implementation runs: the named one, or the first of an order that can."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jax

Implementation = TypeVar("Implementation")
Result = TypeVar("Result")

_said: set[tuple[str, str]] = set()


# Generations that the real compiler was seen to accept our kernels for, as JAX calls them:
# v5e, v5p, v6e (tests/kernels/tpu_compile.py).
_TPU_KINDS = {"TPU v5 lite", "TPU v5e", "TPU v5", "TPU v5p", "TPU v6 lite", "TPU v6e"}


def target() -> tuple[str, str]:
    """What is traced for: platform (`cpu`, `gpu`, `tpu`) and kind of device.

    Those of the mesh in context, which may be of devices that are not there; else the default
    device's.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    if device is None:
        device = jax.config.jax_default_device
        if device is None:
            return jax.default_backend(), jax.devices()[0].device_kind
        device = jax.devices(device)[0] if isinstance(device, str) else device
    return {"cuda": "gpu"}.get(device.platform, device.platform), device.device_kind


def on_known_tpu() -> bool:
    """Whether what is traced for is a TPU that our kernels were compiled for."""
    platform, kind = target()
    return platform == "tpu" and kind in _TPU_KINDS


def refuse_partitioner() -> None:
    """Raises NotImplementedError where XLA's partitioner would have to split a kernel."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    split = [name for name, n, kind in axes if n > 1 and kind != jax.sharding.AxisType.Manual]
    if split:
        raise NotImplementedError(
            f"XLA's partitioner cannot split a kernel over {', '.join(split)} of the mesh; give "
            "`partition`"
        )


def check_name(name: str | None, implementations: Mapping[str, object]) -> None:
    """Raises ValueError unless `name` is one of `implementations` or None."""
    if name is not None and name not in implementations:
        known = ", ".join(implementations)
        raise ValueError(f"implementation {name!r} is unknown; known: {known}")


def first_able(
    name: str | None,
    order: Sequence[str],
    implementations: Mapping[str, Implementation],
    call: Callable[[Implementation], Result],
) -> Result:
    """`call` with the implementation `name`, or with the first of `order` that can.

    An implementation that cannot raises NotImplementedError while it is traced. A named one
    passes that on; in the automatic order the next one is tried, with a warning that says
    why, once for each reason.

    Args:
      name: a key of `implementations`, or None for the automatic order.
      order: names to try when none is named, best first.
      implementations: all there are.
      call: runs one of them.

    Raises:
      ValueError: unknown `name`.
      NotImplementedError: the named one cannot, or none of the order can.
    """
    check_name(name, implementations)
    if name is not None:
        return call(implementations[name])
    reasons = []
    for candidate, following in zip(order, (*order[1:], None), strict=True):
        try:
            return call(implementations[candidate])
        except NotImplementedError as error:
            reasons.append(f"{candidate}: {error}")
            if following and (candidate, str(error)) not in _said:
                _said.add((candidate, str(error)))
                warnings.warn(f"{candidate} cannot, {following} instead: {error}", stacklevel=3)
    raise NotImplementedError("no implementation can: " + "; ".join(reasons))
