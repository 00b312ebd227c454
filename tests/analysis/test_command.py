"""The positions command: what it writes where, what it refuses, and what it prints."""

import json
import runpy
import sys
import tomllib

import jax
import numpy as np
import pytest

import repo_jax
from repo_jax import cli
from repo_jax.analysis import Reading, Report, command, needle_prompt, page, read_report
from repo_jax.analysis.page import build
from repo_jax.analysis.records import CorrelationRow, MassRow, PatternRow, RangeRow
from repo_jax.config import DecoderConfig, PositionConfig, RopeScaling
from repo_jax.data import byte_tokenizer, train_bpe
from repo_jax.inference.loading import Loaded
from repo_jax.modeling import RePoLM, init_params
from tests.tiny_runs import ROOT, make_run, parse, write_config

TEXT = "def add(a, b):\n    return a + b\n" * 3
QUICK = ["--prompts", "1"]
FIGURES = ("positions", "ranges", "patterns", "attention_mass", "overview", "related_tokens")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Has text.txt, a RePo run of bytes `run` and a RoPE model `rope` with a BPE."""
    folder = tmp_path_factory.mktemp("positions")
    make_run(folder / "run", parse(write_config(folder)))
    sizes = dict(d_model=32, n_layers=3, n_heads=4, d_ff=32)
    config = DecoderConfig(vocab_size=300, positions=PositionConfig("rope"), **sizes)
    tokenizer = train_bpe([TEXT], 270)
    repo_jax.save_pretrained(
        folder / "rope", RePoLM(config), init_params(RePoLM(config), jax.random.key(0))
    )
    tokenizer.save(folder / "rope")
    (folder / "text.txt").write_text(TEXT)
    (folder / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (folder / "empty.txt").touch()
    (folder / "labelled.json").write_text("[]")
    return folder


@pytest.fixture
def pages(monkeypatch):
    """The readings of each page; what is in it is tested elsewhere."""
    found = []

    def write_page(path, readings):
        path.write_text("a page")
        found.append(readings)

    monkeypatch.setattr(build, "write_page", write_page)
    return found


@pytest.fixture
def undrawn(pages, monkeypatch):
    """`pages`, and no figures, which take most of the time."""
    monkeypatch.setattr(command.figures, "draw_all", lambda *args, **options: [])
    return pages


def run(folder, *options):
    command.main([*QUICK, *(option.replace("{folder}", str(folder)) for option in options)])


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_run_is_analysed_into_its_folder(folder, capsys):
    run(folder, "--run", "{folder}/run", "--text_file", "{folder}/text.txt", "--layers", "[1]")
    out = folder / "run" / "analysis"
    report = read_report(out)
    assert {row.model for row in report.masses} == {"run"}
    assert {row.tokens for row in report.correlations} == {len(TEXT)}
    drawn = {f"figures/{name}{suffix}" for name in FIGURES for suffix in (".png", ".svg")}
    tables = {f"{name}.csv" for name in command.TABLES}
    assert files(out).keys() == {*drawn, *tables, "report.json", "page.html"}
    assert "<html" in (out / "page.html").read_text()[:1000]
    model, params = repo_jax.load_run(folder / "run")
    z = repo_jax.analysis.read(model, params, byte_tokenizer(), TEXT).positions
    whole = {(r.layer, r.head): r.range for r in report.ranges if r.tokens == len(TEXT)}
    for (layer, head), found in whole.items():
        np.testing.assert_allclose(found, np.ptp(z[layer, head]), rtol=1e-5)
    printed = capsys.readouterr().out
    assert f"run: {len(TEXT)} tokens" in printed
    assert f"{out}/page.html" in printed


def test_models_side_by_side_each_with_its_own_tokenizer(folder, undrawn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models = ["--run", "[{folder}/run]", "--model", "{folder}/rope"]
    run(folder, *models, "--text", TEXT)
    out = tmp_path / "analysis" / "run-rope"
    ((ours, theirs),) = undrawn
    assert (ours.name, theirs.name) == ("run", "rope")
    assert len(ours.ids) == len(TEXT) > len(theirs.ids)
    assert (ours.text, theirs.text) == (TEXT, TEXT)
    assert {row.model for row in read_report(out).ranges} == {"run", "rope"}
    assert [path.name for path in tmp_path.iterdir()] == ["analysis"]
    assert [path.name for path in out.parent.iterdir()] == ["run-rope"]


def test_names_steps_tokenizers_and_yarn_are_those_of_each(folder, monkeypatch, tmp_path):
    asked, told = [], []

    def load(source):
        asked.append((source.run, source.model, source.step, source.rope_scaling))
        return Loaded(model=None, params=None, folder=None)

    def analyse(*_, name, **options):
        told.append((name, options))
        raise ValueError("enough")

    monkeypatch.setattr(command, "load", load)
    monkeypatch.setattr(command, "analyse", analyse)
    place = str(folder / "run")
    options = ["--run", f"[{place}, {place}]", "--step", "[0, latest]", "--name", "[new, old]"]
    options += ["--rope_scaling.factor", "2", "--eps", "0.5", "--seed", "3", "--text", "a"]
    with pytest.raises(command.ConfigError, match="new: enough"):
        run(folder, *options, "--out", str(tmp_path / "out"))
    assert asked == [(place, None, "0", RopeScaling(2.0))]
    ((name, given),) = told
    assert name == "new"
    assert (given["eps"], given["seed"], given["prompts"], given["chunk"]) == (0.5, 3, 1, 16)
    config = command.PositionsConfig(
        run=(place,) * 2, step=(0, "latest"), name=("new", "old"), text="a"
    )
    assert [(s.name, s.step) for s in command._sources(config)] == [("new", "0"), ("old", "latest")]


def test_labelled_texts_take_the_place_of_needle_prompts(folder, undrawn, tmp_path):
    prompt = {"text": "The code is 417. It is 417", "queries": [23, 26]}
    prompt["parts"] = {"secret": [[12, 15]], "all else": [[0, 12], [15, 23]]}
    (tmp_path / "spans.json").write_text(json.dumps([prompt]))
    options = ["--run", "{folder}/run", "--labelled", str(tmp_path / "spans.json")]
    run(folder, *options, "--text", TEXT, "--out", str(tmp_path / "out"))
    assert {row.part for row in read_report(tmp_path / "out").masses} >= {"secret", "all else"}


def test_an_analysis_is_replaced_when_asked_and_nothing_else(folder, pages, tmp_path):
    out, theirs = tmp_path / "out", tmp_path / "theirs"
    again = lambda text, *more: run(
        folder, "--run", "{folder}/run", "--text", text, "--out", str(out), *more
    )
    again(TEXT)
    first = files(out)
    (out / "notes.md").write_text("mine")
    with pytest.raises(command.ConfigError, match=r"report.json exists; name a new folder"):
        again("no chunk")
    assert files(out) == first | {"notes.md": b"mine"}
    theirs.mkdir()
    (theirs / "ranges.png").write_text("theirs")
    (out / "figures").rename(tmp_path / "kept")
    (out / "figures").symlink_to(theirs)
    again("no chunk", "--overwrite")
    second = files(out)
    assert second.pop("notes.md") == b"mine"
    assert first.keys() - second.keys() == {"figures/patterns.png", "figures/patterns.svg"}
    assert read_report(out).correlations[0].tokens == len("no chunk")
    assert files(theirs) == {"ranges.png": b"theirs"}
    assert {path.name for path in out.iterdir()} == {*command._NAMES, "notes.md"}


def test_a_file_made_meanwhile_is_kept(folder, undrawn, monkeypatch, tmp_path):
    out = tmp_path / "out"
    monkeypatch.setattr(
        build, "write_page", lambda path, readings: (out / "report.json").write_text("somebody's")
    )
    with pytest.raises(command.ConfigError, match=r"report.json exists"):
        run(folder, "--run", "{folder}/run", "--text", TEXT, "--out", str(out))
    assert files(tmp_path) == {"out/report.json": b"somebody's"}


def test_serve_hands_over_loaded_models(folder, monkeypatch):
    served = []
    monkeypatch.setattr(page, "serve", lambda *given, **where: served.append((*given, where)))
    models = ["--run", "{folder}/run", "--model", "{folder}/rope"]
    run(folder, *models, "--serve", "--port", "0")
    (((ours, theirs), listening, where),) = served
    assert where == {"host": "127.0.0.1"}
    assert listening.fileno() == -1  # closed with the command
    assert (ours.name, theirs.name) == ("run", "rope")
    reading = repo_jax.analysis.read(ours.model, ours.params, ours.tokenizer, TEXT)
    assert reading.positions.shape == (2, 2, len(TEXT))
    assert theirs.model.config.kinds == ("rope",) * 3


def test_a_port_in_use_is_told_before_a_model_is_loaded(folder, monkeypatch):
    monkeypatch.setattr(command, "load", lambda source: pytest.fail("loaded"))
    with page.listen(port=0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(command.ConfigError, match=f"--port {port} is in use on 127.0.0.1"):
            run(folder, "--run", "{folder}/run", "--serve", "--port", str(port))


MISTAKES = [
    ([], "give --run (run directories), --model (folders or hub ids) or both"),
    (["--run", "{folder}/run"], "give one of --text_file, --text and --serve true"),
    (
        ["--run", "{folder}/run", "--text", "a", "--serve", "true"],
        "give one of --text_file, --text and --serve true",
    ),
    (["--run", "{folder}/run", "--text", ""], "--text is empty; give at least one character"),
    (
        ["--run", "{folder}/run", "--text_file", "{folder}/nowhere"],
        "--text_file {folder}/nowhere cannot be read as text: ",
    ),
    (
        ["--run", "{folder}/run", "--text_file", "{folder}/latin.txt"],
        "--text_file {folder}/latin.txt cannot be read as text: 'utf-8' codec can't decode",
    ),
    (
        ["--run", "{folder}/run", "--text_file", "{folder}/empty.txt"],
        "--text_file {folder}/empty.txt is empty; it must have at least one character",
    ),
    (["--run", "{folder}/no", "--text", "a"], "--run {folder}/no: there is no such folder"),
    (["--model", "{folder}/no", "--text", "a"], "there is no folder {folder}/no"),
    (
        ["--run", "[{folder}/run, {folder}/rope]", "--text", "a"],
        "{folder}/rope is no run directory: it has no config.yaml",
    ),
    (
        ["--run", "[{folder}/run, {folder}/run]", "--text", "a"],
        "two models are called run; give --name, a list of names",
    ),
    (
        ["--run", "{folder}/run", "--name", "[a, b]", "--text", "a"],
        "--name has 2 entries for 1 models; give 1",
    ),
    (
        ["--run", "{folder}/run", "--step", "[0, 1]", "--text", "a"],
        "--step has 2 entries for 1 runs; give 1",
    ),
    (["--run", "{folder}/run", "--step", "7", "--text", "a"], "step '7': "),
    (
        ["--run", "{folder}/run", "--tokenizer", "{folder}/no", "--text", "a"],
        "tokenizer '{folder}/no': there is no file {folder}/no;",
    ),
    (
        ["--run", "{folder}/run", "--tokenizer", "{folder}/rope", "--text", TEXT],
        "the tokenizer of run gives the token ",
    ),
    (
        ["--run", "{folder}/run", "--labelled", "{folder}/labelled.json", "--text", "a"],
        "{folder}/labelled.json must be a list of at least one object",
    ),
    (
        ["--run", "{folder}/run", "--layers", "[0, 2]", "--text", "a"],
        "--layers has 2; it must be 0 to 1",
    ),
    (
        ["--run", "{folder}/run", "--text", "a", "--needle_length", "9", "--prompts", "1"],
        "a needle prompt of 9 tokens is asked for; without filler it has ",
    ),
    (["--run", "{folder}/run", "--text", "a\udcff"], "--text has bytes that are not UTF-8"),
    (["--run", "{folder}/run", "--text", "a", "--name", ".."], "--name is '..'; it must have a"),
    (
        ["--run", "{folder}/run", "--text", "a", "--name", "[50, 250]"],
        "--name has 2 entries for 1 models; give 1",
    ),
    (["--run", "{folder}/run", "--text", "a", "--chunk", "0"], "--chunk is 0; it must be 1 or"),
    (["--run", "{folder}/run", "--text", "a", "--eps", "-1"], "--eps is -1.0; it must be 0 or"),
    (["--run", "{folder}/run", "--serve", "true", "--port", "99999"], "--port is 99999; it must"),
    (
        ["--run", "{folder}/run", "--text", "a", "--out", "{folder}/text.txt"],
        "--out {folder}/text.txt is a file; name a folder",
    ),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_mistakes_are_told_before_a_model_is_loaded(
    folder, options, message, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(command, "load", lambda source: pytest.fail("loaded"))
    monkeypatch.chdir(tmp_path)
    before = set(folder.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: run(folder, *options))
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("error: " + message.replace("{folder}", str(folder)))
    assert set(folder.rglob("*")) == before
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("package", "options", "extra"),
    [
        ("matplotlib", ["--text", "a"], "plots"),
        ("plotly", ["--text", "a"], "plots"),
        ("plotly", ["--serve", "true"], "serve"),
        ("starlette", ["--serve", "true"], "serve"),
        ("uvicorn", ["--serve", "true"], "serve"),
    ],
)
def test_a_missing_package_is_named_before_a_model_is_loaded(
    folder, package, options, extra, capsys, monkeypatch
):
    monkeypatch.setattr(command, "load", lambda source: pytest.fail("loaded"))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit):
        cli.run(lambda: run(folder, "--run", "{folder}/run", *options))
    error = capsys.readouterr().err
    assert f"needs the package {package!r}" in error
    assert f"repo-jax[{extra}]" in error


def test_the_table_says_what_the_rows_say():
    positions = np.zeros((3, 2, 8), np.float32)
    ids = np.zeros(8, np.int32)
    kinds = ("nope", "repo", "repo")
    reading = Reading("m", "x" * 8, ids, np.stack([ids, ids], 1), kinds, positions)
    ranges, patterns, correlations, masses = [], [], [], []
    for layer, head in ((1, 0), (1, 1), (2, 0), (2, 1)):
        size = 10.0 * layer + head
        ranges += [RangeRow("m", layer, head, n, 0.0, 1.0, size * n, 0, 0, 0) for n in (4, 8)]
        patterns.append(PatternRow("m", layer, head, 4, 0.2, 2, 0.5 * head, 0.5, 0.5 - 0.5 * head))
        known = None if layer == 2 else 0.25
        correlations.append(CorrelationRow("m", layer, head, 8, known, None))
    for layer in range(3):
        masses.append(MassRow("m", layer, 0, "needle", 0.01 * (layer + 1), 3, 1))
    masses.append(MassRow("another", 0, 0, "needle", 5.0, 3, 1))
    report = Report(*map(tuple, (ranges, patterns, correlations, masses)))
    title, *lines = command.table(reading, report).splitlines()
    assert title == "m: 8 tokens; needle: attention per token x 1e-2"
    assert [line.split() for line in lines] == [
        ["layer", "kind", "range", "constant", "monotonic", "hybrid", "correlation", "needle"],
        ["0", "nope", "-", "-", "-", "-", "-", "1.000"],
        ["1", "repo", "84.0", "0.25", "0.50", "0.25", "0.25", "2.000"],
        ["2", "repo", "164.0", "0.25", "0.50", "0.25", "-", "3.000"],
        ["all", "repo", "124.0", "0.25", "0.50", "0.25", "0.25", "2.000"],
    ]


@pytest.mark.parametrize("kind", ["single", "multikey"])
def test_needle_prompts_are_those_of_the_seed_and_kind(folder, undrawn, tmp_path, kind):
    """The attention of the report is that to the prompts of needle_prompt."""
    options = ["--run", "{folder}/run", "--text", "a", "--seed", "5", "--needle_length", "500"]
    run(folder, *options, "--needle_kind", kind, "--out", str(tmp_path / "out"))
    prompt = needle_prompt(byte_tokenizer(), 500, kind=kind, seed=5)
    model, params = repo_jax.load_run(folder / "run")
    mass = repo_jax.analysis.attention_mass(
        model, params, prompt.ids, prompt.labels, prompt.queries
    )
    for row in read_report(tmp_path / "out").masses:
        part = prompt.names.index(row.part)
        found = row.mass * row.tokens
        np.testing.assert_allclose(found, mass[row.layer, row.head, part], rtol=1e-4)


def test_it_is_a_module_and_a_console_script(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["positions", "--text_fiel", "a"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("repo_jax.positions", run_name="__main__")
    assert ended.value.code == 2
    assert "there is no option --text_fiel; did you mean --text_file?" in capsys.readouterr().err
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"]["repo-positions"] == f"{command.__name__}:{command.run.__name__}"
