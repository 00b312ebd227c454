"""What our Mosaic GPU kernels share, and all that differs between releases of jax.

Kernels are written for the `Lane` lowering, which jax 0.11 no longer takes by default, so it
is always named. jax 0.10.2 is the oldest release that is supported.
"""

import contextlib
import contextvars
import inspect
from collections.abc import Iterator

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

try:
    force_gpu_interpret_mode = plgpu.force_gpu_interpret_mode
except AttributeError:  # jax 0.10
    from jax._src.pallas.mosaic_gpu.interpret.params import force_gpu_interpret_mode

# jax 0.10 wants an index beside the reference, which later releases deprecate.
_index = inspect.signature(plgpu.load).parameters.get("idx")
_NO_INDEX = (None,) if _index and _index.default is inspect.Parameter.empty else ()

_interpreting = contextvars.ContextVar("interpreting", default=False)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Kernels that are traced in this context run on the CPU, in jax's interpreter."""
    token = _interpreting.set(True)
    try:
        with force_gpu_interpret_mode():
            yield
    finally:
        _interpreting.reset(token)


def interpreting() -> bool:
    """Whether `interpreted` is in force."""
    return _interpreting.get()


def kernel(body, *, out_type, grid, grid_names, name: str, params: dict | None = None, **options):
    """`plgpu.kernel` with our compiler parameters; `name` is what profiles and dumps call it.

    Args:
      body: takes input, output and scratch references.
      out_type: shapes and dtypes of the outputs.
      grid, grid_names: as of `plgpu.kernel`.
      params: of `plgpu.CompilerParams`.
      options: more for `plgpu.kernel`: scratch_types, num_threads, thread_name, ...
    """
    compiler_params = plgpu.CompilerParams(
        lowering_semantics=plgpu.LoweringSemantics.Lane, **(params or {})
    )
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=grid,
        grid_names=grid_names,
        compiler_params=compiler_params,
        kernel_name=name,
        **options,
    )


def load(ref, index, layout, *, optimized: bool = False):
    """ref[index] into registers of that layout; `optimized` for shared memory only."""
    if interpreting():  # jax 0.10.2's interpreter has no rule for plgpu.load
        return ref[index]
    return plgpu.load(ref.at[index], *_NO_INDEX, layout=layout, optimized=optimized)


def store(ref, index, value) -> None:
    """ref[index] = value, from registers to global memory."""
    if interpreting() or not hasattr(plgpu, "store"):  # before jax 0.12
        ref[index] = value
    else:
        plgpu.store(ref.at[index], value, optimized=False)


def check_device(*majors: int) -> None:
    """Raises NotImplementedError if there is a GPU of another compute capability.

    Without a GPU nothing is raised, so that kernels can be compiled for one elsewhere.

    Args:
      majors: the major numbers that will do.
    """
    if jax.default_backend() != "gpu":
        return
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", "unknown"))
    if capability.split(".")[0] not in map(str, majors):
        known = " or ".join(f"{major}.x" for major in majors)
        raise NotImplementedError(
            f"this kernel is for GPUs of compute capability {known}; "
            f"{device.device_kind} has {capability}"
        )
