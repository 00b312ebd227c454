"""Devices that this machine does not have, to compile for: an H200, TPUs.

    device = targets.h200()
    compiled = targets.compile(device, f, *structs)     # .memory_analysis(), .as_text()

`prepare()` has to run before JAX touches a backend. Nothing can run on such a device.
"""

import importlib.util
import os

import jax

TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}

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
    jax.config.update("jax_platforms", "cpu")


def has_cuda() -> bool:
    """Whether jax's CUDA packages are installed."""
    names = (f"jax_cuda{major}_plugin" for major in (12, 13))
    return any(importlib.util.find_spec(name) for name in names)


def has_libtpu() -> bool:
    """Whether TPU's compiler is installed."""
    return importlib.util.find_spec("libtpu") is not None


def h200():
    """One H200. SystemExit where jax's CUDA packages are not installed."""
    if not has_cuda():
        raise SystemExit(
            "compiling for an H200 needs jax's CUDA packages: pip install 'jax[cuda13]' "
            "(several GB; no GPU is needed)"
        )
    from jax.experimental import topologies

    options = {"topology_name": "", "topology": "1x1x1", "target_config": _H200}
    return topologies.get_topology_desc(platform="cuda", **options).devices[0]


def tpu(generation: str):
    """One chip of a TPU of `TPUS`. SystemExit where libtpu is not installed."""
    if not has_libtpu():
        raise SystemExit("compiling for a TPU needs libtpu: pip install libtpu (Linux x86-64)")
    from jax.experimental import topologies

    return topologies.get_topology_desc(TPUS[generation], "tpu").devices[0]


def compile(device, f, *structs):
    """`f` compiled for `device`; arguments are trees of `jax.ShapeDtypeStruct`."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), structs
    )
    return jax.jit(f).lower(*placed).compile()
