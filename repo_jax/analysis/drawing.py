"""How the figures of an analysis look: widths, colours, marks, axes and legends.

What a model looks like depends on its number alone, so that it is the same in all figures.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from repo_jax import plots

FEATURE = "the figures of an analysis"
ONE_COLUMN, TWO_COLUMNS = 3.3, 6.9
POINTS = 7
GREY = "#767676"
REFERENCE: dict[str, Any] = dict(color=GREY, lw=0.8, ls=(0, (4, 2)), zorder=1)
LEGEND: dict[str, Any] = dict(fontsize=POINTS, frameon=False, handlelength=1.6, columnspacing=1.2)
_HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "----")


def panels(n_rows: int, n_columns: int, width: float, height: float, **options):
    """A figure of `width` x `height` inches and its axes [n_rows, n_columns]."""
    pyplot = plots.import_pyplot(FEATURE)
    style = {"font.size": POINTS, "axes.labelsize": POINTS, "axes.linewidth": 0.5}
    with pyplot.rc_context({**style, "hatch.linewidth": 0.4}):
        figure, axes = pyplot.subplots(
            *(n_rows, n_columns),
            figsize=(width, height),
            layout="constrained",
            squeeze=False,
            **options,
        )
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
        # Ticks are made when they are drawn, when the style above is no more.
        panel.tick_params(labelsize=POINTS, width=0.5, length=2.5)
        panel.tick_params(which="minor", width=0.4, length=1.5)
    return figure, axes


def title(panel, name: str) -> None:
    """A title over one panel."""
    panel.set_title(name, loc="left", fontsize=POINTS, pad=3)


def short(name: str, most: int = 28) -> str:
    """Without the middle where it is too long: names differ at their ends."""
    if len(name) <= most:
        return name
    head = (most - 1) // 2
    return f"{name[:head]}\N{HORIZONTAL ELLIPSIS}{name[head - most + 1 :]}"


def color(i: int) -> str:
    """Of model or head number i."""
    return plots.COLORS[i % len(plots.COLORS)]


def _other(i: int, of: Sequence[str]) -> str:
    """One of as many as there are colours; models that share a colour have different ones."""
    return of[(i + i // len(plots.COLORS)) % len(of)]


def line(i: int) -> dict[str, Any]:
    """How model or head i's curve is drawn."""
    return dict(color=color(i), marker=_other(i, plots.MARKERS), ms=3, lw=1)


def dots(i: int) -> dict[str, Any]:
    """How model i's single points are drawn."""
    marker = _other(i, plots.MARKERS)
    return dict(color=color(i), marker=marker, ms=2.2, mew=0, ls="", alpha=0.7)


def hatch(i: int) -> str:
    """Of model i's bars."""
    return _other(i, _HATCHES)


def layer_ticks(panel, depth: int, most: int, last: str | None = None, at: float = 0) -> None:
    """Ticks for `most` layers, and one for what stands after them."""
    ticks = range(0, depth, -(-depth // most))
    panel.set_xticks(
        [*ticks, *([at] if last else [])], [*map(str, ticks), *([last] if last else [])]
    )
    panel.set_xlabel("layer")


def log(panel, name: str, base: int = 10) -> None:
    """A logarithmic axis with plain numbers, more of them where there are few powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    getattr(panel, f"set_{name}scale")("log", base=base)
    low, high = getattr(panel, f"get_{name}lim")()
    axis = getattr(panel, f"{name}axis")
    few = base == 10 and high / low < 100
    axis.set_major_locator(LogLocator(base, subs=(1, 2, 5) if few else (1,), numticks=9))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def whole_numbers(axis) -> None:
    """Ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))


def legend_of_models(figure, models: Mapping[str, int], reference: str | None = None) -> None:
    """Which mark is which model's; `reference` is what the grey line stands for."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **line(i), label=short(name)) for name, i in models.items()]
    if reference is not None:
        handles.append(Line2D([], [], **REFERENCE, label=reference))
    legend(figure, handles)


def legend(figure, handles: Sequence[Any]) -> None:
    """Above the panels, in as many columns as there is room for; the figure grows by its rows."""
    style = dict(loc="outside upper center", **LEGEND)
    for n_columns in (4, 3, 2, 1):
        legend = figure.legend(handles=handles, ncols=n_columns, **style)
        if n_columns == 1 or legend.get_window_extent().width < figure.bbox.width:
            break
        legend.remove()
    n_rows = -(-len(handles) // n_columns)
    figure.set_figheight(figure.get_figheight() + (n_rows - 1) * 1.5 * POINTS / 72)


def spread(n: int, width: float) -> np.ndarray:
    """Places beside each other, so that points do not hide each other."""
    return np.zeros(1) if n == 1 else np.linspace(-width / 2, width / 2, n)


def color_bar(figure, image, axes, label: str, **options) -> None:
    """The bar that says what an image's colours mean."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    bar = figure.colorbar(image, ax=axes, pad=0.02, **options)
    bar.set_label(label, fontsize=POINTS)
    bar.ax.tick_params(labelsize=POINTS, width=0.5, length=2)
    bar.outline.set_linewidth(0.5)
    if isinstance(image.norm, LogNorm):
        axis = bar.ax.xaxis
        wide = image.norm.vmax / image.norm.vmin > 1000
        axis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 3), numticks=12))
        axis.set_major_formatter(FormatStrFormatter("%g"))
        axis.set_minor_locator(NullLocator())
