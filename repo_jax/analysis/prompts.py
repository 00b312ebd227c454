"""Texts whose parts are known: needles in filler, linearised tables, and a user's own."""

import bisect
import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from repo_jax.data import Tokenizer
from repo_jax.errors import ConfigError

REST = "rest"

Span = tuple[int, int]
NeedleKind = Literal["single", "multikey"]

_KEYS: dict[NeedleKind, int] = {"single": 1, "multikey": 4}

_COLOURS, _STATES, _THINGS, _DEEDS, _PLACES = (
    tuple(words.split())
    for words in (
        "amber black blue brown coral cream crimson golden green grey ivory orange pink purple "
        "red scarlet silver teal violet white",
        "ancient bright broken calm careful clever distant empty gentle heavy hidden hungry "
        "narrow patient quiet rapid sleepy warm wild young",
        "anchor basket bridge candle castle engine falcon garden hammer island kettle ladder "
        "lantern mirror orchard piano rabbit teapot tower wagon",
        "disappears glitters moves rests returns rolls shakes shines sings sleeps stands waits",
        "Almere Bergen Cork Dover Essen Faro Gdansk Haifa Izmir Kyoto Lagos Malaga Nagoya Oslo "
        "Perth Quito Riga Sofia Turin Utrecht",
    )
)


@dataclasses.dataclass(frozen=True)
class Labelled:
    """A text of which each token belongs to one part, and whose attention is of interest.

    Attributes:
      text: read as one document.
      ids: int32 [T].
      labels: int [T], of each token, the number of its part in `names`.
      names: of the parts; the last is `rest`, unless every token belongs to another one.
      queries: bool [T], the tokens whose attention is measured.
    """

    text: str
    ids: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    queries: np.ndarray


def labelled(
    tokenizer: Tokenizer, text: str, spans: Mapping[str, Sequence[Span]], query_span: Span
) -> Labelled:
    """The tokens of spans of characters.

    A token belongs to the part that has most of its characters, a named one if it shares them
    evenly with the rest, and is a query if at least half of them are in the query span.

    Args:
      tokenizer: that of the model.
      text: of any length.
      spans: by the name of the part, its spans: first character and one past the last, in
        Unicode code points. What is in none of them is the part `rest`.
      query_span: likewise, such as the answer. It may be in a part.

    Raises:
      ConfigError: a span is not in the text, two overlap, a part has no tokens or lies after
        all queries, or there are no queries.
    """
    part_of = np.full(len(text), len(spans))
    for part, (name, found) in enumerate(spans.items()):
        if name == REST:
            raise ConfigError(f"a part is named {REST!r}; that is the name of what has no other")
        for start, end in found:
            _check_span(f"part {name!r}", start, end, text)
            if (part_of[start:end] != len(spans)).any():
                raise ConfigError(
                    f"part {name!r} has the span [{start}, {end}], which overlaps another"
                )
            part_of[start:end] = part
    _check_span("queries", *query_span, text)
    ids, offsets = tokenizer.encode_with_spans(text)
    labels = _most(part_of, len(spans) + 1, offsets, default=len(spans))
    outside = np.ones(len(text), int)
    outside[slice(*query_span)] = 0
    queries = _most(outside, 2, offsets, default=1) == 0
    if not queries.any():
        raise ConfigError(f"queries has the span {list(query_span)}, which has no token of its own")
    for part, name in enumerate(spans):
        tokens = np.flatnonzero(labels == part)
        if not len(tokens):
            raise ConfigError(f"part {name!r} has no token of its own")
        if tokens[0] > np.flatnonzero(queries)[-1]:
            raise ConfigError(f"part {name!r} lies after all queries, which cannot see it")
    names = (*spans, REST)[: labels.max() + 1]
    return Labelled(text, ids, labels, names, queries)


def _check_span(what: str, start: int, end: int, text: str) -> None:
    if not 0 <= start < end <= len(text):
        raise ConfigError(
            f"{what} has the span [{start}, {end}]; it must be [first, one past the last] within "
            f"the {len(text)} characters of the text"
        )


def _most(group_of: np.ndarray, groups: int, offsets: np.ndarray, default: int) -> np.ndarray:
    """Which group has most characters of each token, int [T]; the first of equals.

    group_of: int [characters].
    default: for tokens without characters.
    """
    found = np.full(len(offsets), default)
    most = np.zeros(len(offsets), int)
    for group in range(groups):
        before = np.concatenate([[0], np.cumsum(group_of == group)])
        count = before[offsets[:, 1]] - before[offsets[:, 0]]
        found[count > most] = group
        most = np.maximum(most, count)
    return found


def read_labelled(path: str | Path, tokenizer: Tokenizer) -> list[Labelled]:
    """Labelled texts of a JSON file, UTF-8.

    It is a list of objects, each with `text`; `parts`, by name a list of spans; and `queries`, a
    span. A span is [first character, one past the last], as in `labelled`:

        [{"text": "The code is 417. The code is 417",
          "parts": {"needle": [[12, 15]], "query": [[17, 28]]},
          "queries": [29, 32]}]

    Raises:
      ConfigError: the file cannot be read or is not like that; it names file and prompt.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, list) or not content:
        raise ConfigError(f"{path} must be a list of at least one object")
    found = []
    for i, prompt in enumerate(content):
        try:
            found.append(_labelled_of(prompt, tokenizer))
        except ConfigError as error:
            raise ConfigError(f"{path}, prompt {i} (from 0): {error}") from None
    return found


def _labelled_of(prompt: Any, tokenizer: Tokenizer) -> Labelled:
    if not isinstance(prompt, dict) or set(prompt) != {"text", "parts", "queries"}:
        raise ConfigError("it must be an object with text, parts and queries, and nothing else")
    text, parts, queries = prompt["text"], prompt["parts"], prompt["queries"]
    if not isinstance(text, str):
        raise ConfigError(f"text is {text!r}; it must be a string")
    span = lambda x: isinstance(x, list) and len(x) == 2 and all(type(i) is int for i in x)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError("text has half of a surrogate pair, which is no character") from None
    if not span(queries):
        raise ConfigError(f"queries is {queries!r}; it must be a span, [first, one past the last]")
    if not isinstance(parts, dict) or not parts:
        raise ConfigError(
            f"parts is {parts!r}; it must be an object with a list of spans for each name"
        )
    for name, spans in parts.items():
        if not isinstance(spans, list) or not all(map(span, spans)):
            raise ConfigError(f"part {name!r} is {spans!r}; it must be a list of spans")
    return labelled(tokenizer, text, parts, tuple(queries))


def needle_prompt(
    tokenizer: Tokenizer, length: int, *, kind: NeedleKind = "single", seed: int = 0
) -> Labelled:
    """A code to be found in a text about other things, the question for it, and the answer.

    Parts: `needle`, the code where it is hidden; `query`, the question and what comes before the
    answer; `rest`. The queries are the tokens of the answer. Built from characters, so that any
    tokenizer will do, and the same for the same arguments.

    Args:
      tokenizer: that of the model.
      length: tokens of all of it, at most; as many sentences are put in as fit.
      kind: `single`, one code; `multikey`, three codes of other things are hidden, too.
      seed: of all that is drawn.

    Raises:
      ConfigError: not even a prompt without filler fits.
    """
    draw = random.Random(f"{kind}/{seed}")
    keys = draw.sample([f"{a}-{b}" for a in _COLOURS for b in _THINGS], _KEYS[kind])
    codes = draw.sample(range(1_000_000, 10_000_000), len(keys))
    hidden = [f"The code of the {key} is {code}." for key, code in zip(keys, codes, strict=True)]
    depths = [draw.random() for _ in hidden]
    key, code = keys[0], str(codes[0])
    pick = draw.choice
    # No tokenizer takes fewer than four tokens for a sentence.
    fillers = [
        f"The {pick(_STATES)} {pick(_THINGS)} {pick(_DEEDS)} near the {pick(_COLOURS)} "
        f"{pick(_THINGS)} of {pick(_PLACES)}."
        for _ in range(length // 4)
    ]

    def build(n: int) -> tuple[str, dict[str, list[Span]], Span]:
        """With n sentences of filler: text, spans of the parts, and that of the answer."""
        lines = fillers[:n]
        for depth, line in sorted(zip(depths, hidden, strict=True), reverse=True):
            lines.insert(round(depth * n), line)
        context = "Some codes are noted here, one of which will be asked for.\n" + "\n".join(lines)
        needle = context.index(code)
        query = f"\nQuestion: what is the code of the {key}?\nAnswer: The code of the {key} is"
        start = len(context) + len(query) + 1
        spans = {
            "needle": [(needle, needle + len(code))],
            "query": [(len(context) + 1, start - 1)],
        }
        return f"{context}{query} {code}", spans, (start, start + len(code))

    count = lambda n: len(tokenizer.encode(build(n)[0]))
    n = bisect.bisect_right(range(len(fillers) + 1), length, key=count) - 1
    if n < 0:
        raise ConfigError(
            f"a needle prompt of {length} tokens is asked for; without filler it has {count(0)}"
        )
    return labelled(tokenizer, *build(n))


@dataclasses.dataclass(frozen=True)
class Table:
    """A linearised table, and the cell of each token.

    Attributes:
      text: a header, then a line for each row, cells separated by ` | `.
      ids: int32 [T].
      cells: int [T], row * columns + column, both from 0; -1 outside of cells, as in the header.
      rows, columns: of cells.
    """

    text: str
    ids: np.ndarray
    cells: np.ndarray
    rows: int
    columns: int


def table_prompt(tokenizer: Tokenizer, rows: int, columns: int, seed: int = 0) -> Table:
    """A table of drawn words and numbers, each column of one kind.

    Args:
      tokenizer: that of the model.
      rows, columns: at least 2 each; the header is no row.
      seed: of all that is drawn.

    Raises:
      ConfigError: fewer rows or columns, or the tokenizer joins cells in one token.
    """
    if min(rows, columns) < 2:
        raise ConfigError(f"a table has {rows} rows and {columns} columns; it needs 2 of each")
    draw = random.Random(f"table/{seed}")
    numbers = tuple(map(str, range(10, 1000)))
    kinds = dict(thing=_THINGS, colour=_COLOURS, count=numbers, city=_PLACES, state=_STATES)
    names = list(kinds)
    header = [
        names[c % len(names)] + f" {c // len(names) + 1}" * (c >= len(names))
        for c in range(columns)
    ]
    text = " | ".join(header)
    cell_of = [-1] * len(text)
    for row in range(rows):
        for column in range(columns):
            separator = " | " if column else "\n"
            value = draw.choice(kinds[names[column % len(names)]])
            text += separator + value
            cell_of += [-1] * len(separator) + [row * columns + column] * len(value)
    ids, offsets = tokenizer.encode_with_spans(text)
    # Characters between cells are the last group, which loses where there are as many of a cell.
    outside = rows * columns
    groups = np.where(np.array(cell_of) < 0, outside, cell_of)
    cells = _most(groups, outside + 1, offsets, default=outside)
    if len(np.unique(cells[cells < outside])) < outside:
        raise ConfigError(
            "the tokenizer joins cells of a table in one token; it cannot be measured"
        )
    return Table(text, ids, np.where(cells == outside, -1, cells), rows, columns)
