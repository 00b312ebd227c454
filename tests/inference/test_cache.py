"""Reading with a cache is reading everything again, and cheaper."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import repo_jax
from repo_jax import sharding
from repo_jax.config import DecoderConfig, MeshConfig, PositionConfig, RopeScaling
from repo_jax.inference import Completion, Generator, Sampling
from repo_jax.inference import generator as generator_module
from repo_jax.modeling import RePoLM, init_params
from repo_jax.modeling.cache import empty_cache, extend, split_layers

VOCAB = 64
SHAPE = dict(vocab_size=VOCAB, d_model=32, n_layers=3, n_heads=4, d_ff=48, init_std=0.25)
KINDS = {
    "rope": {},
    "nope": {},
    "r2n1": {},
    "n2r1": {},
    "repo": dict(start_layer=1),
    "repo-all": dict(start_layer=0),
    "repo-shared": dict(start_layer=1, heads="shared"),
    "repo-query": dict(start_layer=1, heads="query"),
    "repo-linear": dict(start_layer=1, f_phi="linear"),
    "cope": dict(cope_positions=16),
}
YARN = RopeScaling(factor=4.0, original_length=16)


def make(kind: str, **changes):
    positions = PositionConfig(preset=kind.split("-")[0], **KINDS[kind])
    model = RePoLM(DecoderConfig(**SHAPE | changes, positions=positions))
    params = init_params(model, jax.random.key(3))
    return model, params


def prompts_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, n).tolist() for n in lengths]


def recomputed(model, params, prompt, n):
    """Greedy tokens and their log-probabilities, the whole sequence run for each."""
    apply = jax.jit(lambda tokens: model.apply({"params": params}, tokens).logits)
    tokens, log_probs = list(prompt), []
    for _ in range(n):
        # What is right of a token changes nothing, so all lengths run in one program.
        padded = np.zeros((1, len(prompt) + n), np.int32)
        padded[0, : len(tokens)] = tokens
        at = jax.nn.log_softmax(apply(padded)[0, len(tokens) - 1])
        tokens.append(int(at.argmax()))
        log_probs.append(float(at.max()))
    return tokens[len(prompt) :], log_probs


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["mha", "gqa"])
@pytest.mark.parametrize("kind", KINDS)
def test_cached_greedy_is_recomputation(kind, kv_heads):
    model, params = make(kind, n_kv_heads=kv_heads, rope_scaling=YARN)
    prompts = prompts_of([1, 3, 9, 16, 21])  # chunks of 8: within one, whole ones, several
    done = Generator(model, params, chunk=8).complete(prompts, max_new_tokens=7, eos_ids=())
    for prompt, completion in zip(prompts, done, strict=True):
        ids, log_probs = recomputed(model, params, prompt, 7)
        assert completion.ids == ids
        np.testing.assert_allclose(completion.log_probs, log_probs, rtol=1e-4, atol=1e-4)
        assert completion.finish == "length"


@settings(max_examples=4, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    chunk=st.sampled_from([4, 16, 64]),
    every=st.integers(1, 64),
)
def test_chunks_batches_and_looks_change_nothing(lengths, chunk, every):
    model, params = make("repo")
    prompts = prompts_of(lengths, seed=sum(lengths))
    options = dict(max_new_tokens=9, eos_ids=())
    expected = [Generator(model, params).complete([p], **options)[0].ids for p in prompts]
    for completions in Generator(model, params, chunk=chunk).stream(prompts, every, **options):
        now = [c.ids for c in completions]
        assert [ids[: len(part)] for ids, part in zip(expected, now, strict=True)] == now
    assert now == expected


@pytest.mark.parametrize("kind", ["repo", "cope"])
def test_padding_takes_no_slots_from_new_tokens(kind, monkeypatch):
    """What comes last lies where the padding was, and is seen as if it lay at the end."""
    monkeypatch.setattr(generator_module, "_LEAST_SLOTS", 16)
    model, params = make(kind, n_layers=2)
    prompts, options = prompts_of([3, 5, 1]), dict(max_new_tokens=12, eos_ids=())
    generator = Generator(model, params, chunk=16)
    slots = generator._lay_out(prompts, 12)[0].shape[1]
    assert slots == (32 if kind == "cope" else 5 + 12 - 1)
    for prompt, completion in zip(prompts, generator.complete(prompts, **options), strict=True):
        ids, log_probs = recomputed(model, params, prompt, 12)
        assert completion.ids == ids
        np.testing.assert_allclose(completion.log_probs, log_probs, rtol=1e-4, atol=1e-4)
    in_large_chunks = Generator(model, params, chunk=512).slots  # as on accelerators
    assert in_large_chunks(3968, 128) == (8192 if kind == "cope" else 4096)
    assert in_large_chunks(3970, 128) == 8192


@pytest.mark.parametrize("kind", ["rope", "repo", "repo-query"])
def test_parts_of_a_cache_are_the_cache(kind):
    """Written and read a token at a time, around its end too; what is empty is not read."""
    model, params = make(kind, n_kv_heads=2, n_layers=2)
    config, params = model.config, split_layers(model.config, params)
    tokens = np.array(prompts_of([24, 24]))

    def read(cache, start, n):
        index = np.broadcast_to(np.arange(start, start + n, dtype=np.int32), (2, n))
        return extend(config, params, tokens[:, start % 24 :][:, :n], index, cache)

    _, whole = read(empty_cache(config, 2, 16), 0, 8)
    parts = whole.in_parts()
    assert [x.shape[1] for x in parts.keys[0]] == [8, 2, 2, 4]
    for at in range(8, 24):  # slot 0 follows slot 15
        # A part without a token has nothing that is a number, until one is written there.
        fill = {first: 0.0 if at == first else jnp.nan for first in (8, 10, 12) if at <= first}

        def empty(layers, fill=fill):
            at_first = lambda i, x: jnp.full_like(x, fill[i]) if i in fill else x
            return tuple(tuple(map(at_first, (0, 8, 10, 12), layer)) for layer in layers)

        parts = parts.replace(keys=empty(parts.keys), values=empty(parts.values))
        found, parts = read(parts, at, 1)
        wanted, whole = read(whole, at, 1)
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    together = lambda layers: [jnp.concatenate(layer, axis=1) for layer in layers]
    for layer, (wanted,) in zip(together(parts.keys), whole.keys, strict=True):
        np.testing.assert_allclose(layer, wanted, atol=1e-5)


def test_decoding_copies_neither_cache_nor_scores():
    model, params = make("repo", d_model=64)
    generator = Generator(model, params)
    tokens, lengths, n_chunks = generator._lay_out(prompts_of([7, 3]), 20)
    given = dict(numbers=Sampling().numbers(), eos=np.zeros(0, np.int32), kind=Sampling().kind)
    prepared = (model.config, generator._params)
    state = jax.eval_shape(
        lambda *arrays: generator_module._prefill(
            *prepared, *arrays, **given, chunk=generator._chunk
        ),
        *(tokens, lengths, n_chunks, np.uint32(0), np.zeros((2, 2), np.uint32)),
    )
    config = dataclasses.replace(model.config, remat="none")
    program = generator_module._decode.lower(
        *(config, generator._params, state, np.int32(9)), **given, window=64
    )
    loop = program.compile().as_text().split("ENTRY")[0]
    parts = {f"f32[{','.join(map(str, x.shape))}]" for x in state.cache.keys[0]}
    assert len(parts) == 3  # of four, two are alike
    made = {m for m in re.findall(r"= (f32\[[\d,]+\])\S* (?:copy|slice|transpose)\(", loop)}
    assert not made & parts
    rows = state.cache.keys[0][0].shape[0]
    assert not re.findall(rf"= f32\[{rows},[\d,]+\]\S* copy\(", loop)


def test_rows_that_fill_up_a_batch_change_nothing(monkeypatch):
    """As for one prompt on a GPU."""
    model, params = make("repo")
    prompts, options = prompts_of([7]), dict(max_new_tokens=9, eos_ids=())
    expected = Generator(model, params).complete(prompts, **options)
    monkeypatch.setattr(generator_module, "_LEAST_ROWS", {"cpu": 2})
    generator = Generator(model, params)
    assert generator._lay_out(prompts, 9)[0].shape[0] == 2
    (found,) = generator.complete(prompts, **options)
    assert found.ids == expected[0].ids
    np.testing.assert_allclose(found.log_probs, expected[0].log_probs, rtol=1e-4, atol=1e-4)


def test_a_sample_is_the_same_alone_and_among_eight():
    model, params = make("repo")
    prompts = prompts_of([5, 1, 30, 12, 12, 7, 2, 19])
    options = dict(max_new_tokens=12, temperature=0.9, top_k=30, top_p=0.95, min_p=0.01, seed=4)
    options |= dict(repetition_penalty=1.2, eos_ids=())
    eight = repo_jax.generate(model, params, prompts, **options)
    for prompt, among in zip(prompts, eight, strict=True):
        assert repo_jax.generate(model, params, [prompt], **options) == [among]


def test_ten_lengths_compile_few_programs():
    model, params = make("repo", d_model=24, d_ff=40)
    generator = Generator(model, params, chunk=64)
    programs = (generator_module._prefill, generator_module._decode)
    before = [program._cache_size() for program in programs]
    for prompt in prompts_of([1, 2, 7, 50, 64, 65, 130, 300, 440, 700]):
        generator.complete([prompt], max_new_tokens=5, eos_ids=())
    compiled = [program._cache_size() - was for program, was in zip(programs, before, strict=True)]
    assert sum(compiled) <= 4
    generator.complete([[1]], max_new_tokens=9, seed=7, eos_ids=())
    assert [p._cache_size() - was for p, was in zip(programs, before, strict=True)] == compiled


class Letters:
    """Token i is the letter number i, or 26 or 52 less."""

    def decode(self, ids):
        return "".join(chr(97 + i % 26) for i in ids)


def test_a_row_ends_with_its_stop_string_and_others_go_on():
    model, params = make("rope")
    prompts = prompts_of([4, 6, 9])
    free = [
        c.ids for c in Generator(model, params).complete(prompts, max_new_tokens=40, eos_ids=())
    ]
    texts = [Letters().decode(ids) for ids in free]
    stop = texts[1][10:13]
    stopped = Generator(model, params).complete(
        *(prompts,),
        **dict(max_new_tokens=40, eos_ids=(), stop_strings=[stop, "!"], tokenizer=Letters()),
    )
    for ids, text, completion in zip(free, texts, stopped, strict=True):
        assert isinstance(completion, Completion)
        end = text.find(stop)
        assert completion.finish == ("length" if end < 0 else "stop")
        assert completion.ids == (ids if end < 0 else ids[: end + 3])
        assert len(completion.log_probs) == len(completion.ids)
    assert stopped[1].finish == "stop"


def test_finish_says_eos():
    model, params = make("rope")
    (free,) = Generator(model, params).complete(prompts_of([4]), max_new_tokens=12, eos_ids=())
    eos = free.ids[6]
    (ended,) = Generator(model, params).complete(prompts_of([4]), max_new_tokens=12, eos_ids=(eos,))
    assert ended == Completion(
        free.ids[: free.ids.index(eos)], free.log_probs[: free.ids.index(eos)], "eos"
    )


def test_repetition_penalty_and_min_p():
    model, params = make("rope")
    (prompt,) = prompts_of([20])
    logits = np.asarray(model.apply({"params": params}, np.array([prompt])).logits[0, -1])
    seen = np.isin(np.arange(VOCAB), prompt)
    penalized = np.where(seen, np.where(logits > 0, logits / 3.0, logits * 3.0), logits)
    options = dict(max_new_tokens=1, eos_ids=())
    out = repo_jax.generate(model, params, [prompt], repetition_penalty=3.0, **options)
    assert out == [[int(penalized.argmax())]]
    p = np.exp(logits - logits.max())
    drawn = repo_jax.generate(model, params, [prompt] * 512, temperature=1.0, min_p=0.3, **options)
    assert {ids[0] for ids in drawn} == set(np.flatnonzero(p >= 0.3).tolist())


@pytest.mark.parametrize(
    ("kind", "kv_heads", "temperature", "mesh"),
    [
        ("repo", 4, 0.0, dict(data=2, fsdp=2, tensor=2)),
        ("repo", 4, 0.0, dict(fsdp=1, tensor=4)),
        ("repo", 2, 0.9, dict(fsdp=1, tensor=2)),
        ("repo-query", 2, 0.0, dict(fsdp=2, tensor=2)),
        ("cope", 2, 0.0, dict(fsdp=1, tensor=2)),
    ],
)
def test_a_mesh_changes_nothing(kind, kv_heads, temperature, mesh, device_flops):
    """But that each device does its part of the work."""
    model, params = make(kind, n_kv_heads=kv_heads, n_layers=2)
    prompts = prompts_of([3, 8, 17])
    options = dict(max_new_tokens=6, eos_ids=(), sampling=Sampling(temperature=temperature))
    flops = device_flops(generator_module, "_decode")
    alone = Generator(model, params).complete(prompts, **options)
    size = int(np.prod(list(mesh.values())))
    mesh = sharding.make_mesh(MeshConfig(**mesh), jax.devices()[:size])
    placed = jax.device_put(
        params, sharding.param_shardings(repo_jax.modeling.boxed_params(model), mesh)
    )
    spread = Generator(model, placed, mesh=mesh).complete(prompts, **options)
    for ours, theirs in zip(spread, alone, strict=True):
        assert ours.ids == theirs.ids
        np.testing.assert_allclose(ours.log_probs, theirs.log_probs, rtol=1e-4, atol=1e-4)
    whole, part = flops
    assert part < 1.3 * whole / size


def test_activations_in_bfloat16_are_those_of_the_whole_pass():
    model, params = make("repo", dtype="bfloat16", init_std=0.1)
    (prompt,) = prompts_of([24])
    (completion,) = Generator(model, params, chunk=8).complete(
        [prompt], max_new_tokens=4, eos_ids=()
    )
    whole = np.array([prompt + completion.ids])
    logits = model.apply({"params": params}, whole).logits[0, len(prompt) - 1 : -1]
    wanted = jax.nn.log_softmax(logits)[np.arange(4), np.array(completion.ids)]
    np.testing.assert_allclose(completion.log_probs, wanted, atol=0.03)


def test_what_a_generator_refuses():
    model, params = make("rope")
    with pytest.raises(ValueError, match=r"chunk is 48; it must be a power of 2 up to 512"):
        Generator(model, params, chunk=48)
    mesh = sharding.make_mesh(MeshConfig(context=8, fsdp=1))
    with pytest.raises(ValueError, match=r"mesh.context is 8; generation needs 1"):
        Generator(model, params, mesh=mesh)
    with pytest.raises(ValueError, match="stop_strings is given without tokenizer"):
        repo_jax.generate(model, params, [[1]], stop_strings=["a"])
    with pytest.raises(ValueError, match=r"stop_strings is 'ab'; it must list strings"):
        repo_jax.generate(model, params, [[1]], stop_strings="ab", tokenizer=Letters())
    for options, message in (
        (dict(min_p=1.5), "min_p is 1.5; it must be from 0 to 1"),
        (dict(repetition_penalty=0.0), "repetition_penalty is 0.0; it must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Sampling(**options)


def test_weights_that_make_positions_stay_exact():
    model, params = make("repo")
    config = dataclasses.replace(model.config, dtype="bfloat16")
    prepared = generator_module._prepare(config, params, in_place=False)
    f_phi = prepared["layers"][-1]["repositioning"]
    assert f_phi["final_map"]["kernel"].dtype == jnp.float32
    assert f_phi["gate_map"]["kernel"].dtype == jnp.bfloat16
    assert prepared["layers"][0]["attention"]["query"]["kernel"].dtype == jnp.bfloat16
