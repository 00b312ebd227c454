"""Whole runs: killed, stopped, continued, refused; and what they leave behind."""

import dataclasses
import json
import math
import random
import re
import shutil
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from repo_jax import cli, load_run
from repo_jax.config import TrainingConfig
from repo_jax.data import Tokenizer, byte_tokenizer, open_data
from repo_jax.errors import ConfigError
from repo_jax.evaluation.perplexity import score
from repo_jax.modeling import RePoLM
from repo_jax.training import loop
from repo_jax.training import run_dir as run_directory
from repo_jax.training.checkpoints import Checkpoints, abstract_params
from repo_jax.training.metrics import MetricsWriter, read_metrics
from repo_jax.training.step import TrainState
from tests.tiny_runs import (
    TrainProcess,
    assert_same_bits,
    assert_same_run,
    checkpoints_of,
    keep_programs,
    last_checkpoint,
    last_line,
    lines_of,
    parse,
    state_of,
    train_here,
    write_config,
)

STEPS = 40
SPEED = {"tokens_per_second", "step_seconds"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Has tiny.yaml, its corpus, and the compiled programs of the processes started here."""
    folder = tmp_path_factory.mktemp("runs")
    write_config(folder)
    keep_programs(folder / "programs")
    yield folder
    keep_programs(None)


@pytest.fixture(scope="module")
def undisturbed(workspace):
    """A finished run that nothing happened to."""
    run_dir = workspace / "undisturbed"
    output = TrainProcess(workspace, run_dir).finish()
    assert f"finished at step {STEPS}" in output
    return run_dir


# Kills and signals.


def test_killed_at_any_moment_a_run_ends_in_the_same_bits(workspace, undisturbed):
    draw = random.Random(0)
    run_dir = workspace / "killed"
    moments = ["starting"] * 5 + ["running"] * 5 + ["writing"] * 10
    draw.shuffle(moments)
    half_written = []
    for moment in moments:
        target = last_checkpoint(run_dir) + draw.randint(1, 2)
        process = TrainProcess(workspace, run_dir)
        if moment == "starting":
            time.sleep(draw.uniform(0.1, 1.0))
        elif moment == "running":
            process.wait_until(lambda: last_line(run_dir) >= target)  # noqa: B023
            time.sleep(draw.uniform(0.0, 0.05))
        else:
            name = f"{target}.orbax-checkpoint-tmp"
            process.wait_until(lambda: name in checkpoints_of(run_dir))  # noqa: B023
        process.kill()
        left = checkpoints_of(run_dir)
        half_written += [entry for entry in left if not entry.isdigit()]
        print(f"killed while {moment}; checkpoints left: {sorted(left)}")
    assert half_written, "no kill came while a checkpoint was written"
    TrainProcess(workspace, run_dir).finish()
    assert_same_run(run_dir, undisturbed, STEPS)
    # That includes one batch for each step, none twice; nor is anything left of what was half
    # written or half deleted.
    hashes = [line["batch_hash"] for line in lines_of(run_dir) if "batch_hash" in line]
    assert len(hashes) == len(set(hashes)) == STEPS
    assert checkpoints_of(run_dir) == checkpoints_of(undisturbed)


def test_signals_save_and_the_same_command_goes_on(workspace, undisturbed):
    run_dir = workspace / "signalled"
    stopped_at = 0
    for number in (signal.SIGTERM, signal.SIGINT):
        process = TrainProcess(workspace, run_dir, "--training.checkpoint_every", "1000")
        process.wait_until(lambda: last_line(run_dir) > stopped_at)  # noqa: B023
        process.signal(number)
        output = process.finish()
        stopped_at = last_line(run_dir)
        assert 0 < stopped_at < STEPS
        assert last_checkpoint(run_dir) == stopped_at
        message = f"{number.name}: saved step {stopped_at} to {run_dir}; the same command goes on"
        assert message in output.splitlines()
        assert f"stopped at step {stopped_at}" in output
        assert "Traceback" not in output
    output = TrainProcess(workspace, run_dir, "--training.checkpoint_every", "1000").finish()
    assert f"finished at step {STEPS}" in output
    assert_same_run(run_dir, undisturbed, STEPS)


# What a run leaves behind.


def test_metrics(workspace, undisturbed):
    lines = [json.loads(line) for line in (undisturbed / "metrics.jsonl").open()]
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, STEPS + 1))
    keys = {"step", "loss", "ce_loss", "z_loss", "grad_norm", "learning_rate", "tokens"} | SPEED
    for line in training:
        assert keys <= set(line)
        assert line["tokens"] == line["step"] * 8 * 32
        assert line["z_loss"] > 0
        np.testing.assert_allclose(line["loss"], line["ce_loss"] + line["z_loss"], rtol=1e-6)
        rate = 1e-2 * (1 - line["step"] / STEPS)
        np.testing.assert_allclose(line["learning_rate"], rate, atol=1e-9)
    # The first step compiles and has no speed; the others agree on theirs.
    assert training[0]["step_seconds"] is training[0]["tokens_per_second"] is None
    for line in training[1:]:
        np.testing.assert_allclose(line["tokens_per_second"] * line["step_seconds"], 256)
    assert training[-1]["learning_rate"] == 0.0
    assert training[-1]["ce_loss"] < training[0]["ce_loss"] - 1
    validation = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in validation] == [8, 16, 24, 32, 40]


def test_a_checkpoint_scores_what_was_logged(undisturbed):
    lines = read_metrics(undisturbed / "metrics.jsonl")
    logged = {line["step"]: line for line in lines if "val_loss" in line}
    model, params = load_run(undisturbed)
    config = run_directory.read_config(undisturbed)
    data = open_data(config.data, config.model)
    result = score(model, params, data.validation_batches(max_windows=8), data.byte_lengths)
    np.testing.assert_allclose(result.loss, logged[STEPS]["val_loss"], rtol=1e-6)
    bits = logged[STEPS]["val_bits_per_byte"]
    np.testing.assert_allclose(result.bits_per_byte, bits, rtol=1e-6)


def test_config_and_tokenizer_are_kept_whole(workspace, undisturbed):
    kept = run_directory.read_config(undisturbed)
    assert kept.model.eos_ids == (256,)  # learned from the data
    given = parse(workspace / "tiny.yaml")
    assert dataclasses.replace(kept, model=given.model) == given
    assert set(yaml.safe_load((undisturbed / "config.yaml").read_text())["training"]) == {
        field.name for field in dataclasses.fields(TrainingConfig)
    }
    assert Tokenizer.load(undisturbed).encode("abc") == [97, 98, 99]


def test_a_tokenizer_cut_short_by_a_kill_is_written_again(tmp_path):
    (tmp_path / "tokenizer.tmp").mkdir()
    (tmp_path / "tokenizer.tmp" / "tokenizer.json").write_text('{"version"')
    run_directory.keep_tokenizer(tmp_path, byte_tokenizer())
    assert Tokenizer.load(tmp_path).eos_id == 256
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json"}


HALF_WRITTEN = "7.orbax-checkpoint-tmp"


def state_full_of(step: int, shapes) -> TrainState:
    params = jax.tree.map(lambda x: jnp.full(x.shape, step, x.dtype), shapes)
    return TrainState(jnp.int32(step), params, (), jnp.zeros(2, jnp.uint32))


def test_the_last_and_the_best_are_kept(workspace, tmp_path):
    config = parse(workspace / "tiny.yaml")
    run_directory.write(tmp_path, config)
    shapes = abstract_params(RePoLM(config.model))
    state = lambda step: state_full_of(step, shapes)
    losses = {1: 4.0, 2: None, 3: 2.0, 4: None, 5: 3.0, 6: None, 7: 2.5, 8: None}
    with Checkpoints(tmp_path, keep_last=2) as checkpoints:
        assert checkpoints.best_loss is None
        for step, loss in losses.items():
            checkpoints.save(state(step), {}, loss)
        checkpoints.wait()
        assert checkpoints.best_loss == 2.0
    assert checkpoints_of(tmp_path) == {"3", "7", "8"}
    for asked, step in {"latest": 8, "best": 3, 7: 7, "7": 7}.items():
        _, params = load_run(tmp_path, asked)
        assert_same_bits(params, state(step).params)
    for missing in (5, "6", "newest"):
        message = rf"step '?{missing}'?: .* has the checkpoints 3, 7, 8; latest and best also"
        with pytest.raises(ConfigError, match=message):
            load_run(tmp_path, missing)


def test_what_kills_leave_half_written_or_half_deleted_does_no_harm(tmp_path):
    shapes = {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}
    with Checkpoints(tmp_path, keep_last=3) as checkpoints:
        for step, loss in {1: 2.0, 2: 3.0, 3: None, 4: 4.0}.items():
            checkpoints.save(state_full_of(step, shapes), {}, loss)
    for part in ("params", "metrics"):
        shutil.rmtree(tmp_path / "checkpoints" / "2" / part)
    shutil.copytree(tmp_path / "checkpoints" / "4", tmp_path / "checkpoints" / HALF_WRITTEN)
    # One that only reads leaves alone what another may be writing.
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.latest, checkpoints.find("best")) == (4, 1)
    assert HALF_WRITTEN in checkpoints_of(tmp_path)
    with Checkpoints(tmp_path, keep_last=3) as checkpoints:
        assert (checkpoints.latest, checkpoints.find("best")) == (4, 1)
        checkpoints.save(state_full_of(5, shapes), {}, None)
    assert checkpoints_of(tmp_path) == {"1", "3", "4", "5"}


def test_loading_what_is_no_run(tmp_path):
    with pytest.raises(ConfigError, match=r"is no run directory: it has no config\.yaml"):
        load_run(tmp_path)


@settings(max_examples=30)
@given(st.integers(0, 12), st.floats(0, 1), st.integers(0, 12))
def test_no_step_stands_twice_wherever_the_file_was_cut(tmp_path_factory, written, share, start):
    folder = tmp_path_factory.mktemp("metrics")
    writer = MetricsWriter(folder, TrainingConfig(), 0)
    for step in range(1, written + 1):
        writer.write(step, loss=step / 3)
    writer.close()
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[: round(share * path.stat().st_size)])
    whole = path.read_bytes().count(b"\n")
    writer = MetricsWriter(folder, TrainingConfig(), start)
    for step in range(start + 1, 15):
        writer.write(step, loss=math.nan)
    writer.close()
    steps = [json.loads(line)["step"] for line in path.open()]
    kept = min(start, max(whole, steps.index(start + 1)))
    assert steps == [*range(1, kept + 1), *range(start + 1, 15)]
    assert json.loads(path.read_text().splitlines()[-1])["loss"] is None


def test_tensorboard_gets_the_same_numbers(tmp_path):
    writer = MetricsWriter(tmp_path, TrainingConfig(tensorboard=True), 0)
    writer.write(1, loss=2.5, step_seconds=None)
    writer.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b"loss" in content
    assert b"step_seconds" not in content


# Starting again.


def snapshot(folder: Path):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return [(path, path.stat().st_mtime_ns, path.read_bytes()) for path in files]


def test_a_finished_run_is_left_as_it_is(workspace, undisturbed, capsys):
    before = snapshot(undisturbed)
    train_here(workspace, undisturbed)
    said = capsys.readouterr().err
    assert f"the run in {undisturbed} is finished; nothing is left to do" in said
    assert f"finished at step {STEPS}" in said
    assert snapshot(undisturbed) == before


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("model.d_model", "64"),
        ("model.positions.preset", "rope"),
        ("model.rope_theta", "500"),
        ("data.seed", "1"),
        ("data.sequence_length", "16"),
        ("data.batch_size", "16"),
        ("data.document_mask", "true"),
        ("data.validation_fraction", "0.1"),
        ("optimizer.learning_rate", "0.02"),
        ("optimizer.rates", '{"head/kernel": 2.0}'),
        ("optimizer.clip_norm", "null"),
        ("training.z_loss", "0"),
        ("training.seed", "1"),
        ("training.schedule_steps", "60"),
    ],
)
def test_changed_mathematics_is_refused_by_name(workspace, undisturbed, capsys, option, value):
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: train_here(workspace, undisturbed, f"--{option}", value))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {option} ")
    assert re.search(r"was started with .*; keep that, or name another --run_dir$", line)


def test_a_longer_run_is_another_schedule(workspace, undisturbed):
    message = r"training.schedule_steps \(training.steps unless given\) is 50, .* with 40"
    with pytest.raises(ConfigError, match=message):
        train_here(workspace, undisturbed, "--training.steps", "50")


# A run that goes on beyond its schedule, which is how the recipe ends.
LONGER = ("--training.steps", f"{STEPS + 3}", "--training.schedule_steps", f"{STEPS}")


def test_other_options_may_change_and_the_rate_stays_zero(workspace, undisturbed, tmp_path):
    run_dir = tmp_path / "longer"
    shutil.copytree(undisturbed, run_dir)
    changes = {
        "training.accumulation": 2,
        "training.loss_chunk": 17,
        "training.checkpoint_every": "null",
        "training.validate_every": "null",
        "training.keep_last": 1,
        "training.log_every": 2,
        "training.position_stats_every": 7,
        "mesh.context": 2,
        "model.remat": "full",
        "data.prefetch": 1,
        "data.cache_dir": tmp_path / "cache",
        "data.text": shutil.copytree(workspace / "corpus", tmp_path / "moved"),
    }
    options = [text for name, value in changes.items() for text in (f"--{name}", str(value))]
    train_here(workspace, run_dir, *LONGER, *options)
    after = state_of(run_dir, STEPS + 3)
    assert_same_bits(after.params, state_of(undisturbed, STEPS).params)
    lines = [line for line in read_metrics(run_dir / "metrics.jsonl") if line["step"] > STEPS]
    assert {line.get("learning_rate", 0.0) for line in lines} == {0.0}
    assert [line["step"] for line in lines if "val_loss" in line] == [STEPS + 3]
    assert run_directory.read_config(run_dir).training.accumulation == 2


def test_a_log_has_a_line_for_each_half_minute(
    workspace, undisturbed, tmp_path, monkeypatch, capsys
):
    shutil.copytree(undisturbed, tmp_path / "run")
    # As if steps took that long. metrics.jsonl has but the first and the last of them.
    monkeypatch.setattr("repo_jax.progress._SECONDS_BETWEEN_LINES", 0.0)
    train_here(workspace, tmp_path / "run", *LONGER, "--training.log_every", "100")
    lines = capsys.readouterr().err.splitlines()
    steps = [int(found[1]) for line in lines if (found := re.match(r"step (\d+): loss \d", line))]
    assert steps == [STEPS + 1, STEPS + 2, STEPS + 3]


def test_an_interrupted_validation_is_made_up_for_once(workspace, tmp_path, monkeypatch, capsys):
    run_dir, score_whole, calls = tmp_path / "interrupted", loop.score, []

    def interrupted_at_the_end(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return score_whole(*arguments, **options)

    monkeypatch.setattr(loop, "score", interrupted_at_the_end)
    length = ("--training.steps", "2", "--training.schedule_steps", f"{STEPS}")
    for _ in range(3):
        train_here(workspace, run_dir, *length, "--training.validate_every", "1")
    losses = [line["val_loss"] for line in lines_of(run_dir) if "val_loss" in line]
    assert len(losses) == 2
    assert "is finished; nothing is left to do" in capsys.readouterr().err
    # It counts when the best is chosen, too.
    assert losses[1] < losses[0]
    with Checkpoints(run_dir) as checkpoints:
        assert (checkpoints.find("best"), checkpoints.best_loss) == (2, losses[1])


def test_other_data_is_refused(workspace, undisturbed, tmp_path):
    run_dir, corpus = tmp_path / "undisturbed", tmp_path / "corpus"
    shutil.copytree(undisturbed, run_dir)
    shutil.copytree(workspace / "corpus", corpus)
    with (corpus / "00.txt").open("a") as file:
        file.write("one more sentence")
    before = (run_dir / "config.yaml").read_text()
    with pytest.raises(ConfigError, match="the training data are not those that the run in"):
        train_here(workspace, run_dir, *LONGER, "--data.text", str(corpus))
    assert (run_dir / "config.yaml").read_text() == before


def test_what_tells_data_from_others_is_not_where_they_are(workspace):
    def config(*options):
        return parse(workspace / "tiny.yaml", "--data.text=[]", *options)

    def mixed(path, weight=1.0):
        web = {"tokens": f"{path}/*.npy", "weight": weight}
        notes = {"text": f"{path}/notes", "weight": 2.0}
        return config("--data.tokenizer", path, "--data.sources", str({"web": web, "notes": notes}))

    same = run_directory.check_same
    same(config("--data.tokens=a"), config("--data.tokens=b", "--data.validation_tokens=v"), "x")
    same(mixed("a"), mixed("b"), "x")
    with pytest.raises(ConfigError, match=r"^data\.sources\.web\.weight is 3\.0, but the run"):
        same(mixed("a"), mixed("b", weight=3.0), "x")


# Failing.


def test_a_loss_that_is_not_finite_ends_the_run(workspace, tmp_path, capsys):
    run_dir = tmp_path / "hot"
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: train_here(workspace, run_dir, "--optimizer.learning_rate", "1e30"))
    assert ended.value.code == 1
    last = capsys.readouterr().err.splitlines()[-1]
    found = re.fullmatch(
        r"error: (?:loss|grad_norm) is (?:nan|inf) at step (\d+); the last good checkpoint is "
        r"(\S+); a lower optimizer.learning_rate or a longer optimizer.warmup_steps may help",
        last,
    )
    assert found, last
    step = int(found[1])
    assert Path(found[2]) == run_dir / "checkpoints" / f"{step - 1}"
    assert last_checkpoint(run_dir) == step - 1
    _, params = load_run(run_dir)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert last_line(run_dir) == step - 1


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_weights_that_are_not_finite_are_not_saved(workspace, tmp_path):
    # The only step has a finite loss, and its update is infinite.
    run_dir = tmp_path / "hotter"
    options = ("--optimizer.learning_rate", "1e39", "--training.schedule_steps", "40")
    with pytest.raises(RuntimeError, match="val_loss is nan at step 1; there is no checkpoint"):
        train_here(workspace, run_dir, *options, "--training.steps", "1")
    assert checkpoints_of(run_dir) == set()


def test_a_mistake_before_the_first_step_leaves_nothing_to_undo(workspace, tmp_path):
    run_dir = tmp_path / "again"
    missing = str(tmp_path / "missing")
    with pytest.raises(ConfigError, match="missing"):
        train_here(workspace, run_dir, "--init.checkpoint", missing, "--model.d_model", "64")
    # Had the first command started a run, the change would now be refused.
    with pytest.raises(ConfigError, match="missing"):
        train_here(workspace, run_dir, "--init.checkpoint", missing, "--model.d_model", "48")
