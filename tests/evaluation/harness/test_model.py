"""What the model answers to lm-eval, against the definition."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance

from repo_jax import sharding
from repo_jax.config import DecoderConfig, MeshConfig, RopeScaling
from repo_jax.data import Tokenizer, ValidationBatches, byte_tokenizer
from repo_jax.errors import ConfigError
from repo_jax.evaluation.harness import model as harness
from repo_jax.evaluation.harness.cache import RequestCache
from repo_jax.evaluation.harness.model import RepoJaxLM
from repo_jax.evaluation.perplexity import score
from repo_jax.modeling import RePoLM, boxed_params, init_params

EOS = 256
WIDTH = 64


@pytest.fixture(scope="module")
def parts():
    """A model with decided opinions, its weights and a tokenizer of bytes."""
    config = DecoderConfig(
        vocab_size=272, d_model=32, n_layers=2, n_heads=2, d_ff=48, max_length=48, eos_ids=(EOS,)
    )
    model = RePoLM(dataclasses.replace(config, init_std=0.3))
    params = init_params(model, jax.random.key(0))
    return model, params, byte_tokenizer()


@pytest.fixture(scope="module")
def lm(parts):
    return RepoJaxLM(*parts, batch_tokens=1024)


def ask(kind, *arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, tokens):
    return model.apply({"params": params}, tokens).logits


def log_probabilities(parts, ids):
    """float64 [T - 1, V] after each of ids but the last."""
    model, params, _ = parts
    tokens = np.zeros((1, WIDTH), np.int32)
    tokens[0, : len(ids)] = ids
    logits = np.asarray(apply(model, params, tokens), np.float64)
    logits -= logits.max(-1, keepdims=True)
    return (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[0, : len(ids) - 1]


def expected(parts, context, continuation):
    """The log-probability of a continuation, and whether it is what greedy search gives."""
    table = log_probabilities(parts, [*context, *continuation])[-len(continuation) :]
    logprob = table[np.arange(len(continuation)), list(continuation)].sum()
    return logprob, bool((table.argmax(-1) == list(continuation)).all())


TEXT = st.text("abcdefgh, ", min_size=1, max_size=20)


@settings(max_examples=10)
@given(st.lists(st.tuples(TEXT | st.just(""), TEXT), min_size=1, max_size=12))
def test_loglikelihood_is_that_of_each_pair_alone(parts, lm, pairs):
    answers = lm.loglikelihood(ask("loglikelihood", *pairs))
    for (context, continuation), (logprob, greedy) in zip(pairs, answers, strict=True):
        # lm-eval takes spaces that end a context as part of the continuation.
        spaces = len(context) - len(context.rstrip())
        continuation = context[len(context) - spaces :] + continuation
        ids = context[: len(context) - spaces].encode() or [EOS]
        right, is_greedy = expected(parts, ids, continuation.encode())
        np.testing.assert_allclose(logprob, right, rtol=1e-5)
        assert greedy == is_greedy


def test_the_greedy_continuation_is_known_for_one(parts, lm):
    ids = list(b"abcabc")
    while len(ids) < 11:
        ids.append(int(log_probabilities(parts, [*ids, 0])[-1].argmax()))
    pairs = [(None, ids[:6], ids[6:]), (None, ids[:6], [*ids[6:10], (ids[10] + 1) % 256])]
    assert [greedy for _, greedy in lm._loglikelihood_tokens(pairs)] == [True, False]


def test_contexts_lose_their_beginning_and_continuations_nothing(parts):
    lm = RepoJaxLM(*parts, max_length=16)
    text, ending = "abcdefghabcdefghabcdefgh", "hgfed"
    ((logprob, _),) = lm.loglikelihood(ask("loglikelihood", (text, ending)))
    kept = (text + ending).encode()[-17:]
    np.testing.assert_allclose(logprob, expected(parts, kept[:-5], kept[-5:])[0], rtol=1e-5)
    # As many tokens as the model may see, and one of context.
    ((logprob, _),) = lm.loglikelihood(ask("loglikelihood", (text, "h" * 16)))
    np.testing.assert_allclose(logprob, expected(parts, b"h", b"h" * 16)[0], rtol=1e-5)
    with pytest.raises(ConfigError, match=r"a continuation has 17 tokens .* max_length is 16"):
        lm.loglikelihood(ask("loglikelihood", (text, "h" * 17)))


def test_a_continuation_that_merges_into_the_context_is_tokens_of_its_own(parts):
    """As `b` after `a` where `ab` is one token, too: lm-eval's pair is then ([a], [])."""
    model, params, _ = parts
    vocab = {"a": 0, "b": 1, "ab": 2, " ": 3, "<eos>": EOS}
    merging = tokenizers.models.BPE(vocab=vocab, merges=[("a", "b")])
    lm = RepoJaxLM(model, params, Tokenizer(tokenizers.Tokenizer(merging), EOS))
    for pair, ids in ((("a", "b"), ([0], [1])), (("ba", "b"), ([1, 0], [1]))):
        ((logprob, _),) = lm.loglikelihood(ask("loglikelihood", pair))
        assert logprob < 0.0
        np.testing.assert_allclose(logprob, expected(parts, *ids)[0], rtol=1e-5)


@pytest.mark.parametrize("context", ["abc", ""])
def test_no_continuation_is_never_the_likeliest(lm, context):
    with pytest.raises(ConfigError, match=f"log-probability of no text after '{context}'; what"):
        lm.loglikelihood(ask("loglikelihood", ("abc", "d"), (context, "")))
    with pytest.raises(ConfigError, match="log-probability of no text after 'abc'; what"):
        lm._loglikelihood_tokens([(None, list(b"abc"), [])])


def evaluated(parts, tokens, width):
    """What eval.py sums over windows of `width` tokens."""
    model, params, _ = parts
    batches = ValidationBatches(
        [np.asarray(tokens, np.uint16)],
        sequence_length=width,
        batch_size=2,
        document_mask=False,
        eos_id=EOS,
    )
    return score(model, params, batches)


def test_rolling_is_eval_of_a_text_in_one_window(parts, lm):
    text = "abc, def, abcdef. "
    (logprob,) = lm.loglikelihood_rolling(ask("loglikelihood_rolling", (text,)))
    right = evaluated(parts, [EOS, *text.encode()], len(text) + 1)
    assert right.targets == len(text)
    np.testing.assert_allclose(-logprob, right.nll, rtol=1e-6)


def test_rolling_is_eval_of_windows_that_share_a_token(parts):
    lm = RepoJaxLM(*parts, max_length=16)
    text = bytes(range(97, 97 + 24)) * 2
    (logprob,) = lm.loglikelihood_rolling(ask("loglikelihood_rolling", (text.decode(),)))
    ids = [EOS, *text]
    windows = [ids[i : i + 17] for i in range(0, len(text), 16)]
    right = evaluated(parts, np.concatenate(windows), 17)
    assert right.targets == len(text)
    np.testing.assert_allclose(-logprob, right.nll, rtol=1e-6)


def test_rolling_predicts_every_token_once_with_the_most_context(parts):
    lm = RepoJaxLM(*parts, max_length=16)
    text = bytes(range(97, 97 + 21))
    (logprob,) = lm.loglikelihood_rolling(ask("loglikelihood_rolling", (text.decode(),)))
    first = expected(parts, [EOS], text[:16])[0]
    last = expected(parts, text[4:16], text[16:])[0]  # the rest, after as much as fits
    np.testing.assert_allclose(logprob, first + last, rtol=1e-6)


def test_no_text_has_log_probability_zero(lm):
    assert lm.loglikelihood_rolling(ask("loglikelihood_rolling", ("",))) == [0.0]


def greedy_text(lm, prompt, n):
    options = {"until": [], "max_gen_toks": n, "do_sample": False}
    return lm.generate_until(ask("generate_until", (prompt, options)))[0]


def test_generation_stops_at_the_first_of_the_strings(lm):
    whole = greedy_text(lm, "abc", 24)
    assert len(whole) > 8
    stop, later = whole[5:7], whole[-1]
    for until in (stop, [stop], [later, stop, "never"]):
        options = {"until": until, "max_gen_toks": 24}
        (text,) = lm.generate_until(ask("generate_until", ("abc", options)))
        first = min(
            whole.find(each)
            for each in ([until] if isinstance(until, str) else until)
            if each in whole
        )
        assert text == whole[:first]


def test_generation_keeps_the_end_of_a_long_prompt(parts):
    lm = RepoJaxLM(*parts, max_length=20)
    prompt = "abcdefgh" * 8
    assert greedy_text(lm, prompt, 8) == greedy_text(lm, prompt[-12:], 8)
    with pytest.raises(ConfigError, match=r"generates 20 tokens, .* max_length, 20"):
        greedy_text(lm, prompt, 20)


def test_prompts_of_many_lengths_are_answered_in_their_order(lm):
    prompts = ["a" * n for n in (3, 30, 1, 17, 8)]
    options = {"until": [], "max_gen_toks": 6}
    together = lm.generate_until(ask("generate_until", *((p, options) for p in prompts)))
    assert together == [greedy_text(lm, prompt, 6) for prompt in prompts]
    assert len(set(together)) > 1


def test_a_batch_has_the_rows_that_its_cache_leaves_room_for(parts, monkeypatch):
    """Of 512 slots for a prompt of 500 tokens and 13 new ones, whose last one is never read."""
    asked, complete = [], harness.Generator.complete

    def recorded(self, prompts, **given):
        asked.append(self._lay_out(prompts, given["max_new_tokens"])[0].shape)
        return complete(self, prompts, **given)

    monkeypatch.setattr(harness.Generator, "complete", recorded)
    lm = RepoJaxLM(*parts, batch_tokens=1024, max_length=4096)
    options = {"until": [], "max_gen_toks": 13}
    lm.generate_until(ask("generate_until", ("a" * 500, options), ("b" * 500, options)))
    assert asked == [(2, 512)]


def test_sampling_options_reach_the_generator(lm):
    drawn = lambda **options: lm.generate_until(
        ask("generate_until", ("abc", {"max_gen_toks": 12, "do_sample": True} | options))
    )
    assert drawn(temperature=1.5, seed=1) == drawn(temperature=1.5, seed=1)
    assert drawn(temperature=1.5, seed=1) != drawn(temperature=1.5, seed=2)
    assert drawn(temperature=1.5, top_k=1) == [greedy_text(lm, "abc", 12)]
    # lm-eval's tasks write a temperature beside do_sample: false.
    assert drawn(temperature=1.0, do_sample=False) == [greedy_text(lm, "abc", 12)]


def test_repeats_of_a_request_draw_on_whatever_the_batches(parts):
    """lm-eval asks for 64 samples of an example with one request 64 times."""
    repeats = ask("generate_until", ("abc", {"max_gen_toks": 12, "temperature": 1.0})) * 16
    narrow, wide = (RepoJaxLM(*parts, batch_tokens=tokens) for tokens in (1024, 16 * 512))
    texts = narrow.generate_until(repeats)  # two rows to a batch
    assert len(set(texts)) == len(texts)
    assert wide.generate_until(repeats) == texts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, "generation_kwargs has num_beams; the model repo_jax takes until"),
        ({"until": ["a", ""]}, r"has until \['a', ''\]; each must be a text that is not empty"),
        ({"until": [3]}, r"has until \[3\]; each must be a text that is not empty"),
        ({"max_gen_toks": 0}, "has max_gen_toks 0; it must be a positive whole number"),
        ({"max_new_tokens": "x"}, "has max_new_tokens x; it must be a positive whole number"),
        (
            {"temperature": 1.0, "top_p": 3, "max_gen_toks": 4},
            "generation_kwargs: top_p is 3; it must be",
        ),
    ],
)
def test_generation_options_that_are_wrong(lm, options, message):
    with pytest.raises(ConfigError, match=message):
        lm.generate_until(ask("generate_until", ("abc", options)))


def test_progress_is_some_lines_where_there_is_no_terminal(parts, capsys, monkeypatch):
    lm = RepoJaxLM(*parts, batch_tokens=64)
    monkeypatch.setattr("repo_jax.progress._SECONDS_BETWEEN_LINES", 0.0)
    lm.loglikelihood(ask("loglikelihood", *(("abc" * n, "d") for n in range(1, 13))))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 1
    assert lines[-1].startswith("score: 12 of 12 requests in ")
    options = {"until": [], "max_gen_toks": 4}
    lm.generate_until(ask("generate_until", ("abc", options), ("abcd", options)))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" in ")[0] for line in lines] == [
        "generate: 1 of 2 requests",
        "generate: 2 of 2 requests",
    ]


class StoppedError(Exception):
    """Stands for a signal."""


def test_what_was_answered_before_a_stop_is_not_asked_again(parts, tmp_path, monkeypatch):
    lm = RepoJaxLM(*parts, batch_tokens=64, cache=RequestCache(tmp_path / "requests"))
    requests = ask("loglikelihood", *(("abc" * n, "d") for n in range(1, 13)))
    ask_model, rows, stop_after = harness.log_probabilities, [], 2

    def counted(*args):
        if len(rows) == stop_after:
            raise StoppedError
        rows.append(int((args[3] > 0).any(axis=1).sum()))
        return ask_model(*args)

    monkeypatch.setattr(harness, "log_probabilities", counted)
    with pytest.raises(StoppedError):
        lm.loglikelihood(requests)
    before = sum(rows)
    assert 0 < before < len(requests)
    # Another process has another connection.
    again = RepoJaxLM(*parts, batch_tokens=64, cache=RequestCache(tmp_path / "requests"))
    stop_after = None
    answers = again.loglikelihood(requests)
    assert sum(rows) == len(requests)
    plain = RepoJaxLM(*parts, batch_tokens=64).loglikelihood(requests)
    np.testing.assert_allclose([a for a, _ in answers], [a for a, _ in plain], rtol=1e-5)
    assert [greedy for _, greedy in answers] == [greedy for _, greedy in plain]


def test_the_cache_keeps_all_kinds_but_no_draws(parts, tmp_path, monkeypatch):
    cache = RequestCache(tmp_path / "requests")
    lm = RepoJaxLM(*parts, cache=cache)
    greedy = ask("generate_until", ("abc", {"max_gen_toks": 4}))
    drawn = ask("generate_until", ("abc", {"max_gen_toks": 4, "temperature": 1.0}))
    rolling = ask("loglikelihood_rolling", ("abcdef" * 20,))
    first = lm.generate_until(greedy), lm.loglikelihood_rolling(rolling)
    lm.generate_until(drawn)
    assert len(cache) == 2
    monkeypatch.delattr(harness, "log_probabilities")
    monkeypatch.delattr(harness, "Generator")
    again = RepoJaxLM(*parts, cache=cache)
    assert (again.generate_until(greedy), again.loglikelihood_rolling(rolling)) == first


def test_another_model_has_another_identity(parts):
    model, params, tokenizer = parts
    lm = RepoJaxLM(*parts)
    changed = jax.tree.map(lambda x: x, params)
    changed["head"]["kernel"] = changed["head"]["kernel"].at[3, 5].add(1e-6)
    swapped = jax.tree.map(lambda x: x, params)
    swapped["head"]["kernel"] = swapped["head"]["kernel"].at[:, ::-1].get()
    bfloat16 = RePoLM(dataclasses.replace(model.config, dtype="bfloat16"))
    others = [
        RepoJaxLM(model, changed, tokenizer),
        RepoJaxLM(model, swapped, tokenizer),
        RepoJaxLM(bfloat16, params, tokenizer),
        RepoJaxLM(*parts, max_length=47),
        lm.scaled(RopeScaling(2.0, 24), 48),
    ]
    assert len({lm.identity, *(other.identity for other in others)}) == 6
    attention = RePoLM(dataclasses.replace(model.config, attention="reference"))
    assert RepoJaxLM(attention, params, tokenizer).identity == lm.identity
    assert lm.scaled(None, 48).identity == lm.identity


def test_a_mesh_changes_no_answer(parts, device_flops):
    """Nor what the model is called, so that answers are remembered from one mesh to another."""
    model, params, tokenizer = parts
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(params, sharding.param_shardings(boxed_params(model), mesh))
    alone = RepoJaxLM(*parts, batch_tokens=96)
    spread = RepoJaxLM(model, placed, tokenizer, batch_tokens=96, mesh=mesh)
    assert spread.identity == alone.identity
    assert spread.scaled(RopeScaling(2.0, 48), None)._mesh is mesh
    pairs = ask("loglikelihood", *(("abc" * n, "efg"[: n % 3 + 1]) for n in range(5)))
    flops = device_flops(harness, "log_probabilities")
    ours, part = spread.loglikelihood(pairs), max(flops)
    flops.clear()
    theirs, whole = alone.loglikelihood(pairs), max(flops)
    assert part < whole / 6  # each of eight devices does its part
    np.testing.assert_allclose(*([x for x, _ in answers] for answers in (ours, theirs)), rtol=1e-5)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    texts = ask("loglikelihood_rolling", ("a text",), ("a longer one",))
    rolled = (lm.loglikelihood_rolling(texts) for lm in (spread, alone))
    np.testing.assert_allclose(*rolled, rtol=1e-5)
    prompts = ask("generate_until", *((p, {"max_gen_toks": 8}) for p in ("a", "bcd")))
    assert spread.generate_until(prompts) == alone.generate_until(prompts)


def test_scaling_changes_the_model_and_its_reach(parts):
    lm = RepoJaxLM(*parts)
    scaled = lm.scaled(RopeScaling(4.0, 48), None)
    assert (lm.max_length, scaled.max_length) == (48, 192)
    request = ask("loglikelihood", ("abcdefgh" * 4, "abc"))
    assert lm.loglikelihood(request) != scaled.loglikelihood(request)


@pytest.mark.parametrize(
    ("factor", "original_length", "tokens"),
    [(2.0, 48, 96), (2.0, None, 96), (2.0, 8, 48), (1.0, 8, 48), (4.0, 24, 96)],
)
def test_yarn_never_shortens_what_a_model_sees(parts, factor, original_length, tokens):
    assert RepoJaxLM(*parts).scaled(RopeScaling(factor, original_length), None).max_length == tokens


def test_answers_of_another_version_of_this_program_are_not_used(parts, tmp_path, monkeypatch):
    cache = RequestCache(tmp_path / "requests")
    request = ask("loglikelihood", ("abc", "d"))
    RepoJaxLM(*parts, cache=cache).loglikelihood(request)
    RepoJaxLM(*parts, cache=cache).loglikelihood(request)
    assert len(cache) == 1
    monkeypatch.setattr(harness, "_VERSION", harness._VERSION + 1)
    RepoJaxLM(*parts, cache=cache).loglikelihood(request)
    assert len(cache) == 2


def test_a_tokenizer_with_ids_beyond_the_model_is_refused(parts):
    """Their log-probabilities would be NaN, which is the greatest of choices."""
    model, params, tokenizer = parts
    of_size = lambda n: RePoLM(dataclasses.replace(model.config, vocab_size=n, eos_ids=()))
    RepoJaxLM(of_size(257), params, tokenizer)
    message = "has a vocabulary of 257; model.vocab_size is 256 and must be at least that"
    with pytest.raises(ConfigError, match=message):
        RepoJaxLM(of_size(256), params, tokenizer)


def test_a_file_that_is_no_cache(tmp_path):
    (tmp_path / "notes").write_text("these are notes, and far longer than a header of SQLite" * 9)
    with pytest.raises(ConfigError, match="notes is no cache of requests"):
        RequestCache(tmp_path / "notes")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run=a,pretrained=b", "needs one of run=DIR and pretrained="),
        ("batch_size=8,run=a", "model_args has batch_size; the model repo_jax takes run, "),
        ("run=a,tensor=two", "model_args has tensor=two; it must be a whole number"),
        ("run=a,tensor=true", "model_args has tensor=True; it must be a whole number"),
        ("run=a,batch_tokens=x", "batch_tokens=x; it must be a positive whole number"),
        ("run=a,batch_tokens=0", "batch_tokens=0; it must be a positive whole number"),
        ("run=a,max_length=4k", "max_length=4k; it must be a positive whole number"),
        ("run=a,rope_factor=x", "model_args has rope_factor=x; it must be a number"),
        ("run=a,rope_factor=0.5", "rope_scaling.factor is 0.5; it must be at least 1"),
        (
            "run=a,rope_factor=2,rope_original_length=x",
            "rope_original_length=x; it must be a positive whole number",
        ),
        (
            "run=a,rope_original_length=512",
            "model_args has rope_original_length, which needs rope_factor",
        ),
        ("run=a,dtype=auto", "model_args has dtype=auto; it must be one of float32, bfloat16"),
        ("run=a,dtype=float16", "model_args has dtype=float16; it must be one of"),
        ("run=a,tensor=3", "the mesh is data 1 x fsdp -1 x tensor 3 .* must use all 8 devices"),
    ],
)
def test_model_args_that_are_wrong(arguments, message):
    with pytest.raises(ConfigError, match=message):
        RepoJaxLM.create_from_arg_string(arguments)
