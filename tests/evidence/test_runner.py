"""A suite is run, stopped, killed and resumed; a cell run again gives the same bits."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import optax
import pytest

from repo_jax import cli, from_pretrained
from repo_jax.data import Tokenizer
from repo_jax.errors import ConfigError, TrainingError
from repo_jax.evidence import about, command, results, runner
from repo_jax.evidence import cell as cells
from repo_jax.evidence.runner import Outcome, run_suite
from repo_jax.evidence.suite import load
from repo_jax.flops import model_flops_per_token
from repo_jax.interop import config_json
from repo_jax.modeling import RePoLM, init_params
from tests.tiny_runs import ROOT

ONE = ["--suite", "tiny", "--tasks", "reversal", "--methods", "rope,repo", "--seeds", "0"]


@pytest.fixture(autouse=True)
def workers_compile_fast(monkeypatch):
    """As this process does: models train for eight steps."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


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
    assert record["commit"] == about.commit()
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
        assert record["index_weight"] == 0.5
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


@pytest.mark.parametrize(("over", "chunk"), [("examples", 2), ("answers", 50)])
def test_losses_are_means_as_the_suite_says_and_a_cell_stopped_at_its_end_leaves_nothing(
    tmp_path, monkeypatch, over, chunk
):
    changes = [f"experiments.recall.loss_over={over}", "experiments.recall.steps=3"]
    changes += ["experiments.recall.model.n_layers=1", "experiments.recall.recall.factors=[1]"]
    changes += ["experiments.recall.headline=[]"]
    # Too little for any weight to change.
    changes += ["experiments.recall.optimizer.learning_rate=1e-30"]
    (cell,) = load(
        "tiny", experiments=["recall"], methods=["rope"], seeds=[0], changes=changes
    ).cells()
    heard = []

    def watch(step, loss):
        if step in dict(heard):  # all steps are done, and nothing is written yet
            raise InterruptedError
        heard.append((step, loss))

    monkeypatch.setattr(cells, "_CHUNK", chunk)
    with pytest.raises(InterruptedError):
        cells.run([cell], tmp_path / "out", watch)
    assert not (tmp_path / "out").exists()

    model = RePoLM(cell.method_and_model()[1])
    params = init_params(model, jax.random.key(0))
    apply = jax.jit(model.apply)
    assert [step for step, _ in heard] == ([2, 3] if chunk == 2 else [3])
    for step, loss in heard:
        batch = cell.task.training_batch(0, step - 1, cell.definition.batch_size)
        assert len(set(batch.answers.sum(1))) > 1
        log_p = np.asarray(jax.nn.log_softmax(apply({"params": params}, batch.tokens).logits))
        nll = -np.take_along_axis(log_p[:, :-1], batch.tokens[:, 1:, None], 2)[..., 0]
        answers = batch.answers[:, 1:]
        rows = [n[a].mean() for n, a in zip(nll, answers, strict=True)]
        expected = np.mean(rows) if over == "examples" else nll[answers].mean()
        assert loss == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("method", ["rope", "nope", "repo_all"])
def test_a_model_that_continues_begins_with_the_weights_that_rope_came_to(
    method, tmp_path, monkeypatch
):
    monkeypatch.setattr(cells, "_CHUNK", 1)
    chosen = dict(experiments=["reversal"], seeds=[3])
    (base,) = load(
        "tiny", methods=["rope"], changes=["experiments.reversal.steps=4"], **chosen
    ).cells()
    changes = ["experiments.reversal.rope_steps=4", "experiments.reversal.steps=3"]
    (cell,) = load("tiny", methods=[method], changes=changes, **chosen).cells()
    assert cell.config_hash() != base.config_hash()
    cells.run([base], tmp_path / "base")
    heard = {}
    cells.run([cell], tmp_path / "out", heard.__setitem__)
    assert list(heard) == list(range(1, 8))

    _, rope = from_pretrained(cells.model_path(tmp_path / "base", base))
    config = cell.method_and_model()[1]
    assert config.d_ff == cell.definition.model.d_ff
    params = init_params(RePoLM(config), jax.random.key(3))
    params = {**rope, "layers": {**params["layers"], **rope["layers"]}}
    batch = cell.task.training_batch(3, 4, cell.definition.batch_size)
    logits = RePoLM(config).apply({"params": params}, batch.tokens).logits[:, :-1]
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch.tokens[:, 1:])
    assert heard[5] == pytest.approx(float(nll[batch.answers[:, 1:]].mean()), rel=1e-5)
    assert len(json.loads(cells.cell_path(tmp_path / "out", cell).read_text())["losses"]) == 3

    # Another method goes on from the same weights, which are not trained again.
    (kept,) = (tmp_path / "out" / "continued").iterdir()
    weights = (cells.model_path(tmp_path / "base", base) / "model.safetensors").read_bytes()
    assert (kept / "model.safetensors").read_bytes() == weights
    heard.clear()
    cells.run([dataclasses.replace(cell, method="r2n1")], tmp_path / "out", heard.__setitem__)
    assert list(heard) == [5, 6, 7]


class Clock:
    """Time that passes when a test says so."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def accelerator(monkeypatch):
    """Cells that train nothing, run in this process; each step takes ten seconds.

    Attributes of what it gives: `ran`, the names of the cells of each call; `broken`, methods.
    """
    clock = Clock()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(time, "monotonic", clock)
    clock.ran, clock.broken = [], set()

    def run(group, out, watch, *, commit):
        clock.ran.append([cell.name for cell in group])
        if group[0].method in clock.broken:
            raise RuntimeError("out of memory")
        for step in range(1, group[0].definition.steps + 1):
            clock.now += 10.0
            watch(step, 1.0)
        for cell in group:
            cells.write(cells.cell_path(out, cell), json.dumps(stub(cell, group, commit)))

    monkeypatch.setattr(cells, "run", run)
    return clock


def stub(cell, group, commit="", seconds=80.0):
    """A record with what a runner and a results file need."""
    unknown = ("steps", "parameters", "flops_per_token", "train_loss", "step_seconds")
    return {
        **dict.fromkeys(unknown),
        **{"experiment": cell.experiment, "method": cell.method, "seed": cell.seed},
        **{"seconds": seconds, "seeds_together": [c.seed for c in group], "commit": commit},
        **{"evaluations": [], "hardware": {"device": ""}, "config_hash": cell.config_hash()},
    }


def run_here(out, *, minutes=None, changes=(), **chosen):
    suite = load("tiny", experiments=["reversal"], changes=changes, **chosen)
    return run_suite(suite, out, command="", minutes=minutes)


def test_cells_run_one_after_the_other_on_an_accelerator(tmp_path, accelerator):
    assert run_here(tmp_path / "out", methods=["rope", "repo"]) == Outcome(4, 4, None)
    names = ["reversal-rope-0", "reversal-repo-0", "reversal-rope-1", "reversal-repo-1"]
    assert accelerator.ran == [[name] for name in names]
    assert {r["commit"] for r in results.collect(tmp_path / "out")} == {about.commit()}
    # What is done is not done again.
    assert run_here(tmp_path / "out", methods=["rope", "nope"]) == Outcome(4, 4, None)
    assert accelerator.ran[4:] == [["reversal-nope-0"], ["reversal-nope-1"]]


def test_the_time_that_is_left_is_that_of_the_cells_that_are_done(tmp_path, accelerator, capsys):
    run_here(tmp_path / "out", methods=["rope", "repo"])
    lines = capsys.readouterr().err.splitlines()
    # A cell takes eighty seconds.
    assert "1 of 4 cells done; about 4 min left" in lines
    assert "3 of 4 cells done; about 1 min left" in lines
    assert lines[-1] == "4 of 4 cells done"


def test_a_cell_that_fails_stops_no_other(tmp_path, accelerator):
    accelerator.broken = {"nope"}
    outcome = run_here(tmp_path / "out", seeds=[0])
    assert outcome == Outcome(2, 3, None, ("reversal-nope-0",))
    found = results.load(tmp_path / "out")["cells"]
    assert [record["method"] for record in found] == ["repo", "rope"]
    accelerator.broken = set()
    assert run_here(tmp_path / "out", seeds=[0]) == Outcome(3, 3, None)


def test_a_worker_that_fails_stops_no_other(tmp_path, monkeypatch):
    class Finished:
        """A worker that has ended; every second one without success."""

        done, loss, seconds = 1.0, 1.0, None

        def __init__(self, cell, out, commit):
            self.cell, self.out = cell, out
            self.sentinel, writer = os.pipe()
            os.close(writer)

        def poll(self):
            os.close(self.sentinel)
            if self.cell.seed == 1:
                return 3
            record = stub(self.cell, [self.cell])
            cells.write(cells.cell_path(self.out, self.cell), json.dumps(record))
            return 0

    monkeypatch.setattr(runner, "Worker", Finished)
    outcome = run_here(tmp_path / "out", methods=["rope", "repo"], seeds=[0, 1, 2])
    assert outcome == Outcome(4, 6, None, ("reversal-rope-1", "reversal-repo-1"))
    assert [r["seed"] for r in results.load(tmp_path / "out")["cells"]] == [0, 2, 0, 2]


def test_the_command_reports_what_there_is_and_then_says_which_cells_failed(monkeypatch, tmp_path):
    outcome = Outcome(1, 2, None, ("reversal-nope-0",))
    monkeypatch.setattr(command, "run_suite", lambda *_, **__: outcome)
    with pytest.raises(TrainingError, match=r"^1 of 2 cells failed, .*: reversal-nope-0; "):
        command.main([*ONE, "--out", str(tmp_path / "out")])


def test_seeds_that_train_together_come_out_as_alone(tmp_path):
    group = load("tiny", experiments=["recall"], methods=["repo"], seeds=[0, 1]).cells()
    cells.run(group, tmp_path / "together")
    for cell in group:
        cells.run([cell], tmp_path / "alone")
        alone, together = (
            json.loads(cells.cell_path(tmp_path / out, cell).read_text())
            for out in ("alone", "together")
        )
        assert together["seeds_together"] == [0, 1]
        np.testing.assert_allclose(together["losses"], alone["losses"], atol=1e-5)
        for ours, true in zip(together["evaluations"], alone["evaluations"], strict=True):
            np.testing.assert_allclose(ours["loss"], true["loss"], atol=1e-5)
        params = (
            from_pretrained(cells.model_path(tmp_path / out, cell))[1]
            for out in ("together", "alone")
        )
        jax.tree.map(lambda *x: np.testing.assert_allclose(*x, atol=1e-4), *params)


def test_seeds_that_train_together_are_missing_together(tmp_path, accelerator):
    out, together = tmp_path / "out", dict(methods=["rope", "repo"], changes=["vmap_seeds=true"])
    run_here(out, **together)
    rope, repo = [["reversal-rope-0", "reversal-rope-1"], ["reversal-repo-0", "reversal-repo-1"]]
    assert accelerator.ran == [rope, repo]
    # As if the machine had gone down between two records.
    (out / "cells" / "reversal-repo-1.json").unlink()
    assert run_here(out, **together) == Outcome(4, 4, None)
    assert accelerator.ran[2:] == [repo]
    # More seeds leave those alone that are whole.
    run_here(out, **together, seeds=[0, 1, 2, 3])
    assert accelerator.ran[3:] == [
        ["reversal-rope-2", "reversal-rope-3"],
        ["reversal-repo-2", "reversal-repo-3"],
    ]


def test_a_time_in_which_no_cell_ends_is_refused_once_it_is_known(tmp_path, accelerator):
    out, rope = tmp_path / "out", dict(methods=["rope"])
    # A cell takes eighty seconds.
    assert run_here(out, minutes=1, **rope) == Outcome(0, 2, "time")
    begun = len(accelerator.ran)
    with pytest.raises(
        ConfigError, match=r"--minutes is 1; .*: reversal-rope-0 takes about 1\.33 minutes"
    ):
        run_here(out, minutes=1, **rope)
    assert len(accelerator.ran) == begun
    # Two minutes do for one, and the other is not begun.
    assert run_here(out, minutes=2, **rope) == Outcome(1, 2, "time")
    assert accelerator.ran[begun:] == [["reversal-rope-0"]]
    assert run_here(out, minutes=2, **rope) == Outcome(2, 2, None)


def test_a_time_shorter_than_that_of_the_cells_that_are_done_is_refused(tmp_path):
    suite = load("tiny", experiments=["reversal"], methods=["rope"], seeds=[0, 1])
    done = suite.cells()[0]
    (tmp_path / "suite.json").write_text("{}")
    record = stub(done, [done], seconds=3600.0)
    cells.write(cells.cell_path(tmp_path, done), json.dumps(record))
    with pytest.raises(ConfigError, match="reversal-rope-1 takes about 60 minutes"):
        run_suite(suite, tmp_path, command="", workers=1, minutes=30.0)


def test_a_record_of_another_config_is_refused_by_its_name(tmp_path):
    suite = load("tiny", experiments=["reversal"], methods=["rope"], seeds=[0])
    (cell,) = suite.cells()
    (tmp_path / "suite.json").write_text("{}")
    record = stub(cell, [cell]) | {"config_hash": "abc"}
    cells.write(cells.cell_path(tmp_path, cell), json.dumps(record))
    with pytest.raises(ConfigError, match=r"reversal-rope-0\.json has the config_hash abc, and"):
        run_suite(suite, tmp_path, command="", workers=1, minutes=None)


def test_all_commands_that_made_a_folder_are_kept(tmp_path, accelerator):
    suite = load("tiny", experiments=["reversal"], methods=["rope"], seeds=[0])
    for given in ("one", "two", "one"):
        run_suite(suite, tmp_path / "out", command=given, minutes=None)
    assert results.load(tmp_path / "out")["commands"] == ["one", "two"]


def test_a_commit_is_marked_if_code_that_decides_numbers_changed(tmp_path, monkeypatch):
    file = tmp_path / "repo_jax" / "evidence" / "about.py"
    file.parent.mkdir(parents=True)
    file.write_text("")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *arguments], check=True)
    monkeypatch.setattr(about, "__file__", str(file))
    (tmp_path / "notes.py").write_text("")
    (tmp_path / "repo_jax" / "notes.txt").write_text("")
    assert re.fullmatch("[0-9a-f]{40}", about.commit())
    (tmp_path / "repo_jax" / "new.py").write_text("")
    assert re.fullmatch("[0-9a-f]{40} with changes", about.commit())


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
    message = "vmap_seeds is true; it must be false on a CPU: add --vmap_seeds false"
    with pytest.raises(ConfigError, match=message):
        command.main([*ONE, "--out", str(tmp_path / "out"), "--vmap_seeds", "true"])


def test_models_are_saved_in_a_format_that_keeps_their_positions(tmp_path):
    """`repo_shared` and others cannot be expressed upstream."""
    _, config = load("tiny", methods=["rope", "repo_shared"]).cells()[1].method_and_model()
    assert config_json.write(config, "float32", "repo_jax")["repo_jax"]["positions"]["heads"] == (
        "shared"
    )


def test_chunks_of_steps_give_the_same_bits_again(tmp_path, monkeypatch, optimized):
    changes = ["experiments.*.model.n_layers=1", "experiments.*.reversal.test_lengths=[2]"]
    suite = load("tiny", experiments=["reversal"], methods=["repo_all"], seeds=[0], changes=changes)
    heard = []
    monkeypatch.setattr(cells, "_CHUNK", 4)
    for folder in ("one", "other"):
        cells.run(suite.cells(), tmp_path / folder, lambda step, loss: heard.append(step))
    assert heard == 2 * [4, 8, 8]
    one, other = (numbers(tmp_path / f, "reversal-repo_all-0") for f in ("one", "other"))
    assert one == other
