"""What lm-eval's requests ask for, and which of them go together."""

from collections.abc import Callable, Iterator, Sequence

from repo_jax import sharding
from repo_jax.config import DecoderConfig
from repo_jax.errors import ConfigError

# Where a task does not say how many.
NEW_TOKENS = 256
_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens")
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def reach(config: DecoderConfig) -> int:
    """Tokens that a model may see: as many as it was trained on, or as YaRN makes of its original
    length, if that is more.
    """
    scaling = config.rope_scaling
    extended = 0 if scaling is None else int(scaling.factor * scaling.original_length)
    return max(config.trained_length, extended)


def prompt_room(task: str, gen_kwargs: dict, max_length: int) -> int:
    """Tokens that a prompt may have beside what is generated.

    Raises:
      ConfigError: none, naming the task; or a name in `gen_kwargs` that is not known.
    """
    new_tokens = generation_options(gen_kwargs)[1]["max_new_tokens"]
    if new_tokens >= max_length:
        raise ConfigError(
            f"{task} generates {new_tokens} tokens, which leaves no room for a prompt in "
            f"max_length, {max_length}; leave it out, or extend the context with YaRN"
        )
    return max_length - new_tokens


def is_sampled(request) -> bool:
    """Whether its answer is drawn at random."""
    if request.request_type != "generate_until":
        return False
    return bool(generation_options(request.args[1])[1]["temperature"])


def generation_options(gen_kwargs: dict) -> tuple[tuple[str, ...], dict]:
    """Stop strings, and the keywords of `generate`.

    Raises:
      ConfigError: a name is not known, a stop string is empty, or nothing is to be generated.
    """
    given = dict(gen_kwargs)
    until = given.pop("until", None) or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    if not all(isinstance(stop, str) and stop for stop in until):
        raise ConfigError(
            f"generation_kwargs has until {list(until)}; each must be a text that is not empty"
        )
    do_sample = given.pop("do_sample", None)
    max_new_tokens = NEW_TOKENS
    for name in _NEW_TOKENS:
        value = given.pop(name, max_new_tokens)
        try:
            max_new_tokens = int(value)
        except (TypeError, ValueError):
            max_new_tokens = 0
        if max_new_tokens < 1:
            raise ConfigError(
                f"generation_kwargs has {name} {value}; it must be a positive whole number"
            )
    for name in given:
        if name not in _SAMPLING:
            raise ConfigError(
                f"generation_kwargs has {name}; the model repo_jax takes until, do_sample, "
                f"{_NEW_TOKENS[0]}, {', '.join(_SAMPLING)}"
            )
    # lm-eval's tasks write temperature 1 beside do_sample false.
    greedy = not given.get("temperature", 1.0 if do_sample else 0.0) or do_sample is False
    given["temperature"] = 0.0 if greedy else float(given.get("temperature", 1.0))
    return until, given | {"max_new_tokens": max_new_tokens}


def _width(n: int) -> int:
    """The next power of two or 1.5 times one, from 16."""
    power = max(16, 1 << (n - 1).bit_length())
    return power * 3 // 4 if power > 16 and n <= power * 3 // 4 else power


def batches(
    lengths: dict[int, int], batch_tokens: int, width_of: Callable[[int], int] = _width
) -> Iterator[tuple[Sequence[int], int, int]]:
    """Which go together: their indices, width and rows; the longest first.

    A batch that does not fit the device's memory then fails at once.
    """
    order = sorted(lengths, key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        width = width_of(lengths[order[start]])
        size = sharding.even_rows(batch_tokens // width)
        rows = [i for i in order[start : start + size] if width_of(lengths[i]) == width]
        yield rows, width, size
        start += len(rows)
