"""Our task files on rows in the published schemas, with scores worked out by hand."""

import json
import re

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.tasks import TaskManager

from repo_jax.data import byte_tokenizer
from repo_jax.errors import ConfigError
from repo_jax.evaluation.harness.suites import TASKS_DIR
from repo_jax.evaluation.harness.task_loading import load_tasks
from repo_jax.evaluation.harness.tasks import hybridqa, needles, nlgraph, ruler

# As in NLGraph's main.json.
NLGRAPH = {
    "connectivity": [
        ("Is there a path between node 0 and node 2?", "The answer is yes."),
        ("Is there a path between node 0 and node 3?", "The answer is no."),
    ],
    "cycle": [
        ("Is there a cycle in this graph?", "Yes, there is a cycle in this graph."),
        ("Is there a cycle in this graph?", "No, there is no cycle in this graph."),
    ],
    "flow": [
        (
            "What is the maximum flow from node 0 to node 2?",
            "The maximum flow from node 0 to node 2 is 7.",
        ),
    ],
    "shortest_path": [
        (
            "Give the shortest path from node 0 to node 4.",
            "The shortest path from node 0 to node 4 is 0,3,4 with a total weight of 4",
        ),
    ],
}


def load(name, **metadata):
    manager = TaskManager(include_path=str(TASKS_DIR), include_defaults=False, metadata=metadata)
    return manager.load([name])["tasks"][name]


def write_nlgraph(folder, graph, rows, place="NLGraph/{}/main.json"):
    path = folder / place.format(graph)
    path.parent.mkdir(parents=True)
    content = {
        str(i): {"question": f"Graph: ...\nQ: {q}\nA:", "answer": a, "difficulty": "easy"}
        for i, (q, a) in enumerate(rows)
    }
    content["99"] = {"question": "a hard one", "answer": "no", "difficulty": "hard"}
    path.write_text(json.dumps(content))


def scores(task, outputs):
    """Each example's scores for what a model would have said."""
    docs = list(task.test_docs())
    assert len(docs) == len(outputs)
    return [task.process_results(doc, [output]) for doc, output in zip(docs, outputs, strict=True)]


@pytest.mark.parametrize(
    ("graph", "outputs", "exact", "published"),
    [
        ("connectivity", ["The answer is yes.", "The answer is no."], [1, 1], [1, 1]),
        ("connectivity", ["", ""], [0, 0], [0, 1]),
        ("connectivity", ["The answer is yes. The answer is no."] * 2, [0, 0], [1, 0]),
        ("connectivity", [" Yes", " no, they are not"], [1, 1], [0, 1]),
        # The model goes on with a question of its own, which is not the answer.
        (
            "connectivity",
            [" The answer is yes.\nQ: Is it? A: The answer is no."] * 2,
            [1, 0],
            [1, 0],
        ),
        ("connectivity", ["know", "nothing"], [0, 0], [0, 1]),
        ("connectivity", ["The answer is yes. There is no shorter path."] * 2, [1, 0], [1, 0]),
        ("connectivity", ["Yes, and there is no shorter path.", "No. Yes."], [1, 0], [0, 1]),
        ("connectivity", ["There is a path: 0,1,2.", "There is no path."], [1, 1], [0, 1]),
        ("connectivity", ["The answer is yes or no.", "Yes or no?"], [0, 0], [1, 1]),
        ("cycle", ["Yes, there is a cycle in this graph."] * 2, [1, 0], [1, 0]),
        ("cycle", ["No, there is no cycle in this graph."] * 2, [0, 1], [0, 1]),
        ("cycle", ["", ""], [0, 0], [0, 1]),
        ("cycle", ["There is a cycle in this graph."] * 2, [1, 0], [1, 0]),
        ("cycle", ["There is no cycle in this graph."] * 2, [0, 1], [0, 1]),
        ("cycle", ["Yes, there is no cycle in this graph."] * 2, [0, 0], [0, 1]),
        ("cycle", ["Let us see if there is a cycle in this graph."] * 2, [0, 0], [1, 0]),
        ("flow", ["The maximum flow from node 0 to node 2 is 7."], [1], [1]),
        ("flow", ["The maximum flow from node 0 to node 2 is 17."], [0], [1]),
        ("flow", [" 7"], [1], [0]),
        ("flow", ["The maximum flow from 0 to 2 is 7"], [1], [0]),
        ("flow", ["The capacity is 9 and 7, so the answer is 7 units."], [1], [0]),
        ("flow", ["The answer is 7, or it is 9."], [0], [0]),
        ("flow", ["between 3 and 7"], [0], [0]),
        ("flow", [""], [0], [0]),
        ("shortest_path", ["The shortest path from node 0 to node 4 is 0,3,4 with"], [1], [1]),
        ("shortest_path", [" 0, 3, 4"], [1], [0]),
        ("shortest_path", ["The shortest path from node 0 to node 4 is 0, 3, 4 with a"], [1], [0]),
        ("shortest_path", ["The shortest path from 0 to 4 is 0,3,4, not 0,1,4"], [1], [0]),
        ("shortest_path", ["The shortest path from node 0 to node 4 is 0,3,4,5"], [0], [1]),
        ("shortest_path", ["The shortest path from node 0 to node 4 is 0, 3"], [0], [0]),
        ("shortest_path", ["0,3,4 or 0,4"], [0], [0]),
    ],
)
def test_nlgraph(tmp_path, graph, outputs, exact, published):
    write_nlgraph(tmp_path, graph, NLGRAPH[graph])
    task = load(f"nlgraph_{graph}", data_dir=str(tmp_path))
    found = scores(task, outputs)
    assert [row["exact_match"] for row in found] == exact
    assert [row["published_match"] for row in found] == published
    doc = next(iter(task.test_docs()))
    question, answer = NLGRAPH[graph][0]
    assert task.doc_to_text(doc) == f"Graph: ...\nQ: {question}\nA:"
    assert task.doc_to_target(doc) == answer


@settings(max_examples=50)
@given(st.sampled_from(sorted(NLGRAPH)), st.text("yesno 0123,.\n", max_size=30))
def test_nlgraph_takes_one_answer_or_none(graph, text):
    found = nlgraph.definite_answer(graph, text)
    assert found is None or found in "".join(text.split()).lower()
    if graph in ("connectivity", "cycle"):
        assert found in (None, "yes", "no")
        # Words that leave it open make no answer of what is none.
        assert nlgraph.definite_answer(graph, f"{text} yes or no") in (None, found)


# The first is the data set's repository's.
@pytest.mark.parametrize(
    "place", ["NLGraph/flow/main.json", "nlgraph/flow/main.json", "nlgraph/flow.json"]
)
def test_nlgraph_is_found_in_several_places(tmp_path, place):
    (tmp_path / place).parent.mkdir(parents=True)
    row = {
        "question": "Q",
        "answer": "The maximum flow from node 1 to node 2 is 3.",
        "difficulty": "easy",
    }
    (tmp_path / place).write_text(json.dumps({"0": row}))
    (doc,) = load("nlgraph_flow", data_dir=str(tmp_path)).test_docs()
    assert doc["question"] == "Q"


def test_the_file_of_nlgraph_that_is_asked_for_is_one_that_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    metadata = {"data_dir": str(tmp_path)}
    manager = TaskManager(include_path=str(TASKS_DIR), include_defaults=False, metadata=metadata)
    with pytest.raises(ConfigError) as raised:
        load_tasks(manager, "nlgraph_shortest_path", str(tmp_path))
    asked = re.search(r"; put (\S+) of github.com/Arthur-Heng/NLGraph into ", str(raised.value))[1]
    assert asked == "NLGraph/shortest_path/main.json"
    write_nlgraph(tmp_path, "shortest_path", NLGRAPH["shortest_path"], place=asked)
    assert list(load_tasks(manager, "nlgraph_shortest_path", str(tmp_path)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"NLGraph/connectivity/main.json is not JSON"),
        (
            '{"0": {"question": "q", "answer": "a"}}',
            r"a row of .* has no difficulty; it has question",
        ),
        ('{"0": {"question": "q", "answer": "a", "difficulty": "hard"}}', r"has no question whose"),
    ],
)
def test_nlgraph_files_that_are_something_else(tmp_path, content, message):
    folder = tmp_path / "NLGraph" / "connectivity"
    folder.mkdir(parents=True)
    (folder / "main.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        nlgraph.documents("connectivity", str(tmp_path))


# As in WikiTables-WithLinks' tables_tok.
TABLE = {
    "url": "https://en.wikipedia.org/wiki/Stadiums",
    "title": "Stadiums",
    "header": [["Name", []], ["Capacity", []]],
    "data": [
        [["The Grove", ["/wiki/The_Grove"]], ["12,000", []]],
        [["Lake Field", ["/wiki/Lake_Field"]], ["8,500", []]],
    ],
    "section_title": "",
}
TABLE_TEXT = "Stadiums\n| Name | Capacity |\n| The Grove | 12,000 |\n| Lake Field | 8,500 |"


# The kinds of the places that have the answer; the first two rows can be answered by the table.
HYBRIDQA = [
    ("Which holds 12,000 ?", "The Grove", ["table"]),
    ("How many does Lake Field hold ?", "8,500", ["table", "table"]),
    ("Which is by a lake ?", "Lake Field", ["table", "passage"]),
    ("Who built it ?", "Jerry", ["passage"]),
    ("How many are there ?", "2", []),
]
# As in HybridQA's dev.traced.json.
TRACED = [
    {
        "table_id": "Stadiums_0",
        "question": question,
        "answer-text": answer,
        "question_postag": "WP VBZ .",
        "question_id": "00153f694413a536",
        "answer-node": [[answer, [0, 0], None, kind] for kind in kinds],
    }
    for question, answer, kinds in HYBRIDQA
]


def write_hybridqa(folder, name, rows):
    (folder / "hybridqa" / "tables_tok").mkdir(parents=True)
    (folder / "hybridqa" / name).write_text(json.dumps(rows))


def test_hybridqa(tmp_path):
    write_hybridqa(tmp_path, "dev.traced.json", TRACED)
    message = r"has the table_id Stadiums_0; there is no .*tables_tok/Stadiums_0.json"
    with pytest.raises(ConfigError, match=message):
        hybridqa.documents(str(tmp_path))
    table = tmp_path / "hybridqa" / "tables_tok" / "Stadiums_0.json"
    table.write_text(json.dumps(TABLE))
    task = load("hybridqa", data_dir=str(tmp_path))
    prompts = [task.doc_to_text(doc) for doc in task.test_docs()]
    assert prompts == [
        f"{TABLE_TEXT}\n\nQuestion: {question}\nAnswer:" for question, _, _ in HYBRIDQA[:2]
    ]
    for outputs, expected in (
        ([" The Grove.", " 8,500"], [1, 1]),
        ([" grove", " about 8500 people"], [1, 1]),
        (["", ""], [0, 0]),
        ([" Lake Field", " 850"], [0, 0]),
    ):
        assert [row["substring_match"] for row in scores(task, outputs)] == expected


def test_hybridqa_without_questions_for_the_table_alone(tmp_path):
    write_hybridqa(tmp_path, "dev.traced.json", TRACED[2:])
    with pytest.raises(ConfigError, match=r"dev.traced.json has no question that is answered by"):
        hybridqa.documents(str(tmp_path))


# Today's dev.json has neither of these; an older one has both, and numbers for tables.
OLDER = [row | {"table_id": 1122, "where": "table"} for row in TRACED]


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("dev.json", TRACED, r"hybridqa/dev.json does not say which questions a table answers"),
        ("dev.json", OLDER, r"hybridqa/dev.json does not say which questions a table answers"),
        ("dev.traced.json", OLDER, r"is of an older HybridQA, whose tables are numbers, .* 1122"),
    ],
)
def test_hybridqa_files_that_are_something_else(tmp_path, name, rows, message):
    write_hybridqa(tmp_path, name, rows)
    (tmp_path / "hybridqa" / "tables_tok" / "1122.json").write_text(json.dumps(TABLE))
    taken = r"; take .*released_data/dev.traced.json of github.com/wenhuchen/HybridQA$"
    with pytest.raises(ConfigError, match=message + taken):
        hybridqa.documents(str(tmp_path))


def test_hybridqa_of_the_hub_has_its_prompts_already(tmp_path, monkeypatch):
    row = {"table_id": "Stadiums_0", "table": TABLE_TEXT}
    row |= {"question": f"{TABLE_TEXT}\n\nQ: Which holds 12,000 ?\nA:", "answer": "The Grove"}
    published = {("huayangli/hybrid_qa", "test"): Dataset.from_list([row])}
    fetch = lambda path, split: published[path, split]
    monkeypatch.setattr(hybridqa.datasets, "load_dataset", fetch)
    (doc,) = hybridqa.documents(str(tmp_path))["test"]
    assert doc == {"prompt": row["question"], "answer": "The Grove"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "hidden", "asked", "gold"),
    [("single", 1, 1, 1), ("multikey", 4, 1, 1), ("multivalue", 4, 1, 4), ("multiquery", 4, 4, 4)],
)
@pytest.mark.parametrize("haystack", ["noise", "needles", "essay"])
def test_needles(tokenizer, tmp_path, kind, hidden, asked, gold, haystack):
    (tmp_path / "ruler").mkdir()
    essay = "It rained. Nobody came to see the boats! Was it cold? " * 9
    (tmp_path / "ruler" / "essays.txt").write_text(essay)
    metadata = dict(tokenizer=tokenizer, length=3000, samples=4, haystack=haystack)
    task = load(f"needle_{kind}", data_dir=str(tmp_path), **metadata)
    docs = list(task.test_docs())
    assert len({doc["input"] for doc in docs}) == 4
    for doc in docs:
        text = task.doc_to_text(doc)
        # Room for 128 more, and none for another sentence of the haystack, which is the noise's 90.
        assert doc["tokens"] == len(text.encode())
        assert 3000 - 128 - 110 < doc["tokens"] <= 3000 - 128
        body, question = text.split("\nWhat ")
        needles_in = body.count("special magic numbers for")
        assert needles_in == hidden if haystack != "needles" else needles_in > hidden
        assert len(doc["outputs"]) == gold
        assert all(f"is: {value}." in body and value not in question for value in doc["outputs"])
        keys = question.split("mentioned")[0].split(" for ")[1].replace(", and ", ", ").split(", ")
        assert len(keys) == asked
        for key in keys:
            assert f"for {key.strip()} is: " in body
        found = task.process_results(doc, [f"They are {', '.join(doc['outputs'][:1])}."])
        assert found == {"recall": 1 / gold}
        assert task.process_results(doc, [""]) == {"recall": 0.0}
        assert task.process_results(doc, [" ".join(doc["outputs"])]) == {"recall": 1.0}


def test_recall_does_not_look_at_case():
    doc = {"outputs": ["Blue-Fox", "7"]}
    assert ruler.process_results(doc, ["the blue-fox"]) == {"recall": 0.5}


def test_needles_depend_on_the_seed_and_their_number_only(tokenizer):
    made = lambda **given: needles.documents("multikey", tokenizer, length=1500, **given)["test"]
    assert made(samples=2)[:] == made(samples=5).select(range(2))[:]
    assert made(samples=2, seed=1)["input"] != made(samples=2)["input"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokenizer": None}, "RULER.s tasks need a tokenizer"),
        (
            {"haystack": "straw"},
            r"the haystack is 'straw'; it must be one of noise, needles, essay",
        ),
        ({"haystack": "essay"}, r"DATA_DIR/ruler/essays.txt; give --data_dir"),
        (
            {"length": 300},
            r"a needle task without a haystack has \d+ tokens; the length 300 .* for 172 beside",
        ),
    ],
)
def test_needles_that_cannot_be_made(tokenizer, given, message):
    with pytest.raises(ConfigError, match=message):
        needles.documents("single", **({"tokenizer": tokenizer} | given))


def test_without_essays_the_haystack_is_noise(tokenizer, tmp_path):
    made = lambda kind: needles.documents(
        kind, tokenizer, length=1500, samples=1, data_dir=str(tmp_path)
    )["test"][0]["haystack"]
    assert (made("single"), made("multikey")) == ("noise", "noise")
    (tmp_path / "ruler").mkdir()
    (tmp_path / "ruler" / "essays.txt").write_text("One. Two. Three.")
    assert (made("single"), made("multikey")) == ("noise", "essay")
