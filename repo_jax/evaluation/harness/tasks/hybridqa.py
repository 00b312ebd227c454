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
      data_dir: has hybridqa/dev.json, a list of `question`, `answer-text` (or `answer`) and a
        `table`, or a `table_id` that names hybridqa/tables_tok/<table_id>.json. Rows that say
        `where` the answer is are kept if that is the table. None, or no such file: the hub's
        prompts, made by the authors of RePo, whose `question` holds all.

    Returns:
      Split `test` with `prompt`, `answer`.

    Raises:
      ConfigError: the file or a table is something else.
    """
    path = None if data_dir is None else Path(data_dir) / "hybridqa" / "dev.json"
    if path is not None and path.is_file():
        rows = [row for row in read_json(path) if row.get("where", "table") == "table"]
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
