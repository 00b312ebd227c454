"""Accuracy against length, a curve and a band for each method."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repo_jax import plots
from repo_jax.evidence.methods import NAMES
from repo_jax.evidence.summary import SummaryRow, methods_in

_LABELS = {"exact": "whole answers right", "tokens": "answer tokens right"}
# As many methods as a suite has at most are told apart by marker, colours come again dashed.
_COLORS = (*plots.COLORS, "#000000")
_MARKERS = (*plots.MARKERS, "P", "X", "<", ">", "h", "p", "d")
FEATURE = "the figures of a suite"


def draw(
    folder: Path, records: Sequence[dict[str, Any]], rows: Sequence[SummaryRow]
) -> dict[str, list[str]]:
    """Draws a figure for each experiment into `folder`, as PNG and SVG; returns their names.

    A row of axes for each metric, a column for each kind of question. Bands are from the
    least to the most of the seeds; dotted is chance; the grey line is the largest size in training.
    """
    pyplot = plots.import_pyplot(FEATURE)
    drawn: dict[str, list[str]] = {}
    order = methods_in(records)
    for experiment in dict.fromkeys(row.experiment for row in rows):
        record = next(r for r in records if r["experiment"] == experiment)
        own = [row for row in rows if row.experiment == experiment]
        metrics = list(dict.fromkeys(row.metric for row in own))
        groups = list(dict.fromkeys(row.group for row in own))
        figure, axes = pyplot.subplots(
            *(len(metrics), len(groups)),
            figsize=(1.6 + 3.2 * len(groups), 0.6 + 2.6 * len(metrics)),
            squeeze=False,
            sharex=True,
            layout="constrained",
        )
        for i, metric in enumerate(metrics):
            for j, group in enumerate(groups):
                chosen = [row for row in own if (row.metric, row.group) == (metric, group)]
                _curves(axes[i, j], chosen, order, record["trained_to"])
                axes[i, j].set_title(group.replace("_", " ") if not i else "")
            axes[i, 0].set_ylabel(_LABELS.get(metric, metric.replace("_", " ")))
        figure.supxlabel(record["x_label"])
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False)
        drawn[experiment] = [path.name for path in plots.save(figure, folder / experiment)]
    return drawn


def _curves(axes, rows: Sequence[SummaryRow], order: Sequence[str], trained_to: int) -> None:
    for method in order:
        mine = sorted((r for r in rows if r.method == method and r.value), key=lambda row: row.x)
        if not mine:
            continue
        i = NAMES.index(method)  # so that a method looks the same in all figures
        color, marker = _COLORS[i % len(_COLORS)], _MARKERS[i % len(_MARKERS)]
        line = "-" if i < len(_COLORS) else "--"
        x = [row.x for row in mine]
        axes.plot(
            *(x, [row.value.mean for row in mine]),
            **dict(label=method, color=color, marker=marker, ls=line, ms=4, lw=1.4),
        )
        low, high = ([end(row.value.values) for row in mine] for end in (min, max))
        axes.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
    chance = {row.x: row.chance for row in rows if row.chance is not None}
    if chance:
        axes.plot(sorted(chance), [chance[x] for x in sorted(chance)], ":", color="0.4", lw=1)
        axes.set_ylim(-0.03, 1.03)
    axes.axvline(trained_to, color="0.8", lw=1, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
