"""What our TPU kernels cost on v5e, v5p and v6e, from TPU's compiler, without a TPU.

    pip install libtpu               # Linux x86-64; no TPU is needed
    python -m benchmarks.tpu_static

The kernels' VLIW bundles, each about a cycle, on each path, times how often it is taken; plus
XLA's own estimate of what it does around them. Against rotation by XLA (`rotate`'s `xla`) and
splash attention of jax at blocks that suit v5e. One row, causal, bf16, positions for every head
with their gradients; inputs and outputs are [T, N * H], as projections write and read them.

Limits: nothing runs. Bundles leave out waiting for memory (for the rotation's kernels on v5e
the time to move their bytes is given beside them) and XLA's estimates are its own. A path that
starts a sum or ends one counts as often as it is taken; branches around a DMA count always.
"""

import argparse
import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks import device, harness, llo, targets
from benchmarks.tpu_paths import PATHS, Cost, Path, Sizes, attention_blocks, splash_blocks
from pallas_kernels import rotate
from pallas_kernels.attention import masks
from pallas_kernels.attention import tpu as attention_tpu
from repo_jax.planning import hlo

V5E_BYTES_PER_CYCLE = 546  # 819 GB/s at 1.5 GHz
V5E_FLOP_PER_CYCLE = 131_072


def rotated(sizes: Sizes, norm: bool, implementation: str):
    """(q, k, z, weights) -> rotated q and k, all [T, X * H]."""
    inv_freq = 500_000.0 ** (-jnp.arange(0, sizes.H, 2) / sizes.H)

    def run(q, k, z, q_norm, k_norm):
        norms = dict(q_norm=q_norm, k_norm=k_norm) if norm else {}
        q, k = (x.reshape(1, sizes.T, -1, sizes.H) for x in (q, k))
        return rotate(q, k, z, z, inv_freq=inv_freq, **norms, implementation=implementation)

    return run


def splash(sizes: Sizes):
    """(q, k, v) [1, T, X, H] -> [1, T, N, H]."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    causal = splash_attention_mask.CausalMask((sizes.T, sizes.T))
    mask = splash_attention_mask.MultiHeadMask([causal] * sizes.N)
    kernel = splash_attention_kernel.make_splash_mha_single_device(
        mask, block_sizes=splash_blocks(sizes)
    )

    def run(q, k, v):
        q, k, v = (x[0].swapaxes(0, 1) for x in (q, k, v))
        q = (q * sizes.H**-0.5).astype(q.dtype)
        return kernel(q, k, v).swapaxes(0, 1)[None]

    return run


def attention(sizes: Sizes):
    """(q, k, v) [1, T, X, H] -> [1, T, N, H]: ours."""
    options = dict(scale=sizes.H**-0.5, blocks=attention_blocks(sizes))
    return lambda q, k, v: attention_tpu.attend(q, k, v, masks.Default(True), **options)[0]


def program(sizes: Sizes, what: str, *, norm: bool, backward: bool) -> tuple[Callable, tuple]:
    """(function, structs). what: rotation or whole, of ours or of XLA and splash."""
    struct = jax.ShapeDtypeStruct
    wide = lambda X: struct((sizes.T, X * sizes.H), jnp.bfloat16)
    args = [wide(sizes.N), wide(sizes.K), struct((1, sizes.T, sizes.P), jnp.float32)]
    args += [struct((X, sizes.H), jnp.float32) for X in (sizes.N, sizes.K)]
    ours = "ours" in what
    turn = rotated(sizes, norm, "pallas_tpu" if ours else "xla")
    flat = lambda x: x.reshape(sizes.T, -1)
    if "rotation" in what:
        f, d_out = lambda *args: tuple(map(flat, turn(*args))), tuple(args[:2])
    else:
        attend = attention(sizes) if ours else splash(sizes)
        args, d_out = [*args, wide(sizes.K)], wide(sizes.N)

        def f(*args):
            *args, v = args
            q, k = turn(*args)
            return flat(attend(q, k, v.reshape(1, sizes.T, -1, sizes.H)))

    if not backward:
        return f, tuple(args)

    def both(d_out, *args):
        out, vjp = jax.vjp(f, *args)
        return out, vjp(d_out)

    return both, (d_out, *args)


def measure(generation: str, dump, sizes: Sizes, what: str, **options) -> Cost:
    sizes = dataclasses.replace(sizes, generation=generation)
    f, structs = program(sizes, what, **options)
    compiled = targets.compile(targets.tpu(generation), f, *structs)
    paths: list[Path] = []
    for name, kernel in llo.kernels(dump).items():
        for part, of_kernel in PATHS.items():
            if part in name:
                paths += of_kernel(kernel, sizes)
    return Cost(tuple(paths), hlo.total_cycles(compiled.as_text()))


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--generations", nargs="+", default=list(targets.TPUS), choices=targets.TPUS)
    p.add_argument("--length", type=int, default=4096)
    p.add_argument("--heads", type=int, default=16)
    p.add_argument("--head_dim", type=int, default=128)
    args = device.add_options(p).parse_args()
    path = device.result_path(args, "tpu_static", "-".join(args.generations))
    dump = llo.start()
    targets.prepare()
    sizes = Sizes(T=args.length, N=args.heads, K=args.heads, H=args.head_dim, P=args.heads)
    costs: dict[tuple, Cost] = {}
    for generation in args.generations:
        for what in ("rotation ours", "whole ours", "whole xla + splash"):
            for norm in (False, True):
                for backward in (False, True):
                    key = (generation, what, norm, backward)
                    try:
                        options = dict(norm=norm, backward=backward)
                        costs[key] = measure(generation, dump, sizes, what, **options)
                        print(*key, costs[key].kernels(), costs[key].rest, flush=True)
                    except NotImplementedError as error:
                        print(*key, error, flush=True)
    # One position for all heads: what a layer with ordinary positions pays.
    shared = dataclasses.replace(sizes, P=1)
    for generation in args.generations:
        for backward in (False, True):
            key = (generation, "rotation ours, P = 1", True, backward)
            options = dict(norm=True, backward=backward)
            costs[key] = measure(generation, dump, shared, "rotation ours", **options)
    report(path, args, sizes, costs)


def report(path, args, sizes: Sizes, costs: dict[tuple, Cost]) -> None:
    lines = [
        f"[B 1, T {sizes.T}, {sizes.N} x {sizes.H}] bf16, causal, {sizes.P} position columns.",
        "From the compiler's schedules; nothing was run.",
        "",
        *("## Our norm and rotation of q and k, per 128 tokens", ""),
        *_rotation_table(sizes, costs),
        *("## The whole operation, thousands of cycles a head", ""),
        *_whole_table(sizes, costs),
        *_bounds(sizes, costs),
        *_layer(sizes, costs),
        *("## Paths of the kernels, forward and backward", ""),
        *_path_table(costs),
    ]
    keys = ("generation", "what", "norm", "backward")
    data = {
        "sizes": dataclasses.asdict(sizes),
        "costs": [
            dict(zip(keys, key, strict=True)) | dataclasses.asdict(cost)
            for key, cost in costs.items()
        ],
    }
    hardware = {"target": ", ".join(args.generations) + ", not present"}
    hardware["cpu"] = harness._cpu_model()
    device.report(path, "TPU kernels, static", lines, data, args, hardware)


def _rotation_table(sizes: Sizes, costs) -> list[str]:
    rows = []
    for (generation, what, norm, backward), cost in costs.items():
        if "rotation ours" not in what:
            continue
        name = "backward" if backward else "forward"
        bundles = cost.kernels(name) * 128 / sizes.T
        columns = 1 if "P = 1" in what else sizes.P
        rest = cost.rest - (costs[generation, what, norm, False].rest if backward else 0)
        moved = ""
        if generation == "v5e":
            width = 128 * (sizes.N + sizes.K) * sizes.H * 2  # bf16
            moved = f"{width * (3 if backward else 2) / V5E_BYTES_PER_CYCLE:.0f}"
        cells = (generation, name, "yes" if norm else "no", columns, f"{bundles:.0f}", moved)
        rows.append(" | ".join(map(str, (*cells, f"{rest * 128 / sizes.T:.0f}"))))
    head = ("", "direction", "norm", "columns", "bundles", "cycles to move its bytes")
    return harness.table((*head, "XLA's estimate of the rest"), rows)


def _whole_table(sizes: Sizes, costs) -> list[str]:
    rows = []
    thousands = lambda n: f"{n / sizes.N / 1000:.1f}"
    for (generation, what, norm, backward), cost in costs.items():
        if "whole" not in what:
            continue
        rotation = cost.kernels("rotate_")
        plain = costs[generation, "whole xla + splash", norm, backward]
        cells = [generation, what.removeprefix("whole "), "yes" if norm else "no"]
        cells += ["forward + backward" if backward else "forward"]
        parts = (rotation, cost.kernels() - rotation, cost.rest, cost.total)
        cells += [thousands(n) for n in parts]
        cells += [f"{cost.kernels() / plain.kernels():.3f}"]
        cells += [f"{cost.total / plain.kernels():.3f}", f"{cost.total / plain.total:.3f}"]
        rows.append(" | ".join(cells))
    head = ("", "what", "norm", "direction", "rotation", "attention", "XLA's estimate of the rest")
    head += ("total", "kernels over bare splash", "total over bare splash")
    return harness.table((*head, "total over XLA + splash"), rows)


def _bounds(sizes: Sizes, costs) -> list[str]:
    """The same ratio, counted against us."""
    lines = []
    thousand = 1000 * sizes.N
    for (generation, what, norm, backward), cost in costs.items():
        if what != "whole ours" or not backward or norm:
            continue
        splash = costs[generation, "whole xla + splash", norm, backward]
        alone = sum(p.total for p in splash.paths if p.path == "block")
        text = f"- {generation}: splash's blocks alone, without what starts and ends its sums and "
        text += f"steps, {alone / thousand:.1f}; ours over that {cost.total / alone:.3f}."
        if generation == "v5e":
            passes = 2 + 3  # over q and k in bf16
            moved = passes * sizes.T * (sizes.N + sizes.K) * sizes.H * 2 / V5E_BYTES_PER_CYCLE
            slow = cost.total - cost.kernels("rotate_") + moved
            text += f" With the rotation as slow as moving its bytes, {slow / thousand:.1f} and "
            text += f"{slow / alone:.3f} ({slow / splash.kernels():.3f} over all of splash)."
        lines.append(text)
    return ["Without the norm, forward + backward:", "", *lines, ""]


def _layer(sizes: Sizes, costs) -> list[str]:
    """What a position for every head adds to a layer of OLMo 2 1B, f_phi's matmuls aside."""
    found = {}
    for what in ("rotation ours", "rotation ours, P = 1", "whole ours"):
        found[what] = costs.get(("v5e", what, True, True))
    if None in found.values():
        return []
    D, F = sizes.N * sizes.H, 4 * sizes.N * sizes.H
    matmuls = 3 * 2 * sizes.T * (4 * D * D + 3 * D * F) / V5E_FLOP_PER_CYCLE
    one = found["rotation ours, P = 1"].total
    added = found["rotation ours"].total - one
    layer = matmuls + found["whole ours"].total - added
    return [
        "## What RePo adds to a RoPE layer, v5e, forward + backward",
        "",
        f"Layer of {D} channels, {F} in the MLP: matmuls {matmuls / 1e6:.2f}M cycles at the peak",
        f"rate, with attention, norm and rotation by one position a token {layer / 1e6:.2f}M. A",
        f"position for every head adds {added / 1e6:.3f}M: {100 * added / layer:.2f} % (bundles",
        "and XLA's estimate; waiting for memory and f_phi left out).",
        "",
    ]


def _path_table(costs) -> list[str]:
    rows = []
    for (generation, what, norm, backward), cost in costs.items():
        if not backward or "P = 1" in what:
            continue
        for p in cost.paths:
            cells = (generation, what, "yes" if norm else "no", p.kernel, p.path)
            rows.append(" | ".join(map(str, (*cells, p.bundles, p.times))))
    return harness.table(("", "what", "norm", "kernel", "path", "bundles", "times"), rows)


if __name__ == "__main__":
    main()
