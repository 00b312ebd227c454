"""A user's mistakes: one sentence on stderr, exit status 2, nothing begun."""

import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import yaml

from repo_jax import cli, tokenize
from repo_jax.data import train_bpe
from repo_jax.evaluation import command as evaluation
from repo_jax.evaluation.config import EvalConfig
from repo_jax.inference.command import GenerateConfig
from repo_jax.training import command as training
from tests.golden_sets import ROOT as GOLDEN
from tests.tiny_runs import ROOT, write_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Has tiny.yaml, its corpus, and files and folders that are wrong in some way."""
    folder = tmp_path_factory.mktemp("mistakes")
    write_config(folder)
    np.arange(999, dtype="<u4").tofile(folder / "good.bin")
    (folder / "truncated.bin").write_bytes((folder / "good.bin").read_bytes()[:-1])
    (folder / "empty.bin").touch()
    np.arange(20, dtype="<u4").tofile(folder / "short.bin")
    (folder / "link.bin").symlink_to(folder / "good.bin")
    np.save(folder / "numpy.npy", np.arange(999, dtype=np.uint32))
    (folder / "foreign").mkdir()
    (folder / "foreign" / "thesis.tex").write_text("do not touch")
    train_bpe(["some text, and more of it"], 260).save(folder / "tokenizer")
    (folder / "corpus.txt.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    files = {
        "unknown_option": "training: {stepz: 3}",
        "unknown_section": "modle: {vocab_size: 3}",
        "unknown_nested": "model: {positions: {prest: repo}}",
        "wrong_type": "optimizer: {learning_rate: fast}",
        "no_yaml": "training: [",
        "no_options": "- steps",
        "empty_section": "training:",
        "number_section": "training: 7",
    }
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def said(capsys, main, options) -> str:
    """What a command says that ends in a user's mistake."""
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: main(options))
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    return line


def train_mistake(capsys, folder, options) -> str:
    """The message of train.py with tiny.yaml and `options`, whose {folder} is filled in."""
    options = [option.replace("{folder}", str(folder)) for option in options]
    run_dir = folder / "never"
    given = ["--config", str(folder / "tiny.yaml"), "--run_dir", str(run_dir), *options]
    line = said(capsys, training.main, given)
    assert not run_dir.exists() or not any(run_dir.iterdir())
    return line


OPTIONS = [
    (
        ["--trainig.steps", "5"],
        "there is no option --trainig.steps; did you mean --training.steps? (--help lists them)",
    ),
    # The beginning of an option's name is not the option.
    (
        ["--optimizer.learning_rat", "5"],
        "there is no option --optimizer.learning_rat; did you mean --optimizer.learning_rate? "
        "(--help lists them)",
    ),
    (["--run_dri=x"], "there is no option --run_dri; did you mean --run_dir? (--help lists them)"),
    (["--zzz"], "there is no option --zzz (--help lists them)"),
    (
        ["--data.text", "a.txt", "b.txt"],
        "the argument 'b.txt' belongs to no option; a list is written '[a, b]'",
    ),
    (["--training.steps", "1.5"], "training.steps is 1.5; it must be int"),
    (["--training.steps", "0"], "training.steps is 0; it must be positive"),
    (["--optimizer.learning_rate", "fast"], "optimizer.learning_rate is fast; it must be float"),
    (
        ["--optimizer.name", "adafactor", "--optimizer.mu_dtype", "bfloat16"],
        "optimizer.mu_dtype is bfloat16; only adamw has a first moment, and optimizer.name is",
    ),
    (["--optimizer.clip_norm", "no"], "optimizer.clip_norm is no; it must be float or null"),
    (
        ["--model.positions.preset", "rpoe"],
        "model.positions.preset is rpoe; it must be one of 'rope', 'nope', 'r2n1', 'n2r1', 'repo'",
    ),
    (
        ["--model.positions.layers", "[rope, reppo]"],
        "model.positions.layers is ['rope', 'reppo']; it must be list[one of 'rope', 'nope', "
        "'repo', 'cope'] or null",
    ),
    (
        ["--model.positions.start_layer", "2"],
        "positions.start_layer is 2; with n_layers 2 it must be 0 to 1",
    ),
    (
        ["--model.n_heads", "3"],
        "model.n_heads is 3; it must divide model.d_model (32) unless model.head_dim is given",
    ),
    (
        ["--model.attention", "pallas_tpu"],
        "model.attention is pallas_tpu, which needs a TPU; JAX runs on cpu here; leave it out",
    ),
    (
        ["--model.attention", "flash"],
        "model.attention is flash; it must be one of 'xla', 'pallas_tpu', 'pallas_gpu', 'cudnn', ",
    ),
    (
        ["--model.param_dtype", "bfloat16"],
        "model.param_dtype is bfloat16; it must be float32 to train, since what a step adds would",
    ),
    (["--model.n_kv_heads", "3"], "model.n_kv_heads is 3; it must divide model.n_heads (2)"),
    (
        ["--training.accumulation", "3"],
        "training.accumulation is 3; it must divide data.batch_size (8)",
    ),
    (
        ["--optimizer.rates", '{"f_phi.*": 2}'],
        "optimizer.rates has the pattern 'f_phi.*', which matches no parameter; parameters: ",
    ),
    (
        ["--mesh.fsdp", "3"],
        "the mesh is data 1 x fsdp 3 x tensor 1 x context 1; it must use all 8 devices",
    ),
    (
        ["--mesh.tensor", "8", "--mesh.fsdp", "1"],
        "mesh.tensor is 8; it must divide model.n_heads (2)",
    ),
    (["--data.text", "[]"], "neither data.text nor data.tokens is given; name files or folders"),
    (["--config", "{folder}/unknown_option.yaml"], "there is no option training.stepz; did you"),
    (
        ["--config", "{folder}/unknown_section.yaml"],
        "there is no option modle.vocab_size; did you mean model.vocab_size?",
    ),
    (
        ["--config={folder}/unknown_nested.yaml"],
        "there is no option model.positions.prest; did you mean model.positions.preset?",
    ),
    (
        ["--config", "{folder}/wrong_type.yaml"],
        "optimizer.learning_rate is fast; it must be float",
    ),
    (["--config", "{folder}/no_yaml.yaml"], "--config {folder}/no_yaml.yaml is not YAML: while"),
    (["--config", "{folder}/no_options.yaml"], "--config {folder}/no_options.yaml has no options"),
    (
        ["--config", "{folder}/empty_section.yaml"],
        "training in {folder}/empty_section.yaml is empty; it is a section",
    ),
    (
        ["--config", "{folder}/number_section.yaml"],
        "training in {folder}/number_section.yaml is 7; it is a section",
    ),
    (["--config", "qiuckstart"], "--config qiuckstart: there is no such file; packaged configs: "),
    (["--config"], "argument --config: expected one argument"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=[" ".join(o) for o, _ in OPTIONS])
def test_options(capsys, folder, options, message):
    line = train_mistake(capsys, folder, options)
    assert re.sub(r"^(train.py: )?error: ", "", line).startswith(
        message.replace("{folder}", str(folder))
    )


def tokens(name):
    return ["--data.text", "[]", "--data.tokens", f"{{folder}}/{name}"]


def held_out(name):
    return ["--data.validation_tokens", f"{{folder}}/{name}"]


FILES = [
    (
        ["--data.text", "{folder}/missing.txt"],
        "text source '{folder}/missing.txt' does not exist; give a file, a folder, a glob or",
    ),
    (tokens("missing.bin"), "token file {folder}/missing.bin does not exist"),
    (tokens("empty.bin"), "token file {folder}/empty.bin is empty"),
    (
        tokens("truncated.bin"),
        "token file {folder}/truncated.bin has 3995 bytes, which is no multiple of 4 (uint32); "
        "it is cut short or of another dtype",
    ),
    (tokens("numpy.npy"), "token file {folder}/numpy.npy is in numpy's format; token files have"),
    (
        tokens("good.bin"),
        "{folder}/good.bin has the token id 998; the vocabulary has 257 entries, or the file is "
        "not of the given dtype",
    ),
    (
        [*tokens("good.bin"), "--model.vocab_size", "999", "--data.batch_size", "40"],
        "the training data has 25 windows of sequence_length 32 (800 tokens); batch_size is 40",
    ),
    # What is wrong with validation data is not left to the first validation.
    (
        [*tokens("good.bin"), "--model.vocab_size", "999", *held_out("short.bin")],
        "the validation data has no window of sequence_length 32: it has 20 tokens in "
        "{folder}/short.bin; give a longer file, or a smaller sequence_length",
    ),
    (
        [*tokens("good.bin"), "--model.vocab_size", "999", *held_out("link.bin")],
        "{folder}/good.bin is both trained on and in data.validation_tokens; leave it out of one",
    ),
    (
        ["--data.tokenizer", "{folder}/tokenizer"],
        "data.tokenizer {folder}/tokenizer has a vocabulary of 260; model.vocab_size is 257",
    ),
    (
        ["--data.tokenizer", "bpe:512"],
        "data.tokenizer bpe:512 has a vocabulary of 512; model.vocab_size is 257 and must be at "
        "least that",
    ),
    (
        ["--init.checkpoint", f"{GOLDEN}/rope"],
        f"model.vocab_size is 257, but init.checkpoint {GOLDEN}/rope has 256; give that",
    ),
    (
        ["--init.checkpoint", f"{GOLDEN}/rope", "--init.revision", "stage1"],
        f"revision is 'stage1', but {GOLDEN}/rope is a folder here, which has none; leave it out "
        "(of a recipe with --init.revision null)",
    ),
    (["--run_dir", "{folder}/tiny.yaml"], "--run_dir {folder}/tiny.yaml is a file; name a folder"),
    (
        ["--run_dir", "{folder}/foreign"],
        "--run_dir {folder}/foreign is not empty and has no config.yaml, so it is no run; name a "
        "new folder",
    ),
    (
        ["--run_dir", "gs://bucket/run"],
        "--run_dir is gs://bucket/run; it must be a folder, and checkpoints alone can be "
        "elsewhere: --training.checkpoint_dir gs://bucket/run",
    ),
    (["--run_dir", "{folder}/tiny.yaml/run"], "--run_dir {folder}/tiny.yaml/run cannot be made"),
]


@pytest.mark.parametrize(("options", "message"), FILES, ids=[" ".join(o) for o, _ in FILES])
def test_files(capsys, folder, options, message):
    line = train_mistake(capsys, folder, options)
    assert line.startswith("error: " + message.replace("{folder}", str(folder)))
    assert [path.name for path in (folder / "foreign").iterdir()] == ["thesis.tex"]


def test_a_checkpoint_of_another_width(capsys, folder):
    options = ["--init.checkpoint", f"{GOLDEN}/rope", "--model.vocab_size", "256"]
    line = train_mistake(capsys, folder, options)
    assert (
        line == f"error: model.d_model is 32, but init.checkpoint {GOLDEN}/rope has 64; give that"
    )


@pytest.mark.parametrize(
    ("package", "options", "message"),
    [
        (
            "tensorboardX",
            ["--training.tensorboard", "true"],
            "training.tensorboard needs the package 'tensorboardX', which is not installed; "
            "run: pip install 'repo-jax[loggers]'",
        ),
        (
            "wandb",
            ["--training.wandb_project", "positions"],
            "training.wandb_project needs the package 'wandb', which is not installed; "
            "run: pip install 'repo-jax[loggers]'",
        ),
        (
            "zstandard",
            ["--data.text", "{folder}/corpus.txt.zst"],
            "reading .zst files needs the package 'zstandard', which is not installed; "
            "run: pip install 'repo-jax[zstd]'",
        ),
        (
            "huggingface_hub",
            ["--init.checkpoint", "someone/some-model"],
            "needs the package 'huggingface_hub', which is not installed; "
            "run: pip install 'repo-jax[hub]'",
        ),
    ],
)
def test_a_missing_package_is_named_with_what_installs_it(
    capsys, folder, monkeypatch, package, options, message
):
    monkeypatch.setitem(sys.modules, package, None)
    line = train_mistake(capsys, folder, options)
    assert line.startswith("error: ")
    assert line.endswith(message)


def test_no_config(capsys):
    assert said(capsys, training.main, []) == (
        "error: the following arguments are required: model.vocab_size, "
        "model.d_model, model.n_layers, model.n_heads, model.d_ff; give options, or a --config "
        "file that has them"
    )


def test_no_argument_of_a_command_without_configs(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tokenize"])
    line = said(capsys, lambda _: tokenize.main(), [])
    assert line.startswith("error: the following arguments are required: ")
    assert "--config" not in line
    monkeypatch.setattr(sys, "argv", ["tokenize", "--text", "a", "--out", "b", "--text_suf", ".c"])
    line = said(capsys, lambda _: tokenize.main(), [])
    assert "there is no option --text_suf; did you mean --text_suffixes?" in line


def test_no_run_dir_to_be_named_after_a_config(capsys, tmp_path, folder):
    model = yaml.safe_load((folder / "tiny.yaml").read_text())["model"]
    options = [f"--model.{name}={value}" for name, value in model.items()]
    line = said(capsys, training.main, [*options, "--data.text", str(tmp_path)])
    assert line == "error: neither --config nor --run_dir is given; name one of them"


def test_the_last_given_wins(folder):
    tiny = str(folder / "tiny.yaml")
    options = ["--training.steps", "7", "--config", tiny, "--data.text", "[a, b]"]
    config, _ = cli.parse(training.TrainConfig, "train.py", "", options)
    assert (config.training.steps, config.data.text) == (40, ("a", "b"))
    config, _ = cli.parse(training.TrainConfig, "train.py", "", [*options, "--training.steps=8"])
    assert config.training.steps == 8


def test_hyphens_serve_for_underscores_in_names_alone(folder):
    options = ["--config", str(folder / "tiny.yaml"), "--training.log-every=7", "--data.text"]
    config, _ = cli.parse(training.TrainConfig, "train.py", "", [*options, "[my-notes/a_b-c.md]"])
    assert config.training.log_every == 7
    assert config.data.text == ("my-notes/a_b-c.md",)


@pytest.mark.parametrize("text", ["# hello", "~", "[a, b]", "{a: b}", "5", "true", "- a"])
def test_texts_are_taken_as_they_are_written(tmp_path, text):
    file = tmp_path / "prompt.yaml"
    file.write_text(yaml.safe_dump({"prompt": text}))
    for options in (["--prompt", text], [f"--prompt={text}"], ["--config", str(file)]):
        config, _ = cli.parse(GenerateConfig, "generate", "", ["--run", ".", *options])
        assert config.prompt == text


def test_null_unsets_what_a_file_has(tmp_path):
    file = tmp_path / "anew.yaml"
    file.write_text("init: {checkpoint: null}")
    for anew in (["--config", str(file)], ["--init.checkpoint", "null"]):
        options = ["--config", "olmo2_1b_repo", *anew, "--data.tokens", "x"]
        config, _ = cli.parse(training.TrainConfig, "train.py", "", options)
        assert config.init.checkpoint is None
        assert config.init.revision is not None


def test_true_may_be_left_out():
    for options in (["--by_position", "--run", "."], ["--run", ".", "--by-position"]):
        config, _ = cli.parse(EvalConfig, "eval.py", "", options)
        assert config.by_position
        assert config.run == "."
    config, _ = cli.parse(EvalConfig, "eval.py", "", ["--run", ".", "--by_position", "false"])
    assert not config.by_position


def test_a_packaged_config_serves_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "configs/quickstart.yaml"):
        config, _ = cli.parse(training.TrainConfig, "train.py", "", ["--config", name])
        assert config.data.text == ("python-stdlib",)


def test_an_interrupt_before_training_is_no_traceback(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


# In processes of their own.


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        (
            "train.py",
            ["--config", "quickstart", "--training.setps", "5"],
            "error: there is no option --training.setps; did you mean "
            "--training.steps? (--help lists them)\n",
        ),
        (
            "eval.py",
            ["--run", "runs/of-nobody"],
            "error: --run runs/of-nobody: there is no such folder\n",
        ),
    ],
)
def test_the_scripts(tmp_path, script, options, message):
    command = [sys.executable, str(ROOT / script), *options]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", message)
    assert not any(tmp_path.iterdir())


def test_the_model_and_the_train_step_need_no_data_or_command_line_packages():
    program = """
        import sys
        for name in ("grain", "jsonargparse", "orbax", "orbax.checkpoint", "tokenizers"):
            sys.modules[name] = None
        import repo_jax
        repo_jax.RePoLM, repo_jax.DecoderBlock, repo_jax.ContextRePositioning
        repo_jax.DecoderConfig, repo_jax.PositionConfig, repo_jax.capture_positions
        repo_jax.from_pretrained, repo_jax.save_pretrained, repo_jax.generate
        import pallas_kernels
        pallas_kernels.rotary_attention, pallas_kernels.rotate
        import repo_jax.training.step
        print("all there")
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.stdout == "all there\n", ended.stderr


def test_evaluation_says_what_it_needs(capsys):
    expected = "error: give one of --run (a run directory) and --model (a folder or hub id)"
    assert said(capsys, evaluation.main, []) == expected
