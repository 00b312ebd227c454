"""Tables written out in a line: a cell by its row and column, and the largest of a column."""

import dataclasses
from typing import ClassVar

import numpy as np

from repo_jax.errors import ConfigError
from repo_jax.evidence.tasks.base import (
    START,
    EvaluationSet,
    Examples,
    WordTask,
    check_positive,
    distinct,
    first_asked,
    padded,
    test_rng,
    training_rng,
)

_ROW, _LOOKUP, _LARGEST, _FIRST = 2, 3, 4, 5

KINDS = ("lookup", "largest")


@dataclasses.dataclass(frozen=True)
class Tables(WordTask):
    """The columns' names in any order, then `<row> name value value ...` for each row.

    `lookup`: `<lookup> column row value`. `largest`: `<largest> column row`, the row that has the
    largest number in the column. All numbers of a table are different.

    In training a table is asked `questions` of one kind, since many answers are needed before a
    model finds its way in a table. One that repeats an earlier question does not count, or models
    would learn to copy from there. In the evaluation sets there is one question.

    Attributes:
      rows, columns: at most in training, where a batch has from 2 up of each.
      questions: to a table in training.
      factors: how many times more rows the tables of the evaluation sets have; columns as many.
      row_names, column_names, numbers: different tokens of each sort.
      examples: in each evaluation set.
      test_seed: of the evaluation sets.
    """

    rows: int = 6
    columns: int = 4
    questions: int = 8
    factors: tuple[int, ...] = (1, 2, 4)
    row_names: int = 32
    column_names: int = 16
    numbers: int = 128
    examples: int = 500
    test_seed: int = 0

    x_label: ClassVar[str] = "rows of the table"
    metric: ClassVar[str] = "exact"

    def __post_init__(self):
        object.__setattr__(self, "factors", tuple(self.factors))
        check_positive("tables", factors=self.factors, examples=self.examples)
        most = self.rows * max(self.factors)
        for name, least, why in (
            ("rows", 2, "a table has two or more"),
            ("columns", 2, "a table has two or more"),
            ("questions", 1, "a table is asked one or more"),
            ("row_names", most, f"there are tables of {most} rows"),
            ("column_names", self.columns, f"tables have {self.columns} columns"),
            ("numbers", most * self.columns, f"there are tables of {most} x {self.columns}"),
        ):
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"tables.{name} is {value}; it must be {least} or more: {why}")

    @property
    def length(self) -> int:
        """Tokens of the largest training example."""
        return self._tokens(self.rows, self.questions)

    @property
    def trained_to(self) -> int:
        """Rows of the largest table in training."""
        return self.rows

    def symbols(self) -> tuple[str, ...]:
        """row7, column3 and the numbers."""
        return (
            *("<pad>", "<start>", "<row>", "<lookup>", "<largest>"),
            *(f"row{i}" for i in range(self.row_names)),
            *(f"column{i}" for i in range(self.column_names)),
            *map(str, range(self.numbers)),
        )

    def training_batch(self, seed: int, step: int, batch_size: int) -> Examples:
        """Tables of one size, drawn for the batch, and questions drawn for each."""
        rng = training_rng(seed, step)
        size = rng.integers(2, (self.rows, self.columns), endpoint=True)
        largest = rng.random(batch_size) < 0.5
        made = [
            self._examples(rng, kind, batch_size, *size, self.questions, self.length)[0]
            for kind in KINDS
        ]
        pick = lambda name: np.where(largest[:, None], *(getattr(m, name) for m in made[::-1]))
        return Examples(pick("tokens"), pick("answers"))

    def evaluation_sets(self) -> dict[str, EvaluationSet]:
        """One for each kind and factor."""
        sets = {}
        for i, kind in enumerate(KINDS):
            for factor in self.factors:
                rows = factor * self.rows
                rng = test_rng(self.test_seed, i, rows)
                made, choices = self._examples(
                    rng, kind, self.examples, rows, self.columns, 1, self._tokens(rows, 1)
                )
                sets[f"{kind}_{rows}"] = EvaluationSet(
                    made.tokens, made.answers, rows, kind, choices
                )
        return sets

    def oracle(self, prompts: np.ndarray) -> np.ndarray:
        """Reads the table back."""
        out = prompts.copy()
        for tokens in out:
            first, *others = np.flatnonzero(tokens == _ROW)
            asked = np.flatnonzero((tokens == _LOOKUP) | (tokens == _LARGEST))
            columns = list(tokens[1:first])
            rows = {
                tokens[start + 1]: tokens[start + 2 : start + 2 + len(columns)]
                for start in (first, *others)
            }
            for ask in asked:
                if tokens[ask] == _LOOKUP:
                    column, row = tokens[ask + 1 : ask + 3]
                    tokens[ask + 3] = rows[row][columns.index(column)]
                else:
                    at = columns.index(tokens[ask + 1])
                    tokens[ask + 2] = max(rows, key=lambda row, at=at: rows[row][at])
        return out

    def _tokens(self, rows: int, questions: int) -> int:
        return 1 + self.columns + rows * (2 + self.columns) + 4 * questions

    def _examples(
        self,
        rng: np.random.Generator,
        kind: str,
        n: int,
        rows: int,
        columns: int,
        questions: int,
        length: int,
    ):
        """Examples of one kind [n, length], and the tokens that may be asked for [n, C]."""
        first_number = _FIRST + self.row_names + self.column_names
        row_names = _FIRST + distinct(rng, n, rows, self.row_names)
        column_names = _FIRST + self.row_names + distinct(rng, n, columns, self.column_names)
        numbers = first_number + distinct(rng, n, rows * columns, self.numbers)
        table = numbers.reshape(n, rows, columns)
        lines = np.concatenate(
            [np.full((n, rows, 1), _ROW), row_names[:, :, None], table], 2
        ).reshape(n, -1)
        each, column = np.arange(n)[:, None], rng.integers(columns, size=(n, questions))
        if kind == "lookup":
            row = rng.integers(rows, size=(n, questions))
            asked = [column_names[each, column], row_names[each, row]]
            answer, choices = table[each, row, column], numbers
        else:
            asked = [column_names[each, column]]
            answer, choices = row_names[each, table.argmax(1)[each, column]], row_names
        mark = np.full(answer.shape, _LOOKUP if kind == "lookup" else _LARGEST)
        ask = np.stack([mark, *asked, answer], 2)
        tokens = np.concatenate(
            [np.full((n, 1), START), column_names, lines, ask.reshape(n, -1)], 1
        )
        answers = np.zeros(tokens.shape, bool)
        first = 1 + columns + lines.shape[1]
        answers[:, first + ask.shape[2] - 1 :: ask.shape[2]] = first_asked(*asked)
        return padded(tokens, answers, length), choices
