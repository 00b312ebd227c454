"""A run and local tasks, for whatever evaluates them."""

import json

import pytest

from repo_jax import save_pretrained
from tests.evaluation.harness.task_files import ANSWER, CHOICE, ROLLING
from tests.tiny_runs import make_run, parse, write_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run, the same exported, and local data: nothing here needs a network."""
    folder = tmp_path_factory.mktemp("tasks")
    # Tasks are longer than the windows; the model was not trained anyway.
    config = parse(write_config(folder), "--model.max_length", "4096")
    model, params = make_run(folder / "run", config)
    save_pretrained(folder / "model", model, params, tokenizer_dir=folder / "run")
    data = folder / "data"
    (data / "nlgraph").mkdir(parents=True)
    for graph, (yes, no) in {
        "connectivity": ("The answer is yes.", "The answer is no."),
        "cycle": ("Yes, there is a cycle in this graph.", "No, there is no cycle in this graph."),
    }.items():
        rows = {
            str(i): {
                "question": f"Q: {i}?\nA:",
                "answer": no if i % 4 == 0 else yes,
                "difficulty": "easy",
            }
            for i in range(8)
        }
        (data / "nlgraph" / f"{graph}.json").write_text(json.dumps(rows))
    own = folder / "own"
    own.mkdir()
    rows = [{"q": f"{i} is a letter of", "gold": (0, 1, 1, 2, 1)[i % 5]} for i in range(10)]
    (own / "letters.json").write_text("\n".join(map(json.dumps, rows)))
    (own / "letters.yaml").write_text(CHOICE.format(folder=own))
    (own / "texts.yaml").write_text(ROLLING.format(folder=own))
    (own / "answers.yaml").write_text(ANSWER.format(folder=own))
    return folder
