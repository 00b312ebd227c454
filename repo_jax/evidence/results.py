"""All cells of a folder in one file, for people, spreadsheets and reports."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repo_jax.errors import ConfigError
from repo_jax.evidence.cell import SCHEMA, write
from repo_jax.evidence.methods import NAMES

_OF_CELL = ("experiment", "method", "seed")
_OF_SET = (
    *("set", "group", "x", "examples", "exact", "tokens", "loss", "bits_per_byte"),
    *("chance_exact", "chance_tokens"),
)
_OF_TRAINING = (
    *("steps", "parameters", "flops_per_token", "train_loss", "step_seconds", "seconds"),
    *("config_hash", "commit"),
)


def collect(out: Path) -> list[dict[str, Any]]:
    """The records of the finished cells in a folder, as `cell.run` wrote them, sorted.

    Raises:
      ConfigError: one is of a method that does not exist.
    """
    records = [json.loads(path.read_text()) for path in (out / "cells").glob("*.json")]
    _check_methods(records, out)
    return sorted(records, key=lambda r: tuple(r[name] for name in _OF_CELL))


def save(out: Path, commands: Sequence[str]) -> Path:
    """Writes results.json, which reports are made from, and results.csv, a line for each cell and
    evaluation set.

    Args:
      out: a suite's folder.
      commands: that made it.
    """
    records = collect(out)
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow([*_OF_CELL, *_OF_SET, *_OF_TRAINING, "device"])
    for record in records:
        for row in record["evaluations"]:
            writer.writerow(
                [
                    *(record[name] for name in _OF_CELL),
                    *(row.get(name) for name in _OF_SET),
                    *(record[name] for name in _OF_TRAINING),
                    record["hardware"]["device"],
                ]
            )
    write(out / "results.csv", lines.getvalue())
    whole = {"schema": SCHEMA, "commands": list(commands), "cells": records}
    write(out / "results.json", json.dumps(whole, indent=1) + "\n")
    return out / "results.json"


def load(folder: Path) -> dict[str, Any]:
    """What `save` wrote.

    Raises:
      ConfigError: there is no results.json, or none of ours.
    """
    path = folder / "results.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"--report {folder}: it has no results.json; name the folder of a suite"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise ConfigError(f"{path} is no results of this version of the suite")
    if not found["cells"]:
        raise ConfigError(f"{path} has no finished cell; run the suite first")
    _check_methods(found["cells"], path)
    return found


def _check_methods(records: Sequence[dict[str, Any]], where: Path) -> None:
    for record in records:
        if record["method"] not in NAMES:
            raise ConfigError(
                f"{where} has a cell of the method {record['method']!r}; there are "
                f"{', '.join(NAMES)}"
            )
