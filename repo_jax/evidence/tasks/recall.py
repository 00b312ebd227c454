"""Noisy recall: keys and their values among other tokens, asked for at the end."""

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
    padded,
    test_rng,
    training_rng,
)

_ASK, _FIRST = 2, 3

KINDS = ("single", "multi_key", "multi_value", "multi_query")


@dataclasses.dataclass(frozen=True)
class Recall(WordTask):
    """`<start>`, noise in which needles `key value` and lone values stand, `<ask> key value`.

    As in RULER (arXiv 2404.06654), in four kinds: `single`, one needle; `multi_key`, `needles`
    with different keys, one asked for; `multi_value`, as many, of which `asked` have the key asked
    for, whose values are given in the order of the context; `multi_query`, as many, `asked` of
    which are asked for one after the other.

    In training a quarter of the rows is of each kind. There are `questions` in a row, but for
    `multi_value`: with one question a row, hardly any model learns to find keys in some thousand
    steps. So `multi_key` and `multi_query` are the same in training, and once `questions` are
    more than the needles, most of them repeat an earlier one. Each kind has the same weight only
    if the loss is a mean over examples.

    Tests have few questions. Rows `factor` times as long as in training therefore have contexts
    that are more than so many times longer; with the factor 1 the context is that of training,
    and rows are shorter by the questions that are left out.

    A context has `needles` + `lone` values, all different, whatever its kind and length. There
    are so many contexts that none is met twice.

    Attributes:
      context: tokens of the context in training.
      factors: how many times longer the rows of the evaluation sets are; see above.
      needles, asked, questions: see above.
      lone: values without a key, beside a full number of needles.
      keys, values, noise: different tokens of each sort.
      examples: in each evaluation set.
      test_seed: of the evaluation sets.
    """

    context: int = 64
    factors: tuple[int, ...] = (1, 2, 4)
    needles: int = 4
    asked: int = 2
    questions: int = 12
    lone: int = 8
    keys: int = 32
    values: int = 32
    noise: int = 32
    examples: int = 250
    test_seed: int = 0

    x_label: ClassVar[str] = "tokens"
    metric: ClassVar[str] = "exact"

    def __post_init__(self):
        object.__setattr__(self, "factors", tuple(self.factors))
        check_positive("recall", factors=self.factors, examples=self.examples)
        limits = {
            "asked": (1, self.needles, "recall.needles"),
            "needles": (1, self.keys, "recall.keys"),
            "questions": (self.asked, 1_000, "a thousand"),
            "lone": (0, self.values - self.needles, "recall.values - recall.needles"),
        }
        for name, (low, high, what) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise ConfigError(
                    f"recall.{name} is {getattr(self, name)}; it must be {low} to {what} ({high})"
                )
        least = 2 * self.needles + self.lone
        if self.context < least:
            raise ConfigError(
                f"recall.context is {self.context}; recall.needles ({self.needles}) and "
                f"recall.lone ({self.lone}) take {least} tokens"
            )

    @property
    def length(self) -> int:
        """Tokens of the kinds with the most questions."""
        return 1 + self.context + 3 * self.questions

    @property
    def trained_to(self) -> int:
        """Tokens of the longest rows."""
        return self.length

    def symbols(self) -> tuple[str, ...]:
        """key7, value3, noise0 and so on."""
        sorts = (("key", self.keys), ("value", self.values), ("noise", self.noise))
        numbered = (f"{name}{i}" for name, n in sorts for i in range(n))
        return ("<pad>", "<start>", "<ask>", *numbered)

    def training_batch(self, seed: int, step: int, batch_size: int) -> Examples:
        """Rows of kinds drawn for each."""
        rng = training_rng(seed, step)
        kinds = rng.integers(len(KINDS), size=batch_size)
        tokens = np.zeros((batch_size, self.length), np.int32)
        answers = np.zeros(tokens.shape, bool)
        for i, kind in enumerate(KINDS):
            rows = np.flatnonzero(kinds == i)
            asked = self.asked if kind == "multi_value" else self.questions
            made, _ = self._examples(rng, kind, len(rows), self.context, asked)
            made = padded(made.tokens, made.answers, self.length)
            tokens[rows], answers[rows] = made.tokens, made.answers
        return Examples(tokens, answers)

    def evaluation_sets(self) -> dict[str, EvaluationSet]:
        """One for each kind and factor."""
        sets = {}
        for i, kind in enumerate(KINDS):
            for factor in self.factors:
                length = factor * self.length
                rng = test_rng(self.test_seed, i, length)
                asked = self.asked if kind in ("multi_value", "multi_query") else 1
                question = 2 + asked if kind == "multi_value" else 3 * asked
                context = self.context if factor == 1 else length - 1 - question
                made, choices = self._examples(rng, kind, self.examples, context, asked)
                found = EvaluationSet(made.tokens, made.answers, length, kind, choices)
                sets[f"{kind}_{length}"] = found
        return sets

    def oracle(self, prompts: np.ndarray) -> np.ndarray:
        """Reads the values off the needles."""
        out = prompts.copy()
        for row in out:
            asks = np.flatnonzero(row == _ASK)
            context = row[: asks[0]]
            for ask in asks:
                values = context[1:][context[:-1] == row[ask + 1]]
                gap = row[ask + 2 :] == -1
                n = len(gap) if gap.all() else int(gap.argmin())
                row[ask + 2 : ask + 2 + n] = values[:n]
        return out

    def _examples(self, rng: np.random.Generator, kind: str, n: int, context: int, asked: int):
        """Examples of one kind [n, T], and the values in each context [n, C]."""
        m = 1 if kind == "single" else self.needles
        items = self.needles + self.lone
        rows = np.arange(n)[:, None]
        keys = _FIRST + distinct(rng, n, m, self.keys)
        which = distinct(rng, n, asked, m) if asked <= m else rng.integers(m, size=(n, asked))
        if kind == "multi_value":
            which = np.sort(which, 1)
            keys[rows, which] = keys[rows, which[:, :1]]
        choices = _FIRST + self.keys + distinct(rng, n, items, self.values)
        needle = distinct(rng, n, items, items) < m
        # Places for one token each, moved by the needles before, which take two.
        at = np.sort(distinct(rng, n, items, context - m), 1) + needle.cumsum(1) - needle + 1
        first_noise = _FIRST + self.keys + self.values
        body = rng.integers(first_noise, self.vocab_size, (n, 1 + context))
        body[:, 0] = START
        body[rows, at + needle] = choices
        body[rows, at[needle].reshape(n, m)] = keys
        values = choices[needle].reshape(n, m)
        key, value = keys[rows, which], values[rows, which]
        ask = np.full_like(key, _ASK)
        if kind == "multi_value":
            question = np.concatenate([ask[:, :1], key[:, :1], value], 1)
            answers = np.arange(2 + asked) >= 2
        else:
            question = np.stack([ask, key, value], 2).reshape(n, 3 * asked)
            answers = np.arange(3 * asked) % 3 == 2
        tokens = np.concatenate([body, question], 1)
        answers = np.concatenate([np.zeros(1 + context, bool), answers])
        answers = np.broadcast_to(answers[None], tokens.shape)
        return Examples(tokens.astype(np.int32), answers), choices
