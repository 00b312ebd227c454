"""What a task is: examples to train on, sets to be tested on, and what guessing would give."""

import dataclasses
from typing import ClassVar, Literal, Protocol

import numpy as np
import tokenizers

from repo_jax.data import Tokenizer
from repo_jax.errors import ConfigError

# Beginnings of vocabularies that all tasks but text share.
PAD, START = 0, 1


@dataclasses.dataclass(frozen=True)
class Examples:
    """Token sequences and what is asked of them.

    Attributes:
      tokens: int32 [n, T]; shorter examples are filled up at the end with `PAD`, which nothing
        before it sees.
      answers: bool [n, T], the tokens that are to be predicted from all before them.
    """

    tokens: np.ndarray
    answers: np.ndarray


@dataclasses.dataclass(frozen=True)
class EvaluationSet(Examples):
    """Examples of one kind and one size.

    Attributes:
      x: the size, in the unit of the task's `x_label`.
      group: the kind; "" where a task has one.
      choices: int32 [n, C], distinct tokens that one who knows the task, but looks up nothing,
        would draw each answer token from; None for language modelling.
    """

    x: int
    group: str = ""
    choices: np.ndarray | None = None

    def prompts(self) -> np.ndarray:
        """int32 [n, T], the tokens with -1 where an answer is."""
        return np.where(self.answers, -1, self.tokens)

    @property
    def chance_tokens(self) -> float | None:
        """The share of answer tokens that draws from `choices` get right."""
        return None if self.choices is None else 1.0 / self.choices.shape[1]

    @property
    def chance_exact(self) -> float | None:
        """The share of examples that independent draws from `choices` get right."""
        if self.choices is None:
            return None
        return float(np.mean(self.chance_tokens ** self.answers.sum(1)))


@dataclasses.dataclass(frozen=True)
class Score:
    """Shares of what was right.

    Attributes:
      exact: of examples, those of which every answer token was.
      tokens: of answer tokens, those that were.
    """

    exact: float
    tokens: float


def score(predicted: np.ndarray, examples: Examples) -> Score:
    """Compares answers with predictions.

    Args:
      predicted: int [n, T], the likeliest token at each place given the true tokens before it.
        An example is exactly right then iff greedy decoding from its prompt would be: as long as
        all tokens so far were right, both have seen the same.
      examples: what is right.
    """
    right = predicted == examples.tokens
    return Score(
        exact=float((right | ~examples.answers).all(1).mean()),
        tokens=float(right[examples.answers].mean()),
    )


class Task(Protocol):
    """A source of examples; its attributes are its difficulty.

    Attributes:
      x_label: what the sizes of evaluation sets count.
      metric: the one to look at first; `bits_per_byte` is better when smaller.
    """

    x_label: ClassVar[str]
    metric: ClassVar[Literal["exact", "bits_per_byte"]]

    @property
    def vocab_size(self) -> int:
        """Tokens that the task knows."""

    @property
    def length(self) -> int:
        """T of training batches."""

    @property
    def trained_to(self) -> int:
        """The largest size in training, in the unit of `x_label`."""

    def tokenizer(self) -> Tokenizer:
        """Readable names of tokens to ids and back, for the analysis of trained models."""

    def training_batch(self, seed: int, step: int, batch_size: int) -> Examples:
        """[B, T] examples: a pure function of its arguments."""

    def evaluation_sets(self) -> dict[str, EvaluationSet]:
        """What is tested, the same for every model; drawn with keys that training never uses."""

    def oracle(self, prompts: np.ndarray) -> np.ndarray:
        """int32 [n, T]: `prompts` of an evaluation set with every -1 replaced by the answer."""


class WordTask:
    """What tasks have in common whose tokens are words of their own."""

    def symbols(self) -> tuple[str, ...]:
        """Names of the tokens, those of `PAD` and `START` first."""
        raise NotImplementedError

    @property
    def vocab_size(self) -> int:
        """Number of `symbols`."""
        return len(self.symbols())

    def tokenizer(self) -> Tokenizer:
        """Of `symbols`, with white space between; the first, for padding, ends texts."""
        symbols = self.symbols()
        ids = {symbol: i for i, symbol in enumerate(symbols)}
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token=symbols[PAD]))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        return Tokenizer(backend, PAD)


def check_positive(task: str, **options: int | tuple[int, ...]) -> None:
    """Refuses empty lists and numbers below 1.

    Raises:
      ConfigError: names the task's option.
    """
    for name, value in options.items():
        if value == ():
            raise ConfigError(f"{task}.{name} is empty; give one or more")
        least = min(value) if isinstance(value, tuple) else value
        if least < 1:
            has = "has" if isinstance(value, tuple) else "is"
            raise ConfigError(f"{task}.{name} {has} {least}; it must be 1 or more")


def training_rng(seed: int, step: int) -> np.random.Generator:
    """The draws of one training batch."""
    return _generator(0, seed, step)


def test_rng(seed: int, *which: int) -> np.random.Generator:
    """The draws of one evaluation set."""
    return _generator(1, seed, *which)


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def distinct(rng: np.random.Generator, n: int, size: int, among: int) -> np.ndarray:
    """int [n, size]: in each row `size` different numbers below `among`, in random order."""
    return rng.random((n, among)).argsort(1)[:, :size]


def shuffled(rng: np.random.Generator, *arrays: np.ndarray) -> list[np.ndarray]:
    """The arrays [n, m, ...] with axis 1 in an order drawn for each row, the same for all."""
    n, m = arrays[0].shape[:2]
    rows, order = np.arange(n)[:, None], rng.random((n, m)).argsort(1)
    return [array[rows, order] for array in arrays]


def first_asked(*parts: np.ndarray) -> np.ndarray:
    """bool [n, questions]: whether no earlier question of the row has the same parts.

    Args:
      parts: int [n, questions] each.
    """
    same = np.all([part[:, :, None] == part[:, None, :] for part in parts], 0)
    return ~np.tril(same, -1).any(2)


def padded(tokens: np.ndarray, answers: np.ndarray, length: int) -> Examples:
    """Examples of [n, T] filled up to [n, length]."""
    more = ((0, 0), (0, length - tokens.shape[1]))
    return Examples(np.pad(tokens.astype(np.int32), more), np.pad(answers, more))
