"""A suite is run, stopped, killed and resumed; a cell run again gives the same bits."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from repo_jax import cli, from_pretrained
from repo_jax.data import Tokenizer
from repo_jax.errors import ConfigError
from repo_jax.evidence import cell as cells
from repo_jax.evidence import command
from repo_jax.evidence.runner import run_suite
from repo_jax.evidence.suite import load
from repo_jax.flops import model_flops_per_token
from repo_jax.interop import config_json
from tests.tiny_runs import ROOT

ONE = ["--suite", "tiny", "--tasks", "reversal", "--methods", "rope,repo", "--seeds", "0"]


@pytest.fixture(autouse=True)
def fast_compilation(monkeypatch):
    """Models train for eight steps, here or in workers, so that compiling is what takes time."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def start(out, *options):
    """The command in a process of its own; it says on stderr what it does."""
    return subprocess.Popen(
        [sys.executable, "-m", "repo_jax.evidence", *ONE, "--out", str(out), *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def numbers(out, name):
    """All of a cell that must not differ when it is run again."""
    record = json.loads((out / "cells" / f"{name}.json").read_text())
    weights = (out / "models" / name / "model.safetensors").read_bytes()
    kept = ("evaluations", "losses", "train_loss", "parameters", "config_hash", "config")
    return {key: record[key] for key in kept}, weights


def test_a_killed_suite_goes_on_and_a_cell_alone_gives_the_same_bits(tmp_path):
    out, again = tmp_path / "out", tmp_path / "again"
    first, second = (out / "cells" / f"reversal-{m}-0.json" for m in ("rope", "repo"))
    process = start(out, "--workers", "1")
    while not first.exists() and process.poll() is None:
        time.sleep(0.05)
    process.kill()  # while the second cell starts
    process.communicate()
    assert first.exists()
    assert not second.exists()
    before = first.read_bytes()

    # SIGTERM ends the cell that runs, cleanly.
    process = start(out, "--workers", "1")
    line = process.stderr.readline()
    assert line.startswith("1 of 2 cells done")
    os.kill(process.pid, signal.SIGTERM)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "stopped (SIGTERM) with 1 of 2 cells done; the same command goes on" in errors
    assert "| rope |" in output
    assert not second.exists()

    # In other company than alone below, and next to nothing that was half done.
    command.main([*ONE, "--out", str(out), "--workers", "2"])
    assert first.read_bytes() == before
    assert {path.name for path in out.iterdir()} >= {"results.json", "results.csv", "summary.md"}
    assert not list(out.rglob("*.part"))

    run_suite(
        load("tiny", experiments=["reversal"], methods=["repo"], seeds=[0]),
        *(again,),
        **dict(command="", workers=1, minutes=None),
    )
    assert numbers(again, "reversal-repo-0") == numbers(out, "reversal-repo-0")

    record = json.loads(second.read_text())
    model, params = from_pretrained(out / "models" / "reversal-repo-0")
    assert model.config.kinds == ("repo", "repo")
    assert record["parameters"] == sum(x.size for x in jax.tree.leaves(params))
    length = load("tiny").experiments["reversal"].task.length
    assert record["flops_per_token"] == model_flops_per_token(model.config, length)
    tokenizer = Tokenizer.load(out / "models" / "reversal-repo-0")
    assert tokenizer.encode("<start> a b <turn> b a") == [1, 4, 5, 2, 5, 4]


def test_seeds_together_leave_a_record_and_a_model_each(tmp_path):
    """What runs on GPUs. Training so is wrong on CPUs, and so nothing is said of what is learned;
    but what is said of a model is true of the model that is saved."""
    suite = load("tiny", experiments=["reversal"], methods=["repo_blend"], seeds=[0, 3])
    cells.run(suite.cells(), tmp_path)
    for cell in suite.cells():
        record = json.loads(cells.cell_path(tmp_path, cell).read_text())
        assert (record["seed"], record["seeds_together"]) == (cell.seed, [0, 3])
        assert len(record["losses"]) == 8
        model, params = from_pretrained(cells.model_path(tmp_path, cell))
        read = jax.jit(
            lambda tokens, model=model, params=params: model.apply(
                {"params": params}, tokens, None, 0.5
            )
        )
        for row in record["evaluations"]:
            examples = cell.task.evaluation_sets()[row["set"]]
            logits = read(examples.tokens).logits
            right = np.pad(logits.argmax(-1), ((0, 0), (1, 0)))[:, :-1] == examples.tokens
            share = right[examples.answers].mean()
            assert row["tokens"] == pytest.approx(share, abs=1e-9)
    assert len({str(cells.cell_path(tmp_path, c).read_text()) for c in suite.cells()}) == 2


def test_no_cell_is_begun_that_would_not_end_in_time(tmp_path):
    suite = load("tiny", experiments=["reversal"], methods=["rope"], seeds=[0, 1])
    out = tmp_path / "out"
    # One is done, and took an hour.
    done, _ = suite.cells()
    record = {"experiment": "reversal", "method": "rope", "seed": 0, "seconds": 3600.0}
    record |= {"evaluations": [], "hardware": {"device": ""}}
    unknown = ("steps", "parameters", "flops_per_token", "train_loss", "step_seconds")
    record |= dict.fromkeys((*unknown, "config_hash", "commit"))
    out.mkdir()
    (out / "suite.json").write_text("{}")
    cells.write(cells.cell_path(out, done), json.dumps(record))
    outcome = run_suite(suite, out, command="", workers=1, minutes=30.0)
    assert dataclasses.astuple(outcome) == (1, 2, "time")


def test_a_folder_made_with_another_config_is_refused_by_the_options_name(tmp_path, capsys):
    out = tmp_path / "out"
    # Too short a time for any cell; the folder has the definitions.
    command.main([*ONE, "--out", str(out), "--minutes", "1e-9"])
    assert "stopped (time) with 0 of 2 cells done" in capsys.readouterr().err
    changed = ["--set", "experiments.*.optimizer.learning_rate=1e-4"]
    with pytest.raises(SystemExit):
        cli.run(lambda: command.main([*ONE, "--out", str(out), *changed]))
    said = capsys.readouterr().err
    assert "experiments.reversal.optimizer.learning_rate is 0.0001, but" in said
    assert "was begun with 0.005" in said
    # Other seeds and methods are no other definition.
    more = ["--suite", "tiny", "--methods", "nope", "--minutes", "1e-9", "--out", str(out)]
    command.main(more)


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"is not empty and has no suite\.json"):
        command.main([*ONE, "--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_headline_that_does_not_exist_is_refused_before_long_work(tmp_path):
    changed = ["--set", "experiments.reversal.headline=[length_7]"]
    with pytest.raises(ConfigError, match=r"headline has 'length_7'; there are length_2, length_6"):
        command.main([*ONE, "--out", str(tmp_path / "out"), *changed])


def test_vmapped_seeds_are_refused_on_cpus(tmp_path):
    with pytest.raises(ConfigError, match="vmap_seeds is true; it must be false on a CPU"):
        command.main([*ONE, "--out", str(tmp_path / "out"), "--vmap_seeds", "true"])


def test_models_are_saved_in_a_format_that_keeps_their_positions(tmp_path):
    """`repo_shared` and others cannot be expressed upstream."""
    _, config = load("tiny", methods=["rope", "repo_shared"]).cells()[1].method_and_model()
    assert config_json.write(config, "float32", "repo_jax")["repo_jax"]["positions"]["heads"] == (
        "shared"
    )
