"""RULER's needle tasks (arXiv 2404.06654), made for any tokenizer without a network."""

import dataclasses
import functools
import random
import re
import uuid
from pathlib import Path
from typing import Any, get_args

import datasets
import wonderwords

from repo_jax.data import Tokenizer
from repo_jax.errors import ConfigError
from repo_jax.evaluation.config import Haystack
from repo_jax.evaluation.harness.tasks.ruler import NOISE, fill, hide, open_tokenizer

_NEEDLE = "One of the special magic numbers for {key} is: {value}."
_ONE = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will "
    "quiz you about the number afterwards.\n{context}\nWhat is the special magic number for "
    "{query} mentioned in the provided text? The special magic number for {query} mentioned in "
    "the provided text is"
)
_SEVERAL = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. I "
    "will quiz you about the numbers afterwards.\n{context}\nWhat are all the special magic "
    "numbers for {query} mentioned in the provided text? The special magic numbers for {query} "
    "mentioned in the provided text are"
)

_NEW_TOKENS = 128


@dataclasses.dataclass(frozen=True)
class Kind:
    """How many keys are hidden, with how many values each, and how many are asked for."""

    keys: int = 1
    values: int = 1
    queries: int = 1


KINDS = {
    "single": Kind(),
    "multikey": Kind(keys=4),
    "multivalue": Kind(values=4),
    "multiquery": Kind(keys=4, queries=4),
}


def documents(
    kind: str,
    tokenizer: str | None = None,
    run: str | None = None,
    pretrained: str | None = None,
    length: int = 4096,
    samples: int = 500,
    seed: int = 42,
    haystack: Haystack | None = None,
    data_dir: str | None = None,
    **_: Any,
) -> dict[str, datasets.Dataset]:
    """Prompts that have as many tokens as fit.

    Args:
      kind: of `KINDS`.
      tokenizer: a tokenizer.json or its folder; else that of `run` or `pretrained`.
      length: tokens of prompt and answer (128 of them) together, at most.
      samples: how many; each depends on the seed and its number only.
      haystack: what needles are hidden in: `noise`, a sentence again and again; `needles`,
        other needles; `essay`, the text in data_dir/ruler/essays.txt. None: as in RULER, noise
        for `single` and for the others the essays, or, without that file, noise too.

    Returns:
      Split `test` with `input`, `outputs`, `haystack`, `tokens`.

    Raises:
      ConfigError: no such haystack, no tokenizer, no essays, or too little room.
    """
    if haystack not in (None, *get_args(Haystack)):
        raise ConfigError(
            f"the haystack is {haystack!r}; it must be one of {', '.join(get_args(Haystack))}"
        )
    loaded = open_tokenizer(tokenizer, run, pretrained)
    essays = None if data_dir is None else Path(data_dir) / "ruler" / "essays.txt"
    found = essays is not None and essays.is_file()
    if haystack is None:
        haystack = "essay" if found and kind != "single" else "noise"
    if haystack == "essay" and not found:
        raise ConfigError(
            "the haystack essay needs a text in DATA_DIR/ruler/essays.txt; give --data_dir"
        )
    sentences = _sentences(essays.read_text(encoding="utf-8")) if haystack == "essay" else None
    rows = [
        _sample(loaded, KINDS[kind], length, haystack, sentences, f"{seed}/{kind}/{index}")
        for index in range(samples)
    ]
    return {"test": datasets.Dataset.from_list(rows)}


def _sentences(text: str) -> tuple[str, ...]:
    return tuple(re.split(r"(?<=[.!?])\s+", " ".join(text.split())))


@functools.cache
def _words() -> tuple[list[str], list[str]]:
    words = wonderwords.RandomWord()
    return tuple(words.filter(include_categories=[name]) for name in ("adjective", "noun"))


def _sample(
    tokenizer: Tokenizer,
    kind: Kind,
    length: int,
    haystack: Haystack,
    sentences: tuple[str, ...] | None,
    seed: str,
) -> dict[str, Any]:
    draw = random.Random(seed)
    number = lambda: str(draw.randint(1_000_000, 9_999_999))
    keys: list[str] = []
    while len(keys) < kind.keys:
        key = "-".join(map(draw.choice, _words()))
        keys += [key] * (key not in keys)
    values = {key: [number() for _ in range(kind.values)] for key in keys}
    needles = [_NEEDLE.format(key=key, value=v) for key in keys for v in values[key]]
    draw.shuffle(needles)
    depths = sorted(draw.random() for _ in needles)
    queries = draw.sample(keys, kind.queries)
    if haystack == "needles":
        uniques = random.Random(f"{seed}/haystack")
        more = lambda i: _NEEDLE.format(
            key=uuid.UUID(int=uniques.getrandbits(128), version=4), value=number()
        )
        sentences = tuple(map(more, range(length // 8)))
    elif haystack == "noise":
        sentences = (NOISE,)
    asked = queries[0] if len(queries) == 1 else ", ".join(queries[:-1]) + f", and {queries[-1]}"
    template = _ONE if len(queries) * kind.values == 1 else _SEVERAL

    def prompt(n: int) -> str:
        lines = hide(needles, depths, [sentences[i % len(sentences)] for i in range(n)])
        context = (" " if haystack == "essay" else "\n").join(lines)
        return template.format(context=context, query=asked)

    without = "a needle task without a haystack"
    tokens, text = fill(prompt, tokenizer, length=length, new_tokens=_NEW_TOKENS, without=without)
    outputs = [value for key in queries for value in values[key]]
    return {"input": text, "outputs": outputs, "haystack": haystack, "tokens": tokens}
