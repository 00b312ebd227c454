"""Figures of an analysis, for a two-column paper.

Widths are one column (3.3 in) or two (6.9 in), and texts 7 pt at that size. Colours are told
apart by colour-blind readers, and nothing is told by colour alone. Models have the same colour
in all figures. What needs positions that were learned (RePo) leaves other layers out.

Functions take rows of `Report`, and `kinds`: by the name of a model, what each of its layers is.
They return a pyplot figure, which the caller closes, as `plots.save` does.
"""

import collections
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from repo_jax import plots
from repo_jax.analysis import drawing
from repo_jax.analysis.reading import Reading
from repo_jax.analysis.records import (
    DistanceRow,
    MassRow,
    PatternRow,
    RangeRow,
    Report,
)
from repo_jax.config import PositionKind

Kinds = Mapping[str, Sequence[PositionKind]]


_WORDS = {"rope": "RoPE", "nope": "NoPE", "repo": "RePo", "cope": "CoPE"}
# Longer lines are drawn by the medians of so many parts.
_PARTS = 400
# Heads that have a colour and a marker of their own; more are a scale of colours.
_FEW = len(plots.COLORS)


def draw_all(
    readings: Sequence[Reading],
    report: Report,
    folder: Path,
    *,
    layers: Sequence[int] | None = None,
) -> list[Path]:
    """Writes each figure that has something to show as PNG and SVG.

    Args:
      readings: of the same text, one a model.
      report: of these models.
      folder: made where there is none; files in it with the same names are overwritten.
      layers: of `position_curves`.

    Returns:
      The PNGs.

    Raises:
      MissingPackageError: matplotlib is not installed.
    """
    kinds = {reading.name: reading.kinds for reading in readings}
    drawn = {}
    if any(map(_placed, kinds.values())):
        drawn["positions"] = lambda: position_curves(readings, layers)
    if any(row.range > 0 for row in report.ranges):
        drawn["ranges"] = lambda: ranges(report.ranges, kinds)
    if report.patterns:
        drawn["patterns"] = lambda: patterns(report.patterns, kinds)
    if report.masses:
        drawn["attention_mass"] = lambda: attention_mass(report.masses, kinds)
    if any("repo" in of_layers for of_layers in kinds.values()):
        drawn["overview"] = lambda: overview(report, kinds)
    if any(row.z_ratio is not None for row in report.distances):
        drawn["related_tokens"] = lambda: related_tokens(report.distances, kinds)
    folder.mkdir(parents=True, exist_ok=True)
    return [plots.save(draw(), folder / name)[0] for name, draw in drawn.items()]


def position_curves(readings: Sequence[Reading], layers: Sequence[int] | None = None):
    """Position against token index: a row a layer, a column a model, a line a head.

    More than four models stand below each other, each with all its rows. Long texts are drawn by
    medians of some neighbouring tokens. Of many heads, those at the right that have room there
    are named.

    Args:
      readings: of the same text; at least one layer of one has positions.
      layers: which of the deepest model, 0-based. None: up to four that are spread over the depth
        of a model, of those with learned positions where there are any. Of the other models,
        those at the same depth.
    """
    depth = max(len(reading.kinds) for reading in readings)
    if not layers:
        layers, depth = _spread_layers(readings)
    chosen = [_layers_alike(reading, layers, depth) for reading in readings]
    n_blocks = -(-len(readings) // 4)
    n_columns = -(-len(readings) // n_blocks)
    width = drawing.ONE_COLUMN if len(readings) == 1 else drawing.TWO_COLUMNS
    # A line of a narrow column has no room for both the name and the layer.
    row, between = (0.95, ", ") if n_columns < 3 else (1.1, "\n")
    height = 0.2 + n_blocks * (0.35 + row * len(layers))
    figure, axes = drawing.panels(n_blocks * len(layers), n_columns, width, height)
    by_model = axes.reshape(n_blocks, len(layers), n_columns).swapaxes(1, 2)
    by_model = by_model.reshape(-1, len(layers))
    for panel in by_model[len(readings) :].flat:
        panel.remove()
    n_heads = max(reading.positions.shape[1] for reading in readings)
    for reading, of_rows, panels in zip(readings, chosen, by_model, strict=False):
        for panel, layer in zip(panels, of_rows, strict=True):
            _curves(panel, reading, layer, n_heads)
            name = f"layer {layer}, {_WORDS[reading.kinds[layer]]}"
            if len(readings) > 1:
                name = drawing.short(reading.name, 20 if n_columns < 4 else 16) + between + name
            drawing.title(panel, name)
            panel.tick_params(labelbottom=panel is panels[-1])
        size = _tokens_a_point(reading)
        medians = size > 1 and any(reading.kinds[layer] == "repo" for layer in of_rows)
        drawn = f"{between}medians of {size}" if medians else ""
        panels[-1].set_xlabel(f"token index (tokens){drawn}")
    for panel in axes[:, 0]:
        panel.set_ylabel("position z")
    learned = any(
        reading.kinds[layer] == "repo"
        for reading, of_rows in zip(readings, chosen, strict=True)
        for layer in of_rows
    )
    _legend_of_heads(figure, n_heads if learned else 0)
    return figure


def ranges(rows: Sequence[RangeRow], kinds: Kinds):
    """How far apart tokens stand: per layer, and against the context length.

    Left, heads of each layer for the whole text, with their median. Right, the median over all
    heads of the model's RePo layers (of all, where it has none) with the band from the first to
    the third quartile. Dashed: one step a token.
    """
    figure, axes = drawing.panels(1, 2, drawing.TWO_COLUMNS, 2.1)
    by_layer, by_length = axes[0]
    models = _models(rows, kinds)
    longest = {name: max(row.tokens for row in rows if row.model == name) for name in models}
    _heads_by_layer(by_layer, models, [(r, r.range) for r in rows if r.tokens == longest[r.model]])
    for tokens in set(longest.values()):
        by_layer.axhline(max(tokens - 1, 1), **drawing.REFERENCE)
    by_layer.set_ylabel("range of z (positions)")
    drawing.log(by_layer, "y")

    step = min(1.5, 6 / len(models))
    for place, (name, i) in enumerate(models.items()):
        found = collections.defaultdict(list)
        for row in _of_learned(rows, kinds, name):
            found[row.tokens].append(row.range)
        lengths = sorted(found)
        low, middle, high = ([np.quantile(found[n], q) for n in lengths] for q in (0.25, 0.5, 0.75))
        by_length.fill_between(lengths, low, high, color=drawing.color(i), alpha=0.2, lw=0)
        # Of lines that coincide, each remains to be seen.
        by_length.plot(
            lengths, middle, **drawing.line(i) | {"ms": 3 + step * (len(models) - 1 - place)}
        )
    lengths = sorted({row.tokens for row in rows})
    by_length.plot(lengths, [n - 1 for n in lengths], **drawing.REFERENCE)
    by_length.set(xlabel="context length (tokens)", ylabel="range of z (positions)")
    drawing.log(by_length, "x", base=2)
    drawing.log(by_length, "y")
    drawing.legend_of_models(figure, models, reference="one step a token")
    return figure


def patterns(rows: Sequence[PatternRow], kinds: Kinds):
    """Shares of chunks by local pattern: bars for layers, then for all RePo layers together."""
    models = _models(rows, kinds)
    depth = max(len(kinds[name]) for name in models)
    learned = [name for name in models if "repo" in kinds[name]]
    width = drawing.ONE_COLUMN if depth <= 16 else drawing.TWO_COLUMNS
    figure, axes = drawing.panels(len(models), 1, width, 0.75 + 0.95 * len(models), sharex=True)
    for panel, name in zip(axes[:, 0], models, strict=True):
        groups = collections.defaultdict(list)
        for row in rows:
            if row.model == name:
                groups[row.layer].append(row)
        for layer in set(range(len(kinds[name]))) - set(groups):
            style = dict(
                rotation=90, color=drawing.GREY, ha="center", va="center", fontsize=drawing.POINTS
            )
            panel.text(layer, 0.5, _WORDS[kinds[name][layer]], **style)
        if name in learned:
            groups[depth + 0.5] = _of_learned(rows, kinds, name)
        bottom = np.zeros(len(groups))
        for pattern, (color, hatch) in _PATTERNS.items():
            share = [np.mean([getattr(row, pattern) for row in group]) for group in groups.values()]
            style = dict(facecolor=color, hatch=hatch, edgecolor="white", lw=0.3)
            panel.bar(list(groups), share, 0.8, bottom, label=pattern, **style)
            bottom += share
        panel.set(ylim=(0, 1), yticks=(0, 0.5, 1), ylabel="share of chunks")
        if len(models) > 1:
            drawing.title(panel, drawing.short(name))
    drawing.layer_ticks(axes[-1, 0], depth, 16, "RePo" if learned else None, depth + 0.5)
    axes[-1, 0].set_xlim(-0.6, depth + 1.1 if learned else depth - 0.4)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, **drawing.LEGEND)
    return figure


def attention_mass(rows: Sequence[MassRow], kinds: Kinds):
    """Attention per token of each part of the prompts: by layer, and means of layers as bars."""
    models, parts = _models(rows, kinds), list(dict.fromkeys(row.part for row in rows))
    depth = max(len(kinds[name]) for name in models)
    n_columns = min(3, len(parts))
    n_rows = -(-len(parts) // n_columns)
    width = drawing.ONE_COLUMN if n_columns == 1 else drawing.TWO_COLUMNS
    figure, axes = drawing.panels(n_rows, n_columns, width, 0.2 + 1.6 * n_rows)
    for panel in axes.flat[len(parts) :]:
        panel.remove()
    slot = max(1.0, 0.14 * depth)  # of a bar, in layers
    for panel, part in zip(axes.flat, parts, strict=False):
        values = np.zeros(0)
        for place, (name, i) in enumerate(models.items(), start=1):
            # A tokenizer may leave a part without tokens.
            if by_layer := _mean_by_layer(rows, name, part):
                mine = 100 * np.array(list(by_layer.values()))
                panel.plot(list(by_layer), mine, **drawing.line(i))
                style = dict(
                    facecolor=drawing.color(i), edgecolor="white", hatch=drawing.hatch(i), lw=0.3
                )
                panel.bar(depth - 0.5 + place * slot, mine.mean(), 0.85 * slot, **style)
                values = np.append(values, mine)
        if values.min() > 0 and values.max() / values.min() > 100:
            drawing.log(panel, "y")
        else:
            panel.set_ylim(bottom=0)
        drawing.layer_ticks(panel, depth, 8, "mean", depth - 0.5 + (len(models) + 1) / 2 * slot)
        panel.set_xlim(-0.6, depth - 0.5 + (len(models) + 0.6) * slot)
        drawing.title(panel, drawing.short(part))
    for panel in axes[:, 0]:
        panel.set_ylabel("attention per token (\N{MULTIPLICATION SIGN} 10$^{-2}$)")
    if len(models) > 1:
        drawing.legend_of_models(figure, models)
    return figure


def overview(report: Report, kinds: Kinds):
    """Layers x heads of each model that has RePo layers: range, constant chunks, correlation.

    White: there is no value, as where a text is shorter than a chunk.
    """
    models = [name for name, of_layers in kinds.items() if "repo" in of_layers]
    longest = max(row.tokens for row in report.ranges)
    measures = {
        "range of z (positions)": ("range", report.ranges),
        "share of constant chunks": ("constant", report.patterns),
        "correlation of z and index": ("pearson", report.correlations),
    }
    measures = {label: what for label, what in measures.items() if what[1]}
    n_heads = {
        name: 1 + max(row.head for row in report.ranges if row.model == name) for name in models
    }
    heights = [min(2.6, max(1.0, 0.16 * len(kinds[name]))) for name in models]
    height = 0.8 + sum(heights) + 0.2 * len(models)
    figure, axes = drawing.panels(
        len(models), len(measures), drawing.TWO_COLUMNS, height, height_ratios=heights
    )
    for column, (label, (attribute, rows)) in enumerate(measures.items()):
        maps = [_map(rows, attribute, name, kinds[name], n_heads[name]) for name in models]
        scale = _scale(attribute, maps, longest)
        for panel, name, found in zip(axes[:, column], models, maps, strict=True):
            image = panel.pcolormesh(found, **scale)
            _mark_other_layers(panel, kinds[name], found.shape[1])
            panel.invert_yaxis()
            panel.spines[["top", "right"]].set_visible(True)
            for axis, n in ((panel.xaxis, found.shape[1]), (panel.yaxis, found.shape[0])):
                ticks = np.arange(0, n, -(-n // 8))
                axis.set_ticks(ticks + 0.5, ticks)
            if len(models) > 1 and not column:
                drawing.title(panel, drawing.short(name))
        drawing.color_bar(figure, image, axes[:, column], label, location="top", aspect=30)
        axes[-1, column].set_xlabel("head")
    for panel in axes[:, 0]:
        panel.set_ylabel("layer")
    return figure


def related_tokens(rows: Sequence[DistanceRow], kinds: Kinds):
    """Distance of related cells of tables over that of unrelated ones, by layer: a point a head.

    Below the dashed line of a model, related cells are nearer in z than in the text.
    """
    rows = [row for row in rows if row.relation != "unrelated" and row.z_ratio is not None]
    relations = list(dict.fromkeys(row.relation for row in rows))
    models = _models(rows, kinds)
    width = drawing.ONE_COLUMN if len(relations) == 1 else drawing.TWO_COLUMNS
    figure, axes = drawing.panels(1, len(relations), width, 2.1)
    for panel, relation in zip(axes[0], relations, strict=True):
        mine = [row for row in rows if row.relation == relation]
        _heads_by_layer(panel, models, [(row, row.z_ratio) for row in mine])
        in_text = {(row.model, row.index_ratio) for row in mine}
        same = len({ratio for _, ratio in in_text}) == 1
        for name, ratio in in_text:
            style = (
                drawing.REFERENCE
                if same
                else drawing.REFERENCE | {"color": drawing.color(models[name])}
            )
            panel.axhline(ratio, **style)
        drawing.title(panel, relation.replace("_", " "))
        panel.set_ylim(bottom=0)
    axes[0, 0].set_ylabel("distance, related / unrelated")
    drawing.legend_of_models(figure, models, reference="in the text (index)")
    return figure


_PATTERNS = {
    "constant": (plots.COLORS[0], ""),
    "monotonic": (plots.COLORS[4], "////"),
    "hybrid": (plots.COLORS[5], "...."),
}


def _models(rows: Sequence[Any], kinds: Kinds) -> dict[str, int]:
    """The models that have rows, and the number that gives them colour and marker."""
    found = {row.model for row in rows}
    return {name: i for i, name in enumerate(kinds) if name in found}


def _placed(of_layers: Sequence[PositionKind]) -> bool:
    """Whether any layer has positions."""
    return not {"rope", "repo"}.isdisjoint(of_layers)


def _of_learned(rows: Sequence[Any], kinds: Kinds, name: str) -> list[Any]:
    """A model's rows of RePo layers; all of its rows where it has no such layer."""
    mine = [row for row in rows if row.model == name]
    return [row for row in mine if kinds[name][row.layer] == "repo"] or mine


def _mean_by_layer(rows: Sequence[MassRow], model: str, part: str) -> dict[int, float]:
    found = collections.defaultdict(list)
    for row in rows:
        if (row.model, row.part) == (model, part):
            found[row.layer].append(row.mass)
    return {layer: float(np.mean(values)) for layer, values in sorted(found.items())}


def _heads_by_layer(panel, models: Mapping[str, int], found: Sequence[tuple[Any, float]]) -> None:
    """The (row, value) of each layer, models beside each other: points with their median.

    Where they are too many for points: a line from the least to the largest, and a bar over the
    middle half.
    """
    slot = 0.8 / len(models)
    for place, (name, i) in enumerate(models.items()):
        by_layer = collections.defaultdict(list)
        for row, value in found:
            if row.model == name:
                by_layer[row.layer].append(value)
        dense = sum(map(len, by_layer.values())) > 64
        for layer, values in by_layer.items():
            x = layer + (place - (len(models) - 1) / 2) * slot
            low, first, middle, third, high = np.quantile(values, (0, 0.25, 0.5, 0.75, 1))
            line = dict(xmin=x - 0.4 * slot, xmax=x + 0.4 * slot, lw=1.2)
            if dense and low < high:
                panel.vlines(x, low, high, drawing.color(i), lw=0.5)
                panel.bar(x, third - first, 0.7 * slot, first, color=drawing.color(i), lw=0)
                panel.hlines(middle, colors="white", **line)
            else:
                panel.hlines(middle, colors=drawing.color(i), **line)
            if not dense:
                panel.plot(x + drawing.spread(len(values), 0.6 * slot), values, **drawing.dots(i))
    panel.use_sticky_edges = False
    panel.set_xlabel("layer")
    drawing.whole_numbers(panel.xaxis)


def _spread_layers(readings: Sequence[Reading], most: int = 4) -> tuple[list[int], int]:
    """Layers that are worth a look, and how many their model has.

    It is the deepest of those with RePo layers; where there are none, of those with RoPE layers.
    """
    reading = max(readings, key=lambda r: ("repo" in r.kinds, _placed(r.kinds), len(r.kinds)))
    for wanted in (("repo",), ("rope",)):
        if found := [i for i, kind in enumerate(reading.kinds) if kind in wanted]:
            at = np.linspace(0, len(found) - 1, min(most, len(found))).round().astype(int)
            return [found[i] for i in at], len(reading.kinds)
    raise ValueError("no layer of these models has positions; there is no curve to draw")


def _layers_alike(reading: Reading, layers: Sequence[int], depth: int) -> list[int]:
    """A model's layers at the depth of those of a model of `depth` layers."""
    last = len(reading.kinds) - 1
    return [round(layer * last / max(1, depth - 1)) for layer in layers]


def _tokens_a_point(reading: Reading) -> int:
    return -(-reading.positions.shape[2] // _PARTS)


def _curves(panel, reading: Reading, layer: int, n_heads: int) -> None:
    """Lines of a layer; `n_heads` is the most that a model here has."""
    z = reading.positions[layer]
    n_tokens = z.shape[1]
    index = ([0, n_tokens - 1], [0, n_tokens - 1])
    panel.set_xlim(-0.01 * n_tokens, 1.01 * n_tokens)
    if reading.kinds[layer] == "rope":
        panel.plot(*index, **drawing.REFERENCE)
        return
    if reading.kinds[layer] != "repo":
        style = dict(ha="center", va="center", color=drawing.GREY, fontsize=drawing.POINTS)
        panel.text(0.5, 0.5, "no positions", transform=panel.transAxes, **style)
        panel.set_yticks([])
        return
    size = _tokens_a_point(reading)
    starts = np.arange(0, n_tokens, size)
    # The last part may be shorter than the others.
    medians = np.stack([np.median(z[:, at : at + size], axis=1) for at in starts], axis=1)
    middles = np.minimum(starts + (size - 1) / 2, n_tokens - 1)
    for head, values in enumerate(medians):
        style = dict(color=_head_color(head, n_heads), lw=0.7, alpha=0.9)
        if n_heads <= _FEW:
            every = max(1, len(starts) // 6)
            marked = (every * head // n_heads, every)
            style |= dict(marker=plots.MARKERS[head], ms=2.6, markevery=marked)
        panel.plot(middles, values, **style)
    panel.set_ylim(panel.get_ylim())
    panel.plot(*index, **drawing.REFERENCE)
    if n_heads > _FEW:
        _name_heads(panel, medians[:, -1])


def _name_heads(panel, ends: np.ndarray) -> None:
    """Numbers at the right ends of lines, from above, where there is room for them."""
    low, high = panel.get_ylim()
    needed, free = 0.14 * (high - low), np.inf
    for head in np.argsort(-ends):
        if ends[head] < free:
            at = (1.01, ends[head])
            style = dict(va="center", fontsize=drawing.POINTS, color=drawing.GREY)
            panel.text(*at, str(head), transform=panel.get_yaxis_transform(), **style)
            free = ends[head] - needed


def _head_color(head: int, n_heads: int):
    if n_heads <= _FEW:
        return plots.COLORS[head]
    from matplotlib import colormaps

    return colormaps["cividis"](head / (n_heads - 1))


def _legend_of_heads(figure, n_heads: int) -> None:
    """Of `n_heads` heads, 0 where no positions are learned, and the reference."""
    from matplotlib import cm, colors
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **drawing.REFERENCE, label="z = index")]
    if n_heads <= _FEW:
        handles += [Line2D([], [], **drawing.line(i), label=f"head {i}") for i in range(n_heads)]
    else:
        scale = cm.ScalarMappable(colors.Normalize(0, n_heads - 1), "cividis")
        drawing.color_bar(figure, scale, figure.axes, "head", aspect=40)
    drawing.legend(figure, handles)


def _map(
    rows: Sequence[Any],
    attribute: str,
    model: str,
    of_layers: Sequence[PositionKind],
    n_heads: int,
):
    """Values of RePo layers at the greatest length, [L, N]; masked elsewhere."""
    mine = [row for row in rows if row.model == model]
    longest = max((getattr(row, "tokens", 0) for row in mine), default=0)
    found = np.full((len(of_layers), n_heads), np.nan)
    for row in mine:
        value = getattr(row, attribute)
        if of_layers[row.layer] == "repo" and getattr(row, "tokens", 0) == longest:
            found[row.layer, row.head] = np.nan if value is None else value
    return np.ma.masked_invalid(found)


def _scale(attribute: str, maps: Sequence[Any], longest: int) -> dict[str, Any]:
    """Colours that all models share."""
    if attribute == "pearson":
        return dict(cmap="PuOr", vmin=-1, vmax=1)
    if attribute == "constant":
        return dict(cmap="cividis", vmin=0, vmax=1)
    values = np.concatenate([found.compressed() for found in maps])
    positive = values[values > 0]
    if not len(positive) or positive.max() / positive.min() < 10:
        return dict(cmap="cividis", vmin=0, vmax=max(positive, default=longest))
    from matplotlib.colors import LogNorm

    return dict(cmap="cividis", norm=LogNorm(positive.min(), positive.max(), clip=True))


def _mark_other_layers(panel, of_layers: Sequence[PositionKind], n_heads: int) -> None:
    """Grey and a word where a layer's positions are not learned."""
    start = 0
    for layer in range(1, len(of_layers) + 1):
        if layer < len(of_layers) and of_layers[layer] == of_layers[start]:
            continue
        if of_layers[start] != "repo":
            panel.axhspan(start, layer, facecolor="#E8E8E8", zorder=2)
            style = dict(
                ha="center", va="center", color="#555555", fontsize=drawing.POINTS, zorder=3
            )
            panel.text(n_heads / 2, (start + layer) / 2, _WORDS[of_layers[start]], **style)
        start = layer
