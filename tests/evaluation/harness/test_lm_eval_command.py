"""lm-eval's own command, with our model and tasks."""

import json
import pkgutil
import sys
import tomllib

import pytest
from lm_eval.tasks import TaskManager

from repo_jax.errors import ConfigError
from repo_jax.evaluation.harness import __main__ as lm_eval_command
from tests.tiny_runs import ROOT


@pytest.fixture
def lm_eval_with(monkeypatch):
    """lm-eval's own program on arguments. It looks through our task files only, which is quick."""

    class OursOnly(TaskManager):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, include_defaults=False, **kwargs)

    def start(*arguments):
        monkeypatch.setattr("lm_eval.tasks.TaskManager", OursOnly)
        monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments])
        lm_eval_command.main()

    return start


@pytest.mark.parametrize("mesh", ["", ",data=2"])
def test_the_lm_eval_command(run, tmp_path, capsys, lm_eval_with, mesh):
    """lm-eval's own program finds the model, and our tasks without being told where they are."""
    lm_eval_with(
        *("--model", "repo_jax", "--tasks", "nlgraph_connectivity"),
        *("--model_args", f"run={run / 'run'},max_length=1024{mesh}", "--limit", "2"),
        *("--metadata", json.dumps({"data_dir": str(run / "data")})),
        *("--output_path", str(tmp_path / "out")),
    )
    (path,) = (tmp_path / "out").rglob("results*.json")
    assert "exact_match,none" in json.loads(path.read_text())["results"]["nlgraph_connectivity"]


def test_a_chat_template_is_refused(run, lm_eval_with):
    with pytest.raises(ConfigError, match="the model repo_jax has no chat template, so leave it"):
        lm_eval_with(
            *("--model", "repo_jax", "--tasks", "nlgraph_connectivity", "--apply_chat_template"),
            *("--model_args", f"run={run / 'run'},max_length=1024", "--limit", "2"),
            *("--metadata", json.dumps({"data_dir": str(run / "data")})),
        )


@pytest.mark.parametrize(
    "arguments",
    [
        "--model repo_jax --tasks nlgraph_cycle",
        "--model=repo_jax --tasks=nlgraph_cycle",
        "run --model repo_jax -t nlgraph_cycle",
        "run --config {folder}/ours.yaml",
        "--tasks nlgraph_cycle letters --include_path {own}",
        "--tasks=nlgraph_cycle,letters --include_path={own}",
        "run --config {folder}/both.yaml",
    ],
)
def test_the_lm_eval_command_finds_our_tasks_however_asked(
    run, tmp_path, monkeypatch, lm_eval_with, arguments
):
    """And those of --include_path beside them."""
    asked = "model: repo_jax\ntasks: [nlgraph_cycle"
    (tmp_path / "ours.yaml").write_text(f"{asked}]")
    (tmp_path / "both.yaml").write_text(f"{asked}, letters]\ninclude_path: {run / 'own'}")
    found = {}
    monkeypatch.setattr("lm_eval.simple_evaluate", lambda **given: found.update(given))
    lm_eval_with(*arguments.format(folder=tmp_path, own=run / "own").split())
    both = "own" in arguments or "both" in arguments
    assert found["tasks"] == ["nlgraph_cycle"] + ["letters"] * both
    assert {*found["tasks"]} <= {*found["task_manager"].all_tasks}


def test_the_other_subcommands_of_lm_eval_know_our_tasks(run, capsys, lm_eval_with):
    lm_eval_with("ls", "tasks")
    assert "nlgraph_cycle" in capsys.readouterr().out
    lm_eval_with("validate", "--tasks", "needle_single,letters", "--include_path", str(run / "own"))
    assert "All tasks found and valid" in capsys.readouterr().out


def test_the_lm_eval_command_has_a_script():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert pkgutil.resolve_name(scripts["repo-lm-eval"]) is lm_eval_command.run
