"""What does not fit into the context is counted, or refused before anything runs."""

import json
import shutil

import pytest

from repo_jax.evaluation import command
from tests.evaluation.harness.asking import lines, mistake, options, report

PROMPT = "0 is a letter of"  # in bytes, as all of the fixture's


@pytest.fixture
def asked(run, tmp_path):
    """Options for the run's model, as if it had been trained on so many tokens."""

    def with_length(length, tasks, output):
        folder = tmp_path / f"model-{length}"
        if not folder.exists():
            shutil.copytree(run / "model", folder)
            config = json.loads((folder / "config.json").read_text())
            config["max_position_embeddings"] = length
            (folder / "config.json").write_text(json.dumps(config))
        return options(run, tasks, output, "--model", str(folder), source="model")

    return with_length


def test_prompts_that_are_cut_are_counted(asked, tmp_path, capsys):
    command.main(asked(32, "letters,answers", tmp_path / "a"))
    printed = capsys.readouterr()
    assert "10 of 10 requests lose their beginning: max_length is 32\n" in printed.err
    (row,) = (line for line in printed.out.splitlines() if "truncated" in line)
    assert row.startswith("answers")
    assert row.endswith("truncated: 10")
    found = report(tmp_path / "a")["tasks"]
    assert (found["letters"]["truncated"], found["answers"]["truncated"]) == (0, 10)
    assert {row["dropped_tokens"] for row in lines(tmp_path / "a", "letters")} == {0}
    # The answers' 24 tokens leave 8 for the prompt.
    dropped = {row["dropped_tokens"] for row in lines(tmp_path / "a", "answers")}
    assert dropped == {len(PROMPT) - 8}


def test_contexts_of_choices_that_are_cut_are_counted(asked, tmp_path):
    """Also where the answers are remembered, and where nothing can be cut."""
    for _ in range(2):
        command.main(asked(12, "letters,texts", tmp_path / "b"))
        found = report(tmp_path / "b")["tasks"]
        assert (found["letters"]["truncated"], found["texts"]["truncated"]) == (10, 0)
        # Twelve tokens to predict, and one before them.
        dropped = {row["dropped_tokens"] for row in lines(tmp_path / "b", "letters")}
        assert dropped == {len(PROMPT) + 2 - 13}


def test_a_task_that_leaves_no_room_for_prompts_is_refused_before_another_runs(
    asked, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(
        "repo_jax.evaluation.harness.run.load", lambda *_, **__: pytest.fail("read")
    )
    assert mistake(capsys, asked(24, "letters,answers", tmp_path / "c")) == (
        "error: the task answers generates 24 tokens, which leaves no room for a prompt in "
        "max_length, 24; leave it out, or extend the context with YaRN"
    )
    assert not (tmp_path / "c").exists()
    scaled = [*asked(24, "letters,answers", tmp_path / "c"), "--rope_scaling.factor", "2"]
    with pytest.raises(pytest.fail.Exception, match="read"):
        command.main(scaled)
