"""Intervals and comparisons."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repo_jax import cli
from repo_jax.errors import ConfigError
from repo_jax.evaluation import command
from repo_jax.evaluation.harness.compare import compare
from repo_jax.evaluation.harness.statistics import (
    mean_interval,
    score_interval,
    statistic_interval,
)


def test_the_interval_of_a_share_is_that_of_the_normal_law():
    values = [1.0] * 300 + [0.0] * 700
    low, high = mean_interval(values)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    np.testing.assert_allclose([low, high], [0.3 - half, 0.3 + half], atol=0.003)
    # Resampling the examples themselves, slower, says the same.
    slow = statistic_interval(values[::10], lambda chosen: sum(chosen) / len(chosen))
    fast = mean_interval(values[::10])
    np.testing.assert_allclose(slow, fast, atol=0.02)


@pytest.mark.parametrize(
    ("right", "examples", "low", "high"),
    [
        # Where all are right Wilson's is n / (n + 1.96 ** 2) to 1; where none is, as far from 0.
        (20, 20, 20 / (20 + 1.959964**2), 1.0),
        (0, 20, 0.0, 1.959964**2 / (20 + 1.959964**2)),
        (2, 2, 2 / (2 + 1.959964**2), 1.0),
        # 0.3142695 -+ 0.1232340, by hand.
        (15, 50, 0.1910355, 0.4375035),
    ],
)
def test_the_interval_of_right_answers_has_a_width(right, examples, low, high):
    values = [1.0] * right + [0.0] * (examples - right)
    np.testing.assert_allclose(score_interval(values), [low, high], atol=1e-5)


def test_scores_between_right_and_wrong_are_resampled():
    values = [0.5, 1.0, 0.0, 0.75] * 5
    assert score_interval(values) == mean_interval(values)


@pytest.mark.parametrize("values", [[1.0], [0.0], [0.5], [0.5] * 9])
def test_there_is_no_interval_where_nothing_is_known_of_the_spread(values):
    assert score_interval(values) == (None, None)
    assert mean_interval(values) == (None, None)
    assert statistic_interval(values, max) == (None, None)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=40), st.integers(0, 3))
def test_intervals_lie_within_the_values_and_repeat(values, seed):
    low, high = mean_interval(values, resamples=200, seed=seed)
    if len(set(values)) > 1:
        slack = 1e-9
        assert low is None or min(values) - slack <= low < high <= max(values) + slack
    assert (low, high) == mean_interval(values, resamples=200, seed=seed)


@given(st.lists(st.integers(-8, 8), min_size=2, max_size=30), st.integers(-3, 3))
def test_intervals_move_with_the_values(values, shift):
    low, high = mean_interval(values, resamples=200)
    moved = mean_interval([value + shift for value in values], resamples=200)
    if low is None:
        assert moved == (None, None)
        return
    np.testing.assert_allclose(moved, [low + shift, high + shift], atol=1e-6)


def write(folder, tasks, metric="acc"):
    """An evaluation with tasks of (example, score)."""
    folder.mkdir(parents=True)
    for name, rows in tasks.items():
        lines = [
            {"task": name, "doc_id": i, "metric": metric, "score": score, "example": example}
            for i, (example, score) in enumerate(rows)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "tasks.json").write_text(json.dumps({"tasks": {name: {} for name in tasks}}))
    return folder


def test_differences_are_paired(tmp_path):
    # b is right wherever a is, and on 10 of 100 more: the examples' own spread cancels.
    a = [(f"e{i}", float(i < 50)) for i in range(100)]
    b = [(f"e{i}", float(i < 60)) for i in range(100)]
    write(tmp_path / "a" / "evaluation", {"t": a, "only_a": a})
    write(tmp_path / "b", {"t": b})
    result = compare(tmp_path / "a", tmp_path / "b")
    row = result["tasks"]["t"]
    assert (row["metric"], row["examples"], row["a"], row["b"]) == ("acc", 100, 0.5, 0.6)
    np.testing.assert_allclose(row["difference"], 0.1)
    half = 1.96 * math.sqrt(0.1 * 0.9 / 100)
    np.testing.assert_allclose([row["low"], row["high"]], [0.1 - half, 0.1 + half], atol=0.012)
    assert result["missing"] == ["only_a"]
    back = compare(tmp_path / "b", tmp_path / "a")["tasks"]["t"]
    np.testing.assert_allclose(back["difference"], -0.1)
    same = compare(tmp_path / "b", tmp_path / "b")["tasks"]["t"]
    assert (same["difference"], same["low"], same["high"]) == (0.0, None, None)


@pytest.mark.parametrize(
    ("other", "metric", "reason"),
    [
        ([("e0", 1.0), ("x", 0.0)], "acc", "the examples differ, from t 1 on"),
        ([("e0", 1.0)], "acc", "2 examples and 1"),
        ([("e0", 1.0), ("e1", 0.0)], "f1", "the metrics differ: acc and f1"),
    ],
)
def test_tasks_that_differ_are_refused_by_name(tmp_path, capsys, other, metric, reason):
    rows = [("e0", 1.0), ("e1", 0.0)]
    write(tmp_path / "a", {"t": rows})
    write(tmp_path / "b", {"t": other}, metric)
    assert compare(tmp_path / "a", tmp_path / "b")["refused"] == {"t": reason}
    command.main(["--compare", str(tmp_path / "a"), str(tmp_path / "b")])
    assert f"not compared: {reason}" in capsys.readouterr().out


def test_the_command_prints_and_writes(tmp_path, capsys):
    write(tmp_path / "a", {"t": [("e0", 1.0), ("e1", 0.0)]})
    write(tmp_path / "b", {"t": [("e0", 1.0), ("e1", 0.5)]})
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    output = tmp_path / "out" / "difference.json"
    command.main(["--compare", *folders, "--output", str(output), "--resamples", "500"])
    assert "+0.2500" in capsys.readouterr().out
    assert json.loads(output.read_text()) == compare(*folders, resamples=500)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["{a}", "{nothing}"], "nothing: it has no tasks.json; run eval.py --tasks first"),
        (["{a}", "{b}"], "have no task in common: t and u"),
        (["{a}"], "expected 2 arguments"),
        (["{a}", "{b}", "--resamples", "5"], "--resamples is 5; it must be at least 100"),
        (["{a}", "{b}", "--seed", "-1"], "--seed is -1; it must be 0 or more"),
        (["{a}", "{empty}"], "empty/tasks.json is no report of tasks; name a folder that eval.py"),
        (["{torn}", "{a}"], "torn/tasks.json is no report of tasks; name a folder that eval.py"),
        (["{a}", "{cut}"], "cut/t.jsonl is no list of examples as eval.py --tasks writes it;"),
        (["{a}", "{none}"], "none/t.jsonl is no list of examples as eval.py --tasks writes it;"),
    ],
)
def test_mistakes(tmp_path, capsys, options, message):
    write(tmp_path / "a", {"t": [("e0", 1.0)]})
    write(tmp_path / "b", {"u": [("e0", 1.0)]})
    for name, report in (("empty", "{}"), ("torn", '{"tasks": {')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tasks.json").write_text(report)
    for name, rows in (("cut", '{"task": "t", "doc'), ("none", "")):
        (write(tmp_path / name, {"t": []}) / "t.jsonl").write_text(rows)
    places = {folder.name: str(folder) for folder in (*tmp_path.iterdir(), tmp_path / "nothing")}
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: command.main(["--compare", *(o.format(**places) for o in options)]))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_an_evaluation_that_lost_a_file(tmp_path):
    write(tmp_path / "a", {"t": [("e0", 1.0)]})
    (tmp_path / "a" / "t.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"is missing; run eval.py --tasks again"):
        compare(tmp_path / "a", tmp_path / "a")
