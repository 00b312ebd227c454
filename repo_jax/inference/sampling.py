"""Generation by sampling one token after the other."""

import functools
from collections import Counter
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from repo_jax.modeling import RePoLM

# Lengths are rounded up to a multiple of this, so that few programs are compiled.
_BUCKET = 64


def generate(
    model: RePoLM,
    params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_ids: Sequence[int] | None = None,
) -> list[list[int]]:
    """Continues prompts, each on its own.

    The whole sequence is run again for each new token: O(T) model calls.

    Args:
      model, params: as `from_pretrained` or `load_run` returns them.
      prompts: token ids, of any lengths from 1.
      max_new_tokens: most tokens added to each.
      temperature: 0 takes the likeliest token; else logits are divided by it and sampled.
      top_k: sample among the k likeliest only.
      top_p: sample among the fewest tokens whose probability reaches p only.
      seed: what is drawn for a prompt depends on it and the prompt's place among equal
        prompts, not on the rest of the batch.
      eos_ids: ids that end a continuation; None: the config's; () never stops.

    Returns:
      The continuations, without the eos.

    Raises:
      ValueError: an argument out of range, naming it.
    """
    vocab = model.config.vocab_size
    _check(prompts, vocab, max_new_tokens, temperature, top_k, top_p)
    if not prompts:
        return []
    eos_ids = tuple(model.config.eos_ids if eos_ids is None else eos_ids)
    lengths = np.array([len(p) for p in prompts], np.int32)
    width = -(-int(lengths.max() + max_new_tokens) // _BUCKET) * _BUCKET
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    # Equal prompts draw differently, and a prompt draws the same alone and in a batch.
    seen: Counter = Counter()
    places = np.zeros(len(prompts), np.uint32)
    for i, prompt in enumerate(map(tuple, prompts)):
        places[i] = seen[prompt]
        seen[prompt] += 1
    keys = jax.vmap(lambda place: jax.random.fold_in(jax.random.key(seed), place))(places)

    tokens, ends = _generate(
        *(model, params, tokens, lengths, keys, max_new_tokens, temperature),
        top_k=None if top_k is None else min(top_k, vocab),
        top_p=top_p,
        eos_ids=eos_ids,
    )
    tokens, ends = np.asarray(tokens), np.asarray(ends)
    return [tokens[i, lengths[i] : ends[i]].tolist() for i in range(len(prompts))]


def _check(prompts, vocab, max_new_tokens, temperature, top_k, top_p) -> None:
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompts[{i}] is empty; it needs at least one token id")
        if min(prompt) < 0 or max(prompt) >= vocab:
            bad = next(t for t in prompt if not 0 <= t < vocab)
            raise ValueError(f"prompts[{i}] has the id {bad}; the vocabulary has {vocab}")
    for name, value, right in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1),
        ("temperature", temperature, temperature >= 0),
        ("top_k", top_k, top_k is None or top_k >= 1),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1),
    ):
        if not right:
            raise ValueError(f"{name} is {value}, which is out of range")


@functools.partial(
    jax.jit, static_argnames=("model", "max_new_tokens", "top_k", "top_p", "eos_ids", "temperature")
)
def _generate(
    model, params, tokens, lengths, keys, max_new_tokens, temperature, *, top_k, top_p, eos_ids
):
    """Returns tokens [B, width], and where each continuation ends, int32 [B]."""
    eos = jnp.array(eos_ids, jnp.int32)
    rows = jnp.arange(tokens.shape[0])

    def unfinished(carry):
        _, i, _, done = carry
        return (i < max_new_tokens) & ~done.all()

    def step(carry):
        tokens, i, ends, done = carry
        # What lies right of a row's end is not yet seen by anything: the mask is causal.
        hidden = model.apply({"params": params}, tokens, method="hidden")
        last = hidden[rows, lengths + i - 1][:, None]
        logits = model.apply({"params": params}, last, method="logits")[:, 0]
        drawn = jax.vmap(
            functools.partial(_draw, temperature=temperature, top_k=top_k, top_p=top_p)
        )(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, i))
        done = done | (drawn[:, None] == eos[None]).any(-1)
        tokens = tokens.at[rows, lengths + i].set(jnp.where(done, 0, drawn))
        return tokens, i + 1, ends + ~done, done

    start = (tokens, jnp.int32(0), lengths, jnp.zeros(tokens.shape[0], bool))
    tokens, _, ends, _ = jax.lax.while_loop(unfinished, step, start)
    return tokens, ends


def _draw(logits, key, *, temperature, top_k, top_p):
    """One token of logits [V]."""
    if temperature == 0.0:
        return logits.argmax().astype(jnp.int32)
    logits = logits / temperature
    order = jnp.argsort(-logits)
    ranked = logits[order]
    if top_k is not None:
        ranked = jnp.where(jnp.arange(ranked.size) < top_k, ranked, -jnp.inf)
    if top_p is not None:
        probability = jax.nn.softmax(ranked)
        before = jnp.cumsum(probability) - probability
        ranked = jnp.where(before < top_p, ranked, -jnp.inf)
    return order[jax.random.categorical(key, ranked)].astype(jnp.int32)
