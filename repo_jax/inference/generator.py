"""Continuations of prompts: one pass over the prompt, then a token at a time from a cache."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from repo_jax import sharding
from repo_jax.config import DecoderConfig
from repo_jax.inference.sampling import (
    Kind,
    Sampling,
    draw,
    places_among_equals,
    row_keys,
    streams,
)
from repo_jax.modeling import RePoLM
from repo_jax.modeling.cache import Cache, empty_cache, extend, head, split_layers

# A cache has 2 ** n slots and no fewer than these, and a batch 2 ** n rows, so that few programs
# are compiled.
_LEAST_SLOTS = 512
# Tokens of a prompt that are read together. More are faster where there is much arithmetic, but
# the shortest prompt is padded to so many.
_CHUNK = {"cpu": 128}
_CHUNK_ELSEWHERE = 512
# Fewest rows of a batch. One row's products are of a vector and a matrix, of which XLA for GPUs
# writes the smaller out term by term before it adds them up, as its program for an H200 shows;
# not timed on one.
_LEAST_ROWS = {"gpu": 2}
# Most tokens drawn before the host looks; fewer where it has strings to look for.
_WINDOW = 64
_WINDOW_WITH_STOPS = 16
_GREEDY = Sampling()


class Decodes(Protocol):
    """What stop strings need of a tokenizer."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """What follows one prompt.

    Attributes:
      ids: the tokens, an eos not included.
      log_probs: natural logarithm of each one's probability by the model itself: before
        penalty, temperature and filters.
      finish: why it ends: an eos, a stop string, or the length asked for.
    """

    ids: list[int]
    log_probs: list[float]
    finish: Literal["eos", "stop", "length"]


@flax.struct.dataclass
class _State:
    """Between two tokens.

    Attributes:
      cache: everything but `token`.
      token: int32 [B], the last one drawn.
      log_prob: float32 [B], its.
      index: int32 [B], where in its sequence it is.
      done: bool [B], rows that have ended.
      seen: bool [B, V], tokens that a row has; None where nobody asks.
      drawn: int32 [], tokens drawn for each row.
      keys: one random key a row.
    """

    cache: Cache
    token: jax.Array
    log_prob: jax.Array
    index: jax.Array
    done: jax.Array
    seen: jax.Array | None
    drawn: jax.Array
    keys: jax.Array


def _draw(config, params, hidden_B1D, state: _State, numbers, eos, kind: Kind) -> _State:
    """With the next token drawn, and read into `seen`, not into the cache."""
    logits = head(config, params, hidden_B1D)[:, 0]
    keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.drawn)
    token, log_prob = draw(logits, keys, state.seen, numbers, kind)
    if kind.penalizes:
        state = state.replace(seen=state.seen.at[jnp.arange(token.size), token].set(True))
    return state.replace(
        token=token,
        log_prob=log_prob,
        index=state.index + 1,
        done=state.done | (token[:, None] == eos[None]).any(-1),
        drawn=state.drawn + 1,
    )


@functools.partial(jax.jit, static_argnames=("config", "chunk", "kind"))
def _prefill(
    config: DecoderConfig, params, tokens_BS, lengths_B, n_chunks, seed, streams_B2, numbers, eos,
    *, chunk: int, kind: Kind
) -> _State:  # fmt: skip
    """Reads prompts and draws the first token.

    tokens_BS: prompts in the first n_chunks * chunk slots, padded on the left.
    lengths_B: of the prompts; 0 for a row that only fills the batch.
    streams_B2: of `sampling.streams`.
    """
    B, S = tokens_BS.shape
    index_BS = jnp.arange(S, dtype=jnp.int32)[None] - (n_chunks * chunk - lengths_B)[:, None]
    index_BS = jnp.maximum(index_BS, -1)
    part = lambda x, i: jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1)

    def read(i, carry):
        cache, _ = carry
        hidden, cache = extend(config, params, part(tokens_BS, i), part(index_BS, i), cache)
        return cache, hidden[:, -1:]

    hidden = jnp.zeros((B, 1, config.d_model), config.dtype)
    cache, hidden = jax.lax.fori_loop(0, n_chunks, read, (empty_cache(config, B, S), hidden))
    seen = None
    if kind.penalizes:
        own = (index_BS >= 0) & (jnp.arange(S)[None] < n_chunks * chunk)
        rows = jnp.arange(B)[:, None]
        seen = jnp.zeros((B, config.vocab_size), bool).at[rows, tokens_BS].max(own)
    state = _State(
        cache=cache if "cope" in config.kinds else cache.in_parts(),
        token=jnp.zeros(B, jnp.int32),
        log_prob=jnp.zeros(B),
        index=lengths_B - 1,
        done=lengths_B == 0,
        seen=seen,
        drawn=jnp.int32(0),
        keys=row_keys(seed, streams_B2),
    )
    return _draw(config, params, hidden, state, numbers, eos, kind)


@functools.partial(
    jax.jit, static_argnames=("config", "kind", "window"), donate_argnames=("state",)
)
def _decode(
    config: DecoderConfig, params, state: _State, steps, numbers, eos, *, kind: Kind, window: int
):
    """Draws up to `steps` more tokens, at most `window`; stops when all rows have ended.

    Returns the state, and tokens and log-probabilities [B, window]; -1 where a row had ended.
    """
    B = state.token.size
    out = (jnp.full((B, window), -1, jnp.int32), jnp.zeros((B, window)))

    def more(carry):
        state, i, *_ = carry
        return (i < steps) & ~state.done.all()

    def step(carry):
        state, i, tokens, log_probs = carry
        before = state.done
        index = jnp.where(before, -1, state.index)
        hidden, cache = extend(config, params, state.token[:, None], index[:, None], state.cache)
        state = _draw(config, params, hidden, state.replace(cache=cache), numbers, eos, kind)
        tokens = tokens.at[:, i].set(jnp.where(before, -1, state.token))
        return state, i + 1, tokens, log_probs.at[:, i].set(state.log_prob)

    state, _, tokens, log_probs = jax.lax.while_loop(more, step, (state, jnp.int32(0), *out))
    return state, tokens, log_probs


class Generator:
    """A model made ready to continue prompts; see `generate` for a single call.

    Args:
      model, params: as `from_pretrained` or `load_run` returns them. Weights are cast to the
        activation dtype once; those that make positions stay as they are.
      mesh: where params were placed on one, that. It may split batch and heads, not tokens.
      chunk: tokens of a prompt that are read together; a power of 2 up to 512. None: by device.

    Raises:
      ValueError: `chunk`, or a mesh that splits tokens.
    """

    def __init__(self, model: RePoLM, params, *, mesh=None, chunk: int | None = None):
        if mesh is not None and mesh.shape["context"] != 1:
            raise ValueError(
                f"mesh.context is {mesh.shape['context']}; generation needs 1 (mesh.tensor "
                "splits the cache)"
            )
        device = jax.default_backend()
        self._least_rows = _LEAST_ROWS.get(device, 1)
        self._chunk = chunk or _CHUNK.get(device, _CHUNK_ELSEWHERE)
        if self._chunk not in [2**n for n in range(10)]:
            raise ValueError(f"chunk is {chunk}; it must be a power of 2 up to {_LEAST_SLOTS}")
        # A policy says what a backward pass keeps, and there is none.
        self.config = dataclasses.replace(model.config, remat="none")
        self._mesh = mesh
        self._params = _prepare(self.config, params, in_place=device == "cpu" and mesh is None)

    def complete(self, prompts: Sequence[Sequence[int]], **options) -> list[Completion]:
        """Continues prompts, each as if alone.

        Args:
          prompts: token ids, of any lengths from 1.
          options: of `stream`, but for `every`.
        """
        every = _WINDOW_WITH_STOPS if options.get("stop_strings") else _WINDOW
        completions: list[Completion] = []
        for completions in self.stream(prompts, every, **options):  # noqa: B007
            pass
        return completions

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        every: int = 1,
        *,
        max_new_tokens: int = 64,
        sampling: Sampling = _GREEDY,
        seed: int = 0,
        places: Sequence[int] | None = None,
        eos_ids: Sequence[int] | None = None,
        stop_strings: Sequence[str] = (),
        tokenizer: Decodes | None = None,
    ) -> Iterator[list[Completion]]:
        """Continues prompts, giving what there is each time that up to `every` tokens were added.

        Args:
          prompts: token ids, of any lengths from 1.
          every: tokens between two looks, 1 to 64.
          max_new_tokens, seed, eos_ids, stop_strings, tokenizer: as in `generate`.
          sampling: how tokens are drawn.
          places: which of several equal prompts each one is, where others of them are in other
            calls: in other places they draw otherwise. None: counted among `prompts`.

        Yields:
          A completion for each prompt; the `finish` of one that goes on is `length`.

        Raises:
          ValueError: an argument out of range, naming it.
        """
        if not 1 <= every <= _WINDOW:
            raise ValueError(f"every is {every}; it must be 1 to {_WINDOW}")
        config = self.config
        _check(prompts, config.vocab_size, max_new_tokens, stop_strings, tokenizer)
        if places is None:
            places = places_among_equals(prompts)
        elif len(places) != len(prompts) or min(places, default=0) < 0:
            raise ValueError(
                f"places is {list(places)}; it must be a number from 0 for each of the "
                f"{len(prompts)} prompts"
            )
        if not prompts:
            return
        eos_ids = tuple(config.eos_ids if eos_ids is None else eos_ids)
        given = dict(numbers=sampling.numbers(), eos=np.array(eos_ids, np.int32))
        given |= dict(kind=sampling.kind)
        tokens, lengths, n_chunks = self._lay_out(prompts, max_new_tokens)
        own = np.pad(streams(prompts, places), ((0, len(lengths) - len(prompts)), (0, 0)))
        rows = [_Row(set(eos_ids), tuple(stop_strings), tokenizer) for _ in prompts]
        # Only around the calls: between two looks the caller's own mesh is in context.
        with sharding.use(self._mesh):
            state = _prefill(
                *(config, self._params, tokens, lengths, n_chunks, np.uint32(seed % 2**32), own),
                **given,
                chunk=self._chunk,
            )
        new = np.asarray(state.token)[:, None], np.asarray(state.log_prob)[:, None]
        drawn = 1
        while True:
            for row, ids, log_probs in zip(rows, *new, strict=False):
                row.add(ids.tolist(), log_probs.tolist())
            yield [row.completion() for row in rows]
            if drawn >= max_new_tokens or all(row.finish for row in rows):
                return
            ended = [row.finish is not None for row in rows]
            ended += [True] * (len(lengths) - len(rows))
            state = state.replace(done=np.array(ended))
            steps = min(every, max_new_tokens - drawn)
            with sharding.use(self._mesh):
                state, *new = _decode(
                    *(config, self._params, state, np.int32(steps)), **given, window=_WINDOW
                )
            drawn += steps
            new = [np.asarray(x)[:, :steps] for x in new]

    def slots(self, longest: int, max_new_tokens: int) -> int:
        """Of a cache for prompts of up to `longest` tokens and what follows them."""
        # The last new tokens take the slots of the padding, which is in whole chunks with the
        # longest prompt. But CoPE counts keys in the order of their slots.
        if "cope" in self.config.kinds:
            longest = -(-longest // self._chunk) * self._chunk
        return max(_LEAST_SLOTS, _power_of_2(longest + max_new_tokens - 1))

    def _lay_out(self, prompts, max_new_tokens: int):
        """Prompts as `_prefill` wants them: tokens [B, S], lengths [B] and the number of chunks."""
        longest = max(map(len, prompts))
        n_chunks = -(-longest // self._chunk)
        used, slots = n_chunks * self._chunk, self.slots(longest, max_new_tokens)
        batch = max(self._least_rows, _power_of_2(len(prompts)))
        if self._mesh is not None:  # rows are split evenly
            split = self._mesh.shape["data"] * self._mesh.shape["fsdp"]
            batch = -(-batch // split) * split
        tokens = np.zeros((batch, slots), np.int32)
        lengths = np.zeros(batch, np.int32)
        for i, prompt in enumerate(prompts):
            tokens[i, used - len(prompt) : used] = prompt
            lengths[i] = len(prompt)
        return tokens, lengths, np.int32(n_chunks)


class _Row:
    """One continuation, as the host sees it."""

    def __init__(self, eos_ids: set[int], stop_strings: tuple[str, ...], tokenizer):
        self.ids: list[int] = []
        self.log_probs: list[float] = []
        self.finish = None
        self._eos_ids, self._stop_strings, self._tokenizer = eos_ids, stop_strings, tokenizer

    def add(self, ids: list[int], log_probs: list[float]) -> None:
        if self.finish is not None:
            return
        before = len(self.ids)
        for token, log_prob in zip(ids, log_probs, strict=True):
            if self.finish is None and token in self._eos_ids:
                self.finish = "eos"
            if self.finish is None and token >= 0:
                self.ids.append(token)
                self.log_probs.append(log_prob)
        if not self._stop_strings or not self._stopped(self.ids):
            return
        n = next(n for n in range(before + 1, len(self.ids) + 1) if self._stopped(self.ids[:n]))
        self.ids, self.log_probs, self.finish = self.ids[:n], self.log_probs[:n], "stop"

    def _stopped(self, ids: list[int]) -> bool:
        text = self._tokenizer.decode(ids)
        return any(stop in text for stop in self._stop_strings)

    def completion(self) -> Completion:
        return Completion(list(self.ids), list(self.log_probs), self.finish or "length")


def generate(
    model: RePoLM,
    params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    eos_ids: Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
    tokenizer: Decodes | None = None,
    mesh=None,
) -> list[list[int]]:
    """Continues prompts, each as if alone. For more than one call keep a `Generator`.

    Args:
      model, params: as `from_pretrained` or `load_run` returns them.
      prompts: token ids, of any lengths from 1.
      max_new_tokens: most tokens added to each.
      temperature, top_k, top_p, min_p, repetition_penalty: see `Sampling`.
      seed: what is drawn for a prompt depends on it, the prompt and the prompt's place among
        equal prompts, not on the rest of the batch.
      eos_ids: ids that end a continuation; None: the config's; () never stops.
      stop_strings: a continuation ends with the token that completes one of these in its text;
        that token is kept, and the string may begin before it or end within it.
      tokenizer: whose `decode` makes the text.
      mesh: where params were placed on one, that.

    Returns:
      The continuations, without the eos.

    Raises:
      ValueError: an argument out of range, naming it.
    """
    sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p)
    _check(prompts, model.config.vocab_size, max_new_tokens, stop_strings, tokenizer)
    completions = Generator(model, params, mesh=mesh).complete(
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
        eos_ids=eos_ids,
        stop_strings=stop_strings,
        tokenizer=tokenizer,
    )
    return [completion.ids for completion in completions]


def _prepare(config: DecoderConfig, params, *, in_place: bool):
    """Weights split by layer, in the dtype they are used in; on a CPU, no copies of float32."""

    def cast(path, x):
        names = {getattr(key, "key", None) for key in path}
        exact = names & {"scale", "final_map", "linear_map"} or "kernel" not in names
        return x if exact or x.dtype == config.dtype else x.astype(config.dtype)

    def ready(params):
        return split_layers(config, jax.tree_util.tree_map_with_path(cast, params))

    # Layers of a stack lie one after the other, and JAX takes such parts of a numpy array for
    # its own without copying them.
    if in_place:
        return jax.device_put(ready(jax.tree.map(np.asarray, params)), may_alias=True)
    return jax.jit(ready)(params)


def _power_of_2(n: int) -> int:
    """The least that is no less than n."""
    return 1 << (n - 1).bit_length()


def _check(prompts, vocab, max_new_tokens, stop_strings, tokenizer) -> None:
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompts[{i}] is empty; it needs at least one token id")
        if min(prompt) < 0 or max(prompt) >= vocab:
            bad = next(t for t in prompt if not 0 <= t < vocab)
            raise ValueError(f"prompts[{i}] has the id {bad}; the vocabulary has {vocab}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be 1 or above")
    if isinstance(stop_strings, str) or "" in stop_strings:
        raise ValueError(
            f"stop_strings is {stop_strings!r}; it must list strings of a letter or more"
        )
    if stop_strings and tokenizer is None:
        raise ValueError("stop_strings is given without tokenizer, whose decode it needs")
