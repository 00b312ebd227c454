"""Language modelling on real text, the control: byte by byte, in bits."""

import dataclasses
import functools
from typing import ClassVar

import numpy as np

from repo_jax.config import DataConfig
from repo_jax.data import Corpus, Tokenizer, byte_tokenizer, cached_corpus
from repo_jax.errors import ConfigError
from repo_jax.evidence.tasks.base import (
    EvaluationSet,
    Examples,
    check_positive,
    training_rng,
)


@dataclasses.dataclass(frozen=True)
class Text:
    """Windows of UTF-8 text; every token but the first is to be predicted.

    Attributes:
      text: as in the data section of a training config.
      cache_dir: where the tokenised text is kept.
      context: tokens of a window in training.
      factors: how many times longer the windows of the evaluation sets are.
      examples: held-out windows of the longest evaluation set; the others are these, cut.
    """

    text: str = "python-stdlib"
    cache_dir: str = "data"
    context: int = 256
    factors: tuple[int, ...] = (1, 2, 4)
    examples: int = 64

    x_label: ClassVar[str] = "tokens of context"
    metric: ClassVar[str] = "bits_per_byte"

    def __post_init__(self):
        object.__setattr__(self, "factors", tuple(self.factors))
        check_positive("text", factors=self.factors, examples=self.examples)
        if self.context < 2:
            raise ConfigError(f"text.context is {self.context}; it must be at least 2")

    @property
    def vocab_size(self) -> int:
        """Bytes, and the end of a document."""
        return 257

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self.context

    @property
    def trained_to(self) -> int:
        """Tokens of a window."""
        return self.context

    def tokenizer(self) -> Tokenizer:
        """Bytes."""
        return byte_tokenizer()

    def training_batch(self, seed: int, step: int, batch_size: int) -> Examples:
        """Windows that begin anywhere in the training text."""
        tokens = self._corpus().train
        starts = training_rng(seed, step).integers(len(tokens) - self.context, size=batch_size)
        return _windows(tokens[starts[:, None] + np.arange(self.context)])

    def evaluation_sets(self) -> dict[str, EvaluationSet]:
        """The same held-out tokens in windows of each length."""
        longest = max(self.factors) * self.context
        held_out = self._corpus().validation
        n = self.examples * longest
        if len(held_out) < n:
            raise ConfigError(
                f"text.examples is {self.examples}; the held-out text has {len(held_out)} tokens, "
                f"and {self.examples} windows of {longest} take {n}"
            )
        sets = {}
        for factor in self.factors:
            length = factor * self.context
            made = _windows(held_out[:n].reshape(-1, length))
            sets[f"context_{length}"] = EvaluationSet(made.tokens, made.answers, length)
        return sets

    def oracle(self, prompts: np.ndarray) -> np.ndarray:
        """Nobody can.

        Raises:
          NotImplementedError: always.
        """
        raise NotImplementedError("no one knows how a text goes on")

    def _corpus(self) -> Corpus:
        return _corpus(self.text, self.cache_dir)


@functools.cache
def _corpus(text: str, cache_dir: str) -> Corpus:
    return cached_corpus(DataConfig(text=text, tokenizer="bytes", cache_dir=cache_dir))


def _windows(tokens: np.ndarray) -> Examples:
    answers = np.broadcast_to(np.arange(tokens.shape[1])[None] > 0, tokens.shape)
    return Examples(tokens.astype(np.int32), answers)
