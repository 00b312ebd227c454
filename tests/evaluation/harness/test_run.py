"""eval.py --tasks, from the command line to what it writes."""

import contextlib
import json
import math
import os
import random
import re
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import time

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from repo_jax import RopeScaling
from repo_jax.evaluation import command
from repo_jax.evaluation.harness import model as harness
from repo_jax.evaluation.harness.baselines import baseline
from repo_jax.evaluation.harness.suites import SUITES, TASKS_DIR, Group, SuiteTask, alone
from tests.evaluation.harness.asking import lines, mistake, options, report
from tests.evaluation.harness.task_files import ANSWER, CHOICE, ROLLING
from tests.tiny_runs import ROOT


def test_what_is_written(run, tmp_path, capsys):
    command.main(options(run, "letters,nlgraph_connectivity,texts", tmp_path))
    found = report(tmp_path)
    assert (found["source"], found["step"], found["dtype"]) == (str(run / "run"), 0, "float32")
    assert list(found["tasks"]) == ["letters", "nlgraph_connectivity", "texts"]
    letters = found["tasks"]["letters"]
    rows = lines(tmp_path, "letters")
    assert (letters["metric"], letters["examples"], letters["shots"]) == ("acc", 10, 0)
    assert letters["score"] == sum(row["score"] for row in rows) / 10
    assert letters["low"] <= letters["score"] <= letters["high"]
    for i, row in enumerate(rows):
        assert (row["doc_id"], row["prompt"]) == (i, f"{i} is a letter of")
        assert row["target"] == (0, 1, 1, 2, 1)[i % 5]
        best = max(range(3), key=lambda choice: row["output"][choice][0])
        assert row["score"] == float(best == row["target"])
    # Three of five are the second choice; no answer cannot be given.
    assert (letters["empty"], letters["constant"]) == (None, 0.6)
    assert letters["constant_answer"] == "choice 2"
    graph = found["tasks"]["nlgraph_connectivity"]
    assert (graph["metric"], graph["empty"], graph["constant"]) == ("exact_match", 0.0, 0.75)
    assert isinstance(lines(tmp_path, "nlgraph_connectivity")[0]["output"], str)
    texts = found["tasks"]["texts"]
    assert texts["low"] <= texts["score"] <= texts["high"]
    assert (texts["empty"], texts["constant"]) == (None, None)
    nll = -sum(row["score"][0] for row in lines(tmp_path, "texts"))
    n_bytes = sum(row["score"][1] for row in lines(tmp_path, "texts"))
    assert texts["score"] == pytest.approx(nll / n_bytes / 0.6931471805599453, rel=1e-6)
    printed = capsys.readouterr().out
    assert f"{letters['score']:.4f}" in printed
    assert "(choice 2)" in printed


def test_an_exported_model_is_the_same_model(run, tmp_path):
    command.main(options(run, "letters", tmp_path / "a"))
    command.main(options(run, "letters", tmp_path / "b", source="model"))
    command.main(["--compare", str(tmp_path / "a"), str(tmp_path / "b")])
    outputs = [lines(tmp_path / name, "letters") for name in "ab"]
    assert [row["score"] for row in outputs[0]] == [row["score"] for row in outputs[1]]


def test_a_mesh_changes_no_score(run, tmp_path):
    for name, mesh in (("alone", ()), ("spread", ("--mesh.data", "2"))):
        command.main(options(run, "letters,answers", tmp_path / name, "--limit", "4", *mesh))
    for task in ("letters", "answers"):
        ours, theirs = (lines(tmp_path / name, task) for name in ("spread", "alone"))
        assert [row["score"] for row in ours] == [row["score"] for row in theirs]
    assert [row["output"] for row in ours] == [row["output"] for row in theirs]


def test_published_scoring_gives_silence_credit(run, tmp_path):
    more = ("--published_scoring", "true", "--limit", "8")
    command.main(options(run, "nlgraph_cycle", tmp_path, *more))
    row = report(tmp_path)["tasks"]["nlgraph_cycle"]
    assert (row["metric"], row["empty"]) == ("published_match", 0.25)


def test_a_folder_named_as_on_the_hub_is_taken_in_its_place(run, tmp_path):
    """With the configurations that such a data set names in its README."""
    folder = run / "data" / "somebody" / "letters"
    folder.mkdir(parents=True)
    (folder / "hard.json").write_text('{"q": "z is a letter of", "gold": 2}')
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: hard\n  data_files:\n"
        "  - split: test\n    path: hard.json\n---\n"
    )
    text = (run / "own" / "letters.yaml").read_text().replace("task: letters", "task: hub")
    text = text.replace("dataset_path: json", "dataset_path: somebody/letters")
    text = re.sub("dataset_kwargs: .*", "dataset_name: hard", text)
    (run / "own" / "hub.yaml").write_text(text)
    command.main(options(run, "hub", tmp_path))
    assert [row["prompt"] for row in lines(tmp_path, "hub")] == ["z is a letter of"]
    # What was read is kept, and the same README must not bring it back for other files.
    (folder / "hard.json").write_text('{"q": "y is a letter of", "gold": 2}')
    command.main(options(run, "hub", tmp_path / "changed"))
    assert [row["prompt"] for row in lines(tmp_path / "changed", "hub")] == ["y is a letter of"]
    elsewhere = tmp_path / "data" / "somebody" / "letters"
    shutil.copytree(folder, elsewhere)
    (elsewhere / "hard.json").write_text('{"q": "x is a letter of", "gold": 2}')
    given = ("--data_dir", str(tmp_path / "data"))
    command.main(options(run, "hub", tmp_path / "elsewhere", *given))
    assert [row["prompt"] for row in lines(tmp_path / "elsewhere", "hub")] == ["x is a letter of"]


def test_limit_and_shots(run, tmp_path, capsys):
    (run / "own" / "shown.yaml").write_text(
        (run / "own" / "letters.yaml").read_text().replace("task: letters", "task: shown")
        + "fewshot_split: test\n"
    )
    for _ in range(2):  # the second time it goes on with its results
        command.main(options(run, "shown", tmp_path, "--limit", "3", "--num_fewshot", "2"))
    row = report(tmp_path)["tasks"]["shown"]
    assert (row["examples"], row["shots"], row["limit"]) == (3, 2, 3)
    assert lines(tmp_path, "shown")[0]["prompt"].count("is a letter of") == 3
    n = len((run / "own" / "letters.json").read_text().splitlines())
    said = mistake(capsys, options(run, "shown", tmp_path / "all", "--num_fewshot", str(n)))
    assert f"the task shown is to show {n} examples before a question and has {n - 1};" in said


def test_rolling_tasks_score_a_document_as_perplexity_does_after_another(run, tmp_path):
    """The same document in a task and in a text, each through its own command.

    In a text an eos stands between documents. Windows as long as the first document begin there,
    so that the second is scored from its first token on, as rolling scores it.
    """
    first, second = "a text of thirty-one characters", "and this one has one fewer, 30"
    texts = tmp_path / "first", tmp_path / "second"
    for path, text in zip(texts, (first, second), strict=True):
        path.with_suffix(".txt").write_text(text)
    (tmp_path / "letters.json").write_text(json.dumps({"q": second}))
    (tmp_path / "texts.yaml").write_text(ROLLING.format(folder=tmp_path))
    model = ["--model", str(run / "model")]
    tasks = ["--tasks", "texts", "--tasks_dir", str(tmp_path)]
    command.main([*model, *tasks, "--output", str(tmp_path)])
    sums = []
    for n in (1, 2):
        files = ", ".join(f"{path}.txt" for path in texts[:n])
        text = ["--text", f"[{files}]", "--context_lengths", "[31]"]
        command.main([*model, *text, "--output", str(tmp_path / f"{n}.json")])
        (row,) = json.loads((tmp_path / f"{n}.json").read_text())["results"]
        sums.append((row["loss"] * row["targets"], row["targets"], row["bytes"]))
    nll, targets, n_bytes = (both - one for one, both in zip(*sums, strict=True))
    assert (targets, n_bytes) == (30, 30)
    (rolled,) = lines(tmp_path, "texts")
    assert rolled["score"] == [pytest.approx(-nll, rel=1e-5), 30]
    score = report(tmp_path)["tasks"]["texts"]["score"]
    assert score == pytest.approx(nll / n_bytes / math.log(2), rel=1e-5)


DRAWS = """
import random

import numpy as np


def choose(doc):
    return {"gold": random.randrange(3), "q": f"after {np.random.randint(1000)}"}


def process_docs(dataset):
    return dataset.map(choose)
"""


def test_tasks_that_draw_from_global_generators_are_the_same_everywhere(run, tmp_path):
    """As lm-eval's gpqa does, to shuffle choices. Two folders stand for two machines."""
    drawn = []
    for name, tasks in (("here", "shuffled"), ("there", "letters,shuffled")):
        own = tmp_path / name
        own.mkdir()
        shutil.copy(run / "own" / "letters.json", own)
        text = CHOICE.format(folder=own)
        (own / "letters.yaml").write_text(text)
        text = text.replace("task: letters", "task: shuffled")
        (own / "shuffled.yaml").write_text(text + "process_docs: !function draws.process_docs\n")
        (own / "draws.py").write_text(DRAWS)
        random.seed(name)
        np.random.seed(len(name))  # noqa: NPY002
        output = tmp_path / f"{name}-out"
        command.main(options(run, tasks, output, "--tasks_dir", str(own)))
        drawn.append([(row["prompt"], row["target"]) for row in lines(output, "shuffled")])
        # And the same again, so that the same command goes on with its results.
        command.main(options(run, tasks, output, "--tasks_dir", str(own)))
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 1


class StoppedError(Exception):
    """Stands for a signal."""


def test_a_stopped_evaluation_goes_on(run, tmp_path, monkeypatch):
    """Tasks that were finished are not asked again, nor batches of the one that was not."""
    asked, allowed = [], 1
    ask_model = harness.log_probabilities

    def counted(*args):
        if len(asked) == allowed:
            raise StoppedError
        asked.append(int((args[3] > 0).any(axis=1).sum()))
        return ask_model(*args)

    monkeypatch.setattr(harness, "log_probabilities", counted)
    given = options(run, "letters,texts", tmp_path, "--batch_tokens", "256")
    with pytest.raises(StoppedError):
        command.main(given)
    allowed = None
    command.main(given)
    assert sum(asked) == 10 * 3 + 10
    command.main(given)
    assert sum(asked) == 10 * 3 + 10
    assert set(report(tmp_path)["tasks"]) == {"letters", "texts"}


def test_an_evaluation_that_was_killed_goes_on(run, tmp_path, monkeypatch):
    """In a process of its own, while it generates; what it had answered is not asked again."""
    program = """if True:
        import sys, time
        from repo_jax.evaluation import command
        from repo_jax.evaluation.harness import model

        asked, complete = [], model.Generator.complete

        def slow(self, prompts, **given):
            asked.extend(prompts)
            if len(asked) > 4:
                time.sleep(600)  # until the signal comes, however busy the machine is
            return complete(self, prompts, **given)

        model.Generator.complete = slow
        command.run()
    """
    given = lambda output: options(run, "answers", output, "--batch_tokens", "512")  # a row each
    database = tmp_path / "killed" / "evaluation" / "requests.sqlite"
    with (tmp_path / "printed").open("w") as printed:
        killed = subprocess.Popen(
            [sys.executable, "-c", program, *given(tmp_path / "killed")],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=printed,
            stderr=printed,
        )
        try:
            while answered(database) < 4:
                assert killed.poll() is None, (tmp_path / "printed").read_text()
                time.sleep(0.02)
        finally:
            killed.kill()
            killed.wait()
    assert killed.returncode == -signal.SIGKILL
    assert answered(database) == 4
    assert not (tmp_path / "killed" / "evaluation" / "tasks.json").exists()

    asked, complete = [], harness.Generator.complete

    def counted(self, prompts, **given):
        asked.extend(prompts)
        return complete(self, prompts, **given)

    monkeypatch.setattr(harness.Generator, "complete", counted)
    command.main(given(tmp_path / "killed"))
    assert len(asked) == 10 - 4
    command.main(given(tmp_path / "undisturbed"))
    assert len(asked) == 10 - 4 + 10
    assert lines(tmp_path / "killed", "answers") == lines(tmp_path / "undisturbed", "answers")
    assert report(tmp_path / "killed") == report(tmp_path / "undisturbed")
    assert len({row["output"] for row in lines(tmp_path / "killed", "answers")}) > 1


def answered(database):
    """How many answers another process has kept so far."""
    if not database.exists():
        return 0
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as found:
        try:
            return found.execute("SELECT COUNT(*) FROM answers").fetchone()[0]
        except sqlite3.OperationalError:  # it is being made
            return 0


def test_other_results_are_not_overwritten(run, tmp_path, capsys):
    command.main(options(run, "letters", tmp_path, "--limit", "4"))
    before = report(tmp_path)
    for more, message in (
        ((), "has letters with limit 4, not None; give another --output"),
        (("--limit", "4", "--dtype", "bfloat16"), "has results of another model"),
    ):
        assert message in mistake(capsys, options(run, "letters", tmp_path, *more))
        assert report(tmp_path) == before


def test_a_report_that_lacks_a_setting_of_newer_programs(run, tmp_path, capsys):
    command.main(options(run, "letters", tmp_path, "--limit", "4"))
    path = tmp_path / "evaluation" / "tasks.json"
    before = report(tmp_path)
    del before["tasks"]["letters"]["haystack"]
    path.write_text(json.dumps(before))
    command.main(options(run, "letters", tmp_path, "--limit", "4"))
    assert report(tmp_path)["tasks"]["letters"]["haystack"] is None
    del before["tasks"]["letters"]["shots"]
    path.write_text(json.dumps(before))
    error = mistake(capsys, options(run, "letters", tmp_path, "--limit", "4"))
    assert "has letters with shots None, not 0; give another --output" in error
    assert report(tmp_path) == before


@pytest.mark.parametrize("changed", ["question", "answer", "number"])
def test_results_of_other_examples_are_not_overwritten(run, tmp_path, capsys, monkeypatch, changed):
    """Nor is the model asked for them in vain."""
    own = tmp_path / "own"
    own.mkdir()
    rows = [{"q": f"{i} is a letter of", "gold": i % 3} for i in range(4)]
    data = own / "letters.json"
    data.write_text("\n".join(map(json.dumps, rows)))
    (own / "letters.yaml").write_text(CHOICE.format(folder=own))
    given = options(run, "letters", tmp_path / "out", "--tasks_dir", str(own))
    command.main(given)
    before = report(tmp_path / "out"), lines(tmp_path / "out", "letters")
    if changed == "number":
        rows.pop()
    else:
        rows[3].update({"q": "another"} if changed == "question" else {"gold": 2})
    data.write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(
        "repo_jax.evaluation.harness.run.load", lambda *_, **__: pytest.fail("read")
    )
    assert mistake(capsys, given) == (
        f"error: {tmp_path / 'out' / 'evaluation' / 'letters.jsonl'} has results of other "
        "examples: the data or the task's file were changed; give another --output"
    )
    assert (report(tmp_path / "out"), lines(tmp_path / "out", "letters")) == before


def test_the_report_says_what_the_model_had(run, tmp_path):
    """Also where the model brings YaRN, and nothing on the command line says how long."""
    folder = tmp_path / "yarn"
    shutil.copytree(run / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    config |= {"max_position_embeddings": 128, "rope_scaling": yarn}
    config.pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps(config))
    more = ("--limit", "1")
    command.main(options(run, "letters", tmp_path / "plain", *more))
    given = options(run, "letters", tmp_path / "own", *more, "--model", str(folder), source="model")
    for _ in range(2):
        command.main(given)
    command.main([*given, "--output", str(tmp_path / "asked"), "--rope_scaling.factor", "4"])
    rows = [report(tmp_path / name)["tasks"]["letters"] for name in ("plain", "own", "asked")]
    assert [row["max_length"] for row in rows] == [4096, 128, 256]
    assert rows[0]["rope_scaling"] is None
    for row, factor in zip(rows[1:], (2.0, 4.0), strict=True):
        scaling = row["rope_scaling"]
        assert (scaling["factor"], scaling["original_length"]) == (factor, 64)


def test_a_task_that_asks_repeatedly(run, tmp_path):
    """All answers are kept, and the baselines have as many for a filter that wants them."""
    own = tmp_path / "own"
    own.mkdir()
    text = ANSWER.format(folder=run / "own").replace("task: answers", "task: often")
    text = text.replace("do_sample: false", "do_sample: true, temperature: 1.0")
    text += "repeats: 4\nfilter_list:\n"
    for k in (2, 4):
        steps = f"[{{function: take_first_k, k: {k}}}, {{function: take_first}}]"
        text += f"- {{name: first_{k}, filter: {steps}}}\n"
    (own / "often.yaml").write_text(text)
    command.main(options(run, "often", tmp_path, "--tasks_dir", str(own), "--limit", "2"))
    row = report(tmp_path)["tasks"]["often"]
    assert (row["filter"], row["examples"], row["empty"], row["constant"]) == ("first_2", 2, 0, 1)
    for example in lines(tmp_path, "often"):
        assert len(example["output"]) == 4
        assert len(set(example["output"])) > 1


def test_baselines_ask_only_the_filter_that_is_read():
    """Another may not take an answer that was never given."""

    class Refusing:
        name = "other"

        def apply(self, requests):
            raise AssertionError

    class Reading:
        name = "read"

        def apply(self, requests):
            for request in requests:
                assert len(request.resps) == 3
                request.filtered_resps[self.name] = request.resps[0]

    class Task:
        OUTPUT_TYPE = "generate_until"
        _filters = (Refusing(), Reading())
        instances = (Instance("generate_until", {}, ("q", {}), 0, ("t", 0, 3), ["x", "y", "z"]),)
        aggregation = staticmethod(lambda: {"match": statistics.mean})
        doc_to_target = staticmethod(lambda doc: "right")
        process_results = staticmethod(lambda doc, results: {"match": results == ["right"]})

    found = baseline([Task()], "match", "read")
    assert (found.empty, found.constant, found.answer) == (0.0, 1.0, "right")


def test_a_task_that_shows_no_examples_says_so(run, tmp_path, capsys):
    given = ("--limit", "1", "--num_fewshot", "2")
    command.main(options(run, "nlgraph_cycle", tmp_path, *given))
    said = (
        "nlgraph_cycle shows no examples, whatever --num_fewshot says: its file has num_fewshot 0"
    )
    assert capsys.readouterr().err.count(said) == 1
    assert report(tmp_path)["tasks"]["nlgraph_cycle"]["shots"] == 0


def test_a_folder_that_cannot_be_used_is_told_before_the_model_is_read(
    run, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(
        "repo_jax.evaluation.harness.run.load", lambda *_, **__: pytest.fail("read")
    )
    (tmp_path / "file").write_text("mine")
    error = mistake(capsys, options(run, "letters", tmp_path / "file"))
    assert error == (
        f"error: --output: {tmp_path}/file is no folder; name a place where files can be made"
    )
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "tasks.json").write_text('{"tasks": "mine"}')
    error = mistake(capsys, options(run, "letters", tmp_path))
    path = tmp_path / "evaluation" / "tasks.json"
    assert error == f"error: {path} is no report of tasks; give another --output"
    assert path.read_text() == '{"tasks": "mine"}'
    error = mistake(capsys, options(run, "letters", tmp_path, "--overwrite"))
    assert "--tasks and --overwrite exclude each other" in error


def test_a_comparison_replaces_no_file_unless_asked(run, tmp_path, capsys):
    command.main(options(run, "letters", tmp_path))
    given = ["--compare", str(tmp_path), str(tmp_path), "--output", str(tmp_path / "differences")]
    (tmp_path / "differences").write_text("mine")
    assert "differences exists; name a new file, or give" in mistake(capsys, given)
    assert (tmp_path / "differences").read_text() == "mine"
    command.main([*given, "--overwrite"])
    assert "letters" in json.loads((tmp_path / "differences").read_text())["tasks"]


def test_a_suite_changes_the_model_and_gives_a_mean(run, tmp_path, capsys, monkeypatch):
    """As `long` does, on a length that takes no time."""
    group = Group(
        "ruler_1024",
        tuple(
            SuiteTask(f"needle_{kind}", "recall", 0, name=f"needle_{kind}_1024")
            for kind in ("single", "multiquery")
        ),
        RopeScaling(16.0, 32),
        1024,
        {"length": 1024},
    )
    monkeypatch.setitem(SUITES, "tiny", (group,))
    asked, complete = [], harness.Generator.complete

    def recorded(self, prompts, **given):
        asked.append((self.config.rope_scaling, [len(prompt) for prompt in prompts]))
        return complete(self, prompts, **given)

    monkeypatch.setattr(harness.Generator, "complete", recorded)
    command.main(options(run, "tiny,letters", tmp_path, "--limit", "2"))
    assert [scaling for scaling, _ in asked] == [group.rope_scaling] * 2
    lengths = [length for _, prompts in asked for length in prompts]
    assert len(lengths) == 4
    assert all(700 < length <= 1024 - 128 for length in lengths)
    found = report(tmp_path)
    rows = [found["tasks"][f"needle_{kind}_1024"] for kind in ("single", "multiquery")]
    for row in rows:
        assert (row["examples"], row["haystack"], row["max_length"]) == (2, "noise", 1024)
        assert row["rope_scaling"]["factor"] == 16.0
        assert row["empty"] == 0.0
    mean = found["groups"]["ruler_1024"]["score"]
    assert mean == sum(row["score"] for row in rows) / 2
    assert found["tasks"]["letters"]["rope_scaling"] is None
    assert f"mean of 2 tasks {'':>13} {mean:>8.4f}" in capsys.readouterr().out


def test_rulers_tasks_are_as_long_as_is_asked(run, tmp_path, monkeypatch):
    """The model sees all of the prompt, however short the texts were that it was trained on."""
    asked, complete = [], harness.Generator.complete

    def recorded(self, prompts, **given):
        asked.extend((len(prompt), given["max_new_tokens"]) for prompt in prompts)
        return complete(self, prompts, **given)

    monkeypatch.setattr(harness.Generator, "complete", recorded)
    names = ("variable_tracking", "frequent_words")
    given = options(run, ",".join(names), tmp_path, "--limit", "1", "--task_length", "1300")
    command.main(given)
    assert sum(new_tokens for _, new_tokens in asked) == 30 + 50
    assert all(1200 < length + new_tokens <= 1300 for length, new_tokens in asked)
    for name in names:
        row = report(tmp_path)["tasks"][name]
        assert (row["metric"], row["examples"], row["max_length"]) == ("recall", 1, 1300)
        assert (row["empty"], row["haystack"]) == (0.0, None)
        assert (row["low"], row["high"]) == (None, None)  # of one example
    lengths = [group.max_length for group in map(alone, (*names, "letters"), [None] * 3)]
    assert lengths == [4096, 4096, None]


def test_the_haystack_is_chosen_and_kept(run, tmp_path, capsys):
    given = ("--limit", "1", "--task_length", "700", "--haystack")
    command.main(options(run, "needle_single", tmp_path, *given, "needles"))
    before = report(tmp_path)
    assert before["tasks"]["needle_single"]["haystack"] == "needles"
    (row,) = lines(tmp_path, "needle_single")
    assert row["prompt"].count("One of the special magic numbers") > 1
    assert "The grass is green." not in row["prompt"]
    error = mistake(capsys, options(run, "needle_single", tmp_path, *given, "noise"))
    assert "has needle_single with haystack needles, not noise; give another --output" in error
    assert report(tmp_path) == before


def test_suites_are_those_of_the_paper():
    """Lengths, YaRN factors and shots; and lm-eval has each task with its metric and filter."""
    facts = {
        group.name: (
            group.max_length,
            group.rope_scaling and group.rope_scaling.factor,
            len(group.tasks),
        )
        for groups in SUITES.values()
        for group in groups
    }
    assert facts == {
        "ruler_4096": (4096, None, 4),
        "nlgraph": (4096, None, 4),
        "hybridqa": (4096, None, 1),
        "ruler_8192": (8192, 2.0, 4),
        "ruler_16384": (16384, 4.0, 4),
        "longbench": (16384, 4.0, 7),
        "general": (None, None, 8),
    }
    groups = [group for groups in SUITES.values() for group in groups]
    assert all(g.rope_scaling.original_length == 4096 for g in groups if g.rope_scaling)
    shots = {task.task: task.shots for task in SUITES["general"][0].tasks}
    assert shots.pop("general_coqa") == 0
    assert set(shots.values()) == {5}
    index = TaskManager(include_path=str(TASKS_DIR)).task_index
    for group in groups:
        for task in group.tasks:
            config = load_yaml(index[task.task].yaml_path, resolve_func=False)
            while "group" in config:
                config = load_yaml(index[config["task"][0]].yaml_path, resolve_func=False)
            assert task.metric in [metric["metric"] for metric in config["metric_list"]]
            if task.filter is not None:
                assert task.filter in [each["name"] for each in config["filter_list"]]
