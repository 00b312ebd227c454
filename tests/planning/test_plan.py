"""The plan command, end to end, for TPUs that are not there, and its refusals."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest

from repo_jax.config import (
    DataConfig,
    DecoderConfig,
    MeshConfig,
    PositionConfig,
    TrainConfig,
    TrainingConfig,
)
from repo_jax.planning import report, targets
from repo_jax.planning.plan import Memory, Plan
from tests.kernels.tpu_compile import needs_libtpu
from tests.tiny_runs import ROOT

pytestmark = pytest.mark.usefixtures("optimized")

GIB = 2**30
SMALL = (
    *("--model.vocab_size", "512", "--model.d_model", "256", "--model.n_layers", "3"),
    *("--model.n_heads", "2", "--model.d_ff", "512", "--model.dtype", "bfloat16"),
    *("--data.sequence_length", "256", "--data.batch_size", "16", "--model.remat", "attention"),
)


def run_plan(*options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "repo_jax.plan", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@needs_libtpu
def test_a_small_run_on_four_chips(tmp_path):
    file = tmp_path / "plan.json"
    options = ("--training.accumulation", "2", "--json", str(file))
    run = run_plan("--topology", "v5e:2x2", *SMALL, *options)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "fits" in run.stdout
    assert "ESTIMATE" in run.stdout
    found = json.loads(file.read_text())
    memory, cost = found["memory"], found["cost"]

    # A quarter of each parameter but of norms' scales and of the map to z, in all three layers;
    # and twice that in the optimizer.
    whole = 256 * (4 * 3 + 1) + 3 * 32 * 2
    assert memory["parameters"] == 4 * ((found["parameters"] - whole) / 4 + whole)
    assert 2 * memory["parameters"] <= memory["optimizer"] <= 2 * memory["parameters"] + 100
    assert memory["batch"] == 16 * 256 * 4 / 4
    assert memory["needed"] >= memory["parameters"] + memory["optimizer"] + memory["temporary"]

    # Model FLOPs with what the mask leaves, and a layer's forward products again.
    assert cost["unknown"] == []
    model = found["model_flops_causal"]
    assert model < 4 * cost["flops"] < 1.34 * model
    attention = 12 * 3 * 256 * (256 + 1) / 2 * 16 * 256
    forward_backward = 4 * cost["kernel_flops"]
    # Of the twelve, four are forward; the backward kernel computes the scores again.
    assert forward_backward == pytest.approx(attention * 14 / 12)

    gathered = [row for row in cost["transfers"] if row["kind"] == "all-gather"]
    assert gathered
    assert all(row["group_size"] == 4 for row in gathered)
    time = cost["time"]
    assert 0 < max(time["products"], time["memory"], time["beside"]) <= time["step"]
    assert time["step"] <= time["without_overlap"]
    assert found["tokens_per_second"] == pytest.approx(16 * 256 / time["step"])


@pytest.mark.skipif(not targets.has_cuda(), reason="jax's CUDA packages are not installed")
def test_a_small_run_on_eight_gpus(tmp_path):
    file = tmp_path / "plan.json"
    run = run_plan("--topology", "h200:8", *SMALL, "--json", str(file))
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(file.read_text())
    model = found["model_flops_causal"]
    assert model < 8 * found["cost"]["flops"] < 1.34 * model
    assert found["cost"]["unknown"] == []


@needs_libtpu
def test_a_run_that_does_not_fit_exits_with_what_to_change():
    sizes = ("--model.vocab_size", "16777216", "--data.sequence_length", "128")
    run = run_plan("--topology", "v5e:2x2", *SMALL, *sizes)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "does NOT fit" in run.stdout
    assert "take a topology with more devices, and raise mesh.fsdp" in run.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--topology", "v5e"), "--topology is 'v5e'; it must be one of v5e, v5p, v6e, h200"),
        (("--topology", "v5p:4x4"), "after v5p: stands 3 numbers, as in v5p:4x4x4"),
        (("--topology", "v5e:2x2", "--mesh.slices", "2"), "only one slice can be planned"),
        pytest.param(
            ("--topology", "v5e:2x2", "--mesh.fsdp", "3"),
            "it must use all 4 devices",
            marks=needs_libtpu,
        ),
    ],
)
def test_mistakes_are_one_sentence(options, message):
    run = run_plan(*options, *SMALL)
    assert run.returncode == 2
    assert message in run.stderr.splitlines()[-1]


def test_no_file_is_overwritten(tmp_path):
    file = tmp_path / "plan.json"
    file.write_text("mine")
    run = run_plan("--topology", "v5e:2x2", *SMALL, "--json", str(file))
    assert run.returncode == 2
    assert f"--json: {file} exists; name a new file, or give --overwrite true" in run.stderr
    assert file.read_text() == "mine"
    run = run_plan("--topology", "v5e:2x2", *SMALL, "--json", str(file / "inside"))
    assert run.returncode == 2
    assert f"--json: {file} is no folder" in run.stderr


@needs_libtpu
def test_the_recipe_of_1b_compiles_and_fits_on_eight_chips():
    # libtpu 0.0.42 crashes here without an option of training.program.COMPILER_OPTIONS.
    options = ("--topology", "v6e:2x4", "--training.accumulation", "32")
    run = run_plan("--config", "configs/olmo2_1b_repo.yaml", *options)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    assert "fits" in run.stdout


def refused(parameters: float, *, mesh=None, remat="attention", accumulation=1, **memory) -> Plan:
    """A plan of 64 rows a step, that needs 20 GiB of 16."""
    model = DecoderConfig(*(64, 32, 2, 2, 64), positions=PositionConfig(preset="rope"), remat=remat)
    config = TrainConfig(
        model=model,
        data=DataConfig(tokens="x", batch_size=64),
        training=TrainingConfig(accumulation=accumulation),
        mesh=MeshConfig(),
    )
    state = int(parameters * GIB)
    return Plan(
        *(config, "v5e:4x4", "v5e", 16, 197e12),
        mesh={"data": 1, "fsdp": 16, "tensor": 1, "context": 1} | (mesh or {}),
        parameters=10**9,
        memory=Memory(state, 2 * state, 0, int(8 * GIB), 0, 20 * GIB, 16 * GIB),
        cost=None,
        compile_seconds=1.0,
        versions={},
    )


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (refused(4.0), "take a topology with more devices, and raise mesh.fsdp, or set optimizer."),
        (refused(4.0, mesh={"data": 4, "fsdp": 4}), "raise mesh.fsdp, say to 16"),
        (refused(0.5), "raise training.accumulation from 1 to 2"),
        (refused(0.5, accumulation=4, remat="none"), "set model.remat to attention"),
        (refused(0.5, accumulation=4), "set model.remat to full"),
        (refused(0.5, accumulation=4, remat="full"), "raise mesh.context"),
    ],
)
def test_advice_is_for_what_takes_the_most(plan, words):
    assert not plan.memory.fits
    said = report.advice(plan)
    assert said.startswith("a device needs 4.00 GiB more than it has, mostly")
    assert words in said


def test_the_guide_has_the_table_of_its_result_file():
    guide = (ROOT / "docs" / "8-planning.md").read_text()
    table = guide.split("begin -->")[1].split("<!--")[0]
    name = re.search(r"\]\(\.\./(benchmarks/results/\S+\.md)\)", table)[1]
    result = (ROOT / name).read_text()
    rows = [line for line in table.splitlines() if line.startswith(("|", "RePo against"))]
    assert len(rows) == 2 + 8 + 1
    for row in rows:
        assert row in result.splitlines()


def test_what_fits_fits():
    memory = Memory(GIB, 2 * GIB, 0, 8 * GIB, 0, 12 * GIB, 16 * GIB)
    assert memory.fits
    assert not dataclasses.replace(memory, temporary=None).fits
