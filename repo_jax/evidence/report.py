"""Tables for readers, from a results file alone."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repo_jax.errors import ConfigError
from repo_jax.evidence import figures, results
from repo_jax.evidence.cell import write
from repo_jax.evidence.summary import (
    BASELINE,
    Interval,
    SummaryRow,
    can_differ,
    costs,
    methods_in,
    summarise,
)

_METRICS = {
    "exact": "whole answers right",
    "tokens": "answer tokens right",
    "bits_per_byte": "bits per byte (less is better)",
}


def write_report(folder: Path, baseline: str = BASELINE) -> None:
    """Writes summary.md, summary.json and the figures beside a folder's results.json.

    Args:
      folder: of the results.
      baseline: the method that the others are compared with.

    Raises:
      ConfigError: there are no results, or none of the baseline.
      MissingPackageError: matplotlib is not installed.
    """
    found = results.load(folder)
    records = found["cells"]
    _check_baseline(records, baseline)
    rows = summarise(records, baseline)
    plain = {
        "baseline": baseline,
        "rows": [dataclasses.asdict(row) for row in rows],
        "sets": _sets(rows),
        "costs": costs(records, baseline),
        "about": _about(found),
    }
    write(folder / "summary.json", json.dumps(plain, indent=1) + "\n")
    drawn = figures.draw(folder, records, rows)
    write(folder / "summary.md", _page(found, rows, drawn, baseline))


def headline_table(found: dict[str, Any], baseline: str = BASELINE) -> str:
    """A Markdown table of the sets that each experiment puts in its headline.

    Args:
      found: what `results.load` returns.
      baseline: the method that the others are compared with.

    Raises:
      ConfigError: there are no results of the baseline.
    """
    records = found["cells"]
    _check_baseline(records, baseline)
    rows = summarise(records, baseline)
    rows = [row for row in rows if row.set in _headline(records, row.experiment)]
    rows = [row for row in rows if row.metric == _first_metric(records, row.experiment)]
    meaning = (
        "Means over seeds (in parentheses the least and the most of them, or that all are equal); "
        f"then the mean difference to {baseline} with the same seeds [its 95 % interval over "
        "seeds, by Student's t; ends may lie beyond what is possible]."
    )
    return "\n".join(
        [*_table(rows, methods_in(records)), "", meaning, "", *_warnings(found), _about_line(found)]
    )


def rewrite(file: Path, name: str, table: str) -> None:
    """Puts a table between `<!-- evidence:NAME -->` and `<!-- /evidence:NAME -->` in a file.

    Raises:
      ConfigError: the file is not there, or does not have both once, in this order.
    """
    begin, end = f"<!-- evidence:{name} -->", f"<!-- /evidence:{name} -->"
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--readme {file} cannot be read: {error.strerror}") from None
    parts = re.fullmatch(f"(.*{re.escape(begin)}\n).*?({re.escape(end)}.*)", text, re.DOTALL)
    if parts is None or text.count(begin) != 1 or text.count(end) != 1:
        raise ConfigError(
            f"--readme {file} must have the line {begin} once, and after it the line {end}"
        )
    write(file, f"{parts[1]}{table}\n{parts[2]}")


def _headline(records: Sequence[dict[str, Any]], experiment: str) -> list[str]:
    first = next(r for r in records if r["experiment"] == experiment)
    return first["headline"] or [row["set"] for row in first["evaluations"]]


def _first_metric(records: Sequence[dict[str, Any]], experiment: str) -> str:
    return next(r["metric"] for r in records if r["experiment"] == experiment)


def _check_baseline(records: Sequence[dict[str, Any]], baseline: str) -> None:
    known = methods_in(records)
    if baseline != BASELINE and baseline not in known:
        raise ConfigError(f"--baseline is {baseline}; the results have {', '.join(known)}")


def _page(
    found: dict[str, Any],
    rows: Sequence[SummaryRow],
    drawn: dict[str, list[str]],
    baseline: str,
) -> str:
    records = found["cells"]
    lines = ["# Evidence", "", *_warnings(found), _about_line(found), ""]
    lines += [
        "Means over seeds with 95 % intervals (Student's t; they may reach beyond 0 and 1) and the "
        f"value of each seed, then the mean difference to {baseline} with the same seeds, with its "
        "interval. Intervals are over seeds only: the test set is one, the same for all. Bands of "
        "figures reach from the least to the most of the seeds; dotted is chance.",
        "",
        "*can differ*: some method is above chance with every seed, by three standard errors of "
        "guessing, and below 1 in the mean, so that differences between methods can show.",
        "",
    ]
    for experiment in dict.fromkeys(row.experiment for row in rows):
        lines += [f"## {experiment}", ""]
        pictures = (name for name in drawn[experiment] if name.endswith("png"))
        lines += [line for name in pictures for line in (f"![{experiment}]({name})", "")]
        own = [row for row in rows if row.experiment == experiment]
        for metric in dict.fromkeys(row.metric for row in own):
            for group in dict.fromkeys(row.group for row in own):
                chosen = [row for row in own if (row.metric, row.group) == (metric, group)]
                if not chosen:
                    continue
                title = f"{group}: {_METRICS[metric]}" if group else _METRICS[metric]
                lines += [f"### {title}", ""]
                lines += [*_table(chosen, methods_in(records), long=True), ""]
    lines += [
        *("## Costs", ""),
        "The time of a step is for one seed: where seeds trained together it is divided by their "
        "number. Times were measured beside other workers where cells shared the machine, and are "
        "an indication only.",
        "",
        *_cost_table(records, baseline),
    ]
    lines += [line for command in found["commands"] for line in ("", f"`{command}`")]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[SummaryRow], methods: Sequence[str], *, long: bool = False) -> list[str]:
    """Methods down, sets across; `long`: with each seed, and whether sets can show differences;
    else as narrow as pages of a repository are."""
    several = len({row.experiment for row in rows}) > 1
    columns = list(dict.fromkeys((row.experiment, row.set) for row in rows))
    at = {(row.method, row.experiment, row.set): row for row in rows}
    names = [f"{experiment} {name}" if several else name for experiment, name in columns]
    lines = [
        f"| method | {' | '.join(name.replace('_', ' ') for name in names)} |",
        f"|---|{'---|' * len(columns)}",
    ]
    for method in (m for m in methods if any(row.method == m for row in rows)):
        shown = [at.get((method, *column)) for column in columns]
        cells = ["-" if row is None else _cell(row, long) for row in shown]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    chances = [next(r.chance for r in rows if (r.experiment, r.set) == c) for c in columns]
    if any(chance is not None for chance in chances):
        digits = 3 if long else 2
        cells = ["-" if chance is None else _number(chance, digits) for chance in chances]
        lines.append(f"| *chance* | {' | '.join(cells)} |")
    if long:
        by_set = [can_differ([r for r in rows if (r.experiment, r.set) == c]) for c in columns]
        if by_set.count(None) < len(by_set):
            cells = [{True: "yes", False: "no", None: "-"}[found] for found in by_set]
            lines.append(f"| *can differ* | {' | '.join(cells)} |")
    return lines


def _sets(rows: Sequence[SummaryRow]) -> list[dict[str, Any]]:
    """Whether each evaluation set can show differences, by each metric."""
    by_set: dict[tuple[str, str, str], list[SummaryRow]] = {}
    for row in rows:
        by_set.setdefault((row.experiment, row.set, row.metric), []).append(row)
    return [
        {"experiment": experiment, "set": name, "metric": metric, "can_differ": can_differ(same)}
        for (experiment, name, metric), same in by_set.items()
    ]


def _cell(row: SummaryRow, long: bool) -> str:
    if row.value is None:
        return f"{row.diverged} of {row.seeds} diverged"
    digits, between = (3, "; ") if long else (2, "<br>")
    number = lambda value: _number(value, digits)
    whole = long or row.value.low is None
    text = _interval(row.value, digits) if whole else number(row.value.mean)
    if row.value.low is not None:
        each = row.value.values
        shown = ", ".join(map(number, each))
        text += f" ({shown})" if long else f" ({number(min(each))} to {number(max(each))})"
    if row.difference is not None:
        text += between + _interval(row.difference, digits, "+")
    return text


def _number(value: float, digits: int, sign: str = "") -> str:
    # A value that is nearly 0 or 1 does not look as if it were; and no -0.00.
    if round(value, digits) in (-1, 0, 1) and round(value, 3) not in (-1, 0, 1):
        digits = 3
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"


def _interval(found: Interval, digits: int, sign: str = "") -> str:
    mean, n = _number(found.mean, digits, sign), len(found.values)
    if found.low is None:
        return f"{mean} (all {n} equal)" if n > 1 else mean
    return f"{mean} [{_number(found.low, digits, sign)}, {_number(found.high, digits, sign)}]"


def _cost_table(records: Sequence[dict[str, Any]], baseline: str) -> list[str]:
    lines = [
        "| experiment | method | parameters | MFLOP per token | ms per step and seed | "
        f"time / {baseline}'s | training loss, last 5 % |",
        "|---|---|---|---|---|---|---|",
    ]
    number = lambda value, digits: "-" if value is None else f"{value:.{digits}f}"
    for row in costs(records, baseline):
        lines.append(
            f"| {row['experiment']} | {row['method']} | {row['parameters']:,} | "
            f"{row['flops_per_token'] / 1e6:.2f} | {1e3 * row['step_seconds']:.1f} | "
            f"x {number(row['step_ratio'], 2)} | {number(row['train_loss'], 4)} |"
        )
    return lines


def _about(found: dict[str, Any]) -> dict[str, Any]:
    """What is the same in all cells, or what there are."""
    records = found["cells"]
    different = lambda values: sorted(set(values))
    versions = {name: {r["versions"][name] for r in records} for name in records[0]["versions"]}
    dates = different(record["date"] for record in records)
    return {
        "commands": found["commands"],
        "seeds": different(record["seed"] for record in records),
        "devices": different(record["hardware"]["device"] for record in records),
        "cores": different(record["hardware"]["cores"] for record in records),
        "commits": different(record["commit"] for record in records),
        "versions": {name: sorted(values) for name, values in versions.items()},
        "first": dates[0],
        "last": dates[-1],
        "hours": sum(r["seconds"] / len(r["seeds_together"]) for r in records) / 3600,
    }


def _warnings(found: dict[str, Any]) -> list[str]:
    commits = _about(found)["commits"]
    if len(commits) < 2:
        return []
    return [f"**These results are of {len(commits)} different commits.**", ""]


def _about_line(found: dict[str, Any]) -> str:
    about = _about(found)
    join = lambda values: " / ".join(map(str, values))
    versions = ", ".join(f"{name} {join(values)}" for name, values in about["versions"].items())
    return (
        f"{len(found['cells'])} trainings with seeds {', '.join(map(str, about['seeds']))}, "
        f"{about['hours']:.1f} hours if one after the other, on {join(about['devices'])} "
        f"({join(about['cores'])} cores), {about['last'][:10]}; {versions}; commit "
        f"{join(about['commits'])}."
    )
