"""RULER's tasks beside the needles: what a reader of the prompt needs is there, and no more."""

import importlib
import re
import sys
import types
from collections import Counter

import pytest
from lm_eval.tasks import TaskManager

from repo_jax.data import Tokenizer, byte_tokenizer, train_bpe
from repo_jax.errors import ConfigError
from repo_jax.evaluation.harness.suites import TASKS_DIR
from repo_jax.evaluation.harness.tasks import ruler, variables, words
from tests.tiny_runs import ROOT

# The tokens of an answer, and what one more piece of the prompt has at most, in bytes.
TASKS = {"variable_tracking": (30, 91), "common_words": (120, 90), "frequent_words": (50, 40)}
each_task = pytest.mark.parametrize("name", TASKS)


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    texts = (path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))
    made = byte_tokenizer() if request.param == "bytes" else train_bpe(texts, 2000)
    made.save(folder)
    return str(folder)


def load(name, **metadata):
    manager = TaskManager(include_path=str(TASKS_DIR), include_defaults=False, metadata=metadata)
    return manager.load([name])["tasks"][name]


def published(name):
    """lm-eval's module, without transformers, which it has for loading tokenizers only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "transformers", types.SimpleNamespace(AutoTokenizer=None))
        for module in ("common_utils", name):
            patch.delitem(sys.modules, f"lm_eval.tasks.ruler.{module}", raising=False)
        return importlib.import_module(f"lm_eval.tasks.ruler.{name}")


def documents(name, tokenizer, **given):
    if name == "variable_tracking":
        return variables.documents(tokenizer, **given)["test"]
    return words.documents(name.removesuffix("_words"), tokenizer, **given)["test"]


def parts(prompt, first_words):
    """The solved example, where there is one, and what is asked."""
    start = prompt.rindex(first_words)
    return prompt[:start], prompt[start:]


def follow_variables(prompt):
    """The names that a value goes to, as a reader finds them; and the solved example's."""

    def names(text):
        (value,) = set(re.findall(r"the value (\d+)", text))
        assigned = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text)).items()
        found = [value]
        while following := [name for name, source in assigned if source == found[-1]]:
            found += following
        assert len(assigned) == len(found) - 1
        return found[1:]

    example, asked = parts(prompt, "Memorize and track")
    assert example.endswith(f"they are: {' '.join(names(example))}\n\n")
    return names(asked)


def count_listed(prompt):
    """The ten words of a numbered list that are the most frequent, by far."""

    def most(text):
        context = text.split("most often.\n")[1].split("\nQuestion")[0]
        entries = re.findall(r"(\d+)\. (.+?)(?= \d+\. |$)", context)
        assert [int(number) for number, _ in entries] == [*range(1, len(entries) + 1)]
        ranked = Counter(word for _, word in entries).most_common()
        assert len({count for _, count in ranked[:10]}) == 1
        assert len({count for _, count in ranked[10:]}) == 1
        assert ranked[9][1] >= 3 * ranked[10][1]
        return [word for word, _ in ranked[:10]]

    example, asked = parts(prompt, "Below is a numbered list")
    answer = re.findall(r"\d+\. (.+?)(?= \d+\. |$)", example.rstrip("\n").split("list are:")[1])
    assert sorted(answer) == sorted(most(example))
    return most(asked)


def count_coded(prompt):
    """The three words of a text that are the most frequent but for dots."""
    context = prompt.split("coded words. ")[1].split("\nQuestion")[0].split(" ")
    (dots, _), *ranked = Counter(context).most_common()
    assert dots == "..."
    counts = [count for _, count in ranked]
    assert counts[0] > counts[1] > counts[2] > counts[3]
    return [word for word, _ in ranked[:3]]


READERS = {
    "variable_tracking": follow_variables,
    "common_words": count_listed,
    "frequent_words": count_coded,
}


@each_task
@pytest.mark.parametrize("length", [2500, 4096])
def test_who_reads_the_prompt_is_right(tokenizer, name, length):
    task = load(name, tokenizer=tokenizer, length=length, samples=4)
    docs = list(task.test_docs())
    assert len({doc["input"] for doc in docs}) == 4
    backend = Tokenizer.load(tokenizer)
    new_tokens, piece = TASKS[name]
    assert task.get_config("generation_kwargs")["max_gen_toks"] == new_tokens
    for doc in docs:
        prompt = task.doc_to_text(doc)
        assert doc["tokens"] == len(backend.encode(prompt))
        assert length - new_tokens - piece < doc["tokens"] <= length - new_tokens
        found = READERS[name](prompt)
        assert sorted(found) == sorted(doc["outputs"])
        assert len(backend.encode(" " + " ".join(found))) <= new_tokens
        assert task.process_results(doc, [" ".join(found)]) == {"recall": 1.0}
        assert task.process_results(doc, [""]) == {"recall": 0.0}


NAMES = ["ABCDE", "FGHIJ", "KLMNO", "PQRST", "UVWXY"]
LISTED = ["oak", "contact lens", "run", "blue", "tidy", "fig", "hum", "vast", "jar", "nod"]
CODED = ["qjxkzv", "wpmbnt", "rgdhcy"]


@pytest.mark.parametrize(
    ("gold", "output", "right"),
    [
        (NAMES, " ABCDE FGHIJ KLMNO PQRST UVWXY", 5),
        (NAMES, " ABCDE PQRST", 2),
        (NAMES, " abcde ABCD FGHI", 1),
        (NAMES, " UVWXY, FGHIJ and KLMNO.\nQuestion: Find all variables", 3),
        (LISTED, "1. oak 2. contact lens 3. contact 4. blue 5. lamp 6. lens", 3),
        (LISTED, "1. fig\n2. HUM\n3. vast\n4. fig", 3),
        (CODED, " rgdhcy ... ....", 1),
        (CODED, " wpmbnt, qjxkzv, aaaaaa", 2),
        (CODED, " ...", 0),
    ],
)
def test_recall(gold, output, right):
    assert ruler.process_results({"outputs": gold}, [output]) == {"recall": right / len(gold)}
    theirs = published("common_utils").process_results
    doc = {"outputs": gold, "max_length": 4096}
    assert theirs(doc, [output]) == {"4096": right / len(gold)}


@each_task
def test_the_words_around_the_context_are_those_of_lm_evals_task(tokenizer, name):
    (prompt,) = documents(name, tokenizer, length=2500, samples=1)["input"]
    module = {
        "variable_tracking": "vt_utils",
        "common_words": "cwe_utils",
        "frequent_words": "fwe_utils",
    }[name]
    before, after = published(module).TEMPLATE.strip().split("{context}")
    (value,) = re.findall(r"assigned the value (\d+)", prompt)[-1:] or [None]
    _, asked = parts(prompt, before)
    assert asked.endswith(after.format(query=value, num_v=5))
    if name != "frequent_words":
        assert prompt.count(before) == 2


def test_variables_are_joined_as_in_lm_evals_task(tokenizer):
    def sentences(text):
        """How many of noise and of assignments a prompt has."""
        context = text.split("text.\n\n")[1].split("\nQuestion")[0]
        noise = f"{ruler.NOISE}\n"
        found = re.findall(rf"{re.escape(noise)}|VAR \w+ = (?:VAR \w+ |\d+)", context)
        assert context == " ".join(found)
        return found.count(noise), len(found) - found.count(noise)

    (prompt,) = documents("variable_tracking", tokenizer, length=2500, samples=1)["input"]
    example, asked = parts(prompt, "Memorize and track")
    assert sentences(example)[1] == 5
    theirs, _ = published("vt_utils").generate_input_output(20, num_chains=1, num_hops=4)
    assert sentences(theirs) == (20, 5)
    noise, assignments = sentences(asked)
    assert noise > 5
    assert assignments == 5


@each_task
def test_an_example_depends_on_the_seed_and_its_number_only(tokenizer, name):
    made = lambda **given: documents(name, tokenizer, length=2500, **given)
    assert made(samples=2)[:] == made(samples=4).select(range(2))[:]
    assert made(samples=2, seed=1)["outputs"] != made(samples=2)["outputs"]


def test_lists_are_longer_where_they_fit(tokenizer, tmp_path):
    """As in RULER, words stand 30 and 3 times from 4096 tokens on, and else 6 times and once."""
    made = lambda folder, length, n: documents("common_words", folder, length=length, samples=n)

    def times(folder, length):
        _, asked = parts(made(folder, length, 1)[0]["input"], "Below is a numbered list")
        return {*Counter(re.findall(r"\d+\. (.+?)(?= \d+\. |\nQ)", asked)).values()}

    # By bytes, and with so few merges, the longer ones do not fit at 4096.
    assert times(tokenizer, 4096) == {6, 1}
    assert times(tokenizer, 16_384) == {30, 3}
    train_bpe(made(tokenizer, 16_384, 9)["input"], 9000).save(tmp_path)
    assert times(str(tmp_path), 4095) == {6, 1}
    assert times(str(tmp_path), 4096) == {30, 3}


def test_a_list_ends_where_there_are_no_more_words(tokenizer, monkeypatch):
    monkeypatch.setattr(words, "_words", lambda: [f"w{i}" for i in range(45)])
    (row,) = documents("common_words", tokenizer, length=20_000, samples=1)
    _, asked = parts(row["input"], "Below is a numbered list")
    assert len(set(re.findall(r"\d+\. (w\d+)", asked))) == 45


@each_task
def test_the_shortest_prompt_has_one_right_answer(tokenizer, name):
    length, row = 200, None
    while row is None:
        try:
            (row,) = documents(name, tokenizer, length=length, samples=1)
        except ConfigError as error:
            length = int(re.search(r"has (\d+) tokens", str(error))[1]) + TASKS[name][0]
    assert row["tokens"] == length - TASKS[name][0]
    assert sorted(READERS[name](row["input"])) == sorted(row["outputs"])


@each_task
def test_prompts_that_cannot_be_made(tokenizer, name):
    with pytest.raises(ConfigError, match=r"RULER's tasks need a tokenizer: give it"):
        documents(name, None)
    new_tokens, _ = TASKS[name]
    message = rf"^{name} with.* has \d+ tokens; the length 200 leaves room for {200 - new_tokens} "
    with pytest.raises(ConfigError, match=message):
        documents(name, tokenizer, length=200)
