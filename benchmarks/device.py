"""What the benchmarks of accelerators share: the device in words, and dated result files.

They run on a machine with nothing but jax, numpy and this repository: no CPU is pinned and no
torch is started, unlike in harness.py, of which the rest (rounds, intervals, tables) is used.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

from benchmarks import harness

PACKAGES = (
    *("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13"),
    *("libtpu", "tokamax", "numpy"),
)


def add_options(p: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Where results go."""
    p.add_argument("--results_dir", type=Path, default=harness.HERE / "results")
    p.add_argument("--overwrite", action="store_true", help="replace today's results")
    p.add_argument("--no_write", action="store_true", help="print only")
    return p


def describe() -> dict:
    """The default device, and the machine around it."""
    import jax

    device = jax.devices()[0]
    about = {
        "device": device.device_kind,
        "platform": jax.default_backend(),
        "devices": jax.device_count(),
        "cpu": harness._cpu_model(),
        "cpus": os.cpu_count(),
        "system": platform.platform(),
    }
    if about["platform"] == "gpu":
        about["compute_capability"] = str(getattr(device, "compute_capability", "unknown"))
        about["nvidia_smi"] = _nvidia_smi()
    return about


def _nvidia_smi() -> str:
    fields = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Of Python and of those of `PACKAGES` that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def result_path(args, name: str, hardware: str) -> Path | None:
    """Where this run's result goes, without a suffix; None where nothing is to be written."""
    if args.no_write:
        return None
    hardware = re.sub(r"[^a-z0-9]+", "-", hardware.lower()).strip("-") or "unknown"
    path = args.results_dir / f"{datetime.date.today()}-{name}-{hardware}"
    for file in harness._files(path):
        if file.exists() and not args.overwrite:
            raise SystemExit(f"{file} exists; give --overwrite to replace it")
    return path


def report(path: Path | None, title: str, lines: list[str], data: dict, args, hardware: dict):
    """Prints the markdown; writes it and the JSON too unless `path` is None."""
    options = {k: v for k, v in vars(args).items() if not isinstance(v, Path)}
    data = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "options": options,
        "git": harness._git(),
        "hardware": hardware,
        "versions": versions(),
        **data,
    }
    git = data["git"]
    text = "\n".join(
        [
            *(f"# {title}, {data['date'][:10]}", "", *lines),
            f"- {', '.join(f'{k} {v}' for k, v in hardware.items())}",
            f"- {', '.join(f'{k} {v}' for k, v in data['versions'].items())}",
            f"- commit {git['commit']}{' with uncommitted changes' if git['dirty'] else ''}",
            f"- `{data['command']}`",
        ]
    )
    print(text)
    if path is None:
        print("nothing is written", file=sys.stderr)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = (json.dumps(data, indent=1) + "\n", text + "\n")
    for file, content in zip(harness._files(path), contents, strict=True):
        file.write_text(content)
        print(f"wrote {file}", file=sys.stderr)
