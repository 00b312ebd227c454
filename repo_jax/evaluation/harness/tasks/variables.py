"""RULER's variable tracking (arXiv 2404.06654), made for any tokenizer without a network.

Of RULER's versions this is lm-eval's, in words and joining: sentences have spaces between them,
and those of noise end their lines. RULER's newer scripts join with ends of lines alone and spell
the prompt's misspelt word right.
"""

import itertools
import random
import string
from collections.abc import Callable
from typing import Any

import datasets

from repo_jax.data import Tokenizer
from repo_jax.evaluation.harness.tasks.ruler import NOISE, fill, hide, longest, open_tokenizer

# The misspelt word is lm-eval's. Its space at the end is not here: a tokenizer would have the
# answer's first word without the space that it begins with everywhere else.
_PROMPT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\nQuestion: Find all variables that are assigned the value {value} in the text "
    "above. Answer: According to the chain(s) of variable assignment in the text above, {names} "
    "variables are assgined the value {value}, they are:"
)
_NAMES = 5
_NEW_TOKENS = 30
_SHOWN_TOKENS = 500


def documents(
    tokenizer: str | None = None,
    run: str | None = None,
    pretrained: str | None = None,
    length: int = 4096,
    samples: int = 500,
    seed: int = 42,
    **_: Any,
) -> dict[str, datasets.Dataset]:
    """Prompts that have as many tokens as fit: a solved example, then the one that is asked.

    Each hides five assignments in noise: a number to a name, and a name to the next.

    Args:
      tokenizer: a tokenizer.json or its folder; else that of `run` or `pretrained`.
      length: tokens of prompt and answer (30 of them) together, at most. The solved example has
        500 at most, or no noise.
      samples: how many; each depends on the seed and its number only.

    Returns:
      Split `test` with `input`, `outputs` (the names), `tokens`.

    Raises:
      ConfigError: no tokenizer, or too little room.
    """
    loaded = open_tokenizer(tokenizer, run, pretrained)
    rows = [
        _sample(loaded, length, f"{seed}/variable_tracking/{index}") for index in range(samples)
    ]
    return {"test": datasets.Dataset.from_list(rows)}


def _sample(tokenizer: Tokenizer, length: int, seed: str) -> dict[str, Any]:
    draw = random.Random(seed)
    shown_value, value = draw.sample(range(10_000, 100_000), 2)
    shown, answer = _chain(draw, 3, shown_value)
    asked, names = _chain(draw, 5, value)
    solved = lambda n: f"{shown(n)} {' '.join(answer)}\n\n"
    _, example = longest(solved, tokenizer, _SHOWN_TOKENS)
    tokens, text = fill(
        lambda n: example + asked(n),
        tokenizer,
        length=length,
        new_tokens=_NEW_TOKENS,
        without="variable_tracking without noise",
    )
    return {"input": text, "outputs": names, "tokens": tokens}


def _chain(draw: random.Random, letters: int, value: int) -> tuple[Callable[[int], str], list[str]]:
    """A prompt as a function of how many sentences of noise it has, and the names in it."""
    names: list[str] = []
    while len(names) < _NAMES:
        name = "".join(draw.choices(string.ascii_uppercase, k=letters))
        names += [name] * (name not in names)
    lines = [f"VAR {names[0]} = {value}"]
    lines += [f"VAR {name} = VAR {known} " for known, name in itertools.pairwise(names)]
    depths = sorted(draw.random() for _ in lines)

    def prompt(n: int) -> str:
        context = " ".join(hide(lines, depths, [f"{NOISE}\n"] * n))
        return _PROMPT.format(context=context, value=value, names=_NAMES)

    return prompt, names
