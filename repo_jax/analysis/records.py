"""Tidy tables of what was measured, as CSV and as one JSON file."""

import csv
import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import docstring_parser

from repo_jax.errors import ConfigError

SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True)
class RangeRow:
    """How far apart a head places the tokens of a text's beginning.

    Attributes:
      model: name of the model.
      layer: 0-based.
      head: query head, 0-based.
      tokens (tokens): length of the prefix of the text that is measured.
      low (position): smallest z.
      high (position): largest z.
      range (position): high - low.
      low_whisker (position): smallest z that is at most 1.5 interquartile ranges below the first
        quartile.
      high_whisker (position): largest z that is at most 1.5 interquartile ranges above the third
        quartile.
      outliers (tokens): how many lie beyond the whiskers.
    """

    model: str
    layer: int
    head: int
    tokens: int
    low: float
    high: float
    range: float
    low_whisker: float
    high_whisker: float
    outliers: int


@dataclasses.dataclass(frozen=True)
class PatternRow:
    """Shares of a text's chunks by the shape of z within them; they sum to 1.

    Attributes:
      model: name of the model.
      layer: 0-based.
      head: query head, 0-based.
      chunk (tokens): length of a chunk; chunks do not overlap, and a last incomplete one is left
        out.
      eps (position): how far from the mean of its chunk a constant z may be.
      chunks (chunks): how many were measured.
      constant (share of chunks): all z are within eps of their mean; comes before monotonic.
      monotonic (share of chunks): z rises, or falls, strictly; not constant.
      hybrid (share of chunks): the rest.
    """

    model: str
    layer: int
    head: int
    chunk: int
    eps: float
    chunks: int
    constant: float
    monotonic: float
    hybrid: float


@dataclasses.dataclass(frozen=True)
class CorrelationRow:
    """How far z follows the index over a text.

    Attributes:
      model: name of the model.
      layer: 0-based.
      head: query head, 0-based.
      tokens (tokens): length of the text.
      pearson: correlation of z and the index; null where z is the same for all tokens.
      spearman: correlation of their ranks, equal z sharing the mean of theirs; null likewise.
    """

    model: str
    layer: int
    head: int
    tokens: int
    pearson: float | None
    spearman: float | None


@dataclasses.dataclass(frozen=True)
class MassRow:
    """Attention from the queries of labelled prompts to one part of them (paper, table 4).

    Attributes:
      model: name of the model.
      layer: 0-based.
      head: query head, 0-based.
      part: name of the part. Of needle prompts: needle, the answer where it is hidden; query, the
        question and what comes before the answer; rest, all else.
      mass (attention per token): what the queries, in needle prompts the tokens of the answer,
        give to the part, divided by the part's tokens that a query sees, both means over the
        queries; then the mean over prompts.
      tokens (tokens): of the part that a query sees, the same means. Where a part lies before the
        queries these are all of its tokens.
      prompts (prompts): how many have the part.
    """

    model: str
    layer: int
    head: int
    part: str
    mass: float
    tokens: float
    prompts: int


@dataclasses.dataclass(frozen=True)
class DistanceRow:
    """Distance between cells of linearised tables; a cell stands at the mean of its tokens.

    Attributes:
      model: name of the model.
      layer: 0-based.
      head: query head, 0-based.
      relation: of two cells. same_row; same_column; unrelated, neither.
      pairs (pairs): how many, over all tables.
      z_distance (position): mean |z_i - z_j| over these pairs.
      index_distance (tokens): mean |i - j| over these pairs.
      z_ratio: z_distance divided by that of unrelated pairs; null where that is 0.
      index_ratio: index_distance divided by that of unrelated pairs; null where that is 0.
    """

    model: str
    layer: int
    head: int
    relation: str
    pairs: int
    z_distance: float
    index_distance: float
    z_ratio: float | None
    index_ratio: float | None


@dataclasses.dataclass(frozen=True)
class Report:
    """All tables, of one model or several; `a + b` has the rows of both.

    A layer without positions (NoPE, CoPE) has rows in `masses` only.

    Attributes:
      ranges: how far apart tokens stand, against context length.
      patterns: shapes of z within chunks.
      correlations: of z and the index.
      masses: attention to parts of prompts.
      distances: of related cells of tables.
    """

    ranges: tuple[RangeRow, ...] = ()
    patterns: tuple[PatternRow, ...] = ()
    correlations: tuple[CorrelationRow, ...] = ()
    masses: tuple[MassRow, ...] = ()
    distances: tuple[DistanceRow, ...] = ()

    def __add__(self, other: "Report") -> "Report":
        return Report(*(getattr(self, name) + getattr(other, name) for name in TABLES))

    def write(self, folder: str | Path) -> None:
        """Writes `<table>.csv` for each table, where null is an empty field, and `report.json`.

        The JSON object has `schema_version` and `tables`: by name, the table's `meaning`, its
        `columns` (by name, `type`, `unit` and `meaning`) and `rows`, an object each.

        Raises:
          ConfigError: the folder already has one of them.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in (*(f"{table}.csv" for table in TABLES), "report.json"):
            if (folder / name).exists():
                raise ConfigError(f"{folder / name} already exists and is not overwritten")
        tables = {}
        for name, row in TABLES.items():
            rows = [dataclasses.asdict(found) for found in getattr(self, name)]
            with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(row)])
                writer.writeheader()
                writer.writerows(rows)
            meaning = docstring_parser.parse(row.__doc__).short_description
            tables[name] = {"meaning": meaning, "columns": columns(row), "rows": rows}
        content = {"schema_version": SCHEMA_VERSION, "tables": tables}
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        (folder / "report.json").write_text(text, encoding="utf-8")


TABLES: dict[str, type] = {
    name: typing.get_args(kind)[0] for name, kind in typing.get_type_hints(Report).items()
}


def columns(row: type) -> dict[str, dict[str, Any]]:
    """What the docstring of a row's class says of its columns.

    Returns:
      By name, in order: `type`, such as `float or null`; `unit`, None for none; `meaning`.
    """
    described = {param.arg_name: param for param in docstring_parser.parse(row.__doc__).params}
    found = {}
    for name, kind in typing.get_type_hints(row).items():
        kinds = [k.__name__ for k in typing.get_args(kind) or (kind,) if k is not type(None)]
        null = ["null"] if type(None) in typing.get_args(kind) else []
        found[name] = {
            "type": " or ".join(kinds + null),
            "unit": described[name].type_name,
            "meaning": " ".join(described[name].description.split()),
        }
    return found


def read_report(path: str | Path) -> Report:
    """What `Report.write` wrote: report.json, or its folder.

    Raises:
      ConfigError: there is none, or it is not what `write` of this schema writes.
    """
    file = Path(path)
    file = file / "report.json" if file.is_dir() else file
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from None
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise ConfigError(f"{file} has schema_version {version!r}; it must be {SCHEMA_VERSION}")
    try:
        tables = {name: content["tables"][name]["rows"] for name in TABLES}
        return Report(**{n: tuple(TABLES[n](**row) for row in rows) for n, rows in tables.items()})
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{file} is not a whole report: {error}") from None
