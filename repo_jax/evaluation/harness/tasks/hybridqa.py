"""HybridQA (arXiv 2004.07347): questions whose answers are in a table."""

import re
import string
from pathlib import Path
from typing import Any

import datasets

from repo_jax.errors import ConfigError
from repo_jax.evaluation.harness.tasks.files import field, read_json

_HUB = "huayangli/hybrid_qa"


def documents(data_dir: str | None = None, **_: Any) -> dict[str, datasets.Dataset]:
    """Prompts and answers.

    Args:
      data_dir: has hybridqa/dev.traced.json (or dev.json), a list of `question`, `answer-text`
        (or `answer`) and a `table`, or a `table_id` that names
        hybridqa/tables_tok/<table_id>.json. Rows are kept whose answer the table has and no
        passage, by their `answer-node`, or `where` in older files. None, or no such file: the
        hub's prompts, made by the authors of RePo, whose `question` holds all.

    Returns:
      Split `test` with `prompt`, `answer`.

    Raises:
      ConfigError: the file or a table is something else, or a row does not say where its answer
        is.
    """
    folder = None if data_dir is None else Path(data_dir) / "hybridqa"
    places = [] if folder is None else [folder / "dev.traced.json", folder / "dev.json"]
    path = next((place for place in places if place.is_file()), None)
    if path is not None:
        rows = [row for row in read_json(path) if _in_table_alone(row, path)]
    else:
        path, rows = Path(_HUB), datasets.load_dataset(_HUB, split="test")
    kept = [
        {
            "prompt": _prompt(row, path),
            "answer": str(field(row, path, "answer", "answer-text", "answer_text")),
        }
        for row in rows
    ]
    if not kept:
        raise ConfigError(f"{path} has no question that is answered by a table")
    return {"test": datasets.Dataset.from_list(kept)}


def _in_table_alone(row: dict, path: Path) -> bool:
    """Whether the answer can be had without the passages, which are not shown."""
    if "where" in row:
        return row["where"] == "table"
    if "answer-node" not in row:
        raise ConfigError(
            f"a row of {path} has neither answer-node nor where, which say whether its table has "
            "the answer; take released_data/dev.traced.json of github.com/wenhuchen/HybridQA"
        )
    # A node, [text, [row, column], link, kind], is each place that has the answer's words.
    kinds = {node[-1] for node in row["answer-node"]}
    return kinds == {"table"}


def _prompt(row: dict, path: Path) -> str:
    question = field(row, path, "question")
    table = row.get("table")
    if table is None and "table_id" in row:
        file = path.parent / "tables_tok" / f"{row['table_id']}.json"
        if not file.is_file():
            raise ConfigError(f"{path} has the table_id {row['table_id']}; there is no {file}")
        table = read_json(file)
    if table is None:
        return question
    return f"{table_text(table)}\n\nQuestion: {question}\nAnswer:"


def table_text(table: str | dict) -> str:
    """A table as lines of cells.

    Args:
      table: text already; or `header`, a list of cells, and `data` (or `rows`), a list of lists
        of cells, perhaps with a `title`. A cell is a text, or a list or dict that begins with
        it and goes on with links.
    """
    if isinstance(table, str):
        return table
    cell = lambda c: str(c.get("value", "") if isinstance(c, dict) else c)
    first = lambda c: cell(c[0] if isinstance(c, (list, tuple)) else c)
    rows = [table["header"], *table.get("data", table.get("rows", []))]
    lines = ["| " + " | ".join(map(first, row)) + " |" for row in rows]
    return "\n".join(([table["title"]] if table.get("title") else []) + lines)


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """`substring_match`: whether the answer is in the output, both normalised as SQuAD's are."""
    gold = normalise(doc["answer"])
    return {"substring_match": float(bool(gold) and gold in normalise(results[0]))}


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and double spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())
