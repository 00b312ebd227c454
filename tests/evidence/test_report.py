"""Means, intervals and differences by hand, and what is made of a results file."""

import csv
import json

import numpy as np
import pytest

from repo_jax import cli
from repo_jax.errors import ConfigError
from repo_jax.evidence import command, report, results
from repo_jax.evidence.cell import SCHEMA, write
from repo_jax.evidence.summary import can_differ, costs, interval, summarise

# By hand: exact answers of three seeds at two lengths.
EXACT = {
    "rope": {0: (0.9, 0.0), 1: (1.0, 0.1), 2: (0.8, 0.2)},
    "repo": {0: (1.0, 0.5), 1: (1.0, 0.8), 2: (1.0, 0.8)},
}
T2 = 4.302653  # 97.5 % of Student's t with two degrees of freedom


def record(method, seed, exact, **changes):
    evaluations = [
        {
            **{"set": f"length_{x}", "group": "", "x": x, "examples": 10},
            **{"exact": value, "tokens": value, "loss": 1.0},
            **{"chance_exact": 0.1, "chance_tokens": 0.25},
        }
        for x, value in zip((20, 30), exact, strict=True)
    ]
    return {
        **{"schema": SCHEMA, "experiment": "reversal", "method": method, "seed": seed},
        **{"x_label": "letters", "trained_to": 20, "metric": "exact", "headline": ["length_30"]},
        **{"steps": 10, "batch_size": 4, "parameters": 1000, "flops_per_token": 6e6},
        **{"train_loss": 0.5, "losses": [1.0, 0.5], "step_seconds": 0.1 + 0.01 * seed},
        **{"seconds": 3600.0, "seeds_together": [seed], "config_hash": "0" * 16},
        **{"hardware": {"device": "a CPU", "cores": 2}, "versions": {"jax": "1.0"}},
        **{"commit": "abc", "date": "2026-01-02T00:00:00+00:00", "evaluations": evaluations},
        **changes,
    }


def write_results(folder, **chosen):
    for method, seeds in EXACT.items():
        for seed, exact in seeds.items():
            path = folder / "cells" / f"reversal-{method}-{seed}.json"
            write(path, json.dumps(record(method, seed, exact, **chosen)))
    return results.save(folder, ["python -m repo_jax.evidence --suite laptop", "again"])


@pytest.fixture
def folder(tmp_path):
    write_results(tmp_path / "laptop")
    return tmp_path / "laptop"


def row(rows, **wanted):
    (found,) = [r for r in rows if all(getattr(r, k) == v for k, v in wanted.items())]
    return found


def test_means_intervals_and_differences_are_those_computed_by_hand(folder):
    rows = summarise(results.load(folder)["cells"])
    rope = row(rows, method="rope", set="length_20", metric="exact")
    # Mean 0.9, standard deviation 0.1.
    assert rope.value.mean == pytest.approx(0.9)
    assert rope.value.high - 0.9 == pytest.approx(T2 * 0.1 / 3**0.5, rel=1e-5)
    assert 0.9 - rope.value.low == pytest.approx(T2 * 0.1 / 3**0.5, rel=1e-5)
    assert (rope.difference, rope.seeds, rope.chance) == (None, 3, 0.1)
    repo = row(rows, method="repo", set="length_30", metric="exact")
    # Differences 0.5, 0.7, 0.6: mean 0.6, standard deviation 0.1.
    assert repo.value.mean == pytest.approx(0.7)
    assert repo.difference.mean == pytest.approx(0.6)
    assert repo.difference.low == pytest.approx(0.6 - T2 * 0.1 / 3**0.5, rel=1e-5)
    assert repo.difference.high == pytest.approx(0.6 + T2 * 0.1 / 3**0.5, rel=1e-5)


def test_differences_are_of_the_seeds_that_both_have():
    records = [record("rope", 0, (0.5, 0.0)), record("rope", 1, (0.9, 0.0))]
    records += [record("repo", 1, (1.0, 0.0)), record("repo", 2, (0.2, 0.0))]
    repo = row(summarise(records), method="repo", set="length_20", metric="exact")
    assert repo.value.mean == pytest.approx(0.6)
    assert repo.difference.mean == pytest.approx(0.1)
    assert (repo.difference.low, repo.difference.high) == (None, None)


@pytest.mark.parametrize("values", [[0.3], [1.0, 1.0, 1.0]])
def test_one_value_and_equal_values_have_no_interval(values):
    assert (interval(values).low, interval(values).high) == (None, None)


def test_a_diverged_seed_is_said_and_leaves_no_mean():
    records = [record(m, seed, (0.5, 0.5)) for m in ("rope", "repo", "nope") for seed in (0, 1, 2)]
    for evaluation in next(r for r in records if r["method"] == "repo")["evaluations"]:
        evaluation["loss"] = None
    rows = summarise(records)
    assert len([r for r in rows if r.method == "repo"]) == 4
    for metric in ("exact", "tokens"):
        repo = row(rows, method="repo", set="length_30", metric=metric)
        assert (repo.seeds, repo.diverged, repo.value, repo.difference) == (3, 1, None, None)
        assert row(rows, method="nope", set="length_30", metric=metric).value.mean == 0.5
    table = report.headline_table({"cells": records, "commands": []})
    assert "| repo | 1 of 3 diverged |" in table


def test_bits_of_a_diverged_seed_are_missing_and_said():
    evaluation = {"set": "context_8", "group": "", "x": 8, "examples": 4}
    evaluation |= {"exact": 0.0, "tokens": 0.0, "chance_exact": None, "chance_tokens": None}
    records = [
        record("rope", 0, (0, 0), metric="bits_per_byte", evaluations=[e])
        for e in [evaluation | {"loss": None, "bits_per_byte": None}]
    ]
    (found,) = summarise(records)
    assert (found.diverged, found.value) == (1, None)
    assert can_differ([found]) is None


@pytest.mark.parametrize(
    ("values", "can"),
    [
        # Chance is 0.1 with ten examples, whose standard error is 0.095.
        ((0.5, 0.6, 0.9), True),
        ((0.3, 0.6, 0.9), False),
        ((1.0, 1.0, 1.0), False),
        ((0.9, 1.0, 1.0), True),
    ],
)
def test_a_set_can_show_differences_between_chance_and_the_ceiling(values, can):
    rows = summarise([record("rope", i, (value, 0.0)) for i, value in enumerate(values)])
    assert can_differ([row(rows, set="length_20", metric="exact")]) is can
    assert not can_differ([row(rows, set="length_30", metric="exact")])


def test_answers_of_one_token_are_reported_once():
    made = record("rope", 0, (0.4, 0.2))
    assert {row.metric for row in summarise([made])} == {"exact", "tokens"}
    for evaluation in made["evaluations"]:
        evaluation["chance_tokens"] = float(np.nextafter(evaluation["chance_exact"], 1))
    assert {row.metric for row in summarise([made])} == {"exact"}


def test_kinds_are_averaged_for_each_seed_at_the_sizes_that_all_have():
    base = {"examples": 4, "tokens": 1.0, "loss": 0.0, "chance_tokens": 0.5}
    evaluations = [
        {**base, "set": "a_8", "group": "a", "x": 8, "exact": 0.2, "chance_exact": 0.5},
        {**base, "set": "b_8", "group": "b", "x": 8, "exact": 0.6, "chance_exact": 0.1},
        {**base, "set": "a_16", "group": "a", "x": 16, "exact": 0.0, "chance_exact": 0.5},
    ]
    rows = summarise([record("rope", 0, (0, 0), evaluations=evaluations)])
    mean = row(rows, set="mean_8", metric="exact")
    assert (mean.value.mean, mean.chance, mean.group) == (
        pytest.approx(0.4),
        pytest.approx(0.3),
        "mean",
    )
    assert not [r for r in rows if r.set == "mean_16"]


def test_steps_are_compared_with_those_of_rope_with_the_same_seed():
    records = [record("rope", 0, (0, 0), step_seconds=0.2), record("repo", 0, (0, 0))]
    records += [record("repo", 1, (0, 0), step_seconds=9.0)]
    repo = next(r for r in costs(records) if r["method"] == "repo")
    assert repo["step_ratio"] == pytest.approx(0.5)


def test_a_step_of_seeds_together_is_divided_among_them():
    records = [record("rope", s, (0, 0), step_seconds=0.6, seeds_together=[0, 1]) for s in (0, 1)]
    records += [record("repo", s, (0, 0), step_seconds=0.3, seeds_together=[s]) for s in (0, 1)]
    rope, repo = costs(records)
    assert rope["step_seconds"] == repo["step_seconds"] == pytest.approx(0.3)
    assert repo["step_ratio"] == pytest.approx(1.0)


def test_the_csv_has_a_line_for_each_cell_and_set(folder):
    with (folder / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * 3 * 2
    found = [x for x in lines if (x["method"], x["seed"], x["x"]) == ("repo", "1", "30")]
    assert [float(x["exact"]) for x in found] == [0.8]


def test_a_report_needs_the_results_file_alone(folder, tmp_path):
    alone = tmp_path / "2026-01-02-laptop"
    alone.mkdir()
    (folder / "results.json").rename(alone / "results.json")
    command.main(["--report", str(alone)])
    names = {path.name for path in alone.iterdir()}
    assert names >= {"summary.md", "summary.json", "reversal.png", "reversal.svg"}
    page = (alone / "summary.md").read_text()
    assert "| repo | 1.000 (all 3 equal); +0.100 [-0.148, +0.348] | 0.700 [0.270, 1.130] (" in page
    assert "1.130] (0.500, 0.800, 0.800); +0.600 [+0.352, +0.848] |" in page
    assert "| *can differ* | yes | yes |" in page
    assert "beside other workers" in page
    assert "the test set is one, the same for all" in page
    assert page.index("`python -m repo_jax.evidence --suite laptop`") < page.index("`again`")
    assert "different commits" not in page
    assert (
        "6 trainings with seeds 0, 1, 2, 6.0 hours if one after the other, on a CPU (2 cores)"
        in page
    )
    whole = json.loads((alone / "summary.json").read_text())
    assert len(whole["rows"]) == 2 * 2 * 2
    assert [x["can_differ"] for x in whole["sets"]] == [True, True, True, False]


def test_results_of_several_commits_come_with_a_warning(tmp_path):
    write_results(tmp_path)
    cell = tmp_path / "cells" / "reversal-repo-1.json"
    cell.write_text(cell.read_text().replace('"commit": "abc"', '"commit": "def"'))
    results.save(tmp_path, [])
    report.write_report(tmp_path)
    assert "results are of 2 different commits" in (tmp_path / "summary.md").read_text()
    assert "results are of 2 different commits" in report.headline_table(results.load(tmp_path))


def test_results_of_a_method_that_does_not_exist_are_refused(tmp_path):
    write_results(tmp_path)
    for path in (tmp_path / "results.json", tmp_path / "cells" / "reversal-repo-1.json"):
        path.write_text(path.read_text().replace('"method": "repo"', '"method": "alibi"'))
    for read in (results.load, results.collect):
        with pytest.raises(ConfigError, match="of the method 'alibi'; there are rope, nope"):
            read(tmp_path)


def test_reports_of_the_same_results_are_the_same_files(folder):
    made = []
    for _ in range(2):
        report.write_report(folder)
        made.append({p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()})
    assert made[0] == made[1]


def test_the_table_of_a_readme_is_rewritten_and_nothing_else(folder, tmp_path):
    readme = tmp_path / "README.md"
    before, after = "# Title\n\n<!-- evidence:laptop -->\n", "<!-- /evidence:laptop -->\nEnd\n"
    readme.write_text(f"{before}old\n{after}")
    for _ in range(2):
        command.main(["--report", str(folder), "--readme", str(readme)])
        text = readme.read_text()
        assert text.startswith(before)
        assert text.endswith(after)
        assert "old" not in text
        # The headline has one of the two lengths.
        assert "| method | length 30 |" in text
        assert "| repo | 0.70 (0.50 to 0.80)<br>+0.60 [+0.35, +0.85] |" in text
        assert "| *chance* | 0.10 |" in text
        assert "(in parentheses the least and the most of them, or that all are equal)" in text


@pytest.mark.parametrize(
    ("rope", "repo", "shown"),
    [
        (0.5, 0.5, "0.50<br>+0.00"),
        (0.5, 0.4999, "0.50<br>+0.00"),
        (1.0, 0.998, "0.998<br>-0.002"),
    ],
)
def test_nothing_looks_like_zero_or_one_that_is_not_or_is_minus_zero(rope, repo, shown):
    given = dict(headline=["length_20"])
    records = [record("rope", 0, (rope, 0), **given), record("repo", 0, (repo, 0), **given)]
    table = report.headline_table({"cells": records, "commands": []})
    assert f"| repo | {shown} |" in table


def test_equal_values_are_called_equal_in_a_readme_too(tmp_path):
    write_results(tmp_path, headline=["length_20"])
    table = report.headline_table(results.load(tmp_path))
    assert "| repo | 1.00 (all 3 equal)<br>+0.10 [-0.15, +0.35] |" in table


@pytest.mark.parametrize(
    "text", ["none", "<!-- evidence:laptop -->\n", "<!-- /evidence:laptop -->"]
)
def test_a_readme_without_its_place_is_refused_and_left_alone(folder, tmp_path, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(ConfigError, match="must have the line <!-- evidence:laptop --> once"):
        command.main(["--report", str(folder), "--readme", str(readme)])
    assert readme.read_text() == text


def test_methods_are_compared_with_the_baseline_that_is_asked_for(folder, tmp_path):
    (tmp_path / "README.md").write_text("<!-- evidence:laptop -->\n<!-- /evidence:laptop -->\n")
    options = ["--report", str(folder), "--readme", str(tmp_path / "README.md")]
    command.main([*options, "--baseline", "repo"])
    text = (tmp_path / "README.md").read_text()
    assert "the mean difference to repo with the same seeds" in text
    records = results.load(folder)["cells"]
    for name in ("length_20", "length_30"):
        chosen = dict(set=name, metric="exact")
        to_rope = row(summarise(records), method="repo", **chosen).difference
        to_repo = row(summarise(records, "repo"), method="rope", **chosen).difference
        assert to_repo.mean == pytest.approx(-to_rope.mean)
        assert to_repo.low == pytest.approx(-to_rope.high)
        assert row(summarise(records, "repo"), method="repo", **chosen).difference is None
    with pytest.raises(ConfigError, match="--baseline is cope; the results have rope, repo"):
        command.main([*options, "--baseline", "cope"])
    assert (tmp_path / "README.md").read_text() == text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "give one of --suite"),
        (["--suite", "tiny", "--baseline", "nope"], "--baseline needs --report"),
        (["--suite", "tiny", "--report", "x"], "give one of --suite"),
        (["--suite", "tiny", "--readme", "x"], "--readme needs --report"),
        (["--suite", "tiny", "--seeds", "a"], "--seeds is a; it must be whole numbers"),
        (["--suite", "tiny", "--minutes", "0"], "--minutes is 0"),
        (["--suite", "tiny", "--worker", "2"], "no option --worker; did you mean --workers?"),
    ],
)
def test_mistakes_are_one_sentence(capsys, options, said):
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: command.main(options))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert said in error
    assert error.strip().count("\n") == 0


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"has no results\.json"):
        command.main(["--report", str(tmp_path)])
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ConfigError, match="is no results of this version"):
        command.main(["--report", str(tmp_path)])
