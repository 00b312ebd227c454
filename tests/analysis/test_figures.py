"""Figures: they show the numbers they are given, and can be read."""

import itertools
import re
import sys
import warnings

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.axis import Tick
from matplotlib.collections import QuadMesh
from matplotlib.text import Text

from repo_jax import plots
from repo_jax.analysis import drawing, figures
from repo_jax.analysis.reading import Reading
from repo_jax.analysis.records import (
    CorrelationRow,
    DistanceRow,
    MassRow,
    PatternRow,
    RangeRow,
    Report,
)
from repo_jax.errors import MissingPackageError

ALL = {"positions", "ranges", "patterns", "attention_mass", "overview", "related_tokens"}
PARTS = ("needle", "query", "rest")
REPO = ("rope", "repo", "repo", "repo")
LONG_NAME = "a-run-whose-name-says-all-of-its-options-and-more-lr-0.004"


@pytest.fixture(autouse=True)
def _closed():
    yield
    pyplot.close("all")


def reading(name="model", kinds=REPO, n_heads=3, n_tokens=100, seed=0) -> Reading:
    rng = np.random.default_rng(seed)
    z = np.full((len(kinds), n_heads, n_tokens), np.nan, np.float32)
    for layer, kind in enumerate(kinds):
        if kind == "rope":
            z[layer] = np.arange(n_tokens)
        if kind == "repo":
            z[layer] = np.cumsum(rng.normal(size=(n_heads, n_tokens)), 1) + rng.normal(0, 20)
    ids = np.zeros(n_tokens, np.int32)
    return Reading(name, "x" * n_tokens, ids, np.stack([ids, ids + 1], 1), tuple(kinds), z)


def report_of(r: Reading, seed=0) -> Report:
    """Rows of the right tables, layers and heads, with numbers of no meaning."""
    rng = np.random.default_rng(seed)
    rows = Report()
    n_layers, n_heads, n_tokens = r.positions.shape
    for layer, head in np.ndindex(n_layers, n_heads):
        at = (r.name, layer, head)
        masses = [MassRow(*at, part, rng.uniform(1e-4, 1e-2), 9, 8) for part in PARTS]
        rows += Report(masses=tuple(masses))
        if r.kinds[layer] not in ("rope", "repo"):
            continue
        z = r.positions[layer, head].astype(float)
        ranges = [
            RangeRow(*at, n, 0.0, 1.0, np.ptp(z[:n]), 0.0, 1.0, 0)
            for n in (16, 32, 64, 128, n_tokens)
            if n <= n_tokens
        ]
        patterns = [PatternRow(*at, 16, 0.2, n_tokens // 16, *rng.dirichlet(np.ones(3)))]
        distances = [
            DistanceRow(*at, relation, 10, 1.0, 1.0, rng.uniform(0.5, 1.5), ratio)
            for relation, ratio in (("same_row", 0.1), ("same_column", 0.9), ("unrelated", 1.0))
        ]
        rows += Report(
            tuple(ranges),
            tuple(patterns if n_tokens >= 16 else ()),
            (CorrelationRow(*at, n_tokens, rng.uniform(-1, 1), 0.0),),
            (),
            tuple(distances),
        )
    return rows


SHAPES = {
    "one layer, one head": [reading(kinds=("repo",), n_heads=1)],
    "a run": [reading(LONG_NAME)],
    "two runs": [reading("rope", ("rope",) * 4), reading(LONG_NAME, seed=1)],
    "rope": [reading(kinds=("rope", "rope"))],
    "nope": [reading(kinds=("nope", "nope"))],
    "cope and repo": [reading("cope", ("cope",)), reading("repo", n_heads=8)],
    "other depths": [reading("a", ("nope", "repo", "repo"), 7), reading("b", REPO * 2, 2)],
    "large": [reading(kinds=("rope",) * 10 + ("repo",) * 22, n_heads=32, n_tokens=900)],
    "a token": [reading(n_tokens=1)],
    "one without a chunk": [reading("bytes", n_tokens=20), reading("pieces", n_tokens=8)],
    "four": [reading(f"{LONG_NAME}-{i}", ("repo",) * 2, n_tokens=500) for i in range(4)],
    "seven": [reading(f"{LONG_NAME}-{i}", REPO[: 2 + i % 2], 7) for i in range(7)],
}
WITHOUT = {
    "rope": {"overview"},
    "nope": ALL - {"attention_mass"},
    "a token": {"ranges", "patterns"},
}


@pytest.fixture(scope="module", params=SHAPES)
def drawn(request, tmp_path_factory):
    """The name of a shape, its readings, the PNGs, and the figures that were saved as them."""
    folder, found = tmp_path_factory.mktemp("figures"), {}
    readings = SHAPES[request.param]
    save = plots.save

    def keep(figure, path):
        figure.canvas.draw()
        found[path.name] = (figure, *unreadable(figure))
        return save(figure, path)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(plots, "save", keep)
        report = sum((report_of(r) for r in readings), Report())
        paths = figures.draw_all(readings, report, folder / "new")
    return request.param, paths, found


def unreadable(figure) -> tuple[list[str], list[str]]:
    """Texts that are cut off or too small, and texts that touch others."""
    renderer, edge = figure.canvas.get_renderer(), figure.bbox.padded(1)
    of_ticks = {label for tick in figure.findobj(Tick) for label in (tick.label1, tick.label2)}
    texts = [text for text in figure.findobj(Text) if text not in of_ticks]
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            texts += [label for tick in ticks for label in (tick.label1, tick.label2)]
    texts = [text for text in texts if text.get_text() and text.get_visible()]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts]
    pairs = itertools.combinations(boxes, 2)
    touching = [text for (text, box), (_, other) in pairs if box.overlaps(other)]
    lost = []
    for text, (words, box) in zip(texts, boxes, strict=True):
        inside = edge.contains(box.x0, box.y0) and edge.contains(box.x1, box.y1)
        if not inside or text.get_fontsize() < 7:
            lost.append(words)
    return lost, touching


def test_what_applies_is_drawn_as_png_and_svg(drawn):
    shape, paths, _ = drawn
    assert {path.stem for path in paths} == ALL - WITHOUT.get(shape, set())
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert "<svg" in path.with_suffix(".svg").read_text()


def test_texts_are_whole_large_enough_and_apart(drawn):
    for name, (figure, lost, touching) in drawn[2].items():
        assert figure.get_size_inches()[0] in (3.3, 6.9)
        assert not lost, (name, lost)
        assert not touching, (name, touching)


def kinds_of(*readings):
    return {r.name: r.kinds for r in readings}


def lines(axes, label=None):
    return [line for line in axes.lines if label is None or line.get_label() == label]


def test_curves_are_the_positions_of_the_layers_asked_for():
    r = reading(n_tokens=50)
    figure = figures.position_curves([r], layers=[3, 1])
    for axes, layer in zip(figure.axes, (3, 1), strict=True):
        assert axes.get_title("left") == f"layer {layer}, RePo"
        *heads, index = lines(axes)
        for line, z in zip(heads, r.positions[layer], strict=True):
            np.testing.assert_array_equal(line.get_xdata(), np.arange(50))
            np.testing.assert_array_equal(line.get_ydata(), z)
        np.testing.assert_array_equal(index.get_xdata(), index.get_ydata())
        low, high = axes.get_ylim()
        assert low < r.positions[layer].min() < r.positions[layer].max() < high


def test_long_curves_are_medians_and_say_so():
    r = reading(n_tokens=1001)
    (axes, *_) = figures.position_curves([r], layers=[2]).axes
    size = 3
    line = lines(axes)[0]
    z = r.positions[2, 0]
    np.testing.assert_array_equal(
        line.get_ydata(), [np.median(z[i : i + size]) for i in range(0, 1001, size)]
    )
    assert axes.get_xlabel() == f"token index (tokens), medians of {size}"


def test_medians_are_named_below_every_column_that_has_them():
    readings = [reading("mixed", n_tokens=1001), reading("rope", ("rope",) * 4, n_tokens=1001)]
    *_, mixed, rope = figures.position_curves(readings, layers=[2, 0]).axes
    assert mixed.get_xlabel() == "token index (tokens), medians of 3"
    assert rope.get_xlabel() == "token index (tokens)"


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (REPO, [1, 2, 3]),
        (("rope",) * 10 + ("repo",) * 22, [10, 17, 24, 31]),
        (("nope", "rope", "nope"), [1]),
    ],
)
def test_layers_with_learned_positions_come_first(kinds, expected):
    figure = figures.position_curves([reading(kinds=kinds, n_heads=1)])
    titles = [axes.get_title("left").split(",")[0] for axes in figure.axes]
    assert titles == [f"layer {layer}" for layer in expected]


def shown_layers(figure) -> dict[str, list[str]]:
    """What is drawn of each model, in a figure of several."""
    found = {}
    for axes in figure.axes:
        name, what = re.split(r", |\n", axes.get_title("left"), maxsplit=1)
        found.setdefault(name, []).append(what)
    return found


@pytest.mark.parametrize("depth", [8, 32])
def test_learned_layers_come_first_beside_a_model_of_other_depth(depth):
    learned = ("rope",) * 5 + ("repo",) * 11
    readings = [reading("a", ("rope",) * depth, 1), reading("b", learned, 1)]
    layers = [5, 8, 12, 15]
    shown = shown_layers(figures.position_curves(readings))
    assert shown["b"] == [f"layer {layer}, RePo" for layer in layers]
    alike = [round(layer / 15 * (depth - 1)) for layer in layers]
    assert shown["a"] == [f"layer {layer}, RoPE" for layer in alike]


def test_layers_asked_for_are_those_of_the_deepest_model():
    readings = [reading("a", ("rope",) * 31, 1), reading("b", ("repo",) * 16, 1)]
    shown = shown_layers(figures.position_curves(readings, layers=[30, 10]))
    assert shown == {
        "a": ["layer 30, RoPE", "layer 10, RoPE"],
        "b": ["layer 15, RePo", "layer 5, RePo"],
    }


@pytest.mark.parametrize("n_models", [1, 4, 5, 7, 9])
def test_curves_of_many_models_keep_their_width(n_models):
    readings = [reading(f"m{i}", ("rope", "repo"), 1, 20 + i) for i in range(n_models)]
    figure = figures.position_curves(readings, layers=[1, 0])
    figure.canvas.draw()
    panels = [axes for axes in figure.axes if len(lines(axes)) > 1]
    for axes, r in zip(panels, readings, strict=True):
        np.testing.assert_array_equal(lines(axes)[0].get_ydata(), r.positions[1, 0])
        assert axes.get_window_extent().width / figure.dpi > 1.2
    if n_models > 1:
        expected = ["layer 1, RePo", "layer 0, RoPE"]
        assert shown_layers(figure) == {r.name: expected for r in readings}


def test_ranges_are_medians_of_learned_layers():
    r = reading()
    rows = report_of(r).ranges
    by_layer, by_length = figures.ranges(rows, kinds_of(r)).axes
    expected = [
        np.median([row.range for row in rows if row.tokens == n and row.layer > 0])
        for n in (16, 32, 64, 100)
    ]
    median, reference = lines(by_length)
    np.testing.assert_array_equal(median.get_xdata(), [16, 32, 64, 100])
    np.testing.assert_allclose(median.get_ydata(), expected)
    np.testing.assert_array_equal(reference.get_ydata(), [15, 31, 63, 99])
    points = [line.get_ydata() for line in lines(by_layer)][: len(r.kinds)]
    for layer, values in enumerate(points):
        np.testing.assert_allclose(values, np.ptp(r.positions[layer], axis=1), rtol=1e-6)


def test_pattern_bars_fill_the_whole_and_rope_is_not_in_their_mean():
    r = reading(kinds=("rope", "nope", "repo", "repo"))
    rows = report_of(r).patterns
    (axes,) = figures.patterns(rows, kinds_of(r)).axes
    bars = {container.get_label(): list(container) for container in axes.containers}
    for pattern, found in bars.items():
        of_layers, together = found[:-1], found[-1]
        for bar, layer in zip(of_layers, (0, 2, 3), strict=True):
            expected = np.mean([getattr(row, pattern) for row in rows if row.layer == layer])
            np.testing.assert_allclose(bar.get_height(), expected)
        learned = np.mean([getattr(row, pattern) for row in rows if row.layer > 1])
        np.testing.assert_allclose(together.get_height(), learned)
    tops = [bar.get_y() + bar.get_height() for bar in bars["hybrid"]]
    np.testing.assert_allclose(tops, 1)
    assert "NoPE" in {text.get_text() for text in axes.texts}


def test_attention_is_per_part_in_hundredths():
    readings = [reading("a"), reading("b", ("nope", "nope"))]
    rows = sum((report_of(r, i) for i, r in enumerate(readings)), Report()).masses
    figure = figures.attention_mass(rows, kinds_of(*readings))
    for axes, part in zip(figure.axes, PARTS, strict=True):
        assert axes.get_title("left") == part
        for name, line, bar in zip("ab", lines(axes), axes.containers, strict=True):
            mine = [row for row in rows if (row.model, row.part) == (name, part)]
            layers = range(4 if name == "a" else 2)
            by_layer = [100 * np.mean([r.mass for r in mine if r.layer == i]) for i in layers]
            np.testing.assert_allclose(line.get_ydata(), by_layer)
            np.testing.assert_allclose(bar[0].get_height(), np.mean(by_layer))


@pytest.mark.parametrize("n_parts", [1, 2, 4, 7])
def test_any_number_of_parts(n_parts):
    rows = [MassRow("m", 0, 0, f"part {i}", 10.0**-i, 1, 1) for i in range(n_parts)]
    figure = figures.attention_mass(rows, {"m": ("rope",)})
    assert [axes.get_title("left") for axes in figure.axes] == [row.part for row in rows]


@pytest.mark.parametrize("n_models", [2, 7])
def test_names_are_whole_in_one_column(n_models):
    readings = [reading(f"{LONG_NAME}-{i}") for i in range(n_models)]
    report = sum(map(report_of, readings), Report())
    kinds = kinds_of(*readings)
    masses = [row for row in report.masses if row.part == "needle"]
    distances = [row for row in report.distances if row.relation == "same_row"]
    drawn = [figures.attention_mass(masses, kinds), figures.related_tokens(distances, kinds)]
    for figure in drawn:
        figure.canvas.draw()
        assert figure.get_size_inches()[0] == 3.3
        assert unreadable(figure) == ([], [])
        (legend,) = figure.legends
        assert {drawing.short(r.name) for r in readings} <= {t.get_text() for t in legend.texts}
        assert figure.axes[0].get_window_extent().height / figure.dpi > 0.9


def test_the_overview_shows_learned_layers_only():
    r = reading()
    report = report_of(r)
    figure = figures.overview(report, kinds_of(r))
    for axes, rows, attribute in zip(
        figure.axes[:3],
        (report.ranges, report.patterns, report.correlations),
        ("range", "constant", "pearson"),
        strict=True,
    ):
        (mesh,) = axes.findobj(QuadMesh)
        found = mesh.get_array().reshape(4, 3)
        assert found.mask[0].all()
        for row in rows:
            if row.layer > 0 and getattr(row, "tokens", 100) == 100:
                assert found[row.layer, row.head] == getattr(row, attribute)
        assert "RoPE" in {text.get_text() for text in axes.texts}


def test_related_tokens_beside_their_distance_in_the_text():
    r = reading()
    rows = report_of(r).distances
    figure = figures.related_tokens(rows, kinds_of(r))
    relations = (("same_row", 0.1), ("same_column", 0.9))
    for axes, (relation, ratio) in zip(figure.axes, relations, strict=True):
        assert axes.get_title("left") == relation.replace("_", " ")
        *points, reference = lines(axes)
        np.testing.assert_array_equal(reference.get_ydata(), ratio)
        expected = [row.z_ratio for row in rows if row.relation == relation]
        np.testing.assert_array_equal(np.concatenate([p.get_ydata() for p in points]), expected)


def test_a_model_has_the_same_colour_in_all_figures():
    readings = [reading("nope", ("nope",)), reading("repo")]
    kinds, report = kinds_of(*readings), sum(map(report_of, readings), Report())
    of_repo = [
        figures.attention_mass(report.masses, kinds).axes[0].lines[1],
        figures.ranges(report.ranges, kinds).axes[1].lines[0],
        figures.related_tokens(report.distances, kinds).axes[0].lines[0],
    ]
    assert {line.get_color() for line in of_repo} == {plots.COLORS[1]}
    assert {line.get_marker() for line in of_repo} == {plots.MARKERS[1]}


def test_no_two_models_look_the_same():
    readings = [reading(f"m{i}", ("repo",), 1) for i in range(2 * len(plots.COLORS))]
    report = sum(map(report_of, readings), Report())
    panel = figures.attention_mass(report.masses, kinds_of(*readings)).axes[0]
    bars = [container[0] for container in panel.containers]
    assert len({(line.get_color(), line.get_marker()) for line in panel.lines}) == len(readings)
    assert len({(bar.get_facecolor(), bar.get_hatch()) for bar in bars}) == len(readings)


def test_long_names_keep_both_ends():
    other = LONG_NAME.replace("0.004", "0.002")
    shown = {drawing.short(name) for name in (LONG_NAME, other)}
    assert len(shown) == 2
    assert all(len(name) == 28 and name.startswith("a-run") for name in shown)
    assert drawing.short("repo") == "repo"


def test_the_same_figure_gives_the_same_files(tmp_path):
    r = reading()
    written = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        figure = figures.patterns(report_of(r).patterns, kinds_of(r))
        written.append([path.read_bytes() for path in plots.save(figure, folder / "v1.5")])
        assert sorted(path.name for path in folder.iterdir()) == ["v1.5.png", "v1.5.svg"]
    assert written[0] == written[1]
    assert not pyplot.get_fignums()


def test_matplotlib_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match=r"matplotlib.*repo-jax\[plots\]"):
        figures.position_curves([reading()])
