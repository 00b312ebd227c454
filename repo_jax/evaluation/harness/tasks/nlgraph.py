"""NLGraph (arXiv 2305.10037): questions on graphs, easy ones, without examples before them."""

import re
from pathlib import Path
from typing import Any

import datasets

from repo_jax.errors import ConfigError
from repo_jax.evaluation.harness.tasks.files import field, read_json

_HUB = "huayangli/nlgraph"
_FLOW = re.compile(r"maximum flow from node \d+ to node \d+ is (\d+)")
_PATH = re.compile(r"shortest path from node \d+ to node \d+ is ([\d,]+)")
_YES_NO = {"connectivity": "answer is yes", "cycle": "there is a cycle in this graph"}
# What a definite answer looks like, the plainest first. All that the first pattern to find any
# verdict finds must agree; that there is "a" cycle or path is a yes.
_VERDICTS = (
    r"answer is (yes|no)\b(?! or\b)",
    r"(?<!if )(?<!whether )there is (a|no) (?:cycle|path)\b|"
    r"(?:^|[.!?\n])\s*(yes|no)(?=\s*(?:[.,;:!\n]|$))",
    r"\b(yes|no)\b",
)
_STATED = {
    "flow": (
        r"maximum flow from (?:node )?\d+ to (?:node )?\d+ is (\d+)",
        r"(?s:.*)\bis:?\s+(\d+)",  # the last
    ),
    "shortest_path": (r"shortest path from (?:node )?\d+ to (?:node )?\d+ is ([\d,]+)",),
}
_ALONE = {"flow": r"\d+", "shortest_path": r"\d+(?:,\d+)+"}
# Where a model goes on with a question of its own.
_NEXT_QUESTION = re.compile(r"\n\s*(?:Q:|Graph:|Question:|Determine if|In an? )")


def documents(
    graph: str, data_dir: str | None = None, difficulty: str = "easy", **_: Any
) -> dict[str, datasets.Dataset]:
    """The questions of one kind.

    Args:
      graph: `connectivity`, `cycle`, `flow` or `shortest_path`.
      data_dir: has NLGraph/<graph>/main.json, as the data set's repository, or
        nlgraph/<graph>.json or nlgraph/<graph>/main.json: a dict of number to `question`,
        `answer`, `difficulty`. None, or no such file: the hub's copy of it.
      difficulty: `easy`, `medium` or `hard`.

    Returns:
      Split `test` with `graph`, `question`, `answer`.

    Raises:
      ConfigError: the file is something else, or has no question of that difficulty.
    """
    names = (f"NLGraph/{graph}/main.json", f"nlgraph/{graph}.json", f"nlgraph/{graph}/main.json")
    places = [] if data_dir is None else [Path(data_dir) / name for name in names]
    path = next((place for place in places if place.is_file()), None)
    if path is not None:
        content = read_json(path)
        rows = list(content.values()) if isinstance(content, dict) else content
    else:
        path, rows = Path(_HUB), datasets.load_dataset(_HUB, graph, split="train")
    kept = [
        {"graph": graph, "question": row["question"], "answer": field(row, path, "answer")}
        for row in rows
        if field(row, path, "difficulty") == difficulty and field(row, path, "question")
    ]
    if not kept:
        raise ConfigError(f"{path} has no question whose difficulty is {difficulty}")
    return {"test": datasets.Dataset.from_list(kept)}


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """`exact_match`, where only a definite answer counts, and `published_match`."""
    (output,) = results
    gold = published_answer(doc["graph"], doc["answer"])
    return {
        "exact_match": float(definite_answer(doc["graph"], output) == gold),
        "published_match": float(gold in published_answer(doc["graph"], output)),
    }


def published_answer(graph: str, text: str) -> str:
    """What upstream takes from an answer; for yes/no tasks whatever is not yes is no."""
    text = text.lower()
    if graph in _YES_NO:
        return "yes" if _YES_NO[graph] in text else "no"
    found = (_FLOW if graph == "flow" else _PATH).search(text)
    return found[1] if found else ""


def definite_answer(graph: str, text: str) -> str | None:
    """The one answer that a text gives; None where there is none, or more than one."""
    text = _NEXT_QUESTION.split(text, maxsplit=1)[0].lower()
    text = re.sub(r"\s*,\s*", ",", text)
    if graph in _YES_NO:
        found = (["".join(v) for v in re.findall(pattern, text)] for pattern in _VERDICTS)
        said = {"yes" if verdict == "a" else verdict for verdict in next(filter(None, found), ())}
    else:
        for pattern in _STATED[graph]:
            if found := re.search(pattern, text):
                return found[1].strip(",") or None
        said = set(re.findall(_ALONE[graph], text))
    return said.pop() if len(said) == 1 else None
