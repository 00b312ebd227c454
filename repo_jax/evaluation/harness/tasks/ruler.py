"""What RULER's tasks (arXiv 2404.06654) share: prompts of a given length, and their score."""

from collections.abc import Callable, Sequence

from repo_jax.data import Tokenizer
from repo_jax.errors import ConfigError

# Here and in the tasks these are RULER's words, which models were compared on: no other wording
# gives the same task.
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def open_tokenizer(*folders: str | None) -> Tokenizer:
    """The tokenizer in the first of `folders` that is given.

    Raises:
      ConfigError: none is given, or it has no tokenizer.
    """
    if (folder := next(filter(None, folders), None)) is None:
        raise ConfigError("RULER's tasks need a tokenizer: give it in the metadata, tokenizer: DIR")
    return Tokenizer.load(folder)


def hide(needles: Sequence[str], depths: Sequence[float], sentences: list[str]) -> list[str]:
    """The sentences with each needle at its depth, 0 to 1; depths ascend."""
    lines = list(sentences)
    for depth, needle in zip(reversed(depths), reversed(needles), strict=True):
        lines.insert(round(depth * len(sentences)), needle)
    return lines


def fill(
    prompt: Callable[[int], str],
    tokenizer: Tokenizer,
    *,
    length: int,
    new_tokens: int,
    without: str,
    most: int | None = None,
) -> tuple[int, str]:
    """The longest of prompt(0) to prompt(most) that fits, and how many tokens it has.

    Args:
      length: tokens of prompt and answer together, at most.
      new_tokens: those of the answer.
      without: names prompt(0) in the error.

    Raises:
      ConfigError: prompt(0) does not fit.
    """
    room = length - new_tokens
    tokens, text = longest(prompt, tokenizer, room, most)
    if tokens > room:
        raise ConfigError(
            f"{without} has {tokens} tokens; the length {length} leaves room for {room} beside the "
            f"{new_tokens} of the answer"
        )
    return tokens, text


def longest(
    prompt: Callable[[int], str], tokenizer: Tokenizer, room: int, most: int | None = None
) -> tuple[int, str]:
    """`fill`, but prompt(0) where nothing fits.

    Lengths grow nearly evenly, so that a few guesses find it.
    """
    count = lambda n: len(tokenizer.encode(prompt(n)))
    low, fits = 0, count(0)
    if fits > room:
        return fits, prompt(0)
    slope = max(1.0, (count(16) - fits) / 16) if most is None or most >= 16 else 1.0
    high = None if most is None else most + 1
    while high is None or high - low > 1:
        n = low + max(1, int((room - fits) / slope))
        n = n if high is None else min(n, high - 1)
        tokens = count(n)
        if tokens <= room:
            low, fits = n, tokens
        else:
            # What was added last may be longer than what was added first, as numbers are.
            high, slope = n, max(1.0, (tokens - fits) / (n - low))
    return fits, prompt(low)


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """`recall`: the share of the gold strings in the output, whatever their case."""
    output = results[0].lower()
    return {"recall": sum(gold.lower() in output for gold in doc["outputs"]) / len(doc["outputs"])}
