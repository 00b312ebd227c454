"""What a number was measured with: hardware, versions, commit."""

import functools
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import jax

from repo_jax import __version__

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


@functools.cache
def hardware() -> dict[str, str | int]:
    """The device that JAX computes on, the CPU and its cores, the system."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": _cpu() if device.platform == "cpu" else device.device_kind,
        "cpu": _cpu(),
        "cores": os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.machine()}",
    }


@functools.cache
def versions() -> dict[str, str]:
    """Of this library, Python and what numbers depend on."""
    found = {"repo-jax": __version__, "python": platform.python_version()}
    return found | {name: importlib.metadata.version(name) for name in _PACKAGES}


def commit() -> str:
    """Of the checkout that this file is in, with a mark if Python files that decide numbers have
    changes or are new; else `unknown`."""

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        code = (":/repo_jax/*.py", ":/pallas_kernels/*.py")
        changed = git("status", "--porcelain", "--untracked-files=all", "--", *code)
        return git("rev-parse", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.machine()
