"""eval.py --tasks, asked, and what it wrote."""

import json

import pytest

from repo_jax import cli
from repo_jax.evaluation import command


def options(folder, tasks, output, *more, source="run"):
    places = ["--data_dir", str(folder / "data"), "--tasks_dir", str(folder / "own")]
    return [
        f"--{source}",
        str(folder / source),
        "--tasks",
        tasks,
        "--output",
        str(output),
        *places,
        *more,
    ]


def mistake(capsys, arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: command.main(arguments))
    assert ended.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    return error


def report(output):
    return json.loads((output / "evaluation" / "tasks.json").read_text())


def lines(output, name):
    text = (output / "evaluation" / f"{name}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]
