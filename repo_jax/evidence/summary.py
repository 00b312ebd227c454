"""From cells to means over seeds, their intervals, and paired differences to RoPE."""

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
    """A mean and its 95 % interval by Student's t, which needs two values or more."""

    mean: float
    low: float | None
    high: float | None


@dataclasses.dataclass(frozen=True)
class SummaryRow:
    """One method on one evaluation set, by one metric.

    Attributes:
      experiment, method: which.
      set, group, x: of the evaluation set; the group `mean` and the sets `mean_X` are means over
        the kinds of a task at the size X, taken for each seed.
      metric: `exact` or `tokens`, shares; or `bits_per_byte`.
      chance: what guessing gives; None: not defined.
      seeds: number of them.
      value: over seeds.
      difference: of this method and RoPE with the same seed, over the seeds that both have; None
        for RoPE itself, or where there are none.
    """

    experiment: str
    method: str
    set: str
    group: str
    x: int
    metric: str
    chance: float | None
    seeds: int
    value: Interval
    difference: Interval | None


def interval(values: Sequence[float]) -> Interval:
    """The mean and its 95 % interval."""
    values = np.asarray(values, np.float64)
    mean, n = float(values.mean()), len(values)
    if n < 2:
        return Interval(mean, None, None)
    half = stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n)
    return Interval(mean, float(mean - half), float(mean + half))


def methods_in(records: Sequence[dict[str, Any]]) -> list[str]:
    """The methods, in the order of `methods.NAMES`."""
    return sorted({record["method"] for record in records}, key=NAMES.index)


def summarise(records: Sequence[dict[str, Any]]) -> list[SummaryRow]:
    """One row for each experiment, evaluation set, metric and method, in this order.

    records: as `cell.run` writes them.
    """
    values: dict[tuple, dict[str, dict[int, float]]] = {}
    chances: dict[tuple, float | None] = {}
    for record in records:
        for row in [*record["evaluations"], *_means(record["evaluations"])]:
            for metric in metrics(record):
                if row.get(metric) is None:
                    continue
                key = (record["experiment"], row["set"], row["group"], row["x"], metric)
                by_method = values.setdefault(key, collections.defaultdict(dict))
                by_method[record["method"]][record["seed"]] = row[metric]
                chances[key] = row.get(f"chance_{metric}")
    rows = []
    for key, by_method in values.items():
        experiment, name, group, x, metric = key
        base = by_method.get(BASELINE, {})
        for method in (m for m in methods_in(records) if m in by_method):
            own = by_method[method]
            pairs = [own[seed] - base[seed] for seed in own if seed in base]
            compared = interval(pairs) if pairs and method != BASELINE else None
            rows.append(
                SummaryRow(
                    *(experiment, method, name, group, x, metric, chances[key], len(own)),
                    value=interval(list(own.values())),
                    difference=compared,
                )
            )
    return rows


def metrics(record: dict[str, Any]) -> tuple[str, ...]:
    """What is reported of a task."""
    return ("exact", "tokens") if record["metric"] == "exact" else (record["metric"],)


def _means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the kinds of a task, for each size that all kinds have."""
    groups = {row["group"] for row in rows}
    if len(groups) < 2:
        return []
    by_x: dict[int, list] = collections.defaultdict(list)
    for row in rows:
        by_x[row["x"]].append(row)
    names = ("exact", "tokens", "chance_exact", "chance_tokens")
    return [
        {"set": f"mean_{x}", "group": "mean", "x": x}
        | {name: float(np.mean([row[name] for row in same])) for name in names}
        for x, same in by_x.items()
        if len(same) == len(groups)
    ]


def costs(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each experiment and method: size, FLOPs, and time of a step.

    `step_ratio` is the mean over the seeds that both have of the step time over RoPE's, None
    where there are none; where cells share a machine it is an indication only.
    """
    found: dict[str, dict[str, dict[int, dict]]] = {}
    for record in records:
        by_method = found.setdefault(record["experiment"], collections.defaultdict(dict))
        by_method[record["method"]][record["seed"]] = record
    rows = []
    for experiment, by_method in found.items():
        base = by_method.get(BASELINE, {})
        for method in (m for m in methods_in(records) if m in by_method):
            own = by_method[method]
            first = next(iter(own.values()))
            ratios = [own[s]["step_seconds"] / base[s]["step_seconds"] for s in own if s in base]
            rows.append(
                {
                    "experiment": experiment,
                    "method": method,
                    "parameters": first["parameters"],
                    "flops_per_token": first["flops_per_token"],
                    "step_seconds": float(np.mean([r["step_seconds"] for r in own.values()])),
                    "step_ratio": float(np.mean(ratios)) if ratios else None,
                    "train_loss": _mean([r["train_loss"] for r in own.values()]),
                }
            )
    return rows


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else float(np.mean(values))
