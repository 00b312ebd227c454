"""What the benchmarks share: alternating rounds, intervals, the torch process, result files.

A contender is a function: number of calls -> seconds per call, over that many calls. In every
round each contender has one turn, in an order shuffled anew, so that what the machine does
besides falls on all alike. Two contenders are compared by the ratio of their times within each
round; reported are the median over rounds and its 95 % bootstrap interval, rounds resampled.

torch runs in a process of its own (`torch_worker.py`), asked over pipes: whoever has no turn
sleeps on a pipe. The CPU time that each side uses in the other's turns is measured and reported,
and so is what other programs use. That must be next to nothing: where a core is shared, torch's
threads, which wait for each other by spinning, become many times slower.
"""

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
LEAST_ROUNDS = 20  # fewer are a trial, and a trial is printed but not kept
BUSY = 0.05  # cores used by other programs that are worth a warning
SETTLE = 0.02  # seconds after a turn of torch or JAX for its threads to stop spinning
Contender = Callable[[int], float]


def parser(description: str, *, rounds: int = LEAST_ROUNDS, warmup: int = 3):
    """An argument parser with the options that all benchmarks have."""
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--rounds", type=int, default=rounds, help="fewer than 20: nothing is written")
    p.add_argument("--warmup", type=int, default=warmup, help="rounds before, not counted")
    p.add_argument("--seed", type=int, default=0, help="of data, weights and orders")
    p.add_argument("--threads", type=int, default=2, help="CPUs that both sides are kept to")
    p.add_argument("--no_torch", action="store_true", help="leave torch out")
    p.add_argument("--torch_python", default=sys.executable, help="a Python that has torch")
    p.add_argument(
        "--omp_wait_policy",
        choices=("default", "passive"),
        default="default",
        help="of torch's threads; passive: they never spin, and torch is slower on idle cores",
    )
    p.add_argument("--results_dir", type=Path, default=HERE / "results")
    p.add_argument("--overwrite", action="store_true", help="replace today's results")
    return p


def prepare(args, name: str) -> Path | None:
    """Keeps to `args.threads` CPUs (children too); where results go, without a suffix.

    Call it before JAX touches a device. None: too few rounds to be kept.
    """
    if args.rounds < 1 or args.warmup < 1:
        raise SystemExit("--rounds and --warmup must be at least 1")
    pinned = hasattr(os, "sched_setaffinity")
    cpus = sorted(os.sched_getaffinity(0)) if pinned else range(os.cpu_count() or 1)
    if not 1 <= args.threads <= len(cpus) or (not pinned and args.threads != len(cpus)):
        most = "1 to" if pinned else "(there is no sched_setaffinity here)"
        raise SystemExit(f"--threads is {args.threads}; it must be {most} {len(cpus)}")
    if pinned:
        os.sched_setaffinity(0, cpus[: args.threads])
    args.start = _cpu_clocks()
    if args.rounds < LEAST_ROUNDS:
        return None
    model = re.sub(r"\((R|TM)\)|\b(CPU|Processor)\b|@.*", " ", _cpu_model())
    cpu = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-") or "cpu"
    path = args.results_dir / f"{datetime.date.today()}-{name}-{cpu}"
    for file in _files(path):
        if file.exists() and not args.overwrite:
            raise SystemExit(f"{file} exists; give --overwrite to replace it")
    return path


def jax_contender(run: Callable) -> Contender:
    """`run()` returns arrays; a call is over when they are ready."""
    import jax

    def contender(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            jax.block_until_ready(run())
        return (time.perf_counter() - start) / calls

    return contender


class Torch:
    """The torch process. Its tasks are contenders: `torch.contender(name)`.

    Args:
      args: options of `parser`.
      setup: what `torch_worker.py` is to prepare; plain values.

    Attributes:
      about: what the process says of itself: versions and whatever the setup adds.
      our_idle: [CPU seconds of this process, wall seconds] in torch's turns.
      its_idle: the same of the torch process between its turns.
    """

    def __init__(self, args, setup: dict):
        python = args.torch_python
        env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
        env |= {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
        if args.omp_wait_policy == "passive":  # GNU's and Intel's OpenMP
            env |= {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
        command = [python, str(HERE / "torch_worker.py")]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            self._process = subprocess.Popen(command, env=env, **pipes)
        except OSError as error:
            raise SystemExit(f"--torch_python {python} cannot be run: {error}") from None
        self.our_idle, self.its_idle = [0.0, 0.0], [0.0, 0.0]
        self.about = self._ask(setup | {"threads": args.threads, "settle": SETTLE})
        if "missing" in self.about:
            raise SystemExit(
                f"{python} lacks what this comparison needs ({self.about['missing']}):\n"
                "  pip install torch==2.13.0 transformers\n"
                "there, or name another interpreter with --torch_python, or give --no_torch"
            )

    def _ask(self, request: dict) -> dict:
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SystemExit("the torch process has ended; its error is above")
        return json.loads(line)

    def contender(self, task: str) -> Contender:
        """The contender that runs the task of that name over there."""

        def run(calls: int) -> float:
            time.sleep(SETTLE)
            cpu, start = time.process_time(), time.perf_counter()
            answer = self._ask({"task": task, "calls": calls})
            _add(self.our_idle, time.process_time() - cpu, time.perf_counter() - start)
            _add(self.its_idle, *answer["idle"])
            return answer["seconds"]

        return run

    def idle(self) -> dict[str, float]:
        """CPU used while the other side had its turn, as a share of one core."""
        shares = {"jax": self.our_idle, "torch": self.its_idle}
        return {side: cpu / wall for side, (cpu, wall) in shares.items()}

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()


def _add(total, cpu, wall):
    total[0] += cpu
    total[1] += wall


def measure(
    contenders: dict[str, Contender], args, *, least_seconds: float = 0.0
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds per call of each contender by round, and of its very first call (compilation).

    A turn has as many calls as take `least_seconds`, by the last round of warm-up.
    """
    order = np.random.default_rng(args.seed)
    names = list(contenders)
    first = {name: contenders[name](1) for name in names}
    calls = dict.fromkeys(names, 1)
    for _ in range(args.warmup):
        for name in names:
            calls[name] = max(1, math.ceil(least_seconds / contenders[name](calls[name])))
    times: dict[str, list[float]] = {name: [] for name in names}
    for done in range(args.rounds):
        for i in order.permutation(len(names)):
            times[names[i]].append(contenders[names[i]](calls[names[i]]))
        last = ", ".join(f"{name} {seconds[-1]:.4f} s" for name, seconds in times.items())
        print(f"round {done + 1}/{args.rounds}: {last}", file=sys.stderr)
    return times, first


def compare(numerator: list[float], denominator: list[float], seed: int) -> dict[str, float]:
    """Median over rounds of numerator / denominator, and its 95 % bootstrap interval."""
    ratios = np.array(numerator) / np.array(denominator)
    picks = np.random.default_rng(seed).integers(len(ratios), size=(10_000, len(ratios)))
    low, high = np.quantile(np.median(ratios[picks], axis=1), [0.025, 0.975])
    return {"median": float(np.median(ratios)), "low": float(low), "high": float(high)}


def show(ratio: dict[str, float]) -> str:
    """For a table: 1.234 [1.200, 1.260]."""
    return "{median:.3f} | [{low:.3f}, {high:.3f}]".format(**ratio)


def table(head: Iterable[str], rows: Iterable[str]) -> list[str]:
    """Lines of a markdown table; a row is its cells joined by ` | `."""
    head = list(head)
    return [
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {row} |" for row in rows),
        "",
    ]


def report(path: Path | None, title: str, lines: list[str], data: dict, args, torch) -> None:
    """Prints the markdown; writes it and the JSON too unless `path` is None."""
    about = torch.about["versions"] if torch else {}
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    versions = {"python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in packages} | about
    options = {k: v for k, v in vars(args).items() if not isinstance(v, Path)}
    others = _used_by_others(options.pop("start"))
    # Where that Python and the results are on this machine is of no use on another.
    command = shlex.join(["python", *sys.orig_argv[1:]])
    command = command.replace(options.pop("torch_python"), "/path/to/python-with-torch")
    command = command.replace(f" --results_dir {args.results_dir}", "")
    data = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command,
        "options": options,
        "git": _git(),
        "hardware": {
            "cpu": _cpu_model(),
            "cpus": os.cpu_count(),
            "cpus_used": args.threads,
            "system": platform.platform(),
        },
        "versions": versions,
        "cores_used_by_others": others,
        **data,
    }
    if torch:
        data["idle_cpu"] = torch.idle()
        idle = ", ".join(f"{k} {100 * v:.1f} %" for k, v in data["idle_cpu"].items())
        lines = [*lines, f"CPU used during the other side's turns, of one core: {idle}.", ""]
    hardware, git = data["hardware"], data["git"]
    lines = [
        *(f"# {title}, {data['date'][:10]}", "", *lines),
        f"- {hardware['cpu']}, {args.threads} of {hardware['cpus']} CPUs, {hardware['system']}",
        f"- {', '.join(f'{k} {v}' for k, v in versions.items())}",
        f"- commit {git['commit']}{' with uncommitted changes' if git['dirty'] else ''}",
        f"- `{data['command']}`, {args.rounds} rounds",
    ]
    if others is not None:
        lines += [f"- other programs used {others:.2f} cores during the run"]
        if others > BUSY:
            lines[-1] += ": **not an idle machine, repeat this**"
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if path is None:
        print(f"a trial of fewer than {LEAST_ROUNDS} rounds: nothing is written", file=sys.stderr)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    for file, content in zip(_files(path), (json.dumps(data, indent=1) + "\n", text), strict=True):
        file.write_text(content)
        print(f"wrote {file}", file=sys.stderr)


def _files(path: Path) -> tuple[Path, Path]:
    return path.with_name(path.name + ".json"), path.with_name(path.name + ".md")


def _cpu_clocks() -> tuple[float, float, float] | None:
    """Seconds: wall, CPU of the whole machine, CPU of this process and its ended children."""
    try:
        ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    busy = sum(ticks) - ticks[3] - ticks[4]  # idle, iowait
    return time.perf_counter(), busy / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])


def _used_by_others(start) -> float | None:
    """Cores that other programs (or other guests of the host) used since `start`, on average."""
    end = _cpu_clocks()
    if start is None or end is None:
        return None
    wall, busy, own = (b - a for a, b in zip(start, end, strict=True))
    return max(0.0, busy - own) / wall


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
        return re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE).group(1)
    except (OSError, AttributeError):
        return platform.processor() or platform.machine()


def _git() -> dict:
    def git(*args):
        run = ["git", "--no-optional-locks", "-C", str(HERE.parent), *args]
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--", ":/", ":(top,exclude)benchmarks/results")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changes)}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "unknown", "dirty": True}
