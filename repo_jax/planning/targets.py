"""Devices that this machine does not have, to compile for.

`prepare()` has to run before JAX touches a backend. Nothing can run on such devices.
"""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Sequence

import jax

from repo_jax import hardware
from repo_jax.errors import ConfigError, MissingPackageError

# What can be compiled for: TPUs that the kernels know, and the GPU whose description is below.
TPUS = ("v5e", "v5p", "v6e")
GPUS = ("h200",)

# A GpuTargetConfigProto: what XLA wants to know of an H200 SXM.
_H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 151397597184
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 28 }
runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H200"
"""


def prepare() -> None:
    """Makes JAX run on the CPU and its compilers do without their hardware."""
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # libtpu complains if it is not told what machine it is on, although it uses none.
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_HOST_BOUNDS", "1,1,1")
    os.environ.setdefault("TPU_CHIPS_PER_HOST_BOUNDS", "2,2,1")
    jax.config.update("jax_platforms", "cpu")


def has_cuda() -> bool:
    """Whether jax's CUDA packages are installed."""
    names = (f"jax_cuda{major}_plugin" for major in (12, 13))
    return any(importlib.util.find_spec(name) for name in names)


def has_libtpu() -> bool:
    """Whether TPU's compiler is installed."""
    return importlib.util.find_spec("libtpu") is not None


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind, connected.

    Attributes:
      name: `v5e:4x4`, `h200:8`.
      chip: what each can do.
      devices: of JAX.
    """

    name: str
    chip: hardware.Chip
    devices: Sequence[jax.Device]


def topology(name: str) -> Topology:
    """`v5e:4x4`, `v5p:2x2x4` (chips along each axis of the torus) or `h200:8` (GPUs).

    Raises:
      ConfigError: not such a name, or not a shape that exists.
      MissingPackageError: the compiler for it is not installed.
    """
    kind, _, shape = name.partition(":")
    known = ", ".join((*TPUS, *GPUS))
    if kind not in (*TPUS, *GPUS) or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise ConfigError(
            f"--topology is {name!r}; it must be one of {known}, a colon and a shape: v5e:4x4, "
            "v5p:2x2x4, h200:8"
        )
    chip = hardware.chip(kind)
    sizes = [int(size) for size in shape.split("x")]
    if len(sizes) != max(1, chip.axes) or 0 in sizes:
        axes = f"{chip.axes} numbers, as in {kind}:{'x'.join('4' * chip.axes)}"
        wanted = axes if chip.axes else "the number of GPUs, as in h200:8"
        raise ConfigError(f"--topology is {name!r}; after {kind}: stands {wanted}")
    devices = tpu(name) if chip.axes else h200(sizes[0])
    return Topology(name, chip, devices)


def tpu(name: str) -> Sequence[jax.Device]:
    """The devices of a TPU topology, `v5e:4x4`.

    Raises:
      ConfigError: there is no such topology.
      MissingPackageError: libtpu is not installed.
    """
    if not has_libtpu():
        raise MissingPackageError("libtpu", "compiling for a TPU", "tpu")
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(name, "tpu").devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0][:200]
        raise ConfigError(f"--topology is {name!r}; TPU's compiler refuses it: {reason}") from None


def h200(n: int = 1) -> Sequence[jax.Device]:
    """So many H200, eight to a machine.

    Raises:
      ConfigError: more than eight, and not a multiple.
      MissingPackageError: jax's CUDA packages are not installed.
    """
    if n > 8 and n % 8:
        raise ConfigError(f"--topology has {n} GPUs; beyond 8 it must be a multiple of 8")
    if not has_cuda():
        raise MissingPackageError("jax-cuda13-plugin", "compiling for an H200", "gpu")
    from jax.experimental import topologies

    machines = max(1, n // 8)
    options = {"topology_name": "", "topology": f"1x{machines}x{n // machines}"}
    described = topologies.get_topology_desc(platform="cuda", **options, target_config=_H200)
    return described.devices
