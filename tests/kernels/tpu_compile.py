"""Compiles functions for TPUs that this machine does not have, in a process of its own.

libtpu's compiler needs its environment before JAX starts, and refuses what a TPU of that
generation would (tiles, VMEM), so this shows that kernels are accepted there. Nothing runs.

    failures = tpu_compile.failures("tests.kernels.test_rotation_tpu:compiled")

names a function without arguments that returns (name, function, arguments) triples, the
arguments as `jax.ShapeDtypeStruct`, for one chip; or, with a tree of `PartitionSpec` like
the arguments as the fourth, for a mesh of 2 x 2 chips with axes data and tensor.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import subprocess
import sys

import pytest

TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1"}

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, TPU's compiler, is not installed"
)


def failures(target: str, generations: tuple[str, ...] = tuple(TOPOLOGIES)) -> dict[str, str]:
    """{"generation name": error} for what did not compile; {} when everything did.

    Args:
      target: "module:function", importable from the root of the repository.
      generations: of `TOPOLOGIES`.
    """
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    command = [sys.executable, "-m", "tests.kernels.tpu_compile", target, *generations]
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    run = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    lines = run.stdout.splitlines()
    if run.returncode or not lines:
        raise RuntimeError(f"{' '.join(command)} failed:\n{run.stdout[-2000:]}{run.stderr[-4000:]}")
    return json.loads(lines[-1])


def _main(target: str, *generations: str) -> None:
    import jax
    import numpy as np
    from jax.experimental import topologies

    module, function = target.split(":")
    cases = getattr(importlib.import_module(module), function)()
    failed = {}
    for generation in generations:
        topology = topologies.get_topology_desc(TOPOLOGIES[generation], "tpu")
        auto = (jax.sharding.AxisType.Auto,) * 2
        four = np.array(topology.devices).reshape(2, 2)
        mesh = jax.sharding.Mesh(four, ("data", "tensor"), axis_types=auto)
        one = jax.sharding.SingleDeviceSharding(topology.devices[0])
        for name, f, args, *specs in cases:
            shardings = (
                jax.tree.map(lambda spec, m=mesh: jax.sharding.NamedSharding(m, spec), specs[0])
                if specs
                else jax.tree.map(lambda _, s=one: s, args)
            )
            args = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), args, shardings
            )
            try:
                with jax.set_mesh(mesh) if specs else contextlib.nullcontext():
                    jax.jit(f).lower(*args).compile()
            except Exception as error:  # whatever the compiler says is the answer
                failed[f"{generation} {name}"] = f"{type(error).__name__}: {error}"[:2000]
    print(json.dumps(failed))


if __name__ == "__main__":
    _main(*sys.argv[1:])
