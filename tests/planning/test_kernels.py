"""The rates of the kernels are those that were counted."""

import json

import pytest

from repo_jax.planning.kernels import RATES
from tests.tiny_runs import ROOT

RESULT = ROOT / "benchmarks/results/2026-11-21-tpu_static-v5e-v5p-v6e.json"


@pytest.mark.parametrize("generation", RATES)
def test_rates_are_those_of_the_result_file(generation):
    data = json.loads(RESULT.read_text())
    T, N = data["sizes"]["T"], data["sizes"]["N"]
    rates = RATES[generation]
    fields = {
        ("whole ours", "rotary_attention_forward"): (rates.attention_forward, N * T * (T + 1) / 2),
        ("whole ours", "rotary_attention_backward"): (
            *(rates.attention_backward, N * T * (T + 1) / 2),
        ),
        ("whole ours", "rotate_forward"): (rates.rotate_forward, 2 * N * T),
        ("whole ours", "rotate_backward"): (rates.rotate_backward, 2 * N * T),
        ("rotation ours, P = 1", "rotate_forward"): (rates.shared_forward, 2 * N * T),
        ("rotation ours, P = 1", "rotate_backward"): (rates.shared_backward, 2 * N * T),
    }
    for (what, kernel), (rate, units) in fields.items():
        (cost,) = (
            cost
            for cost in data["costs"]
            if (cost["generation"], cost["what"]) == (generation, what)
            and cost["norm"]
            and cost["backward"]
        )
        bundles = sum(p["bundles"] * p["times"] for p in cost["paths"] if kernel in p["kernel"])
        assert rate == pytest.approx(bundles / units, rel=1e-3), (what, kernel)
