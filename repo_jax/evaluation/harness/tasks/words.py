"""RULER's common and frequent words (arXiv 2404.06654), for any tokenizer without a network."""

import collections
import functools
import random
import string
from collections.abc import Callable
from typing import Any

import datasets
import wonderwords
from scipy.special import zeta

from repo_jax.data import Tokenizer
from repo_jax.evaluation.harness.tasks.ruler import fill, open_tokenizer

_COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\nQuestion: What are the 10 most common "
    "words in the above list? Answer: The top 10 words that appear most often in the list are:"
)
_COMMON_WORDS = 10
_COMMON_NEW_TOKENS = 120
_FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. Find the three "
    "most frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. "
    "Please ignore the dots '....'. What are the three most frequently appeared words in the "
    "above coded text? Answer: According to the coded text above, the three most frequently "
    "appeared words are:"
)
_FREQUENT_NEW_TOKENS = 50
# With fewer words the third and the fourth may be equally frequent.
_FREQUENT_LEAST = 80


def documents(
    kind: str,
    tokenizer: str | None = None,
    run: str | None = None,
    pretrained: str | None = None,
    length: int = 4096,
    samples: int = 500,
    seed: int = 42,
    **_: Any,
) -> dict[str, datasets.Dataset]:
    """Prompts that have as many tokens as fit.

    Args:
      kind: `common`, a numbered list in which ten words stand more often than the others, after
        a solved one; or `frequent`, a text of made-up words and dots, where the k-th most
        frequent is 1/k^2 as frequent as the dots, which are the first.
      tokenizer: a tokenizer.json or its folder; else that of `run` or `pretrained`.
      length: tokens of prompt and answer (120 and 50 of them) together, at most. There are words
        for a list of about 100,000.
      samples: how many; each depends on the seed and its number only.

    Returns:
      Split `test` with `input`, `outputs` (the words), `tokens`.

    Raises:
      ConfigError: no tokenizer, or too little room.
    """
    loaded = open_tokenizer(tokenizer, run, pretrained)
    make = {"common": _common, "frequent": _frequent}[kind]
    rows = [make(loaded, length, f"{seed}/{kind}_words/{index}") for index in range(samples)]
    return {"test": datasets.Dataset.from_list(rows)}


@functools.cache
def _words() -> list[str]:
    categories = ["noun", "adjective", "verb"]
    return sorted(set(wonderwords.RandomWord().filter(include_categories=categories)))


def _common(tokenizer: Tokenizer, length: int, seed: str) -> dict[str, Any]:
    # How often a common word and another stand in the example and in the list, and how many
    # different ones the example has, and the list at least. RULER takes the second below 4096
    # tokens; by bytes the first does not fit at 4096 either.
    room = length - _COMMON_NEW_TOKENS
    for example, asked, shown in (((10, 3), (30, 3), 40), ((3, 1), (6, 1), 20)):
        prompt, outputs = _lists(random.Random(seed), example, asked, shown)
        if length >= 4096 and len(tokenizer.encode(prompt(0))) <= room:
            break
    tokens, text = fill(
        prompt,
        tokenizer,
        length=length,
        new_tokens=_COMMON_NEW_TOKENS,
        without=f"common_words with {shown} words",
        most=len(_words()) - shown,
    )
    return {"input": text, "outputs": outputs, "tokens": tokens}


def _lists(
    draw: random.Random, example: tuple[int, int], asked: tuple[int, int], shown: int
) -> tuple[Callable[[int], str], list[str]]:
    """A prompt as a function of how many more words than `shown` it has, and the common ones."""
    numbered = lambda words: " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))

    def listed(words: list[str], times: tuple[int, int], order: str) -> str:
        entries = words[:_COMMON_WORDS] * times[0] + words[_COMMON_WORDS:] * times[1]
        random.Random(order).shuffle(entries)
        return _COMMON.format(context=numbered(entries))

    orders = [str(draw.getrandbits(64)) for _ in range(2)]
    solved = draw.sample(_words(), shown)
    words = draw.sample(_words(), len(_words()))
    # Without a space before the answer, as in RULER.
    before = f"{listed(solved, example, orders[0])}{numbered(solved[:_COMMON_WORDS])}\n"
    prompt = lambda n: before + listed(words[: shown + n], asked, orders[1])
    return prompt, words[:_COMMON_WORDS]


def _frequent(tokenizer: Tokenizer, length: int, seed: str) -> dict[str, Any]:
    draw = random.Random(seed)
    different = max(5, length // 50)
    drawn = {"...": None}
    while len(drawn) < different:
        drawn["".join(draw.choices(string.ascii_lowercase, k=6))] = None
    words = list(drawn)
    order = str(draw.getrandbits(64))

    def prompt(n: int) -> str:
        total = (_FREQUENT_LEAST + n) / zeta(2.0)
        counts = {word: int(total / k**2) for k, word in enumerate(words, 1)}
        text = list(collections.Counter(counts).elements())
        random.Random(order).shuffle(text)
        return _FREQUENT.format(context=" ".join(text))

    tokens, text = fill(
        prompt,
        tokenizer,
        length=length,
        new_tokens=_FREQUENT_NEW_TOKENS,
        without=f"frequent_words with {_FREQUENT_LEAST} words",
    )
    return {"input": text, "outputs": words[1:4], "tokens": tokens}
