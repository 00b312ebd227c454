"""Peak temporary memory of rotary attention, forward and backward, against length.

    python -m benchmarks.memory

For each implementation, the program of output and gradients (q, k, v, positions, learned and
one per head) is compiled for its device and XLA is asked how much memory it needs beyond its
arguments and results: `xla` and the dense `reference` for this CPU, `pallas_tpu` for one v5p
chip (where libtpu is installed), `pallas_gpu`, `cudnn` and `xla` for one H200 (where jax's
CUDA packages are installed). Nothing is run, and neither a TPU nor a GPU is needed.

The exponent is the slope of log(bytes) over log(length) between the two longest lengths:
1 is linear, 2 is quadratic.

Limits: what XLA plans, not what a device was seen to use. Shared memory and registers of a
kernel are not in it; cuDNN's workspace is as far as XLA knows of it when it compiles.
"""

import argparse
import math

import jax
import jax.numpy as jnp

from benchmarks import device, harness, targets
from pallas_kernels import rotary_attention

MIB = 2**20


def options():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--lengths", type=int, nargs="+", default=[2**n for n in range(10, 18)])
    p.add_argument("--dense_to", type=int, default=8192, help="longest for the reference")
    p.add_argument("--n_heads", type=int, default=16)
    p.add_argument("--head_dim", type=int, default=128)
    p.add_argument("--only", nargs="+", help="implementations, by name")
    return device.add_options(p)


def program(implementation: str, head_dim: int):
    """Output and gradients, of (q, k, v, z) and the output's cotangent."""
    inv_freq = 500_000.0 ** (-jnp.arange(0, head_dim, 2) / head_dim)

    def forward(q, k, v, z):
        return rotary_attention(*(q, k, v, z, z), inv_freq=inv_freq, implementation=implementation)

    def both(d_out, *inputs):
        out, vjp = jax.vjp(forward, *inputs)
        return out, vjp(d_out)

    return both


def contenders(args) -> dict[tuple[str, str], tuple]:
    """{(implementation, device's name): (device, dtype)}, of what this machine can compile."""
    cpu = jax.devices("cpu")[0]
    found = {("reference", "CPU"): (cpu, jnp.float32), ("xla", "CPU"): (cpu, jnp.float32)}
    if targets.has_libtpu():
        found["pallas_tpu", "v5p"] = (targets.tpu("v5p"), jnp.bfloat16)
    if targets.has_cuda():
        h200 = targets.h200()
        for name in ("pallas_gpu", "cudnn", "xla"):
            found[name, "H200"] = (h200, jnp.bfloat16)
    return {key: x for key, x in found.items() if not args.only or key[0] in args.only}


def temporary_bytes(args, implementation: str, to, dtype, length: int) -> int:
    shape = (1, length, args.n_heads, args.head_dim)
    x, z = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(shape[:3], jnp.float32)
    compiled = targets.compile(to, program(implementation, args.head_dim), x, x, x, x, z)
    return compiled.memory_analysis().temp_size_in_bytes


def main():
    args = options().parse_args()
    path = device.result_path(args, "memory", "compiled")
    targets.prepare()
    bytes_by, errors = {}, {}
    lengths = sorted(args.lengths)
    for (implementation, name), (to, dtype) in contenders(args).items():
        key = f"{implementation}, {name}, {jnp.dtype(dtype).name}"
        bytes_by[key] = {}
        for length in lengths:
            if implementation == "reference" and length > args.dense_to:
                continue
            try:
                found = temporary_bytes(args, implementation, to, dtype, length)
            except Exception as e:  # a compiler's or a backend's refusal, to be read
                errors[key] = f"T {length}: {type(e).__name__}: {str(e).splitlines()[0][:200]}"
                break
            bytes_by[key][length] = found
            print(f"{key}, T {length}: {found / MIB:.1f} MiB", flush=True)

    exponents = {}
    for key, found in bytes_by.items():
        if len(found) > 1 and min(found.values()) > 0:
            (t0, b0), (t1, b1) = list(found.items())[-2:]
            exponents[key] = math.log(b1 / b0) / math.log(t1 / t0)
    cell = lambda found, length: f"{found[length] / MIB:,.0f}" if length in found else ""
    sizes = f"B 1, {args.n_heads} x {args.head_dim}, causal"
    lines = [
        f"{sizes}; MiB of temporary memory beside arguments and results, forward and backward.",
        "Compiled, not run.",
        "",
        *harness.table(
            ("implementation, device", *(f"{n / 1024:g}k" for n in lengths), "exponent"),
            (
                " | ".join((k, *(cell(x, n) for n in lengths), f"{exponents.get(k, math.nan):.2f}"))
                for k, x in bytes_by.items()
            ),
        ),
        *(f"- {key} ended at {error}" for key, error in errors.items()),
        *([""] if errors else []),
    ]
    data = {"temporary_bytes": bytes_by, "exponents": exponents, "errors": errors}
    device.report(path, "Memory", lines, data, args, {"cpu": harness._cpu_model()})


if __name__ == "__main__":
    main()
