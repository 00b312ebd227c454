"""What eval.py --tasks refuses, and in which words."""

import os
import re
import subprocess
import sys

import pytest

from repo_jax.data.tokenizers import train_bpe
from repo_jax.errors import ConfigError
from repo_jax.evaluation import command
from repo_jax.evaluation.harness.model import RepoJaxLM
from repo_jax.training import lock
from tests.evaluation.harness.asking import mistake, options
from tests.evaluation.harness.task_files import ANSWER, CHOICE
from tests.tiny_runs import ROOT


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["--tasks", "nlgraph_conectivity"],
            r"'nlgraph_conectivity', which is no suite .* did you mean nlgraph_connectivity\?",
        ),
        (["--tasks", "letters,letters"], r"--tasks names letters twice"),
        (
            ["--tasks", "nlgraph_flow"],
            r"the data of the task nlgraph_flow cannot be had .*; put NLGraph/flow/main.json of .* "
            r"into /.*/data and give --data_dir, or",
        ),
        (["--data_dir", "nowhere"], r"--data_dir nowhere: there is no such folder"),
        (["--haystack", "straw"], r"haystack.*straw"),
        (["--haystack", "noise"], r"--haystack is noise; none of --tasks, letters, hides"),
        (
            ["--tasks", "needle_multikey", "--haystack", "essay"],
            r"the haystack essay needs a text in DATA_DIR/ruler/essays.txt",
        ),
        (["--task_length", "0"], r"--task_length is 0; it must be positive"),
        (
            ["--tasks", "letters,noisy", "--task_length", "900", "--limit", "1"],
            r"--task_length is 900, which is for needle_single, .*; --tasks names none of them",
        ),
        (
            ["--tasks", "variable_tracking", "--task_length", "600"],
            r"variable_tracking without noise has \d+ tokens; the length 600 leaves room for 570",
        ),
        (["--limit", "0"], r"--limit is 0; it must be positive"),
        (["--num_fewshot", "-1"], r"--num_fewshot is -1; it must be 0 or more"),
        (["--text", "notes"], r"--tasks and --text exclude each other"),
        (["--context_lengths", "[64]"], r"--tasks and --context_lengths exclude each other"),
        (["--max_tokens", "1000"], r"--tasks and --max_tokens exclude each other"),
        (["--tasks", ""], r"--tasks_dir needs --tasks"),
        (
            ["--tasks", "needle_single", "--batch_tokens", "0"],
            r"--batch_tokens is 0; it must be positive",
        ),
    ],
)
def test_mistakes(run, tmp_path, capsys, monkeypatch, changes, message):
    no_network(monkeypatch)
    assert re.search(message, mistake(capsys, options(run, "letters", tmp_path, *changes)))
    assert not (tmp_path / "evaluation").exists()


def own_tasks(run, folder, **files):
    """Options for a folder of task files."""
    own = folder / "own"
    own.mkdir()
    for name, text in files.items():
        (own / f"{name}.yaml").write_text(text.format(folder=run / "own"))
    return ["--tasks_dir", str(own)]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (CHOICE, CHOICE.replace("metric: acc", "metric: acc_norm"), "metric acc; it has acc_norm"),
        (
            CHOICE,
            CHOICE.replace("metric: acc", "metric: acc, aggregation: median"),
            "acc is aggregated in different ways",
        ),
        (
            ANSWER,
            ANSWER + "filter_list: [{{name: other, filter: [{{function: take_first}}]}}]\n",
            "filter none; it has other",
        ),
    ],
)
def test_a_group_that_mixes_scores_is_refused(run, tmp_path, capsys, first, second, message):
    """Its scores are pooled: some would be missing, or found to be after all the work."""
    named = lambda text, name: re.sub("task: .*", f"task: {name}\ntag: mixed", text)
    own = own_tasks(run, tmp_path, one=named(first, "one"), two=named(second, "two"))
    error = mistake(capsys, options(run, "mixed", tmp_path, *own))
    assert error.startswith(
        "error: --tasks mixed mixes tasks that are scored differently; name them one by one ("
    )
    assert message in error
    assert not (tmp_path / "evaluation").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            CHOICE + "unsafe_code: true\n",
            "the task odd runs code that the model writes, which eval.py does not",
        ),
        (
            CHOICE + "doc_to_image: q\n",
            "the task odd shows images or plays sounds, which eval.py does not",
        ),
        (ANSWER.replace("\\n", ""), "generation_kwargs has until ['']; each must be a text"),
        (
            ANSWER.replace("toks: 24", "toks: 0"),
            "generation_kwargs has max_gen_toks 0; it must be a positive whole number",
        ),
    ],
)
def test_tasks_that_cannot_be_done_are_refused_before_the_model_is_read(
    run, tmp_path, capsys, monkeypatch, text, message
):
    monkeypatch.setattr(
        "repo_jax.evaluation.harness.run.load", lambda *_, **__: pytest.fail("read")
    )
    own = own_tasks(run, tmp_path, odd=re.sub("task: .*", "task: odd", text))
    assert message in mistake(capsys, options(run, "odd", tmp_path, *own))
    assert not (tmp_path / "evaluation").exists()


def test_a_tokenizer_of_another_model_is_refused_before_the_model_is_read(
    run, tmp_path, capsys, monkeypatch
):
    for place in ("run", "model"):
        monkeypatch.setattr(
            f"repo_jax.evaluation.harness.{place}.load", lambda *_, **__: pytest.fail("read")
        )
    train_bpe(["abc abc abcd abcd"], 259).save(tmp_path / "larger")
    given = ["--tokenizer", str(tmp_path / "larger")]
    error = mistake(capsys, options(run, "letters", tmp_path, *given))
    assert error == (
        f"error: the tokenizer {tmp_path / 'larger'} has a vocabulary of 259; model.vocab_size is "
        "257 and must be at least that"
    )
    assert not (tmp_path / "evaluation").exists()
    arguments = f"run={run / 'run'},tokenizer={tmp_path / 'larger'}"
    with pytest.raises(ConfigError, match="has a vocabulary of 259"):
        RepoJaxLM.create_from_arg_string(arguments)


def no_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    ("task", "what"),
    [
        (
            "far_easy",
            "fetch the data set nobody/far (configuration Easy) from huggingface.co by running "
            "once with a network, or copy the cache of such a run (HF_HOME), or put a copy of its "
            "repository into DATA_DIR/nobody/far and give --data_dir",
        ),
        (
            "far",
            "fetch the data set nobody/far (configuration Easy, Hard) and nobody/farther from "
            "huggingface.co by running once with a network, or copy the cache of such a run "
            "(HF_HOME), or put a copy of its repository into DATA_DIR/nobody/far and "
            "DATA_DIR/nobody/farther and give --data_dir",
        ),
        ("near", "the files are named in data_files of the task's file"),
        (
            "hybridqa",
            "put hybridqa/dev.traced.json of github.com/wenhuchen/HybridQA and "
            "hybridqa/tables_tok/ of github.com/wenhuchen/WikiTables-WithLinks into DATA_DIR and "
            "give --data_dir, or run once with a network, which fetches huayangli/hybrid_qa",
        ),
    ],
)
def test_missing_data_is_named_with_its_place(run, tmp_path, capsys, monkeypatch, task, what):
    no_network(monkeypatch)
    own = tmp_path / "own"
    own.mkdir()
    text = CHOICE.format(folder=tmp_path)
    (own / "near.yaml").write_text(text.replace("task: letters", "task: near"))
    for name, path in (("easy", "far"), ("hard", "far"), ("other", "farther")):
        changed = text.replace("task: letters", f"task: far_{name}\ntag: far")
        changed = changed.replace("dataset_path: json", f"dataset_path: nobody/{path}")
        configuration = f"dataset_name: {name.title()}" if path == "far" else ""
        changed = re.sub("dataset_kwargs: .*", configuration, changed)
        (own / f"{name}.yaml").write_text(changed)
    given = ["--run", str(run / "run"), "--tasks", task, "--tasks_dir", str(own)]
    error = mistake(capsys, [*given, "--output", str(tmp_path / "out")])
    before, reason, after = re.fullmatch(r"(error: .*? \()(.*)(\); .*)", error).groups()
    assert before == f"error: the data of the task {task} cannot be had ("
    assert reason
    assert after == f"); {what}"


def test_a_package_that_is_missing_is_named(run, tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "repo_jax.evaluation.harness.tasks.needles", raising=False)
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    error = mistake(capsys, options(run, "needle_single", tmp_path))
    assert "the task needle_single needs the package 'wonderwords', which is not" in error
    monkeypatch.delitem(sys.modules, "lm_eval.tasks.longbench.metrics", raising=False)
    monkeypatch.setitem(sys.modules, "jieba", None)
    error = mistake(capsys, options(run, "long_qmsum", tmp_path))
    assert "the task long_qmsum needs the package 'jieba', which is not" in error
    assert error.endswith("run: pip install 'repo-jax[eval]'")


def needing(code: str, run, folder):
    """The options of a task `needs` whose file of functions is this code."""
    own = folder / "own"
    own.mkdir()
    text = CHOICE.format(folder=run / "own").replace("gold", "!function needs.gold")
    (own / "needs.yaml").write_text(text.replace("task: letters", "task: needs"))
    (own / "needs.py").write_text(code)
    return options(run, "needs", folder, "--tasks_dir", str(own))


def test_what_only_a_users_own_task_needs_is_no_extra_of_ours(run, tmp_path, capsys):
    error = mistake(capsys, needing("from not_there.metrics import gold\n", run, tmp_path))
    assert error.endswith(
        "the task needs needs the package 'not_there', which is not installed; "
        "run: pip install not_there"
    )


def test_words_of_a_tasks_own_are_passed_on(run, tmp_path, capsys):
    code = "raise ImportError('Run pip install x first. Then again.')\n"
    error = mistake(capsys, needing(code, run, tmp_path))
    assert error.endswith("the task needs cannot be loaded: Run pip install x first. Then again.")


def test_a_package_that_is_another_version_is_named(run, tmp_path, capsys):
    """To install it would not help; lm-eval's file is made to ask for what numpy never had."""
    error = mistake(capsys, needing("from numpy.never import gold\n", run, tmp_path))
    assert (
        "the task needs does not work with the installed numpy, which has no numpy.never" in error
    )


@pytest.mark.parametrize(
    ("program", "arguments", "purpose"),
    [
        ("eval.py", ["--tasks", "letters", "--run", "."], "--tasks"),
        ("repo_jax/evaluation/harness/__main__.py", ["--model", "repo_jax"], "lm-eval's command"),
    ],
)
def test_lm_eval_that_is_missing_is_one_sentence(tmp_path, program, arguments, purpose):
    """In a process that has not imported it, as if it were not installed."""
    code = f"""if True:
        import runpy, sys

        class Missing:
            def find_spec(self, name, *_):
                if name == "lm_eval":
                    raise ModuleNotFoundError(name=name)

        sys.meta_path.insert(0, Missing())
        runpy.run_path({str(ROOT / program)!r}, run_name="__main__")
    """
    ended = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        f"error: {purpose} needs the package 'lm_eval', which is not installed; "
        "run: pip install 'repo-jax[eval]'\n"
    )
    assert not any(tmp_path.iterdir())


def test_lm_eval_is_imported_when_it_is_used_only():
    program = (
        "import sys, repo_jax, repo_jax.evaluation.command, repo_jax.evaluation.harness.compare\n"
        "assert 'lm_eval' not in sys.modules and 'datasets' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_a_model_needs_somewhere_to_write(run, capsys):
    given = ["--model", str(run / "model"), "--tasks", "letters", "--tasks_dir", str(run / "own")]
    assert "--model with --tasks needs --output" in mistake(capsys, given)


def test_a_folder_that_another_evaluation_writes_is_refused_before_the_model_is_read(
    run, tmp_path, capsys, monkeypatch
):
    """Each would write its own tasks.json over the other's."""
    monkeypatch.setattr(
        "repo_jax.evaluation.harness.run.load", lambda *_, **__: pytest.fail("read")
    )
    folder = tmp_path / "evaluation"
    folder.mkdir()
    with lock.hold(folder):
        error = mistake(capsys, options(run, "letters", tmp_path))
    assert error.startswith(f"error: {folder} is being written by process {os.getpid()} on ")
    assert error.endswith("; wait for it, stop it, or name another --output")
    with pytest.raises(pytest.fail.Exception, match="read"):
        command.main(options(run, "letters", tmp_path))
    assert not folder.exists()
