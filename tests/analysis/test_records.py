"""Tables: what is written is read back, and says what its columns are."""

import csv
import dataclasses
import json
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repo_jax.analysis.records import TABLES, CorrelationRow, RangeRow, Report, columns, read_report
from repo_jax.errors import ConfigError

VALUES = {
    str: st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), min_size=1),
    int: st.integers(0, 2**40),
    float: st.floats(allow_nan=False, allow_infinity=False),
    float | None: st.none() | st.floats(allow_nan=False, allow_infinity=False),
}


def rows_of(row):
    kinds = typing.get_type_hints(row)
    return st.lists(st.builds(row, **{n: VALUES[k] for n, k in kinds.items()}), max_size=3)


reports = st.builds(Report, **{name: rows_of(row).map(tuple) for name, row in TABLES.items()})


def read_csv(file, row):
    """Rows of a CSV file, by the types of its class alone."""
    kinds = typing.get_type_hints(row)
    with file.open(newline="", encoding="utf-8") as lines:
        for found in csv.DictReader(lines):
            assert list(found) == list(kinds)
            read = {str: str, int: int, float: float}
            yield row(
                **{n: None if v == "" else read.get(kinds[n], float)(v) for n, v in found.items()}
            )


@given(reports)
def test_what_is_written_is_read_back(tmp_path_factory, report):
    folder = tmp_path_factory.mktemp("report")
    report.write(folder / "new")
    assert read_report(folder / "new") == report
    assert read_report(folder / "new" / "report.json") == report
    for name, row in TABLES.items():
        assert tuple(read_csv(folder / "new" / f"{name}.csv", row)) == getattr(report, name)


def test_reports_of_several_models_are_joined():
    a, b = (Report(correlations=(CorrelationRow(m, 0, 1, 9, 0.5, None),)) for m in "ab")
    assert [row.model for row in (a + b).correlations] == ["a", "b"]
    assert (a + b).ranges == ()


def test_every_column_of_the_file_is_explained(tmp_path):
    Report().write(tmp_path)
    tables = json.loads((tmp_path / "report.json").read_text())["tables"]
    assert list(tables) == ["ranges", "patterns", "correlations", "masses", "distances"]
    for name, row in TABLES.items():
        assert tables[name]["meaning"]
        described = tables[name]["columns"]
        assert list(described) == [field.name for field in dataclasses.fields(row)]
        assert list(described)[:3] == ["model", "layer", "head"]
        assert all(column["meaning"] for column in described.values())
    assert columns(RangeRow)["low"] == {
        "type": "float",
        "unit": "position",
        "meaning": "smallest z.",
    }
    assert columns(CorrelationRow)["pearson"]["type"] == "float or null"
    assert columns(CorrelationRow)["pearson"]["unit"] is None


@pytest.mark.parametrize("name", ["report.json", "masses.csv"])
def test_nothing_is_overwritten(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=f"{name} already exists and is not overwritten"):
        Report().write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_files_that_are_no_reports_are_refused(tmp_path):
    file = tmp_path / "report.json"
    with pytest.raises(ConfigError, match=r"report\.json cannot be read: No such file"):
        read_report(file)
    for content, message in [
        ("{", r"report\.json is not JSON"),
        ("[]", "has schema_version None; it must be 1"),
        ('{"schema_version": 2}', "has schema_version 2; it must be 1"),
        ('{"schema_version": 1, "tables": {}}', "is not a whole report: 'ranges'"),
    ]:
        file.write_text(content)
        with pytest.raises(ConfigError, match=message):
            read_report(file)
    file.unlink()
    Report().write(tmp_path)
    content = json.loads(file.read_text())
    content["tables"]["ranges"]["rows"] = [{"layer": 1}]
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="is not a whole report"):
        read_report(file)
