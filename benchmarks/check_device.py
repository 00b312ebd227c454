"""Whether an implementation is right on the device at hand: what admits a GPU kernel.

    python -m benchmarks.check_device --implementation pallas_gpu

From the root of the repository, whose tests hold the cases: rotation with and without norm
(tests/kernels/rotation_cases.py) and attention (tests/kernels/attention_cases.py: the covering
set, some as simple as cuDNN wants them, then --more of the full product), outputs and all
gradients against float64, each below 1e-2 in bfloat16 and 2e-5 in float32. A case that the
implementation refuses (NotImplementedError) is counted as that, with its reason. The exit
status is 1 if a case fails, if none passes, or if --minutes end before the last case.

A GPU kernel enters the automatic order only with a result of this script, from such a GPU, in
which nothing fails.
"""

import argparse
import collections
import functools
import itertools
import time

from benchmarks import device, harness


def options():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--implementation", required=True, help="of rotary_attention, or rotate")
    p.add_argument("--only", choices=("rotation", "attention"), help="one of the operations")
    p.add_argument("--more", type=int, default=60, help="of the full product of attention cases")
    p.add_argument("--seed", type=int, default=0, help="of the inputs and of what is drawn")
    p.add_argument("--minutes", type=float, default=float("inf"), help="to start cases in")
    return device.add_options(p)


def simple(Case):
    """bfloat16, as many queries as keys, no documents and no indices."""
    sizes = itertools.product((7, 128, 300, 1024, 4097), (64, 80, 96, 128, 256))
    for i, (T, H) in enumerate(sizes):
        group = (1, 2, 3, 8)[i % 4] if T <= 1024 else 1 + i % 2
        options = {"dtype": "bfloat16", "positions": "kv", "causal": i % 3 != 0}
        yield Case(T, T, H=H, group=group, B=2 if T <= 300 else 1, K=2, **options)


def cases(args):
    """(operation, case, its errors as a function, tolerance)."""
    from pallas_kernels import rotary_attention
    from pallas_kernels.attention import api as attention
    from pallas_kernels.rotation import api as rotation

    try:
        from tests.kernels import attention_cases, rotation_cases
    except ImportError as error:
        raise SystemExit(f"run this from the root of the repository: {error}") from None
    name, seed = args.implementation, args.seed
    if name not in {*attention.IMPLEMENTATIONS, *rotation.IMPLEMENTATIONS}:
        known = dict.fromkeys([*attention.IMPLEMENTATIONS, *rotation.IMPLEMENTATIONS])
        raise SystemExit(f"--implementation {name} is unknown; there are {', '.join(known)}")
    if name in rotation.IMPLEMENTATIONS and args.only != "attention":
        for case in rotation_cases.full():
            errors = functools.partial(rotation_cases.errors, case, name, seed)
            yield "rotation", case, errors, rotation_cases.TOLERANCE[case.dtype]
    if name in attention.IMPLEMENTATIONS and args.only != "rotation":
        ours = functools.partial(rotary_attention, implementation=name)
        more = itertools.islice(attention_cases.full(seed), args.more)
        covering, plain = attention_cases.COVERING, simple(attention_cases.Case)
        for case in itertools.chain(covering, plain, more):
            errors = functools.partial(attention_cases.errors, ours, case, seed)
            yield "attention", case, errors, attention_cases.TOLERANCE[case.dtype]


def outcome(errors, tolerance: float) -> dict:
    """{"outcome": "pass", "FAIL" or "refused", ...}."""
    try:
        found = errors()
    except NotImplementedError as e:
        return {"outcome": "refused", "why": str(e).splitlines()[0][:200]}
    except Exception as e:  # a case that crashes has failed; the others are still to be seen
        return {"outcome": "FAIL", "why": f"{type(e).__name__}: {str(e)[:400]}"}
    passed = all(error < tolerance for error in found.values())
    return {"outcome": "pass" if passed else "FAIL", "errors": found}


def main():
    args = options().parse_args()
    hardware = device.describe()
    path = device.result_path(args, f"check_device-{args.implementation}", hardware["device"])
    start, rows, left = time.monotonic(), [], 0
    for operation, case, errors, tolerance in cases(args):
        if time.monotonic() - start > 60 * args.minutes:
            left += 1
            continue
        begun = time.monotonic()
        row = {"operation": operation, "case": str(case), "tolerance": tolerance}
        row |= outcome(errors, tolerance) | {"seconds": time.monotonic() - begun}
        rows.append(row)
        worst = max(row.get("errors", {}).items(), key=lambda x: x[1], default=("", 0.0))
        detail = row.get("why") or f"{worst[0]} {worst[1]:.1e}"
        print(f"{row['outcome']:7} {operation} {case}: {detail}", flush=True)

    counts = collections.Counter((row["operation"], row["outcome"]) for row in rows)
    operations = dict.fromkeys(row["operation"] for row in rows)
    head = ("operation", "passed", "failed", "refused", "worst error / tolerance")

    def line(operation):
        each = [counts[operation, what] for what in ("pass", "FAIL", "refused")]
        ratios = [
            max(row["errors"].values()) / row["tolerance"]
            for row in rows
            if row["operation"] == operation and "errors" in row
        ]
        return " | ".join((operation, *map(str, each), f"{max(ratios, default=0.0):.2f}"))

    refused = collections.Counter(row["why"] for row in rows if row["outcome"] == "refused")
    failed = [row for row in rows if row["outcome"] == "FAIL"]
    lines = [
        f"`{args.implementation}` on {hardware['device']}; error: |found - true| / |true|.",
        "",
        *harness.table(head, map(line, operations)),
        *(f"- **failed**: {r['operation']} {r['case']}: {_why(r)}" for r in failed),
        *(f"- refused {n} times: {why}" for why, n in refused.items()),
        *([f"- {left} cases were not reached in {args.minutes:g} minutes"] if left else []),
        "",
    ]
    device.report(path, "Correct on a device", lines, {"cases": rows}, args, hardware)
    passed = sum(row["outcome"] == "pass" for row in rows)
    raise SystemExit(1 if failed or left or not passed else 0)


def _why(row: dict) -> str:
    wrong = {n: f"{e:.1e}" for n, e in row.get("errors", {}).items() if not e < row["tolerance"]}
    return row.get("why") or str(wrong)


if __name__ == "__main__":
    main()
