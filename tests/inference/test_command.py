"""The generate command: where prompts come from, and what is printed."""

import io

import pytest
import tokenizers

import repo_jax
from repo_jax import cli
from repo_jax.config import RopeScaling
from repo_jax.inference import Generator, command
from tests.tiny_runs import make_run, parse, write_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    make_run(folder / "run", parse(write_config(folder), "--model.vocab_size", "272"))
    return folder / "run"


@pytest.fixture
def made(monkeypatch):
    """The generators that the command makes."""
    made = []

    class Recorded(Generator):
        def __init__(self, model, params, **options):
            super().__init__(model, params, **options)
            made.append(self)

    monkeypatch.setattr(command, "Generator", Recorded)
    return made


def continuation(run, prompt, n, **options):
    model, params = repo_jax.load_run(run, **options)
    (ids,) = repo_jax.generate(model, params, [list(prompt.encode())], max_new_tokens=n)
    return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


def kernel_of(generator):
    return generator._params["head"]["kernel"]


def printed(capsys, run, *options):
    command.main(["--run", str(run), "--max_new_tokens", "6", *options])
    return capsys.readouterr().out


def test_a_file(run, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("first\nsecond ")
    out = printed(capsys, run, "--prompt_file", str(tmp_path / "prompt.txt"))
    assert out == "first\nsecond " + continuation(run, "first\nsecond ", 6) + "\n"


def test_a_prompt_that_yaml_would_read_as_nothing(run, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    for prompt in ("# hello", "~"):
        out = printed(capsys, run, "--prompt", prompt)
        assert out == prompt + continuation(run, prompt, 6) + "\n"


def test_lines_of_standard_input(run, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n"))
    out = printed(capsys, run)
    assert out == "".join(prompt + continuation(run, prompt, 6) + "\n" for prompt in ("one", "two"))


def test_a_stop_string_is_not_printed(run, capsys):
    # Its first letter comes alone, and is held back until it is known what follows.
    stop = continuation(run, "abc", 6)[:2]
    assert len(stop) == 2
    assert printed(capsys, run, "--prompt", "abc", "--stop", f"['{stop}', 'never']") == "abc\n"
    whole = continuation(run, "abc", 6)
    assert printed(capsys, run, "--prompt", "abc", "--stop", "['never']") == f"abc{whole}\n"


def test_yarn(run, capsys, made):
    scaled = continuation(run, "abc", 6, rope_scaling=RopeScaling(8.0, 4))
    options = ["--rope_scaling.factor", "8", "--rope_scaling.original_length", "4"]
    assert printed(capsys, run, "--prompt", "abc", *options) == "abc" + scaled + "\n"
    # So small a model may well say the same without.
    assert made[0].config.rope_scaling == RopeScaling(8.0, 4)


def test_the_dtype_is_as_asked_for_or_the_models(run, capsys, made):
    out = printed(capsys, run, "--prompt", "abc")
    assert out == "abc" + continuation(run, "abc", 6) + "\n"
    assert printed(capsys, run, "--prompt", "abc", "--dtype", "bfloat16").startswith("abc")
    of = [(generator.config.dtype, kernel_of(generator).dtype) for generator in made]
    assert of == [("float32", "float32"), ("bfloat16", "bfloat16")]


def test_a_mesh_shares_the_work_and_changes_nothing(run, capsys, made):
    options = ["--prompt", "abc", "--mesh.tensor", "2", "--mesh.data", "2"]
    assert printed(capsys, run, *options) == "abc" + continuation(run, "abc", 6) + "\n"
    (generator,) = made
    assert dict(generator._mesh.shape) == dict(data=2, fsdp=2, tensor=2, context=1)
    kernel = kernel_of(generator)
    assert len(kernel.sharding.device_set) == 8
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(16, 136)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "a", "--prompt_file", "b"], "--prompt and --prompt_file are both given"),
        (["--prompt", ""], "--prompt is empty; give at least one character"),
        (["--prompt_file", "nowhere.txt"], "--prompt_file nowhere.txt cannot be read as text"),
        (["--prompt", "a", "--max_new_tokens", "0"], "--max_new_tokens is 0; it must be 1"),
        (["--prompt", "a", "--dtype", "half"], "dtype"),
        (["--prompt", "a", "--min_p", "2"], "--min_p is 2.0; it must be from 0 to 1"),
        (["--prompt", "a", "--mesh.tensor", "4"], "mesh.tensor is 4; it must divide model.n_heads"),
        (["--prompt", "a", "--stop", "['b', '']"], "--stop has an empty string; each must have"),
        (["--prompt", "a", "--stop", "END"], "--stop is END; it must be a list of strings in"),
        (["--prompt", "a", "--stop", "END"], "such as '[\"END\"]'"),
        (["--prompt", "a", "--stop", "[5]"], "such as '[\"[5]\"]'"),
        (["--prompt", "a", "--stop", "###"], "such as '[\"###\"]'"),
        (["--prompt", "a", "--tokenizer", "nowhere"], "tokenizer 'nowhere': there is no file"),
        (["--prompt", "a", "--run", "nowhere"], "error: --run nowhere: there is no such folder"),
    ],
)
def test_mistakes_are_told_before_the_model_is_read(run, options, message, capsys, monkeypatch):
    monkeypatch.setattr(command, "load", lambda *_: pytest.fail("the model was read"))
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: command.main(["--run", str(run), *options]))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_tokenizer_larger_than_the_model_is_refused(run, tmp_path, capsys, monkeypatch):
    vocab = {chr(0x100 + i): i for i in range(300)} | {"<|endoftext|>": 300}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<|endoftext|>"))
    backend.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(command, "load", lambda *_: pytest.fail("the model was read"))
    given = ["--run", str(run), "--prompt", "a", "--tokenizer", str(tmp_path)]
    with pytest.raises(SystemExit):
        cli.run(lambda: command.main(given))
    message = "has a vocabulary of 301; model.vocab_size is 272 and must be at least"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stop", "expected"),
    [("[END]", ("END",)), ('["[END]"]', ("[END]",)), ('["END", "\\n"]', ("END", "\n"))],
)
def test_stop_strings_are_a_list(stop, expected):
    """As docs/10-generation.md says."""
    config, _ = cli.parse(command.GenerateConfig, "generate", "", ["--run", ".", "--stop", stop])
    assert config.stop == expected
