"""Two evaluations of the same tasks, example by example."""

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

from repo_jax.errors import ConfigError
from repo_jax.evaluation.harness.statistics import mean_interval, shown

_FIELDS = {"task", "doc_id", "metric", "score", "example"}


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """What `eval.py --compare A B` also takes.

    Attributes:
      output: a JSON file for the result; None: it is printed only.
      overwrite: a file that is there is replaced.
      resamples: of the bootstrap.
      seed: of the bootstrap.
    """

    output: str | None = None
    overwrite: bool = False
    resamples: int = 10_000
    seed: int = 0

    def __post_init__(self):
        if self.resamples < 100:
            raise ConfigError(f"--resamples is {self.resamples}; it must be at least 100")
        if self.seed < 0:
            raise ConfigError(f"--seed is {self.seed}; it must be 0 or more")


def compare(
    a: str | Path, b: str | Path, *, resamples: int = 10_000, seed: int = 0
) -> dict[str, Any]:
    """Differences of scores with 95 % paired bootstrap intervals.

    Args:
      a, b: run directories, or the folders of their evaluations.
      resamples, seed: of the bootstrap.

    Returns:
      `a`, `b`: the folders. `tasks`: by name, `metric`, `examples`, the scores `a` and `b`,
      `difference` (b - a) with its interval `low`, `high`, both None where all examples differ
      alike. `refused`: by name, why a task that both have cannot be compared. `missing`: tasks
      that only one of them has.

    Raises:
      ConfigError: a folder has no evaluation, or they have no task in common.
    """
    folders = [_folder(a), _folder(b)]
    reports = [_tasks(folder / "tasks.json") for folder in folders]
    common = [name for name in reports[0] if name in reports[1]]
    if not common:
        raise ConfigError(
            f"{a} and {b} have no task in common: {', '.join(reports[0])} and "
            f"{', '.join(reports[1])}"
        )
    tasks, refused = {}, {}
    for name in common:
        rows = [read_examples(folder / f"{name}.jsonl") for folder in folders]
        if (reason := _differs(*rows)) is not None:
            refused[name] = reason
            continue
        scores = [[row["score"] for row in each] for each in rows]
        differences = [y - x for x, y in zip(*scores, strict=True)]
        low, high = mean_interval(differences, resamples=resamples, seed=seed)
        means = [statistics.fmean(each) for each in scores]
        tasks[name] = {
            "metric": rows[0][0]["metric"],
            "examples": len(differences),
            "a": means[0],
            "b": means[1],
            "difference": statistics.fmean(differences),
            "low": low,
            "high": high,
        }
    missing = sorted({*reports[0]} ^ {*reports[1]})
    return {"a": str(a), "b": str(b), "tasks": tasks, "refused": refused, "missing": missing}


def _folder(path: str | Path) -> Path:
    for folder in (Path(path), Path(path) / "evaluation"):
        if (folder / "tasks.json").is_file():
            return folder
    raise ConfigError(f"--compare {path}: it has no tasks.json; run eval.py --tasks first")


def _tasks(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("tasks"), dict):
        raise ConfigError(
            f"--compare: {path} is no report of tasks; name a folder that eval.py --tasks wrote"
        )
    return found["tasks"]


def read_examples(path: Path) -> list[dict[str, Any]]:
    """The examples of a task, as an evaluation wrote them.

    Raises:
      ConfigError: the file is missing, or is something else.
    """
    if not path.is_file():
        raise ConfigError(f"--compare: {path} is missing; run eval.py --tasks again")
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        rows = []
    if not rows or not all(isinstance(row, dict) and row.keys() >= _FIELDS for row in rows):
        raise ConfigError(
            f"{path} is no list of examples as eval.py --tasks writes it; evaluate again, with "
            "another --output"
        )
    return rows


def _differs(a: list[dict], b: list[dict]) -> str | None:
    """Why two lists of examples cannot be compared, or None."""
    if a[0]["metric"] != b[0]["metric"]:
        return f"the metrics differ: {a[0]['metric']} and {b[0]['metric']}"
    if len(a) != len(b):
        return f"{len(a)} examples and {len(b)}"
    for x, y in zip(a, b, strict=True):
        if x["example"] != y["example"]:
            return f"the examples differ, from {x['task']} {x['doc_id']} on"
    if isinstance(a[0]["score"], list):
        return f"{a[0]['metric']} is no mean over examples"
    return None


def table(result: dict[str, Any]) -> str:
    """The result for a reader."""
    lines = [f"a: {result['a']}", f"b: {result['b']}"]
    lines.append(f"{'task':<26} {'n':>6} {'a':>8} {'b':>8} {'b - a':>8}  95 %")
    for name, row in result["tasks"].items():
        interval = shown(row["low"], row["high"], "+.4f", " to ")
        lines.append(
            f"{name:<26} {row['examples']:>6} {row['a']:>8.4f} {row['b']:>8.4f} "
            f"{row['difference']:>+8.4f}  {interval}"
        )
    for name, reason in result["refused"].items():
        lines.append(f"{name:<26} not compared: {reason}")
    if result["missing"]:
        lines.append(f"in one of them only: {', '.join(result['missing'])}")
    return "\n".join(lines)
