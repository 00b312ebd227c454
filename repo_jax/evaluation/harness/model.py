"""The model that lm-eval asks: `repo_jax`."""

import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Iterator
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from repo_jax import sharding
from repo_jax.config import Dtype, MeshConfig, RopeScaling, to_dict
from repo_jax.data import Tokenizer, check_vocabulary
from repo_jax.errors import ConfigError
from repo_jax.evaluation.harness.cache import RequestCache
from repo_jax.evaluation.harness.requests import (
    batches,
    generation_options,
    is_sampled,
    prompt_room,
    reach,
)
from repo_jax.evaluation.perplexity import log_probabilities
from repo_jax.inference.generator import Generator
from repo_jax.inference.loading import config_of, folder_of, load, open_mesh
from repo_jax.inference.sampling import Sampling, places_among_equals
from repo_jax.modeling import RePoLM
from repo_jax.progress import progress

# Of our answers, to be raised when a change of this program gives another one to a request that
# it has answered: how tokens are scored, generated, cut or encoded. Kept ones are then not used.
_VERSION = 1
_MESH_ARGS = ("data", "fsdp", "tensor")
_WHOLE_ARGS = ("batch_tokens", "max_length", "rope_original_length")
_MODEL_ARGS = (
    *("run", "pretrained", "step", "revision", "tokenizer", "dtype", "batch_tokens"),
    *("max_length", "rope_factor", "rope_original_length", "cache", *_MESH_ARGS),
)


@dataclasses.dataclass(frozen=True)
class _Arguments:
    """What model_args name."""

    run: str | None
    model: str | None
    step: str
    revision: str | None
    rope_scaling: RopeScaling | None


@register_model("repo_jax")
class RepoJaxLM(TemplateLM):
    """A RePo model behind lm-eval's interface.

    Requests are sorted by length and batched in few shapes: lengths are rounded up to
    2^k or 1.5 * 2^k. What is right of a row's end is seen by nothing, the mask being causal.

    Args:
      model, params: as `from_pretrained` or `load_run` returns them.
      tokenizer: its eos stands before a text that has no context.
      batch_tokens: tokens in a batch, padding included.
      max_length: tokens the model may see, what it generates included; longer contexts lose
        their beginning. None: see `reach`.
      cache: of answers, for evaluations that are stopped and started again.
      mesh: where params were placed on one, that; it may not split tokens.

    Raises:
      ConfigError: the tokenizer has ids that the model does not know.
    """

    def __init__(
        self,
        model: RePoLM,
        params: Any,
        tokenizer: Tokenizer,
        *,
        batch_tokens: int = 16_384,
        max_length: int | None = None,
        cache: RequestCache | None = None,
        mesh: Mesh | None = None,
    ):
        super().__init__()
        check_vocabulary("the tokenizer", tokenizer.vocab_size, model.config)
        self.max_length = reach(model.config) if max_length is None else max_length
        self._model, self._params, self._tokenizer = model, params, tokenizer
        self._batch_tokens, self._cache, self._mesh = batch_tokens, cache, mesh

    def scaled(self, rope_scaling: RopeScaling | None, max_length: int | None) -> "RepoJaxLM":
        """The same parameters with another YaRN factor and length."""
        config = dataclasses.replace(self._model.config, rope_scaling=rope_scaling)
        lm = RepoJaxLM(
            *(RePoLM(config), self._params, self._tokenizer),
            batch_tokens=self._batch_tokens,
            max_length=max_length,
            cache=self._cache,
            mesh=self._mesh,
        )
        lm.__dict__["_parameters"] = self._parameters
        return lm

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None):
        """As `lm_eval --model_args run=DIR,batch_tokens=8192,tensor=4` asks for it."""
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None):
        """`create_from_arg_string`, parsed. lm-eval's batch size and device are not used."""
        for name in arg_dict:
            if name not in _MODEL_ARGS:
                known = ", ".join(_MODEL_ARGS)
                raise ConfigError(f"model_args has {name}; the model repo_jax takes {known}")
        given = {name: arg_dict.get(name) for name in _MODEL_ARGS}
        if (given["run"] is None) == (given["pretrained"] is None):
            raise ConfigError("model_args needs one of run=DIR and pretrained=DIR_OR_HUB_ID")
        _check_values({name: value for name, value in given.items() if value is not None})
        factor, scaling = given["rope_factor"], None
        if factor is not None:
            scaling = RopeScaling(float(factor), given["rope_original_length"])
        step, revision = str(given["step"] or "latest"), given["revision"]
        named = _Arguments(given["run"], given["pretrained"], step, revision, scaling)
        sizes = {name: given[name] for name in _MESH_ARGS if given[name] is not None}
        mesh = open_mesh(named, MeshConfig(**sizes) if sizes else None)
        place = given["tokenizer"] or folder_of(named)
        tokenizer = Tokenizer.load(place)
        # Before its parameters are read.
        check_vocabulary(f"the tokenizer {place}", tokenizer.vocab_size, config_of(named))
        loaded = load(named, given["dtype"] or "float32", mesh)
        return cls(
            *(loaded.model, loaded.params, tokenizer),
            batch_tokens=given["batch_tokens"] or 16_384,
            max_length=given["max_length"],
            cache=given["cache"] and RequestCache(given["cache"]),
            mesh=mesh,
        )

    @functools.cached_property
    def _parameters(self) -> list:
        return jax.device_get(_hash_leaves(self._params)).tolist()

    @functools.cached_property
    def _generator(self) -> Generator:
        return Generator(self._model, self._params, mesh=self._mesh)

    @functools.cached_property
    def identity(self) -> str:
        """A digest of all that decides an answer: parameters, config, tokenizer, length, and
        the version of this program's answers.
        """
        config = to_dict(self._model.config)
        for name in ("attention", "remat"):
            del config[name]
        tokenizer = hashlib.sha256(self._tokenizer.to_json().encode()).hexdigest()
        parts = [self._parameters, config, tokenizer, self._tokenizer.eos_id, self.max_length]
        parts.append(_VERSION)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def eot_token_id(self) -> int:
        """The id that ends a document, and stands before one."""
        return self._tokenizer.eos_id

    def chat_template(self, chat_template: bool | str = False) -> str:
        """There is none. lm-eval asks before it makes prompts with one."""
        if chat_template:
            raise ConfigError(
                "--apply_chat_template is given; the model repo_jax has no chat template, so leave "
                "it out"
            )
        return ""

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs
    ) -> list[int]:
        """The ids of a text, nothing added."""
        return self._tokenizer.encode(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """lm-eval's: what the ids of both together have beyond those of the context.

        Where that is nothing, the continuation having merged into the context's last token, it
        is taken as tokens of its own.
        """
        ids, continued = super()._encode_pair(context, continuation)
        if not continued:
            continued = self.tok_encode(context[len(context.rstrip()) :] + continuation)
        return ids, continued

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """See lm-eval. An empty context is one eos; an empty continuation is a ConfigError."""
        for request in requests:
            if not request.args[1]:
                raise _no_text(request.args[0])
        score = lambda todo: super(RepoJaxLM, self).loglikelihood(todo, disable_tqdm=True)
        answers = self._remembered("loglikelihood", requests, score)
        return [(float(logprob), bool(greedy)) for logprob, greedy in answers]

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs):
        pairs = [(context, continuation) for _, context, continuation in requests]
        answers: list = [None] * len(pairs)
        for i, answer in self._score(pairs):
            answers[i] = answer
            self._remember("loglikelihood", requests[i][0], answer)
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Sums over the tokens of each text, each predicted once.

        Windows are lm-eval's: `max_length` targets each, with one token of context, the first
        being eos; the last window is filled up with context.
        """
        return self._remembered("loglikelihood_rolling", requests, self._roll)

    def _roll(self, requests) -> list[float]:
        pairs, owners = [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            for window in windows:
                pairs.append(make_disjoint_window(window))
                owners.append(i)
        sums, left = [0.0] * len(requests), np.bincount(owners, minlength=len(requests))
        for at, (logprob, _) in self._score(pairs):
            i = owners[at]
            sums[i] += logprob
            left[i] -= 1
            if not left[i]:
                self._remember("loglikelihood_rolling", requests[i].args, sums[i])
        return sums

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Continuations up to `until`, which is not part of them.

        Of `gen_kwargs`: until, max_gen_toks, do_sample, temperature, top_k, top_p, min_p,
        repetition_penalty, seed. Another name is a ConfigError.
        """
        return self._remembered("generate_until", requests, self._generate)

    def _generate(self, requests) -> list[str]:
        groups: dict[str, list[int]] = {}
        options = [generation_options(request.args[1]) for request in requests]
        prompts, cut = [], 0
        for i, request in enumerate(requests):
            task = f"the task {request.task_name}" if request.task_name else "a task"
            room = prompt_room(task, request.args[1], self.max_length)
            context = self.tok_encode(request.args[0]) or [self.prefix_token_id]
            prompts.append(context[-room:])
            cut += len(context) > room
            groups.setdefault(json.dumps(options[i]), []).append(i)
        self._say_cut(cut, len(requests))
        texts = [""] * len(requests)
        with progress("generate", len(requests), "requests") as update:
            for group in groups.values():
                until, sampling = options[group[0]]
                for i, text in self._continue({i: prompts[i] for i in group}, until, sampling):
                    texts[i] = text
                    if not sampling["temperature"]:
                        self._remember("generate_until", requests[i].args, text)
                    update(1)
        return texts

    def _continue(self, prompts, until, sampling) -> Iterator[tuple[int, str]]:
        """Index and text of each of `prompts`, index to ids, as batches are done."""
        given = dict(sampling)
        new, seed = given.pop("max_new_tokens"), given.pop("seed", 0)
        try:
            drawn = Sampling(**given)
        except ValueError as error:
            raise ConfigError(f"generation_kwargs: {error}") from None
        # Repeats of a request may be in several batches.
        places = dict(zip(prompts, places_among_equals([*prompts.values()]), strict=True))
        lengths = {i: len(prompt) for i, prompt in prompts.items()}
        slots = lambda length: self._generator.slots(length, new)
        for rows, _, _ in batches(lengths, self._batch_tokens, slots):
            completions = self._generator.complete(
                [prompts[i] for i in rows],
                max_new_tokens=new,
                sampling=drawn,
                seed=seed,
                places=[places[i] for i in rows],
                eos_ids=(self.eot_token_id, *self._model.config.eos_ids),
                stop_strings=until,
                tokenizer=self._tokenizer,
            )
            for i, completion in zip(rows, completions, strict=True):
                text = self._tokenizer.decode(completion.ids)
                cuts = [text.find(stop) for stop in until if stop in text]
                yield i, text[: min(cuts)] if cuts else text

    def _score(self, pairs) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Index, log-probability and whether it is the greedy one, for (context, continuation)."""
        tokens, counts, cut = [], [], 0
        for context, continuation in pairs:
            if not continuation:
                raise _no_text(self._tokenizer.decode(context))
            if len(continuation) > self.max_length:
                start = self._tokenizer.decode(continuation[:12])
                raise ConfigError(
                    f"a continuation has {len(continuation)} tokens (it begins {start!r}); "
                    f"max_length is {self.max_length}, and only contexts can be cut"
                )
            # A context of spaces is none: lm-eval gives them to the continuation.
            context = context or [self.prefix_token_id]
            row, room = [*context, *continuation], self.max_length + 1
            tokens.append(row[-room:])
            cut += len(row) > room
            counts.append(len(continuation))
        self._say_cut(cut, len(tokens))
        lengths = {i: len(row) - 1 for i, row in enumerate(tokens)}
        with progress("score", len(lengths), "requests") as update:
            for rows, width, size in batches(lengths, self._batch_tokens):
                wide = max(8, 1 << (max(counts[i] for i in rows) - 1).bit_length())
                inputs = np.zeros((size, width), np.int32)
                at, targets = np.zeros((2, size, wide), np.int32)
                for row, i in enumerate(rows):
                    n, count = lengths[i], counts[i]
                    inputs[row, :n] = tokens[i][:-1]
                    at[row, :count] = np.arange(n - count, n)
                    targets[row, :count] = tokens[i][-count:]
                found = log_probabilities(self._model, self._params, inputs, at, targets)
                logprobs, greedy = jax.device_get(found)
                for row, i in enumerate(rows):
                    count = counts[i]
                    logprob = float(logprobs[row, :count].sum(dtype=np.float64))
                    yield i, (logprob, bool(greedy[row, :count].all()))
                update(len(rows))

    def _say_cut(self, n: int, of: int) -> None:
        if n:
            what = f"{n} of {of} requests lose their beginning"
            print(f"{what}: max_length is {self.max_length}", file=sys.stderr)

    def dropped(self, args: tuple) -> int:
        """How many tokens a request with these arguments loses at its beginning, to fit."""
        if len(args) == 1:
            return 0  # the windows of a text have all of it
        context, asked = args
        if isinstance(asked, dict):
            text, room = context, prompt_room("a task", asked, self.max_length)
        else:
            text, room = context + asked, self.max_length + 1
        return max(0, len(self.tok_encode(text)) - room)

    def _remembered(self, kind: str, requests, answer) -> list:
        known = [
            None
            if self._cache is None or is_sampled(request)
            else self._cache.get(self.identity, kind, request.args)
            for request in requests
        ]
        todo = [i for i, found in enumerate(known) if found is None]
        with sharding.use(self._mesh):
            answers = answer([requests[i] for i in todo])
        for i, found in zip(todo, answers, strict=True):
            known[i] = found
        return known

    def _remember(self, kind: str, args: tuple | None, answer: Any) -> None:
        if args is None:
            return
        self.cache_hook.add_partial(kind, args, answer)
        if self._cache is not None:
            self._cache.put(self.identity, kind, args, answer=answer)


def _check_values(given: dict[str, Any]) -> None:
    """lm-eval makes a number of what looks like one, and a text of the rest."""

    def require(name: str, right: bool, what: str) -> None:
        if not right:
            raise ConfigError(f"model_args has {name}={given[name]}; it must be {what}")

    for name in given:
        value = given[name]
        whole = type(value) is int  # a bool is none
        if name in _MESH_ARGS:
            require(name, whole, "a whole number")
        elif name in _WHOLE_ARGS:
            require(name, whole and value > 0, "a positive whole number")
        elif name == "rope_factor":
            require(name, type(value) in (int, float), "a number")
        elif name == "dtype":
            require(name, value in get_args(Dtype), f"one of {', '.join(get_args(Dtype))}")
    if "rope_original_length" in given and "rope_factor" not in given:
        raise ConfigError("model_args has rope_original_length, which needs rope_factor")


def _no_text(context: str) -> ConfigError:
    return ConfigError(
        f"a task asks for the log-probability of no text after {context[-40:]!r}; what it has to "
        "choose from must not be empty"
    )


@jax.jit
def _hash_leaves(params):
    """uint32 [leaves]: another if a number of a parameter changes, or its place."""

    def digest(x):
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
        # Not by a flat copy: of a parameter that is split, every device would make a whole one.
        at = jnp.zeros(x.shape, jnp.uint32)
        for axis, size in enumerate(x.shape):
            at = at * size + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        x = (bits.astype(jnp.uint32) + 1) * (2 * at + 1)
        # The mixing of 32 bits in MurmurHash3.
        x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
        return (x ^ (x >> 16)).sum(dtype=jnp.uint32)

    return jnp.stack([digest(leaf) for leaf in jax.tree.leaves(params)])
