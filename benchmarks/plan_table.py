"""Plans of the paper's runs, compiled for the pods that they are meant for.

    pip install libtpu               # Linux x86-64; no TPU is needed
    python -m benchmarks.plan_table

Each row is `python -m repo_jax.plan` with the options named; the table also goes into
docs/8-planning.md, between the marks there. Minutes a row.

Limits: nothing runs. Memory is what the compiler planned. Times are estimates, by the model that
docs/8-planning.md writes down.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import device, harness

GUIDE = harness.HERE.parent / "docs" / "8-planning.md"
BEGIN, END = "<!-- benchmarks/plan_table.py: begin -->", "<!-- benchmarks/plan_table.py: end -->"
GIB = 2**30

LONG = "--data.sequence_length 131072 --data.batch_size 16 --training.accumulation 1"

# Config, topology, options.
ROWS = (
    ("olmo2_1b_repo", "v5e:4x4", "--training.accumulation 8"),
    ("olmo2_1b_rope", "v5e:4x4", "--training.accumulation 8"),
    ("olmo2_1b_repo", "v6e:4x4", "--training.accumulation 4"),
    ("olmo2_1b_repo", "v5p:2x2x4", "--training.accumulation 4"),
    ("olmo2_1b_repo", "v5p:4x4x4", f"{LONG} --mesh.context 4"),
    ("olmo2_7b_repo", "v5e:16x16", "--mesh.data 4"),
    ("olmo2_7b_repo", "v6e:8x8", ""),
    ("olmo2_7b_repo", "v5p:4x4x4", ""),
)


def one(name: str, topology: str, options: str) -> dict:
    """The plan of a row, as plain values; in a process of its own, which a compiler may crash."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        command = [sys.executable, "-m", "repo_jax.plan", "--config", name, *options.split()]
        command += ["--topology", topology, "--json", str(file)]
        print(f"\n== {shlex.join(command[1:])}", flush=True)
        run = subprocess.run(command, cwd=GUIDE.parent.parent)
        if not file.exists():
            raise SystemExit(f"no plan: exit status {run.returncode}")
        return {"name": name, "options": options} | json.loads(file.read_text())


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--only", nargs="+", help="topologies; the table in docs/ is then left alone")
    args = device.add_options(p).parse_args()
    path = device.result_path(args, "plan_table", "tpu")
    rows = [row for row in ROWS if not args.only or row[1] in args.only]
    plans = [one(*row) for row in rows]
    lines = [*table(plans), *overhead(plans)]
    hardware = {"target": ", ".join(sorted({row[1] for row in rows})) + ", not present"}
    hardware["cpu"] = harness._cpu_model()
    device.report(path, "Plans", lines, {"plans": plans}, args, hardware)
    if path and not args.only:
        write_guide([*lines, *about(path, plans)])


def about(path, plans: list[dict]) -> list[str]:
    """Where the numbers are from."""
    versions = ", ".join(f"{k} {v}" for k, v in plans[0]["versions"].items())
    name = f"{path.name}.md"
    return [f"{path.name[:10]}, {versions}: [{name}](../benchmarks/results/{name})."]


def table(plans: list[dict]) -> list[str]:
    head = ("config", "topology", "batch", "mesh", "microbatches", "parameters, optimizer")
    head += (
        "the rest",
        "needed of",
        "fits",
        "GB sent",
        "step, s",
        "tokens/s",
        "MFU",
        "causal",
        "days",
    )
    return harness.table(head, (" | ".join(_cells(p)) for p in plans))


def _cells(p: dict) -> list[str]:
    memory, cost = p["memory"], p["cost"]
    mesh = " x ".join(f"{axis} {n}" for axis, n in p["mesh"].items() if n > 1)
    gib = lambda size: f"{size / GIB:.2f}"
    state = memory["parameters"] + memory["optimizer"]
    config = p["config"]
    batch = f"{config['batch_size']} x {config['sequence_length']}"
    cells = [p["name"], p["topology"], batch, mesh, str(config["accumulation"])]
    cells += [gib(state), gib(memory["needed"] - state)]
    cells += [f"{gib(memory['needed'])} / {gib(memory['capacity'])}"]
    cells += ["yes" if memory["fits"] else "NO"]
    if not cost:
        return cells + [""] * 6
    sent = sum(row["sent"] for row in cost["transfers"]) / 1e9
    cells += [f"{sent:.0f}", f"{cost['time']['step']:.2f}", f"{p['tokens_per_second']:,.0f}"]
    causal = p["mfu"] * p["model_flops_causal"] / p["model_flops"]
    return [*cells, f"{100 * p['mfu']:.0f} %", f"{100 * causal:.0f} %", f"{p['days']:.1f}"]


def overhead(plans: list[dict]) -> list[str]:
    """RePo against RoPE where both were planned for the same devices."""
    lines = []
    for rope in plans:
        size, positions = rope["name"].rsplit("_", 1)
        pairs = [p for p in plans if p["name"] == f"{size}_repo"] if positions == "rope" else []
        for repo in pairs:
            if repo["topology"] != rope["topology"] or repo["options"] != rope["options"]:
                continue
            more = lambda f, a=repo, b=rope: f"{100 * (f(a) / f(b) - 1):+.2f} %"
            lines += [
                f"RePo against RoPE, {size}, {rope['topology']}: "
                f"{more(lambda p: p['model_flops'])} model FLOPs "
                f"({more(lambda p: p['model_flops_causal'])} with what the causal mask leaves), "
                f"{more(lambda p: p['cost']['flops'])} compiled FLOPs, "
                f"{more(lambda p: p['cost']['time']['step'])} estimated step time.",
                "",
            ]
    return lines


def write_guide(lines: list[str]) -> None:
    """Puts them between the marks."""
    text = GUIDE.read_text()
    pattern = re.escape(BEGIN) + ".*" + re.escape(END)
    new, n = re.subn(
        pattern, lambda _: "\n\n".join((BEGIN, "\n".join(lines), END)), text, flags=re.DOTALL
    )
    if n != 1:
        raise SystemExit(f"{GUIDE} must have one {BEGIN} and one {END}")
    GUIDE.write_text(new)
    print(f"wrote {GUIDE}", file=sys.stderr)


if __name__ == "__main__":
    main()
