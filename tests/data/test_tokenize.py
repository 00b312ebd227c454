"""The command `python -m repo_jax.tokenize`."""

import subprocess
import sys

import pytest

from repo_jax.config import DataConfig
from repo_jax.data import open_corpus, open_data
from repo_jax.tokenize import main, run


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"text {i}\n" * 10)
    return str(folder)


def test_it_writes_a_corpus_and_says_how_to_train_on_it(source, tmp_path, capsys):
    out = str(tmp_path / "out")
    arguments = ["--text", source, f"{source}/3.txt", "--tokenizer", "bpe:270", "--out", out]
    main([*arguments, "--validation_fraction", "0.3"])
    manifest = open_corpus(out).manifest
    assert manifest.train.documents + manifest.validation.documents == 20
    assert manifest.validation_fraction == 0.3
    assert manifest.vocab_size == 270
    printed = capsys.readouterr().out
    assert f"{out}/train.bin: {manifest.train.tokens:,} tokens of uint16" in printed
    assert f"--data.tokens {out} --model.vocab_size 270" in printed
    assert open_data(DataConfig(tokens=out, sequence_length=8)).vocab_size == 270


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "arguments are required: text"),
        (["--text", "nowhere"], "text source 'nowhere' does not exist"),
        (["--text", "a", "--tokeniser", "x"], "there is no option --tokeniser; did you mean"),
        (["--text", "a", "--tokenizer", "bpe:9"], "bpe:N needs a whole N of at least 257"),
        (
            ["--text", "a", "--validation_fraction", "x"],
            "validation_fraction is x; it must be float",
        ),
        (["--text", "a", "--validation_fraction", "2"], "it must be in [0, 1)"),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tokenize", "--out", "o", *arguments])
    with pytest.raises(SystemExit, match="2"):
        run()
    error = capsys.readouterr().err
    assert message in error
    assert "error: " in error
    assert error.count("\n") == 1


def test_as_a_module(source, tmp_path):
    command = [sys.executable, "-m", "repo_jax.tokenize", "--text", source]
    done = subprocess.run([*command, "--out", source], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: {source} is not an empty folder, and nothing is overwritten\n"
