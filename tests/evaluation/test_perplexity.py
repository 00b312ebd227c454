"""Loss and bits per byte against the definition, and the command around them."""

import dataclasses
import json
import math
import os
import re
import shutil

import jax
import numpy as np
import pytest

from repo_jax import cli, load_run, save_pretrained
from repo_jax.config import DecoderConfig, MeshConfig, RopeScaling
from repo_jax.data import ValidationBatches, byte_tokenizer, open_data, segment_ids
from repo_jax.errors import ConfigError
from repo_jax.evaluation import by_position, command, perplexity
from repo_jax.evaluation.command import evaluate
from repo_jax.evaluation.config import EvalConfig
from repo_jax.evaluation.perplexity import Score, score
from repo_jax.modeling import RePoLM, init_params
from tests.tiny_runs import make_run, parse, write_config


def expected_score(model, params, tokens, length, mask, eos_id=256):
    """nll, targets and UTF-8 bytes of the targets, by the definition, in float64."""
    rows = tokens[: len(tokens) // length * length].reshape(-1, length).astype(np.int32)
    segments = segment_ids(rows, eos_id) if mask else None
    logits = np.asarray(model.apply({"params": params}, rows, segments).logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    log_p = np.take_along_axis(log_p[:, :-1], rows[:, 1:, None], -1)[..., 0]
    counts = np.ones_like(rows[:, 1:], bool)
    if mask:
        counts = segments[:, 1:] == segments[:, :-1]
    return -log_p[counts].sum(), counts.sum(), (rows[:, 1:] != eos_id)[counts].sum()


@pytest.mark.parametrize("mask", [False, True])
def test_score_is_the_definition(mask):
    # The model's vocabulary is padded beyond the tokenizer's 257 ids.
    config = DecoderConfig(vocab_size=272, d_model=16, n_layers=1, n_heads=2, d_ff=24)
    model = RePoLM(dataclasses.replace(config, init_std=0.3))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 257, 16 * 7 + 5).astype(np.uint16)
    tokens[rng.random(tokens.size) < 0.1] = 256
    params = init_params(model, jax.random.key(0))
    batches = ValidationBatches(
        [tokens], sequence_length=16, batch_size=3, document_mask=mask, eos_id=256
    )
    result = score(model, params, batches, byte_tokenizer().byte_lengths, chunk=20)
    nll, targets, n_bytes = expected_score(model, params, tokens, 16, mask)
    assert (result.targets, result.bytes) == (targets, n_bytes)
    assert n_bytes < targets  # some are ends of documents
    np.testing.assert_allclose(result.nll, nll, rtol=1e-6)
    np.testing.assert_allclose(result.loss, nll / targets, rtol=1e-6)
    np.testing.assert_allclose(result.perplexity, math.exp(nll / targets), rtol=1e-5)
    expected = result.loss / math.log(2) * targets / n_bytes
    np.testing.assert_allclose(result.bits_per_byte, expected, rtol=1e-12)
    unknown = score(model, params, batches, chunk=20)
    assert (unknown.nll, unknown.bytes, unknown.bits_per_byte) == (result.nll, None, None)


def test_hopeless_models_have_infinite_perplexity():
    assert Score(nll=1e6, targets=10, bytes=None).perplexity == math.inf


# The command.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An untrained run, its model and weights, and the same exported."""
    folder = tmp_path_factory.mktemp("evaluation")
    config = parse(write_config(folder), "--model.vocab_size", "272")  # two devices can share it
    model, params = make_run(folder / "run", config)
    save_pretrained(folder / "model", model, params, tokenizer_dir=folder / "run")
    return folder, model, params


def test_a_run_on_its_held_out_text_at_several_lengths(run, capsys):
    folder, model, params = run
    command.main(["--run", str(folder / "run"), "--context_lengths", "[16, 32, 64]"])
    printed = capsys.readouterr().out
    written = json.loads((folder / "run" / "evaluation" / "perplexity.json").read_text())
    assert (written["source"], written["step"]) == (str(folder / "run"), 0)
    assert [row["context_length"] for row in written["results"]] == [16, 32, 64]
    config = parse(folder / "tiny.yaml")
    (held_out,) = open_data(config.data, config.model).validation
    # All lengths read the same tokens: as many as fill the longest windows.
    same = np.asarray(held_out)[: len(held_out) // 64 * 64]
    for row in written["results"]:
        expected = expected_score(model, params, same, row["context_length"], mask=False)
        np.testing.assert_allclose(row["loss"], expected[0] / expected[1], rtol=1e-6)
        assert (row["targets"], row["bytes"]) == expected[1:]
        bits = row["loss"] / math.log(2) * row["targets"] / row["bytes"]
        np.testing.assert_allclose(row["bits_per_byte"], bits, rtol=1e-9)
        assert f"{row['loss']:.4f}" in printed
        assert f"{row['bits_per_byte']:.4f}" in printed


def test_an_exported_model_scores_as_its_run_does(run):
    folder, _, _ = run
    text = dict(text=str(folder / "corpus"), context_lengths=(32,), max_tokens=640)
    of_run = evaluate(EvalConfig(run=str(folder / "run"), **text))
    of_model = evaluate(EvalConfig(model=str(folder / "model"), **text))
    assert of_model["results"] == of_run["results"]
    assert of_model["source"] == str(folder / "model")
    assert of_run["results"][0]["targets"] == 640 // 32 * 31


@pytest.mark.parametrize("source", ["run", "model"])
def test_a_mesh_changes_rounding_alone(run, source):
    """Also where its devices do not divide the rows that batch_tokens gives, nor all windows."""
    folder, _, _ = run
    text = dict(
        text=str(folder / "corpus"), context_lengths=(16,), max_tokens=640, batch_tokens=112
    )
    alone = EvalConfig(**{source: str(folder / source)}, **text)
    spread = dataclasses.replace(alone, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    ((ours,), (theirs,)) = (evaluate(config)["results"] for config in (spread, alone))
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert (ours["targets"], ours["bytes"]) == (theirs["targets"], theirs["bytes"])
    bins = [command.evaluate_by_position(config)[0] for config in (spread, alone)]
    for ours, theirs in zip(*bins, strict=True):
        assert (ours.first, ours.tokens) == (theirs.first, theirs.tokens)
        assert (ours.loss, ours.bits_per_byte) == pytest.approx(
            (theirs.loss, theirs.bits_per_byte), rel=1e-6
        )


@pytest.mark.parametrize(
    ("module", "program", "evaluates"),
    [
        (perplexity, "_batch_sums", evaluate),
        (by_position, "log_probabilities", command.evaluate_by_position),
    ],
)
def test_each_device_of_a_mesh_does_its_part(run, device_flops, module, program, evaluates):
    folder, _, _ = run
    text = dict(text=str(folder / "corpus"), context_lengths=(16,), max_tokens=128)
    alone = EvalConfig(model=str(folder / "model"), **text, batch_tokens=128)
    flops = device_flops(module, program)
    evaluates(alone)
    (whole,) = set(flops)
    flops.clear()
    evaluates(dataclasses.replace(alone, mesh=MeshConfig(data=2, fsdp=2, tensor=2)))
    (part,) = set(flops)
    assert 1 / 8 < part / whole < 1 / 6  # what is small is done by all


def test_token_files_have_no_bits_per_byte(run, capsys):
    folder, _, _ = run
    np.arange(96, dtype="<u2").tofile(folder / "tokens.bin")
    output = folder / "somewhere" / "result.json"
    with pytest.raises(ConfigError, match="the vocabulary has 272 entries, or the file is not"):
        evaluate(EvalConfig(model=str(folder / "model"), tokens=str(folder / "tokens.bin")))
    np.arange(96, dtype="<u4").tofile(folder / "tokens.bin")
    options = ["--tokens", str(folder / "tokens.bin"), "--context_lengths", "[32]"]
    command.main(["--model", str(folder / "model"), *options, "--output", str(output)])
    (row,) = json.loads(output.read_text())["results"]
    assert (row["bits_per_byte"], row["bytes"], row["targets"]) == (None, None, 93)
    assert " - " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], r"error: give one of --run \(a run directory\) and --model \(a folder or hub id\)"),
        (["--run", "{run}", "--model", "{model}"], r"error: give one of --run .* and --model .*"),
        (["--run", "{run}-of-nobody"], r"error: --run .*-of-nobody: there is no such folder"),
        (["--run", "{model}"], r"error: .*model is no run directory: it has no config.yaml"),
        (
            ["--model", "{model}"],
            r"error: --model needs --text or --tokens: what to evaluate it on",
        ),
        (
            ["--run", "{run}", "--published_scoring", "true"],
            r"error: --published_scoring needs --tasks",
        ),
        (["--run", "{run}", "--num_fewshot", "0"], r"error: --num_fewshot needs --tasks"),
        (["--run", "{run}", "--step", "7"], r"error: step '7': .* has the checkpoints 0; latest.*"),
        (["--run", "{run}", "--mesh.tensor", "4"], r"error: mesh.tensor is 4; it must divide .*"),
        (
            ["--run", "{run}", "--step", "best"],
            r"error: .* has no checkpoint with a validation loss",
        ),
        (
            ["--run", "{run}", "--context_lengths", "[32, 16000]"],
            r"error: the held-out text has \d+ tokens, .* the longest of --context_lengths, 16000",
        ),
        (
            ["--run", "{run}", "--max_tokens", "100", "--context_lengths", "[128]"],
            r"error: --max_tokens is 100; it must be at least the longest context length, 128",
        ),
        (
            ["--model", "{model}", "--text", "{corpus}", "--max_tokens", "50"],
            r"error: --max_tokens is 50; it must be at least the longest context length, 64",
        ),
        (
            ["--run", "{run}", "--by_position", "--stride", "17"],
            r"error: --stride is 17; it must be at most the shortest context .* is 16 unless.*",
        ),
        (
            ["--run", "{run}", "--by_position", "--max_tokens", "1"],
            r"error: the held-out text has no document of two tokens .* within --max_tokens, 1",
        ),
        (["--model", "{model}", "--text", "{corpus}/typo.txt"], r"error: .*typo\.txt.*"),
        (["--run", "{run}", "--tokens", "{corpus}.npy"], r"error: token file .* does not exist"),
        (
            ["--run", "{run}", "--context_lengths", "[20000]"],
            r"error: --context_lengths has 20000; each must be 2 to --batch_tokens \(16384\)",
        ),
        (
            ["--model", "{model}", "--text", "{corpus}", "--tokenizer", "{corpus}"],
            r"error: tokenizer '.*corpus': there is no file .*tokenizer.json; give .*",
        ),
    ],
)
def test_mistakes_are_told_before_the_model_is_read(run, capsys, monkeypatch, options, message):
    folder, _, _ = run
    monkeypatch.setattr(command, "load", lambda *_: pytest.fail("the model was read"))
    places = {name: str(folder / name) for name in ("run", "model", "corpus")}
    # Other tests leave results in the run directory.
    line = refusal(capsys, [*(option.format(**places) for option in options), "--overwrite"])
    assert re.fullmatch(message, line), line


def test_of_several_files_the_longest_is_what_is_too_short(run):
    folder, _, _ = run
    files = [str(folder / f"{n}.bin") for n in (60, 100, 80)]
    for file, n in zip(files, (60, 100, 80), strict=True):
        np.zeros(n, "<u4").tofile(file)
    given = dict(model=str(folder / "model"), tokens=files, context_lengths=(128,))
    for most in (None, 101):
        with pytest.raises(ConfigError, match=r"^the longest of 3 held-out files has 100 tokens,"):
            evaluate(EvalConfig(**given, max_tokens=most))
    with pytest.raises(ConfigError, match=r"^--max_tokens is 100; it must be at least .*, 128$"):
        evaluate(EvalConfig(**given, max_tokens=100))


@pytest.mark.parametrize(
    ("options", "files"),
    [
        (["--text", "{corpus}", "--context_lengths", "[32]"], ["out.json"]),
        (
            ["--text", "{corpus}", "--context_lengths", "[32]", "--by_position"],
            ["out.json", "out.csv", "out.png", "out.svg"],
        ),
    ],
)
def test_files_are_replaced_when_asked_and_otherwise_kept(
    run, tmp_path, capsys, monkeypatch, options, files
):
    folder, _, _ = run
    output = tmp_path / "out.json"
    given = ["--model", str(folder / "model"), "--output", str(output), "--max_tokens", "640"]
    given += [option.format(corpus=folder / "corpus") for option in options]
    for name in files:
        (tmp_path / name).write_text("mine")
        with monkeypatch.context() as patched:
            patched.setattr(command, "_open", lambda config: pytest.fail("loaded"))
            line = refusal(capsys, given)
        path = tmp_path / name
        assert line == f"error: --output: {path} exists; name a new file, or give --overwrite true"
        assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(name, "mine")]
        path.unlink()
    output.write_text("mine")
    command.main([*given, "--overwrite"])
    assert json.loads(output.read_text())["results"]
    assert {path.name for path in tmp_path.iterdir()} == set(files)


def test_results_in_a_run_directory_are_kept_and_the_next_get_a_number(run, tmp_path):
    folder, _, _ = run
    shutil.copytree(folder / "run", tmp_path / "run")
    kept = tmp_path / "run" / "evaluation" / "perplexity.json"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    given = ["--run", str(tmp_path / "run"), "--context_lengths", "[32]", "--max_tokens", "640"]
    for name in ("perplexity-2.json", "perplexity-3.json"):
        command.main(given)
        assert json.loads((kept.parent / name).read_text())["results"]
    assert kept.read_text() == "mine"
    command.main([*given, "--overwrite"])
    assert json.loads(kept.read_text())["results"]
    assert len(list(kept.parent.glob("perplexity*"))) == 3


def test_a_file_made_meanwhile_is_kept(run, tmp_path, capsys, monkeypatch):
    folder, _, _ = run
    output = tmp_path / "out.json"
    monkeypatch.setattr(
        command, "evaluate", lambda config: output.write_text("mine") and {"results": []}
    )
    line = refusal(capsys, ["--run", str(folder / "run"), "--output", str(output)])
    assert line.startswith(f"error: --output: {output} exists")
    assert output.read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "{place}"], "--output {place} is a folder; name a file"),
        (
            ["--output", "{place}/file/out.json"],
            "--output: {place}/file is no folder; name a place where files can be made",
        ),
        (
            ["--output", "{place}/out.csv", "--by_position"],
            "--output is {place}/out.csv, which --by_position writes beside the JSON file; name a "
            ".json file",
        ),
        (
            ["--output", "{place}/closed/new/out.json"],
            "--output: {place}/closed may not be written to; name a place where files can be made",
        ),
    ],
)
def test_places_that_cannot_be_written_are_told_before_the_model_is_read(
    run, tmp_path, capsys, monkeypatch, options, message
):
    folder, _, _ = run
    (tmp_path / "file").write_text("mine")
    (tmp_path / "closed").mkdir()
    access = os.access  # root may write everywhere
    monkeypatch.setattr(
        os, "access", lambda path, mode: "closed" not in str(path) and access(path, mode)
    )
    monkeypatch.setattr(command, "_open", lambda config: pytest.fail("loaded"))
    options = [option.format(place=tmp_path) for option in options]
    line = refusal(capsys, ["--run", str(folder / "run"), *options])
    assert line == f"error: {message.format(place=tmp_path)}"


def test_what_cannot_be_written_in_the_end_is_one_sentence_after_the_table(
    run, tmp_path, capsys, monkeypatch
):
    folder, _, _ = run
    row = dict(context_length=32, loss=1.0, perplexity=2.7, bits_per_byte=1.4, targets=9)
    monkeypatch.setattr(command, "evaluate", lambda config: {"results": [row]})
    output = tmp_path / ("long" * 100)
    given = ["--run", str(folder / "run"), "--output", str(output)]
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: command.main(given))
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert "1.4000" in printed.out
    assert printed.err == f"error: --output {output} cannot be written: File name too long\n"


def refusal(capsys, arguments):
    """The one line that a mistake ends in."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: command.main(arguments))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("more", "unit", "n"), [({}, "batches", 10), ({"by_position": True}, "windows", None)]
)
def test_progress_is_some_lines_where_there_is_no_terminal(run, capsys, monkeypatch, more, unit, n):
    folder, _, _ = run
    text = dict(text=str(folder / "corpus"), context_lengths=(32,), max_tokens=640, batch_tokens=64)
    config = EvalConfig(model=str(folder / "model"), **text, **more)
    scored = lambda: (command.evaluate_by_position if more else evaluate)(config)
    scored()
    assert capsys.readouterr().err == ""  # not yet
    monkeypatch.setattr("repo_jax.progress._SECONDS_BETWEEN_LINES", 0.0)
    scored()
    lines = capsys.readouterr().err.splitlines()
    counts = [re.fullmatch(rf"context 32: (\d+) of (\d+) {unit} in \d+ s", line) for line in lines]
    done, totals = zip(*(map(int, count.groups()) for count in counts), strict=True)
    assert list(done) == sorted(set(done))
    assert set(totals) == {n or totals[0]} == {done[-1]}


def test_yarn_changes_the_model_that_is_scored(tmp_path):
    config = parse(write_config(tmp_path))
    make_run(tmp_path / "run", config)
    report = lambda *options: evaluate(
        cli.parse(EvalConfig, "eval.py", "", ["--run", str(tmp_path / "run"), *options])[0]
    )
    plain = report()
    for options, length in (
        (["--rope_scaling.factor=4"], config.model.max_length),
        (["--rope_scaling.factor=4", "--rope_scaling.original_length=8"], 8),
    ):
        scaled, _ = load_run(tmp_path / "run", rope_scaling=RopeScaling(4.0, length))
        assert scaled.config.rope_scaling == RopeScaling(4.0, length)
        assert report(*options)["results"] != plain["results"]
    assert report("--rope_scaling.factor=1")["results"] == plain["results"]
