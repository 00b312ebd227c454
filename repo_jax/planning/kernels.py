"""What kernels cost, the library's own and cuDNN's, which XLA counts as nothing.

Products are counted from the shapes that a kernel is called with: attention's are those of the
pairs of query and key that a causal mask leaves, documents left out of account. Cycles on a TPU
are those of `RATES`: VLIW bundles of the compiled kernels on the paths that they take, about one a
cycle, waiting for memory left out (benchmarks/tpu_static.py; a test holds the table against its
result file).
"""

import dataclasses
import re

from repo_jax.planning.hlo import Run, Shape, operand_shapes


@dataclasses.dataclass(frozen=True)
class Rates:
    """Cycles of one TensorCore, from calls with 4096 tokens, 16 heads of 128 channels, in bf16.

    Attributes:
      attention_forward, attention_backward: for each query head and pair of tokens.
      rotate_forward, rotate_backward: norm and rotation, for each token and head of q and k,
        with a position for every head.
      shared_forward, shared_backward: the same with one position for all heads.
    """

    attention_forward: float
    attention_backward: float
    rotate_forward: float
    rotate_backward: float
    shared_forward: float
    shared_backward: float


# benchmarks/results/2026-11-21-tpu_static-v5e-v5p-v6e.json
RATES = {
    "v5e": Rates(0.005457, 0.010431, 0.8564, 1.5293, 0.4839, 0.9211),
    "v5p": Rates(0.005441, 0.010892, 0.8896, 1.5935, 0.5166, 0.9795),
    "v6e": Rates(0.003796, 0.006206, 0.8816, 1.5618, 0.4563, 0.9998),
}


@dataclasses.dataclass(frozen=True)
class Call:
    """One execution of a kernel.

    Attributes:
      kernel: its name.
      flops: of matrix products.
      cycles: {generation: of one TensorCore}; {} for a GPU's.
    """

    kernel: str
    flops: float
    cycles: dict[str, float]


def call(run: Run) -> Call | None:
    """The kernel that an instruction calls; None: it calls none, or an unknown one."""
    name = kernel_name(run)
    if name is None:
        return None
    shapes = [*operand_shapes(run.computation, run.instruction), *run.instruction.shapes]
    real = [s for s in shapes if s.dtype.startswith(("bf", "f"))]
    if name.startswith("__cudnn$fmha"):
        return _cudnn(name, real, '"CAUSAL"' in run.instruction.text)
    if name in ("rotary_attention_forward", "rotary_attention_backward"):
        return _attention(name, real)
    if name in ("rotate_forward", "rotate_backward"):
        return _rotation(name, real, run.instruction.shapes)
    return None


def kernel_name(run: Run) -> str | None:
    """Of the Pallas kernel, or the one of cuDNN, that an instruction calls."""
    if run.instruction.opcode != "custom-call":
        return None
    if cudnn := re.search(r'custom_call_target="(__cudnn\$\w+)"', run.instruction.text):
        return cudnn[1]
    if '"tpu_custom_call"' not in run.instruction.text:
        return None
    found = re.search(r"/([\w.]+)/pallas_call$", run.instruction.op_name)
    return found[1] if found else run.instruction.name


def _attention(name: str, shapes: list[Shape]) -> Call:
    """From q [B, T, N * H], k [B, S, K * H] and a row of numbers [B, N, 1, T]."""
    q, k = [s for s in shapes if len(s.dims) == 3][:2]
    (B, T, width), S = q.dims, k.dims[1]
    N = next(s.dims[1] for s in shapes if len(s.dims) == 4)
    H = width // N
    pairs = B * N * T * (S + 1) / 2
    backward = name.endswith("backward")
    # Forward: scores and their product with v; backward: scores, and gradients of v, p, q, k.
    flops = 2 * (5 if backward else 2) * pairs * H
    rate = "attention_backward" if backward else "attention_forward"
    per_pair = {name: getattr(rates, rate) for name, rates in RATES.items()}
    return Call(name, flops, {name: x * pairs * max(1, H / 128) for name, x in per_pair.items()})


def _cudnn(name: str, shapes: list[Shape], causal: bool) -> Call:
    """From q [B, T, N, H] and k [B, S, K, H]."""
    (B, T, N, H), S = shapes[0].dims, shapes[1].dims[1]
    pairs = B * N * T * ((S + 1) / 2 if causal else S)
    return Call(name, 2 * (5 if name.endswith("Backward") else 2) * pairs * H, {})


def _rotation(name: str, shapes: list[Shape], outputs: tuple[Shape, ...]) -> Call:
    """From q and k, [tokens, X * H], which it also writes, and positions [tokens, P]."""
    written = [s for s in outputs if len(s.dims) == 2][-2:]
    tokens = written[0].dims[0]
    units = tokens * sum(s.dims[1] for s in written) / 128
    shared = any(s.dims == (tokens, 1) and s.dtype == "f32" for s in shapes)
    rate = name.replace("rotate", "shared") if shared else name
    return Call(name, 0.0, {name: getattr(rates, rate) * units for name, rates in RATES.items()})
