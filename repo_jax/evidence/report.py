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
from repo_jax.evidence.summary import Interval, SummaryRow, costs, methods_in, summarise

_METRICS = {
    "exact": "whole answers right",
    "tokens": "answer tokens right",
    "bits_per_byte": "bits per byte (less is better)",
}


def write_report(folder: Path) -> None:
    """Writes summary.md, summary.json and the figures beside a folder's results.json.

    Raises:
      ConfigError: there are no results.
      MissingPackageError: matplotlib is not installed.
    """
    found = results.load(folder)
    records = found["cells"]
    rows = summarise(records)
    plain = {
        "rows": [dataclasses.asdict(row) for row in rows],
        "costs": costs(records),
        "about": _about(found),
    }
    write(folder / "summary.json", json.dumps(plain, indent=1) + "\n")
    drawn = figures.draw(folder, records, rows)
    write(folder / "summary.md", _page(found, rows, drawn))


def headline_table(found: dict[str, Any]) -> str:
    """A Markdown table of the sets that each experiment puts in its headline.

    found: what `results.load` returns.
    """
    records = found["cells"]
    rows = [row for row in summarise(records) if row.set in _headline(records, row.experiment)]
    rows = [row for row in rows if row.metric == _first_metric(records, row.experiment)]
    return "\n".join([*_table(rows, methods_in(records)), "", _about_line(found)])


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


def _page(found: dict[str, Any], rows: Sequence[SummaryRow], drawn: dict[str, list[str]]) -> str:
    records = found["cells"]
    lines = ["# Evidence", "", _about_line(found), ""]
    lines += [
        "Means over seeds with 95 % intervals (Student's t; they may reach beyond 0 and 1), then "
        "the mean difference to RoPE with the same seeds, with its interval.",
        "",
    ]
    for experiment in dict.fromkeys(row.experiment for row in rows):
        lines += [f"## {experiment}", ""]
        lines += [f"![{experiment}]({name})" for name in drawn[experiment] if name.endswith("png")]
        own = [row for row in rows if row.experiment == experiment]
        for metric in dict.fromkeys(row.metric for row in own):
            for group in dict.fromkeys(row.group for row in own):
                chosen = [row for row in own if (row.metric, row.group) == (metric, group)]
                if not chosen:
                    continue
                title = f"{group}: {_METRICS[metric]}" if group else _METRICS[metric]
                lines += ["", f"### {title}", ""]
                lines += _table(chosen, methods_in(records), long=True)
    lines += ["", "## Costs", "", *_cost_table(records)]
    lines += ["", f"`{found['command']}`"]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[SummaryRow], methods: Sequence[str], *, long: bool = False) -> list[str]:
    """Methods down, sets across; `long`: with the intervals of values too."""
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
        cells = ["-" if chance is None else _number(chance) for chance in chances]
        lines.append(f"| *chance* | {' | '.join(cells)} |")
    return lines


def _cell(row: SummaryRow, long: bool) -> str:
    text = _number(row.value.mean)
    if long and row.value.low is not None:
        text += f" [{_number(row.value.low)}, {_number(row.value.high)}]"
    if row.difference is None:
        return text
    separator = "; " if long else " "
    return f"{text}{separator}({_signed(row.difference)})"


def _number(value: float) -> str:
    return f"{value:.3f}"


def _signed(difference: Interval) -> str:
    if difference.low is None:
        return f"{difference.mean:+.3f}"
    return f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"


def _cost_table(records: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "| experiment | method | parameters | MFLOP per token | ms per step | RoPE's | loss |",
        "|---|---|---|---|---|---|---|",
    ]
    number = lambda value, digits: "-" if value is None else f"{value:.{digits}f}"
    for row in costs(records):
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
        "command": found["command"],
        "seeds": different(record["seed"] for record in records),
        "devices": different(record["hardware"]["device"] for record in records),
        "cores": different(record["hardware"]["cores"] for record in records),
        "commits": different(record["commit"] for record in records),
        "versions": {name: sorted(values) for name, values in versions.items()},
        "first": dates[0],
        "last": dates[-1],
        "hours": sum(r["seconds"] / len(r["seeds_together"]) for r in records) / 3600,
    }


def _about_line(found: dict[str, Any]) -> str:
    about = _about(found)
    join = lambda values: " / ".join(map(str, values))
    versions = ", ".join(f"{name} {join(values)}" for name, values in about["versions"].items())
    return (
        f"{len(found['cells'])} trainings with seeds {', '.join(map(str, about['seeds']))}, "
        f"{about['hours']:.1f} hours in all on {join(about['devices'])} "
        f"({join(about['cores'])} cores), {about['last'][:10]}; {versions}; commit "
        f"{join(about['commits'])}."
    )
