"""Attention alone: ours (`xla`), dense attention in JAX (`reference`), and torch's SDPA.

    python -m benchmarks.attention --torch_python /path/to/python-with-torch

Causal, float32, forward and forward + backward (gradients to q, k, v), at several lengths.
`xla`, `reference` and `sdpa` have no rotation, which SDPA lacks; `xla rotated` is `xla` with
real positions for every head, as in a RePo layer, with gradients to them as well. Rounds
alternate; see harness.py for that and for the intervals. A turn lasts at least
`--least_seconds`, so caches are warm for most of it, as they may not be within a model.

Limits: one machine, CPU only, one head size. `reference` holds several arrays of [B, N, T, T]:
1 GiB each at the default T 4096.
"""

import statistics

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from pallas_kernels import rotary_attention
from repo_jax.modeling.rope import rotary_frequencies

XLA, ROTATED, REFERENCE, SDPA = "xla", "xla rotated", "reference", "sdpa"
# (what it says, whose seconds, over whose seconds)
PAIRS = (
    ("speed, xla / reference", REFERENCE, XLA),
    ("speed, xla / sdpa", SDPA, XLA),
    ("time, xla rotated / xla", ROTATED, XLA),
)


def options():
    p = harness.parser(__doc__.splitlines()[0], warmup=2)
    p.add_argument("--batch_size", type=int, default=2)
    p.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    p.add_argument("--n_heads", type=int, default=8)
    p.add_argument("--head_dim", type=int, default=64)
    p.add_argument("--least_seconds", type=float, default=0.2, help="of one turn")
    return p


def ours(args, length: int, *, backward: bool) -> dict[str, harness.Contender]:
    """Our contenders at one length."""
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

        def both(d_out, *inputs):
            out, vjp = jax.vjp(forward, *inputs)
            return out, vjp(d_out)

        inputs = (q, k, v, *positions)
        run, inputs = (jax.jit(both), (d_out, *inputs)) if backward else (jax.jit(forward), inputs)
        return harness.jax_contender(lambda: run(*inputs))

    return {
        XLA: contender("xla"),
        ROTATED: contender("xla", z),
        REFERENCE: contender("reference"),
    }


def main():
    args = options().parse_args()
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


if __name__ == "__main__":
    main()
