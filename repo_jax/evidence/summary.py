"""From cells to means over seeds, their intervals, and paired differences to a baseline."""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from repo_jax.evidence.methods import NAMES

BASELINE = "rope"


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval by Student's t.

    Attributes:
      mean: of the values.
      low, high: ends of the interval, which is of no use, and None, where there is one value only
        or all are equal.
      values: one for each seed, in the order of seeds.
    """

    mean: float
    low: float | None
    high: float | None
    values: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class SummaryRow:
    """One method on one evaluation set, by one metric.

    Attributes:
      experiment, method: which.
      set, group, x: of the evaluation set; the group `mean` and the sets `mean_X` are means over
        the kinds of a task at the size X, taken for each seed.
      metric: `exact` or `tokens`, shares; or `bits_per_byte`.
      chance: what guessing gives; None: not defined.
      examples: in the evaluation set; of a mean, in the smallest of its sets.
      seeds: number of them.
      diverged: how many of them have no finite loss.
      value: over seeds; None if any diverged.
      difference: of this method and the baseline with the same seed, over the seeds that both
        have; None for the baseline itself, where there are none, or where any of them diverged.
    """

    experiment: str
    method: str
    set: str
    group: str
    x: int
    metric: str
    chance: float | None
    examples: int
    seeds: int
    diverged: int
    value: Interval | None
    difference: Interval | None


def interval(values: Sequence[float]) -> Interval:
    """The mean and its 95 % interval."""
    each, n = tuple(map(float, values)), len(values)
    mean = float(np.mean(each))
    if len(set(each)) < 2:
        return Interval(mean, None, None, each)
    half = float(stats.t.ppf(0.975, n - 1) * np.std(each, ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, each)


def methods_in(records: Sequence[dict[str, Any]]) -> list[str]:
    """The methods, in the order of `methods.NAMES`."""
    return sorted({record["method"] for record in records}, key=NAMES.index)


def summarise(records: Sequence[dict[str, Any]], baseline: str = BASELINE) -> list[SummaryRow]:
    """One row for each experiment, evaluation set, metric and method, in this order.

    Args:
      records: as `cell.run` writes them.
      baseline: the method that the others are compared with.
    """
    values: dict[tuple, dict[str, dict[int, float | None]]] = {}
    facts: dict[tuple, tuple[float | None, int]] = {}
    for record in sorted(records, key=lambda record: record["seed"]):
        for row in [*record["evaluations"], *means_over_kinds(record["evaluations"])]:
            for metric in metrics(record):
                key = (record["experiment"], row["set"], row["group"], row["x"], metric)
                by_method = values.setdefault(key, collections.defaultdict(dict))
                diverged = row["loss"] is None
                by_method[record["method"]][record["seed"]] = None if diverged else row[metric]
                facts[key] = row.get(f"chance_{metric}"), row["examples"]
    rows = []
    for key, by_method in values.items():
        experiment, name, group, x, metric = key
        base = by_method.get(baseline, {})
        for method in (m for m in methods_in(records) if m in by_method):
            own = by_method[method]
            pairs = [(own[seed], base[seed]) for seed in own if seed in base]
            finite = pairs and all(None not in pair for pair in pairs)
            compared = finite and method != baseline
            diverged = sum(value is None for value in own.values())
            rows.append(
                SummaryRow(
                    *(experiment, method, name, group, x, metric, *facts[key]),
                    seeds=len(own),
                    diverged=diverged,
                    value=None if diverged else interval(list(own.values())),
                    difference=interval([a - b for a, b in pairs]) if compared else None,
                )
            )
    return rows


def can_differ(rows: Sequence[SummaryRow]) -> bool | None:
    """Whether one set can show differences: some method is above chance and not at the ceiling.

    Above chance: every seed is, by three standard errors of what guessing gets of so many
    examples. Not at the ceiling: the mean is below 1.

    Args:
      rows: of one set and metric, one for each method.

    Returns:
      None where chance is not defined.
    """
    chance, examples = rows[0].chance, rows[0].examples
    if chance is None:
        return None
    floor = chance + 3 * math.sqrt(chance * (1 - chance) / examples)
    found = [row.value for row in rows if row.value is not None]
    return any(min(value.values) > floor and value.mean < 1 for value in found)


def metrics(record: dict[str, Any]) -> tuple[str, ...]:
    """What is reported of a task; of answers of one token, whose chances agree, only `exact`."""
    chances = [(row["chance_exact"], row["chance_tokens"]) for row in record["evaluations"]]
    if record["metric"] == "exact" and not np.allclose(*zip(*chances, strict=True)):
        return ("exact", "tokens")
    return (record["metric"],)


def means_over_kinds(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The sets `mean_X` of a task with several kinds, for each size X that all kinds have.

    rows: the evaluations of one cell.
    """
    groups = {row["group"] for row in rows}
    if len(groups) < 2:
        return []
    by_x: dict[int, list] = collections.defaultdict(list)
    for row in rows:
        by_x[row["x"]].append(row)
    names = ("exact", "tokens", "loss", "chance_exact", "chance_tokens")
    return [
        {"set": f"mean_{x}", "group": "mean", "x": x, "examples": min(r["examples"] for r in same)}
        | {name: _mean([row[name] for row in same]) for name in names}
        for x, same in by_x.items()
        if len(same) == len(groups)
    ]


def costs(records: Sequence[dict[str, Any]], baseline: str = BASELINE) -> list[dict[str, Any]]:
    """For each experiment and method: size, FLOPs, and time of a step.

    `step_seconds` is for one seed, a step's time divided by the seeds that trained together.
    `step_ratio` is the mean over the seeds that both have of that time over the baseline's, None
    where there are none; where cells share a machine it is an indication only.
    """
    seconds = lambda record: record["step_seconds"] / len(record["seeds_together"])
    found: dict[str, dict[str, dict[int, dict]]] = {}
    for record in records:
        by_method = found.setdefault(record["experiment"], collections.defaultdict(dict))
        by_method[record["method"]][record["seed"]] = record
    rows = []
    for experiment, by_method in found.items():
        base = by_method.get(baseline, {})
        for method in (m for m in methods_in(records) if m in by_method):
            own = by_method[method]
            first = next(iter(own.values()))
            ratios = [seconds(own[s]) / seconds(base[s]) for s in own if s in base]
            rows.append(
                {
                    "experiment": experiment,
                    "method": method,
                    "parameters": first["parameters"],
                    "flops_per_token": first["flops_per_token"],
                    "step_seconds": float(np.mean([seconds(r) for r in own.values()])),
                    "step_ratio": float(np.mean(ratios)) if ratios else None,
                    "train_loss": _mean([r["train_loss"] for r in own.values()]),
                }
            )
    return rows


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else float(np.mean(values))
