"""The quickstart from end to end, as tiny as its options make it."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from repo_jax import cli, quickstart
from repo_jax.errors import MissingPackageError
from repo_jax.evaluation import command as evaluation
from repo_jax.inference import command as inference
from repo_jax.training import command as training
from repo_jax.training.metrics import read_metrics
from tests.tiny_runs import last_checkpoint, write_config

COMMANDS = {
    "repo-train": training.main,
    "repo-eval": evaluation.main,
    "repo-generate": inference.main,
}


@pytest.fixture
def options(tmp_path, monkeypatch):
    """Of a run in an empty folder, on the tiny runs' corpus."""
    write_config(tmp_path)
    monkeypatch.chdir(tmp_path)
    model = dict(vocab_size=257, d_model=32, n_layers=2, n_heads=2, d_ff=64)
    data = dict(text="corpus", tokenizer="bytes", sequence_length=32, validation_fraction=0.2)
    steps = dict(steps=6, validate_every=3, validation_windows=8, log_every=1)
    sections = dict(model=model, data=data, training=steps, optimizer=dict(warmup_steps=1))
    return [
        f"--{section}.{name}={value}"
        for section, values in sections.items()
        for name, value in values.items()
    ]


def test_it_trains_evaluates_samples_plots_and_says_what_next(options, capsys, monkeypatch):
    quickstart.main(options)
    said = capsys.readouterr().out

    run = Path("runs/quickstart")
    assert last_checkpoint(run) == 6
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines if "ce_loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "val_loss" in line] == [3, 6]

    # Half the trained length, that, and its double; untrained it would be ln 257 = 5.55.
    rows = re.findall(r"^ +(\d+) +(\d\.\d{4}) +[\d.]+ +[\d.]+ +\d+$", said, re.MULTILINE)
    assert [int(length) for length, _ in rows] == [16, 32, 64]
    assert all(0 < float(loss) < 5.5 for _, loss in rows)

    said, _, then = said.partition(f"Loss curve: {run / 'loss.png'}\n")
    assert said.partition("\nA sample:\ndef read_lines(path):\n")[2].strip()

    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    drawn = (run / "loss.svg").read_text()
    assert all(f"<!-- {label} -->" in drawn for label in ("training", "validation", "quickstart"))

    # What comes next is options of commands, and of this run.
    class ParsedError(Exception):
        pass

    def parse_only(*arguments):
        parse(*arguments)
        raise ParsedError

    parse = cli.Parser.parse_args
    monkeypatch.setattr(cli.Parser, "parse_args", parse_only)
    next_lines = then.partition("\nWhat next?\n")[2].splitlines()
    assert len(next_lines) == 1 + len(COMMANDS)
    for line in next_lines[1:]:
        program, *options = shlex.split(line)
        name = Path(program).name
        assert f"--run {run} " in line or name == "repo-train"
        with pytest.raises(ParsedError):
            COMMANDS[name](options)


def test_a_missing_package_is_told_before_training(options, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(MissingPackageError, match="matplotlib"):
        quickstart.main(options)
    assert not Path("runs").exists()


def test_a_stopped_run_says_nothing_yet(options, capsys, monkeypatch):
    stopped = training.Summary(step=2, finished=False, validation=None, tokens_per_second=None)
    monkeypatch.setattr(training, "train", lambda config, run_dir: stopped)
    quickstart.main(options)
    assert capsys.readouterr().out == ""
