"""Which token comes next."""

import dataclasses
import functools
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the filters act in this order, on what the one before left.

    Attributes:
      repetition_penalty: logits of tokens that prompt or continuation have are divided by it
        where positive, else multiplied (CTRL, arXiv 1909.05858).
      temperature: 0 takes the likeliest token; else logits are divided by it and sampled.
      top_k: sample among the k likeliest only.
      top_p: sample among the fewest tokens whose probability reaches p only
        (arXiv 1904.09751).
      min_p: sample among tokens at least p times as likely as the likeliest only
        (arXiv 2407.01082).

    Raises:
      ValueError: a value out of range, naming it.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self):
        for name, right, is_right in (
            ("repetition_penalty", "above 0", self.repetition_penalty > 0),
            ("temperature", "0 or above", self.temperature >= 0),
            ("top_k", "1 or above", self.top_k is None or self.top_k >= 1),
            ("top_p", "above 0 and at most 1", self.top_p is None or 0 < self.top_p <= 1),
            ("min_p", "from 0 to 1", self.min_p is None or 0 <= self.min_p <= 1),
        ):
            if not is_right:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {right}")

    @property
    def kind(self) -> "Kind":
        """What a program has to be compiled for."""
        filters = any(x is not None for x in (self.top_k, self.top_p, self.min_p))
        return Kind(self.temperature > 0, self.temperature > 0 and filters, self.penalizes)

    @property
    def penalizes(self) -> bool:
        """Whether it matters which tokens were seen."""
        return self.repetition_penalty != 1.0

    def numbers(self) -> dict[str, np.ndarray]:
        """The values, which a program takes as they come; a filter that is off keeps all."""
        off = dict(top_k=np.iinfo(np.int32).max, top_p=2.0, min_p=0.0)
        values = {
            name: off[name] if value is None else value
            for name, value in dataclasses.asdict(self).items()
        }
        values["top_k"] = min(values["top_k"], off["top_k"])
        return {
            name: np.asarray(value, np.int32 if name == "top_k" else np.float32)
            for name, value in values.items()
        }


class Kind(NamedTuple):
    """Whether tokens are drawn at random, among some only, and with a penalty."""

    random: bool
    filters: bool
    penalizes: bool


def places_among_equals(prompts: Sequence[Sequence[int]]) -> np.ndarray:
    """Which of several equal prompts each one is, from 0: uint32 [B]."""
    seen: Counter = Counter()
    places = np.zeros(len(prompts), np.uint32)
    for i, prompt in enumerate(map(tuple, prompts)):
        places[i] = seen[prompt]
        seen[prompt] += 1
    return places


def streams(prompts: Sequence[Sequence[int]], places: Sequence[int]) -> np.ndarray:
    """What makes the draws of each prompt its own, in whatever batch: uint32 [B, 2].

    A digest of its ids, the same on every machine, and its place among equal prompts.
    """
    digests = [zlib.crc32(np.asarray(prompt, "<i4").tobytes()) for prompt in prompts]
    return np.stack([np.asarray(x, np.uint32) for x in (digests, places)], axis=1)


def row_keys(seed, streams_B2: jax.Array) -> jax.Array:
    """A random key [B] for each of `streams`."""
    key, fold_in = jax.random.key(seed), jax.random.fold_in
    return jax.vmap(lambda stream_2: fold_in(fold_in(key, stream_2[0]), stream_2[1]))(streams_B2)


def draw(logits_BV, keys_B, seen_BV, numbers, kind: Kind):
    """The next token of each row, and its log-probability by the model itself.

    Args:
      logits_BV: float32 [B, V].
      keys_B: random keys, one a row.
      seen_BV: bool [B, V], tokens to penalize; None if `kind` does not.
      numbers: of `Sampling.numbers`.

    Returns:
      int32 [B], and float32 [B]: before penalty, temperature and filters.
    """
    chosen_BV = logits_BV
    if kind.penalizes:
        penalty = numbers["repetition_penalty"]
        penalized = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        chosen_BV = jnp.where(seen_BV, penalized, logits_BV)
    if kind.random:
        one = functools.partial(_draw_one, numbers=numbers, filters=kind.filters)
        tokens_B = jax.vmap(one)(chosen_BV / numbers["temperature"], keys_B)
    else:
        tokens_B = _first_of_most(chosen_BV)
    at = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=1)[:, 0]
    return tokens_B.astype(jnp.int32), at - jax.nn.logsumexp(logits_BV, axis=-1)


def _first_of_most(x_BV):
    """argmax along V, as two plain reductions: XLA for CPUs does these in vectors, and an argmax,
    which reduces pairs, one by one."""
    V = x_BV.shape[1]
    at_most_BV = x_BV == x_BV.max(-1, keepdims=True)
    return jnp.where(at_most_BV, jnp.arange(V)[None], V - 1).min(-1)


def _draw_one(logits_V, key, *, numbers, filters: bool):
    if not filters:
        return jax.random.categorical(key, logits_V)
    order = jnp.argsort(-logits_V)
    ranked = logits_V[order]
    ranked = jnp.where(jnp.arange(ranked.size) < numbers["top_k"], ranked, -jnp.inf)
    probability = jax.nn.softmax(ranked)
    keep = jnp.cumsum(probability) - probability < numbers["top_p"]
    keep &= probability >= numbers["min_p"] * probability[0]
    return order[jax.random.categorical(key, jnp.where(keep, ranked, -jnp.inf))]
