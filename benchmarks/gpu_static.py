"""Registers and spills of our GPU kernels on an H200, from ptxas, without a GPU.

    pip install 'jax[cuda13]'        # several GB; no GPU is needed
    python -m benchmarks.gpu_static

Every Mosaic GPU kernel is compiled for an H200 at the shapes below, as a training step calls
it, forward and backward. Registers are of a thread; `blocks` is how many blocks of that many
threads the 65,536 registers of a multiprocessor hold, shared memory aside. A spill is a
register kept in memory for want of another: there should be none, and the exit status is 1
if there is one.

Limits: this says that the compilers accept the kernels, and what they cost in registers; not
how long they run, nor that they are right. `compiled` means that XLA made a program of it.
"""

import argparse
import dataclasses
import functools
import os
import re
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks import device, harness, targets

REGISTERS = 65_536  # of a multiprocessor
# name: B, T, query heads, key heads, head dim, position columns, dtype, norm
ROTATION = {
    "OLMo 2 1B": (1, 4096, 16, 16, 128, 16, jnp.bfloat16, True),
    "OLMo 2 7B": (1, 4096, 32, 32, 128, 32, jnp.bfloat16, True),
    "OLMo 2 13B": (1, 4096, 40, 40, 128, 40, jnp.bfloat16, True),
    "OLMo 2 32B": (1, 4096, 40, 8, 128, 8, jnp.bfloat16, True),
    "no norm": (1, 4096, 16, 16, 128, 16, jnp.bfloat16, False),
    "no norm, GQA": (1, 4096, 32, 8, 128, 8, jnp.bfloat16, False),
    "float32": (1, 4096, 16, 16, 128, 16, jnp.float32, True),
    "head dim 64, odd length": (1, 301, 16, 16, 64, 1, jnp.bfloat16, True),
    "head dim 80": (1, 4096, 16, 16, 80, 16, jnp.bfloat16, True),
    "head dim 96": (1, 4096, 16, 16, 96, 16, jnp.bfloat16, True),
    "head dim 256": (1, 4096, 16, 4, 256, 4, jnp.bfloat16, True),
}
# name: B, T, query heads, key heads, head dim, causal, documents
ATTENTION = {
    "head dim 64": (1, 4096, 16, 16, 64, True, False),
    "head dim 80": (1, 4096, 16, 16, 80, True, False),
    "head dim 96": (1, 4096, 16, 16, 96, True, False),
    "head dim 128": (4, 4096, 16, 16, 128, True, False),
    "head dim 128, not causal": (4, 4096, 16, 16, 128, False, False),
    "head dim 128, GQA, documents": (4, 4096, 32, 8, 128, True, True),
    "head dim 128, odd length": (1, 4097, 16, 16, 128, True, False),
    "head dim 128, 128k": (1, 131_072, 16, 16, 128, True, False),
    "head dim 256": (1, 4096, 16, 4, 256, True, False),
}


@dataclasses.dataclass(frozen=True)
class Report:
    """What ptxas says of one kernel."""

    kernel: str
    threads: int
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int

    @property
    def blocks(self) -> int:
        """That the registers of a multiprocessor hold; they are given out by 8 a thread."""
        return REGISTERS // (-(-self.registers // 8) * 8 * self.threads)


def reports(dump: Path) -> list[Report]:
    """Of the kernels compiled since the last call; empties the folder."""
    found = []
    for file in sorted(dump.glob("*.ptxas"), key=lambda f: f.stat().st_mtime_ns):
        text, ptx = file.read_text(), file.with_suffix(".ptx").read_text()
        number = lambda pattern, text: int(re.search(pattern, text).group(1))
        threads = [int(n) for n in re.findall(r"\.(?:req|max)ntid (\d+)", ptx)]
        found.append(
            Report(
                re.sub(r"_\d+$", "", file.stem),
                threads[0] if threads else 128,
                number(r"Used (\d+) registers", text),
                number(r"(\d+) bytes stack frame", text),
                number(r"(\d+) bytes spill stores", text),
                number(r"(\d+) bytes spill loads", text),
            )
        )
    for file in dump.iterdir():
        file.unlink()
    return found


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def rotation(B, T, N, K, H, P, dtype, norm):
    """(function, structs): `rotate` and its gradients."""
    from pallas_kernels import rotate

    args = {"q": struct(B, T, N, H, dtype=dtype), "k": struct(B, T, K, H, dtype=dtype)}
    args["z"] = struct(B, T, P)
    if norm:
        args |= {"q_norm": struct(N, H), "k_norm": struct(K, H)}

    def forward(args):
        args = dict(args)
        q, k, z = (args.pop(name) for name in "qkz")
        inv_freq = 500_000.0 ** (-jnp.arange(0, H, 2) / H)
        return rotate(q, k, z, z, inv_freq=inv_freq, **args, implementation="pallas_gpu")

    return _with_gradients(forward), args


def attention(B, T, N, K, H, causal, documents):
    """(function, structs): `attend` and its gradients."""
    from pallas_kernels.attention import gpu, masks

    args = {"q": struct(B, T, N, H, dtype=jnp.bfloat16)}
    args |= {name: struct(B, T, K, H, dtype=jnp.bfloat16) for name in "kv"}
    mask = masks.Default(causal)
    if documents:
        mask = {name: struct(B, T, dtype=jnp.int32) for name in ("limit", "index")}
        mask |= {name: struct(B, T, dtype=jnp.int32) for name in ("q_segment", "kv_segment")}

    def run(args, mask):
        forward = lambda x: gpu.attend(x["q"], x["k"], x["v"], mask, scale=H**-0.5)
        return _with_gradients(forward)(args)

    if documents:
        return lambda x: run(*x), (args, mask)
    return functools.partial(run, mask=mask), args


def _with_gradients(forward):
    def both(args):
        out, vjp = jax.vjp(forward, args)
        return out, vjp(out)

    return both


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--only", choices=("rotation", "attention"), help="one of the operations")
    args = device.add_options(p).parse_args()
    path = device.result_path(args, "gpu_static", "NVIDIA H200")
    dump = Path(tempfile.mkdtemp(prefix="mosaic-gpu-"))
    os.environ |= {"MOSAIC_GPU_DUMP_TO": str(dump), "MOSAIC_GPU_DUMP_PTXAS": "1"}
    targets.prepare()
    h200 = targets.h200()

    rows, spills, failed = [], 0, 0
    operations = {"rotation": (rotation, ROTATION), "attention": (attention, ATTENTION)}
    for operation, (make, cases) in operations.items():
        if args.only not in (None, operation):
            continue
        for case, options in cases.items():
            try:
                targets.compile(h200, *make(*options))
                error = ""
            except Exception as e:  # whatever a compiler says is the answer
                error = f"{type(e).__name__}: {str(e).splitlines()[0][:200]}"
                failed += 1
            found = reports(dump)
            spills += sum(r.spill_stores + r.spill_loads for r in found)
            rows.append({"operation": operation, "case": case, "error": error})
            rows[-1]["kernels"] = [dataclasses.asdict(r) | {"blocks": r.blocks} for r in found]
            print(operation, case, error or f"{len(found)} kernels", flush=True)
    dump.rmdir()

    def lines_of(row):
        head = f"{row['operation']} | {row['case']}"
        if row["error"]:
            yield f"{head} | **{row['error']}** | | | | | "
        for k in row["kernels"]:
            numbers = ("threads", "registers", "blocks", "stack")
            cells = " | ".join(str(k[name]) for name in numbers)
            yield f"{head} | {k['kernel']} | {cells} | {k['spill_stores'] + k['spill_loads']}"

    head = ("operation", "case", "kernel", "threads", "registers", "blocks", "stack", "spills")
    lines = [
        "Compiled for an H200 on a machine without one; registers of a thread, bytes of stack and",
        "spills. A kernel that an earlier case already had, with the same shapes, is not repeated.",
        "Not run.",
        "",
        *harness.table(head, (line for row in rows for line in lines_of(row))),
        f"Bytes spilled: {spills}. Cases that did not compile: {failed}.",
        "",
    ]
    hardware = {"target": "NVIDIA H200, sm_90a, not present", "cpu": harness._cpu_model()}
    device.report(path, "GPU kernels, static", lines, {"rows": rows}, args, hardware)
    raise SystemExit(1 if spills or failed else 0)


if __name__ == "__main__":
    main()
