"""The reference numbers of tests/golden: how they were made is in its README."""

import json
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent / "golden"
SETS = ("rope", "repo", "r2n1")


def reference(name: str) -> dict[str, np.ndarray]:
    with np.load(ROOT / name / "reference.npz") as arrays:
        return dict(arrays)


def grad_norms(name: str) -> dict[str, float]:
    return json.loads((ROOT / name / "grad_norms.json").read_text())
