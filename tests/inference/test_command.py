"""The generate command: where prompts come from, and what is printed."""

import io

import pytest

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


def continuation(run, prompt, n, **options):
    model, params = repo_jax.load_run(run, **options)
    (ids,) = repo_jax.generate(model, params, [list(prompt.encode())], max_new_tokens=n)
    return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


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


def test_yarn(run, capsys):
    scaled = continuation(run, "abc", 6, rope_scaling=RopeScaling(8.0, 4))
    options = ["--rope_scaling.factor", "8", "--rope_scaling.original_length", "4"]
    assert printed(capsys, run, "--prompt", "abc", *options) == "abc" + scaled + "\n"


def test_the_dtype_is_as_asked_for_or_the_models(run, capsys, monkeypatch):
    made = []

    class Recorded(Generator):
        def __init__(self, model, params, **options):
            super().__init__(model, params, **options)
            made.append((model.config.dtype, self._params["head"]["kernel"].dtype))

    monkeypatch.setattr(command, "Generator", Recorded)
    out = printed(capsys, run, "--prompt", "abc")
    assert out == "abc" + continuation(run, "abc", 6) + "\n"
    assert printed(capsys, run, "--prompt", "abc", "--dtype", "bfloat16").startswith("abc")
    assert made == [("float32", "float32"), ("bfloat16", "bfloat16")]


def test_a_mesh_changes_nothing(run, capsys):
    options = ["--prompt", "abc", "--mesh.tensor", "2", "--mesh.data", "2"]
    assert printed(capsys, run, *options) == "abc" + continuation(run, "abc", 6) + "\n"


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
    ],
)
def test_mistakes(run, options, message, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: command.main(["--run", str(run), *options]))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
