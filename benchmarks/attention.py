"""Attention on the CPU, GPU or TPU at hand: ours, and what else there is.

    python -m benchmarks.attention                                  # the device that JAX finds
    python -m benchmarks.attention --quick                          # a trial: nothing is written
    python -m benchmarks.attention --torch_python /path/to/python-with-torch     # on a CPU

On a GPU or TPU: causal, bfloat16, learned positions for every head, so that gradients go to q,
k, v and positions, forward and forward + backward. B is such that B * T is --tokens, at
least 1. The operations are those of rivals.py, where this machine has them: ours by each of
its implementations; rotation by XLA and then cuDNN, tokamax or splash; attention alone. With
and without packed documents (for cuDNN that is a dense mask). TF/s counts 4 B N T T H / 2
for a forward and 2.5 times that for a backward pass, whose time is that of forward + backward
less that of forward, medians both. A call is timed on the device's queue: a turn is as many
calls, one after the other, as take --least_seconds.

On a CPU: causal, float32, no documents: `xla`, dense attention in JAX (`reference`) and
torch's SDPA without rotation, and `xla` with real positions for every head.

Rounds alternate; see harness.py for that and for the intervals.

Limits: one machine, one head size, warm caches. On a CPU `reference` holds several arrays of
[B, N, T, T]: 1 GiB each at the default T 4096.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import device, harness

XLA, ROTATED, REFERENCE, SDPA = "xla", "xla rotated", "reference", "sdpa"
# (what it says, whose seconds, over whose seconds)
PAIRS = (
    ("speed, xla / reference", REFERENCE, XLA),
    ("speed, xla / sdpa", SDPA, XLA),
    ("time, xla rotated / xla", ROTATED, XLA),
)


def options(platform: str) -> argparse.ArgumentParser:
    p = harness.parser(__doc__.splitlines()[0], warmup=2)
    cpu = platform == "cpu"
    lengths = [1024, 4096] if cpu else [2**n for n in range(10, 18)]
    p.add_argument("--quick", action="store_true", help="T 256 or 1024 and 4096, 3 rounds")
    p.add_argument("--lengths", type=int, nargs="+", default=lengths)
    p.add_argument("--n_heads", type=int, default=8 if cpu else 16)
    p.add_argument("--head_dim", type=int, default=64 if cpu else 128)
    p.add_argument("--least_seconds", type=float, default=0.2 if cpu else 0.03, help="of one turn")
    if cpu:
        p.add_argument("--batch_size", type=int, default=2)
        return p
    p.add_argument("--tokens", type=int, default=16_384, help="B * T")
    p.add_argument("--documents", type=int, default=8, help="in each row, of random lengths")
    p.add_argument("--dense_to", type=int, default=16_384, help="longest dense mask")
    p.add_argument("--xla_to", type=int, default=8192, help="longest for ours, xla")
    p.add_argument("--only", nargs="+", help="operations, by name")
    p.add_argument("--no_write", action="store_true", help="print only")
    p.set_defaults(threads=len(os.sched_getaffinity(0)), no_torch=True)
    return p


def forward_and_backward(f):
    """f's output and, by a cotangent, its gradients."""

    def both(d_out, *inputs):
        out, vjp = jax.vjp(f, *inputs)
        return out, vjp(d_out)

    return both


# ---------------------------------------------------------------- GPU and TPU


def queued(run) -> harness.Contender:
    """Calls are enqueued one after the other; the device is waited for at the end."""

    def contender(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            out = run()
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / calls

    return contender


def packed(length: int, rows: int, documents: int, seed: int) -> np.ndarray:
    """int32 [rows, length]: ids 1, 2, ... of documents of random lengths."""
    draw = np.random.default_rng(seed)
    cuts = np.sort(draw.integers(1, length, (rows, documents - 1)), axis=1)
    return 1 + (np.arange(length)[None, :, None] >= cuts[:, None]).sum(-1).astype(np.int32)


def on_device(args, operations, length: int, documents: bool) -> tuple[dict, dict]:
    """({(name, what): contender} of one length, {name: why it is left out})."""
    B = max(1, args.tokens // length)
    shape = (B, length, args.n_heads, args.head_dim)
    keys = jax.random.split(jax.random.key(args.seed), 5)
    q, k, v, d_out = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:4])
    z = 100.0 * jax.random.normal(keys[4], shape[:3], jnp.float32)
    segments = packed(length, B, args.documents, args.seed) if documents else None
    segments = segments if segments is None else jnp.asarray(segments)
    found, refused = {}, {}
    for name, operation in operations.items():
        longest = args.xla_to if name == "ours, xla" else length
        longest = min(longest, args.dense_to) if documents and "cuDNN" in name else longest
        if length > longest:
            refused[name] = f"not tried above T {longest}"
            continue
        f = lambda q, k, v, z, operation=operation: operation(q, k, v, z, segments)
        try:
            forward, both = jax.jit(f), jax.jit(forward_and_backward(f))
            jax.block_until_ready((forward(q, k, v, z), both(d_out, q, k, v, z)))
        except Exception as e:  # what a rival or a backend cannot do, and running out of memory
            refused[name] = f"{type(e).__name__}: {str(e).splitlines()[0][:160]}"
            continue
        found[name, "forward"] = queued(lambda run=forward: run(q, k, v, z))
        found[name, "both"] = queued(lambda run=both: run(d_out, q, k, v, z))
    return found, refused


def measured(args, operations, baseline: str, length: int, documents: bool) -> dict:
    """One length: medians, TF/s, ratios to the baseline, raw times."""
    contenders, refused = on_device(args, operations, length, documents)
    times, _ = harness.measure(contenders, args, least_seconds=args.least_seconds)
    B = max(1, args.tokens // length)
    flops = 4 * B * args.n_heads * length * length * args.head_dim / 2
    rows = {}
    for name in dict.fromkeys(name for name, _ in times):
        forward, both = (statistics.median(times[name, what]) for what in ("forward", "both"))
        rows[name] = {"forward_ms": 1e3 * forward, "backward_ms": 1e3 * (both - forward)}
        if not documents:
            rows[name]["forward_tflops"] = flops / forward / 1e12
            rows[name]["backward_tflops"] = 2.5 * flops / (both - forward) / 1e12
        if (baseline, "both") in times:
            rows[name]["speed"] = {
                what: harness.compare(times[baseline, what], times[name, what], args.seed)
                for what in ("forward", "both")
            }
    raw = {f"{name}, {what}": seconds for (name, what), seconds in times.items()}
    case = {"length": length, "batch": B, "documents": documents}
    return case | {"rows": rows, "refused": refused, "seconds": raw}


def on_accelerator(args, platform: str) -> None:
    from benchmarks import rivals

    hardware = device.describe()
    args.no_write |= args.rounds < harness.LEAST_ROUNDS
    path = device.result_path(args, "attention", hardware["device"])
    operations, baseline = rivals.operations(platform)
    if args.only:
        if unknown := set(args.only) - set(operations):
            raise SystemExit(f"--only {sorted(unknown)}: there are {list(operations)}")
        operations = {name: operations[name] for name in args.only}
    cases = []
    lines = [
        f"{args.n_heads} x {args.head_dim}, bfloat16, causal, learned positions for every head; "
        f"medians over {args.rounds} rounds. Speed: how many times as fast as {baseline}, "
        "forward and forward + backward, with 95 % intervals.",
        "",
    ]
    for length in args.lengths:
        for documents in (False, True):
            case = measured(args, operations, baseline, length, documents)
            cases.append(case)
            what = f", {args.documents} documents a row" if documents else ""
            lines += [f"## B {case['batch']}, T {length}{what}", "", *_table(case["rows"])]
            lines += [f"- {name}: {why}" for name, why in case["refused"].items()]
            lines += [""] if case["refused"] else []
            print("\n".join(lines[-20:]), file=sys.stderr, flush=True)
    device.report(path, "Attention", lines, {"cases": cases}, args, hardware)


def _table(rows: dict) -> list[str]:
    head = ("", "forward ms", "backward ms", "forward TF/s", "backward TF/s")
    head += ("speed, forward", "interval", "speed, both", "interval")

    def line(name, row):
        number = lambda key, digits: f"{row[key]:.{digits}f}" if key in row else ""
        cells = [name, number("forward_ms", 3), number("backward_ms", 3)]
        cells += [number("forward_tflops", 0), number("backward_tflops", 0)]
        speed = row.get("speed")
        cells += [harness.show(speed[w]) if speed else " | " for w in ("forward", "both")]
        return " | ".join(cells)

    return harness.table(head, (line(name, row) for name, row in rows.items()))


# ---------------------------------------------------------------- CPU


def ours(args, length: int, *, backward: bool) -> dict[str, harness.Contender]:
    """Our contenders on a CPU at one length."""
    from pallas_kernels import rotary_attention
    from repo_jax.modeling.rope import rotary_frequencies

    shape = (args.batch_size, length, args.n_heads, args.head_dim)
    draw = np.random.default_rng(args.seed).standard_normal
    q, k, v, d_out = (jnp.asarray(draw(shape), jnp.float32) for _ in range(4))
    z = jnp.asarray(draw(shape[:3]) * 10.0, jnp.float32)
    inv_freq, _ = rotary_frequencies(args.head_dim, 500_000.0)

    def contender(implementation, *positions):
        def forward(q, k, v, z=None):
            return rotary_attention(
                *(q, k, v, z, z), inv_freq=inv_freq, implementation=implementation
            )

        inputs = (q, k, v, *positions)
        run = jax.jit(forward)
        if backward:
            run, inputs = jax.jit(forward_and_backward(forward)), (d_out, *inputs)
        return harness.jax_contender(lambda: run(*inputs))

    return {
        XLA: contender("xla"),
        ROTATED: contender("xla", z),
        REFERENCE: contender("reference"),
    }


def on_cpu(args) -> None:
    path = harness.prepare(args, "attention")
    names = ("lengths", "batch_size", "n_heads", "head_dim", "seed")
    setup = {"kind": "attention"} | {name: getattr(args, name) for name in names}
    torch = None if args.no_torch else harness.Torch(args, setup)

    times, ratios = {}, {}
    for length in args.lengths:
        for what in ("forward", "forward+backward"):
            case = f"{what} {length}"
            contenders = ours(args, length, backward=what != "forward")
            if torch:
                contenders[SDPA] = torch.contender(case)
            print(case)
            times[case], _ = harness.measure(contenders, args, least_seconds=args.least_seconds)
            ratios[case] = {
                name: harness.compare(times[case][a], times[case][b], args.seed)
                for name, a, b in PAIRS
                if a in contenders and b in contenders
            }
    if torch:
        torch.close()
    used = list(next(iter(times.values())))
    median = lambda seconds: f"{1000 * statistics.median(seconds):.1f}"
    sizes = f"B {args.batch_size}, N {args.n_heads}, H {args.head_dim}, float32, causal"
    lines = [
        *(f"{sizes}; milliseconds, medians over rounds.", ""),
        *harness.table(
            ("", *used), (" | ".join((case, *map(median, t.values()))) for case, t in times.items())
        ),
        *harness.table(
            ("", "ratio", "median", "95 % interval"),
            (
                f"{case} | {name} | {harness.show(ratio)}"
                for case, of_case in ratios.items()
                for name, ratio in of_case.items()
            ),
        ),
    ]
    harness.report(path, "Attention", lines, {"ratios": ratios, "seconds": times}, args, torch)


def backend() -> str:
    """JAX's default backend, asked of another process: here none may start before CPUs are set."""
    command = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1]


def main():
    platform = backend()
    args = options(platform).parse_args()
    if args.quick:
        args.rounds, args.lengths = 3, [256] if platform == "cpu" else [1024, 4096]
    if platform == "cpu":
        on_cpu(args)
    else:
        on_accelerator(args, platform)


if __name__ == "__main__":
    main()
