"""HybridQA (arXiv 2004.07347): questions whose answers are in a table."""

import re
import string
from pathlib import Path
from typing import Any

import datasets

from repo_jax.errors import ConfigError
from repo_jax.evaluation.harness.tasks.files import field, read_json

_HUB = "huayangli/hybrid_qa"
_TRACED = "released_data/dev.traced.json of github.com/wenhuchen/HybridQA"


def documents(data_dir: str | None = None, **_: Any) -> dict[str, datasets.Dataset]:
    """Prompts and answers.

    Args:
      data_dir: has hybridqa/dev.traced.json, a list of `question`, `answer-text`, `answer-node`
        and `table_id`, which names hybridqa/tables_tok/<table_id>.json. Rows are kept whose
        answer the table has and no passage, by their `answer-node`. None, or no such file: the
        hub's prompts, made by the authors of RePo, whose `question` holds all.

    Returns:
      Split `test` with `prompt`, `answer`.

    Raises:
      ConfigError: the file or a table is something else, or of an older HybridQA.
    """
    folder = None if data_dir is None else Path(data_dir) / "hybridqa"
    if folder is not None and (path := folder / "dev.traced.json").is_file():
        rows = [row for row in read_json(path) if _in_table_alone(row, path)]
        kept = [
            {"prompt": _prompt(row, path), "answer": field(row, path, "answer-text")}
            for row in rows
        ]
        if not kept:
            raise ConfigError(f"{path} has no question that is answered by a table")
    elif folder is not None and (path := folder / "dev.json").is_file():
        raise ConfigError(f"{path} does not say which questions a table answers; take {_TRACED}")
    else:
        path, rows = Path(_HUB), datasets.load_dataset(_HUB, split="test")
        kept = [
            {"prompt": field(row, path, "question"), "answer": str(field(row, path, "answer"))}
            for row in rows
        ]
    return {"test": datasets.Dataset.from_list(kept)}


def _in_table_alone(row: dict, path: Path) -> bool:
    """Whether the answer can be had without the passages, which are not shown."""
    if not isinstance(table := field(row, path, "table_id"), str):
        raise ConfigError(
            f"{path} is of an older HybridQA, whose tables are numbers, such as {table}; take "
            f"today's {_TRACED}"
        )
    # A node, [text, [row, column], link, kind], is each place that has the answer's words.
    return {node[-1] for node in field(row, path, "answer-node")} == {"table"}


def _prompt(row: dict, path: Path) -> str:
    file = path.parent / "tables_tok" / f"{row['table_id']}.json"
    if not file.is_file():
        raise ConfigError(f"{path} has the table_id {row['table_id']}; there is no {file}")
    question = field(row, path, "question")
    return f"{table_text(read_json(file))}\n\nQuestion: {question}\nAnswer:"


def table_text(table: dict) -> str:
    """The title of a table and its lines of cells.

    Args:
      table: `title`, `header`, a list of cells, and `data`, a list of lists of cells. A cell is
        a list of its text and links.
    """
    rows = [table["header"], *table["data"]]
    lines = ["| " + " | ".join(text for text, _ in row) + " |" for row in rows]
    return "\n".join(([table["title"]] if table.get("title") else []) + lines)


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """`substring_match`: whether the answer is in the output, both normalised as SQuAD's are."""
    gold = normalise(doc["answer"])
    return {"substring_match": float(bool(gold) and gold in normalise(results[0]))}


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and double spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())
