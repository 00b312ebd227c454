"""Continuations: the reference's, and what batches, seeds and filters promise."""

import importlib

import jax
import numpy as np
import pytest

import repo_jax
from repo_jax import cli
from repo_jax.config import DecoderConfig, MeshConfig
from repo_jax.inference import Generator, Sampling, command
from repo_jax.inference import generator as generator_module
from repo_jax.modeling import RePoLM, boxed_params, init_params
from repo_jax.sharding import make_mesh, param_shardings
from tests.golden_sets import ROOT, SETS, reference
from tests.tiny_runs import make_run, parse, write_config

VOCAB = 40
PROMPTS = [[7], [1, 2, 3], [5, 4, 5, 4, 5, 4, 5], [3] * 12, [1, 2, 3, 30, 20, 10]]


@pytest.fixture(scope="module")
def made():
    config = DecoderConfig(
        vocab_size=VOCAB, d_model=16, n_layers=1, n_heads=2, d_ff=24, init_std=0.4, eos_ids=(9,)
    )
    model = RePoLM(config)
    # A key whose greedy continuations differ and do not soon repeat themselves.
    return model, init_params(model, jax.random.key(11))


@pytest.mark.parametrize("name", SETS)
def test_greedy_is_the_references(name):
    model, params = repo_jax.from_pretrained(ROOT / name)
    tokens, greedy = reference(name)["tokens"], reference(name)["greedy"]
    given = tokens.shape[1] // 2
    prompts = greedy[:, :given].tolist()
    np.testing.assert_array_equal(greedy[:, :given], tokens[:, :given])
    out = repo_jax.generate(model, params, prompts, max_new_tokens=16, eos_ids=())
    np.testing.assert_array_equal(out, greedy[:, given:])


def test_prompts_of_any_length_are_continued_as_if_alone(made):
    together = repo_jax.generate(*made, PROMPTS, max_new_tokens=10, eos_ids=())
    for prompt, continuation in zip(PROMPTS, together, strict=True):
        (alone,) = repo_jax.generate(*made, [prompt], max_new_tokens=10, eos_ids=())
        assert continuation == alone
        assert len(alone) == 10
        assert all(type(token) is int for token in alone)
    assert len(set(map(tuple, together))) == len(PROMPTS)


def test_greedy_takes_the_likeliest_of_the_whole_sequence(made):
    model, params = made
    (continuation,) = repo_jax.generate(model, params, [PROMPTS[1]], max_new_tokens=10, eos_ids=())
    whole = np.array([PROMPTS[1] + continuation])
    logits = jax.jit(model.apply)({"params": params}, whole).logits
    assert np.asarray(logits.argmax(-1))[0, 2:-1].tolist() == continuation


def test_eos_ends_and_is_not_included(made):
    free = repo_jax.generate(*made, PROMPTS, max_new_tokens=10, eos_ids=())
    # Whatever the second prompt says fourth, and another that it never says.
    eos = free[1][3]
    stopped = repo_jax.generate(*made, PROMPTS, max_new_tokens=10, eos_ids=[eos, VOCAB - 1])
    for whole, cut in zip(free, stopped, strict=True):
        ends = [i for i, token in enumerate(whole) if token in (eos, VOCAB - 1)]
        assert cut == whole[: min(ends, default=10)]
    assert 0 < len(stopped[1]) <= 3


def test_the_configs_eos_is_taken_by_default(made):
    sampled = dict(max_new_tokens=10, temperature=2.0, seed=3)
    prompts = [[1, 2]] * 8
    given = repo_jax.generate(*made, prompts, **sampled, eos_ids=(9,))
    assert repo_jax.generate(*made, prompts, **sampled) == given
    assert any(len(continuation) < 10 for continuation in given)
    assert all(9 not in continuation for continuation in given)


def test_seeds_and_batches(made):
    sampled = dict(max_new_tokens=10, temperature=1.0, eos_ids=())
    eight = [PROMPTS[i % 5] for i in range(8)]
    first = repo_jax.generate(*made, eight, **sampled, seed=5)
    assert repo_jax.generate(*made, eight, **sampled, seed=5) == first
    assert repo_jax.generate(*made, eight, **sampled, seed=6) != first
    # The same prompt draws again in a batch, but as it does alone where it comes first.
    assert first[0] != first[5]
    for prompt, continuation in list(zip(eight, first, strict=True))[:5]:
        (alone,) = repo_jax.generate(*made, [prompt], **sampled, seed=5)
        assert alone == continuation


def test_prompts_draw_independently(made):
    """Two that are continued with the same probabilities."""
    model, params = made
    params = jax.tree.map(lambda x: x, params)
    params["head"]["kernel"] *= 0.0  # all tokens are as likely, whatever was read
    sampled = dict(max_new_tokens=16, temperature=1.0, eos_ids=())
    prompts = [*PROMPTS, [1, 2, 4], [1, 2], [1, 2, 3]]
    drawn = repo_jax.generate(model, params, prompts, **sampled)
    assert len(set(map(tuple, drawn))) == len(prompts)
    # Sixteen of forty tokens: two rows are the same in 0.4 places by chance.
    same = (np.array(drawn)[:, None] == np.array(drawn)[None]).sum(-1)
    assert same[~np.eye(len(prompts), dtype=bool)].max() < 6


def test_equal_prompts_of_several_calls_draw_as_in_one(made):
    generator, prompts = Generator(*made), [[1, 2, 3]] * 8
    options = dict(max_new_tokens=10, sampling=Sampling(temperature=1.0), eos_ids=())
    together = [completion.ids for completion in generator.complete(prompts, **options)]
    assert len(set(map(tuple, together))) > 1
    apart = []
    for places in ([0, 1, 2], [3], [4, 5, 6, 7]):
        found = generator.complete(prompts[: len(places)], places=places, **options)
        apart += [completion.ids for completion in found]
    assert apart == together
    with pytest.raises(ValueError, match=r"places is \[0\]; it must be a number from 0 for each"):
        generator.complete(prompts, places=[0], **options)


@pytest.mark.parametrize("only_one", [dict(top_k=1), dict(top_p=1e-6), dict(top_k=3, top_p=1e-6)])
def test_the_likeliest_alone_is_greedy(made, only_one):
    greedy = repo_jax.generate(*made, PROMPTS, max_new_tokens=8, eos_ids=())
    sampled = repo_jax.generate(
        *made, PROMPTS, max_new_tokens=8, temperature=3.0, seed=1, eos_ids=(), **only_one
    )
    assert sampled == greedy


def test_filters_keep_what_they_say(made):
    model, params = made
    prompts = [[1, 2, 3]] * 400
    logits = np.asarray(model.apply({"params": params}, np.array([[1, 2, 3]])).logits, np.float64)
    p = np.exp(logits[0, -1] / 1.5) / np.exp(logits[0, -1] / 1.5).sum()
    order = np.argsort(-p)
    options = dict(max_new_tokens=1, temperature=1.5, eos_ids=())
    drawn = lambda **more: {out[0] for out in repo_jax.generate(*made, prompts, **options, **more)}
    assert drawn(top_k=3) == set(order[:3].tolist())
    # The fewest tokens whose probability reaches 0.5.
    needed = int(np.searchsorted(np.cumsum(p[order]), 0.5)) + 1
    assert drawn(top_p=0.5) == set(order[:needed].tolist())
    assert len(drawn()) > max(3, needed)


def test_draws_follow_the_probabilities(made):
    model, params = made
    logits = model.apply({"params": params}, np.array([[1, 2, 3]])).logits[0, -1]
    p = np.asarray(jax.nn.softmax(logits / 2.0), np.float64)
    n = 2000
    options = dict(max_new_tokens=1, temperature=2.0, eos_ids=())
    out = repo_jax.generate(*made, [[1, 2, 3]] * n, **options)
    seen = np.bincount([continuation[0] for continuation in out], minlength=VOCAB)
    # Five standard deviations of each count, whose draws are fixed by the seed.
    assert np.all(np.abs(seen - n * p) <= 5 * np.sqrt(n * p * (1 - p)) + 1)


def test_no_prompts_no_continuations(made):
    assert repo_jax.generate(*made, []) == []


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, r"prompts\[1\] is empty; it needs at least one token id"),
        ([[1, VOCAB]], {}, r"prompts\[0\] has the id 40; the vocabulary has 40"),
        ([[1], [-1]], {}, r"prompts\[1\] has the id -1"),
        ([[1]], dict(max_new_tokens=0), "max_new_tokens is 0"),
        ([[1]], dict(temperature=-0.5), "temperature is -0.5"),
        ([[1]], dict(temperature=1.0, top_k=0), "top_k is 0"),
        ([[1]], dict(temperature=1.0, top_p=0.0), "top_p is 0.0"),
        ([[1]], dict(temperature=1.0, top_p=1.5), "top_p is 1.5"),
    ],
)
def test_wrong_arguments_are_named(made, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        repo_jax.generate(*made, prompts, **options)


def test_between_tokens_no_mesh_is_left_in_context(made):
    """So that streams on several meshes may take turns."""
    model, params = made
    options = dict(max_new_tokens=4, eos_ids=())
    (alone,) = repo_jax.generate(model, params, [PROMPTS[1]], **options)
    streams = []
    for sizes in (dict(data=4, fsdp=1, tensor=2), dict(fsdp=8)):
        mesh = make_mesh(MeshConfig(**sizes))
        placed = jax.device_put(params, param_shardings(boxed_params(model), mesh))
        streams.append(Generator(model, placed, mesh=mesh).stream([PROMPTS[1]], **options))
    for n in range(1, 5):
        for stream in streams:
            (completion,) = next(stream)
            assert completion.ids == alone[:n]
            assert jax.sharding.get_abstract_mesh().empty
    assert [next(stream, None) for stream in streams] == [None, None]


def test_programs_are_compiled_once_for_each_kind_of_sampling(made):
    """As docs/10-generation.md says."""
    generator = Generator(*made)
    jax.clear_caches()

    def compiled(prompt=PROMPTS[1], n=4, seed=0, eos_ids=(9,), **sampling):
        options = dict(max_new_tokens=n, seed=seed, eos_ids=eos_ids)
        generator.complete([prompt], sampling=Sampling(**sampling), **options)
        programs = generator_module._prefill, generator_module._decode
        return tuple(program._cache_size() for program in programs)

    assert compiled() == (1, 1)
    assert compiled(PROMPTS[3], n=6, seed=3, eos_ids=(8,), top_k=3) == (1, 1)
    assert compiled(temperature=1.0) == (2, 2)
    assert compiled(temperature=0.5) == (2, 2)
    assert compiled(temperature=0.5, top_k=3) == (3, 3)
    assert compiled(temperature=0.7, top_p=0.9, min_p=0.1) == (3, 3)
    assert compiled(repetition_penalty=1.2) == (4, 4)
    assert compiled(repetition_penalty=1.5) == (4, 4)
    assert compiled(eos_ids=(8, 9)) == (5, 5)
    assert compiled() == (5, 5)


@pytest.mark.parametrize("every", [0, -1, 65])
def test_looks_that_never_come_are_refused(made, every):
    with pytest.raises(ValueError, match=f"every is {every}; it must be 1 to 64"):
        next(Generator(*made).stream([[1]], every))


def test_the_function_stays_under_its_name():
    function = repo_jax.generate
    module = importlib.import_module("repo_jax.generate")
    assert repo_jax.generate is function is module
    assert callable(repo_jax.generate)


def test_the_command_continues_a_prompt(tmp_path, capsys):
    config = parse(write_config(tmp_path))
    model, params = make_run(tmp_path / "run", config)
    options = ["--run", str(tmp_path / "run"), "--max_new_tokens", "5"]
    command.main(["--prompt", "abc", *options])
    (ids,) = repo_jax.generate(model, params, [list(b"abc")], max_new_tokens=5)
    expected = "abc" + bytes(i for i in ids if i < 256).decode("utf-8", "replace")
    assert capsys.readouterr().out == expected + "\n"
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: command.main(["--prompt", "abc", *options, "--top_p", "3"]))
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: --top_p is 3.0; it must be above 0 and at most 1\n"
