"""Text reversal (the paper's appendix C): trained on short sequences, tested on longer ones."""

import dataclasses
import string
from typing import ClassVar

import numpy as np

from repo_jax.errors import ConfigError
from repo_jax.evidence.tasks.base import (
    PAD,
    START,
    EvaluationSet,
    Examples,
    WordTask,
    check_positive,
    test_rng,
    training_rng,
)

_TURN, _END, _FIRST = 2, 3, 4


@dataclasses.dataclass(frozen=True)
class Reversal(WordTask):
    """`<start> a b c <turn> c b a`, and then `<end>` if asked for.

    No sequence longer than those of training is ever trained on; shorter test sequences may be.

    Attributes:
      alphabet: different letters.
      shortest, longest: letters of a training example, uniform between them.
      end: whether saying that the answer is over is part of the answer.
      test_lengths: letters of the evaluation sets' examples.
      examples: in each evaluation set.
      test_seed: of the evaluation sets.
    """

    alphabet: int = 26
    shortest: int = 2
    longest: int = 20
    end: bool = False
    test_lengths: tuple[int, ...] = (5, 10, 15, 20, 22, 25, 30, 35, 40)
    examples: int = 500
    test_seed: int = 0

    x_label: ClassVar[str] = "letters to reverse"
    metric: ClassVar[str] = "exact"

    def __post_init__(self):
        object.__setattr__(self, "test_lengths", tuple(self.test_lengths))
        check_positive("reversal", test_lengths=self.test_lengths, examples=self.examples)
        if not 0 < self.shortest <= self.longest:
            raise ConfigError(
                f"reversal.shortest is {self.shortest}; it must be 1 to reversal.longest "
                f"({self.longest})"
            )
        if self.alphabet < 2:
            raise ConfigError(f"reversal.alphabet is {self.alphabet}; it must be at least 2")

    @property
    def length(self) -> int:
        """Tokens of the longest training example."""
        return self._tokens(self.longest)

    @property
    def trained_to(self) -> int:
        """Letters of the longest training example."""
        return self.longest

    def symbols(self) -> tuple[str, ...]:
        """Letters as far as there are."""
        names = string.ascii_lowercase + string.ascii_uppercase + string.digits
        letters = (names[i] if i < len(names) else f"x{i}" for i in range(self.alphabet))
        return ("<pad>", "<start>", "<turn>", "<end>", *letters)

    def training_batch(self, seed: int, step: int, batch_size: int) -> Examples:
        """Examples of lengths drawn for each row."""
        rng = training_rng(seed, step)
        lengths = rng.integers(self.shortest, self.longest, batch_size, endpoint=True)
        return self._examples(rng, lengths, self.length)

    def evaluation_sets(self) -> dict[str, EvaluationSet]:
        """One for each of `test_lengths`."""
        sets = {}
        for n in self.test_lengths:
            lengths = np.full(self.examples, n)
            made = self._examples(test_rng(self.test_seed, n), lengths, self._tokens(n))
            letters = np.arange(_FIRST, self.vocab_size, dtype=np.int32)
            choices = np.broadcast_to(letters, (self.examples, self.alphabet))
            if self.end:
                choices = np.pad(choices, ((0, 0), (0, 1)), constant_values=_END)
            sets[f"length_{n}"] = EvaluationSet(made.tokens, made.answers, n, "", choices)
        return sets

    def oracle(self, prompts: np.ndarray) -> np.ndarray:
        """Reads backwards from the turn."""
        out = prompts.copy()
        for row in out:
            turn = int(np.flatnonzero(row == _TURN)[0])
            row[turn + 1 : 2 * turn] = row[1:turn][::-1]
        out[out == -1] = _END
        return out

    def _tokens(self, letters: int) -> int:
        return 2 + 2 * letters + self.end

    def _examples(self, rng: np.random.Generator, lengths: np.ndarray, T: int) -> Examples:
        letters = rng.integers(_FIRST, self.vocab_size, (len(lengths), lengths.max()))
        at, n = np.arange(T)[None], lengths[:, None]
        source = np.where(at <= n, at - 1, 2 * n + 1 - at).clip(0, letters.shape[1] - 1)
        tokens = np.take_along_axis(letters, source, 1)
        tokens[:, 0] = START
        tokens = np.where(at == n + 1, _TURN, tokens)
        tokens = np.where(at > 2 * n + 1, PAD, tokens)
        last = 2 * n + 1 + self.end
        if self.end:
            tokens = np.where(at == last, _END, tokens)
        return Examples(tokens.astype(np.int32), (at > n + 1) & (at <= last))
