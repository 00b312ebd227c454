"""The README and the guides: their code runs, their commands parse, their links lead somewhere."""

import math
import re
import shlex
import shutil
import tomllib
from pathlib import Path
from urllib.parse import unquote

import jax.numpy as jnp
import pytest

from repo_jax import cli, convert, tokenize
from repo_jax.analysis import command as analysis
from repo_jax.evaluation import command as evaluation
from repo_jax.evidence import command as evidence
from repo_jax.evidence import report, results
from repo_jax.inference import command as inference
from repo_jax.planning import command as planning
from repo_jax.training import command as training
from repo_jax.training.checkpoints import Checkpoints
from repo_jax.training.step import create_state, make_train_step
from tests.tiny_runs import ROOT, make_run, parse

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")

COMMANDS = {
    "train.py": training.main,
    "eval.py": evaluation.main,
    "repo_jax.generate": inference.main,
    "repo_jax.convert": convert.main,
    "repo_jax.tokenize": tokenize.main,
    "repo_jax.plan": planning.main,
    "repo_jax.positions": analysis.main,
    "repo_jax.evidence": evidence.main,
}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def blocks(page: Path, language: str):
    """Line number, words after the language, and text of each block in that language."""
    content = page.read_text(encoding="utf-8")
    for match in _BLOCK.finditer(content):
        name, *words = match[1].split() or [""]
        if name == language:
            yield content.count("\n", 0, match.start()) + 2, words, match[2]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """A run as the quickstart leaves it, but small and untrained."""
    folder = tmp_path_factory.mktemp("quickstart")
    for i in range(9):
        (folder / f"{i}.txt").write_text(f"def f{i}(x):\n    return x + {i}\n" * 20)
    size = ["--model.vocab_size=257", "--model.d_model=48", "--model.d_ff=96"]
    data = [f"--data.text={folder}", "--data.tokenizer=bytes", f"--data.cache_dir={folder}/cache"]
    config = parse(ROOT / "configs" / "quickstart.yaml", *size, *data)
    model, params = make_run(folder / "run", config)
    optimizer, _ = make_train_step(model, config.optimizer, config.training, params)
    state = create_state(params, optimizer, seed=0).replace(step=jnp.int32(300))
    with Checkpoints(folder / "run", keep_last=1) as checkpoints:
        checkpoints.save(state, {}, val_loss=5.0)
    return folder / "run"


@pages
def test_code(page, quickstart, tmp_path, monkeypatch):
    shutil.copytree(quickstart, tmp_path / "runs" / "quickstart")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "docs"}
    for line, words, code in blocks(page, "python"):
        # Blank lines in front make tracebacks name the page's own lines.
        program = compile("\n" * (line - 1) + code, str(page), "exec")
        if words != ["no-run"]:
            assert not words
            exec(program, namespace)


def commands(page: Path):
    """Each command line of the page's shell blocks, as words."""
    for _, _, text in blocks(page, "bash"):
        for line in text.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words[words.index("python") :] if words[0] == "srun" else words


class ParsedError(Exception):
    """Ends a command once its options are found to be right."""


@pages
def test_commands(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parse_args = cli.Parser.parse_args

    def parse_only(self, *args, **kwargs):
        parse_args(self, *args, **kwargs)
        raise ParsedError

    monkeypatch.setattr(cli.Parser, "parse_args", parse_only)
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for words in commands(page):
        match words:
            case ["make", target]:
                assert target in targets
            case ["pip", "install", "-e", what]:
                extras = re.fullmatch(r"\.(?:\[(.*)\])?", what)[1]
                assert set(extras.split(",") if extras else ()) <= set(
                    project["optional-dependencies"]
                )
            case ["python", "-m", name, *options] | ["python", name, *options]:
                wanted = SystemExit if "--help" in options else ParsedError
                with pytest.raises(wanted) as ended:
                    COMMANDS[name](options)
                assert wanted is ParsedError or ended.value.code == 0
            case _:
                pytest.fail(f"nobody knows the command {shlex.join(words)}")


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    text = _BLOCK.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages
def test_links(page):
    for link in _LINK.findall(_BLOCK.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", ["README.md", "docs/13-evidence.md"])
def test_tables_of_results_are_what_the_results_say(page, tmp_path):
    text = (ROOT / page).read_text(encoding="utf-8")
    names = re.findall(r"^<!-- evidence:(\S+) -->$", text, re.MULTILINE)
    assert names
    (tmp_path / "page.md").write_text(text, encoding="utf-8")
    for name in names:
        table = report.headline_table(results.load(ROOT / "benchmarks" / "results" / name))
        report.rewrite(tmp_path / "page.md", name, table)
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == text


def test_the_readme_names_every_console_script():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    readme = PAGES[0].read_text(encoding="utf-8")
    for name in (*project["scripts"], *project["optional-dependencies"]):
        assert f"`{name}`" in readme


def test_the_quickstart_page_says_what_its_config_says():
    config = parse(ROOT / "configs" / "quickstart.yaml")
    model, data = config.model, config.data
    assert model.kinds == ("rope",) + ("repo",) * (model.n_layers - 1)
    page = (ROOT / "docs" / "1-quickstart.md").read_text(encoding="utf-8")
    T = data.sequence_length
    for fact in (
        f"BPE of {int(data.tokenizer.removeprefix('bpe:')):,} entries",
        f"{model.n_layers} layers and {model.n_heads} heads, RoPE in the first layer",
        f"{config.training.steps:,} batches of {data.batch_size} windows of {T} tokens",
        f"at context lengths {T // 2}, {T} and {2 * T}",
        f"ln {model.vocab_size:,} = {math.log(model.vocab_size):.1f}",
    ):
        assert fact in page
