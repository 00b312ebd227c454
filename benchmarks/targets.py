"""Devices that this machine does not have, to compile for: one H200, one TPU chip.

    device = targets.h200()
    compiled = targets.compile(device, f, *structs)     # .memory_analysis(), .as_text()

`prepare()` has to run before JAX touches a backend. Nothing can run on such a device. Topologies
of many are made by `repo_jax.planning.targets`.
"""

import jax

from repo_jax.errors import MissingPackageError
from repo_jax.planning import targets
from repo_jax.planning.targets import has_cuda, has_libtpu, prepare

__all__ = ["TPUS", "compile", "h200", "has_cuda", "has_libtpu", "prepare", "tpu"]

TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


def h200():
    """One H200. SystemExit where jax's CUDA packages are not installed."""
    try:
        return targets.h200()[0]
    except MissingPackageError as error:
        raise SystemExit(f"{error} (several GB; no GPU is needed)") from None


def tpu(generation: str):
    """One chip of a TPU of `TPUS`. SystemExit where libtpu is not installed."""
    try:
        return targets.tpu(TPUS[generation])[0]
    except MissingPackageError as error:
        raise SystemExit(f"{error} (Linux x86-64; no TPU is needed)") from None


def compile(device, f, *structs):
    """`f` compiled for `device`; arguments are trees of `jax.ShapeDtypeStruct`."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), structs
    )
    return jax.jit(f).lower(*placed).compile()
