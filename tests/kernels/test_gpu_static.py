"""The GPU kernels compile for an H200 that need not be there; jax's CUDA packages have to be."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="jax's CUDA packages (several GB) are not installed",
)
@pytest.mark.parametrize("operation", ["rotation", "attention"])
def test_no_kernel_spills(operation):
    command = [sys.executable, "-m", "benchmarks.gpu_static", "--no_write", "--only", operation]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, cwd=root, env=os.environ, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Bytes spilled: 0." in run.stdout
