"""The positions command: tables, figures and a page about a text, or the page live."""

import contextlib
import dataclasses
import importlib.util
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from repo_jax import cli, plots
from repo_jax.analysis import drawing, figures
from repo_jax.analysis.analyse import analyse, needle_prompts
from repo_jax.analysis.prompts import Labelled, NeedleKind, read_labelled
from repo_jax.analysis.reading import Reading
from repo_jax.analysis.records import TABLES, Report
from repo_jax.config import DecoderConfig, RopeScaling
from repo_jax.data import Tokenizer
from repo_jax.errors import ConfigError, MissingPackageError
from repo_jax.inference.loading import load

# What the command writes into its folder.
_NAMES = ("report.json", *(f"{table}.csv" for table in TABLES), "figures", "page.html")


@dataclasses.dataclass(frozen=True)
class PositionsConfig:
    """Which models, and which text they read.

    Several models are lists, runs first: `--run '[runs/rope, runs/repo]'`.

    Attributes:
      run: run directories.
      model: beside or instead of them, local folders or hub ids in Hugging Face's layout.
      text_file: the text to read.
      text: instead, the text itself.
      serve: instead, a page where texts can be typed, until Ctrl-C.
      name: of the models, as tables and figures call them. Empty: those of their folders.
      step: of runs: `latest`, `best`, or a number; one for all or one for each.
      revision: of hub ids.
      tokenizer: a tokenizer.json or its folder, one for all or one for each model. Empty: the
        run's or the model folder's.
      rope_scaling: YaRN, for contexts longer than the models were trained on.
      out: the folder to write to. None: `analysis` in the run directory; of a model, or of
        several, `analysis/<names>` here.
      overwrite: an analysis that is there is replaced.
      layers: whose curves are drawn, 0-based. None: some, spread over the depth.
      chunk: tokens of a chunk, for local patterns.
      eps: how far from the mean of its chunk a constant position may be.
      labelled: a JSON file of texts with parts to measure the attention on, instead of needle
        prompts; see `repo_jax.analysis.read_labelled`.
      needle_length: tokens of a needle prompt, at most. None: the model's `max_length`, but 512
        to 4096.
      needle_kind: `single`, one needle; `multikey`, with needles of other keys beside it.
      prompts: how many needle prompts, and how many tables.
      seed: of these.
      host: with `serve`, whom to listen to; 0.0.0.0 lets everyone in the network in.
      port: with `serve`.
    """

    run: tuple[str | int, ...] | str = ()
    model: tuple[str | int, ...] | str = ()
    text_file: str | None = None
    text: str | None = None
    serve: bool = False
    name: tuple[str | int, ...] | str = ()
    step: tuple[str | int, ...] | str = "latest"
    revision: str | None = None
    tokenizer: tuple[str | int, ...] | str = ()
    rope_scaling: RopeScaling | None = None
    out: str | None = None
    overwrite: bool = False
    layers: tuple[int, ...] | None = None
    chunk: int = 16
    eps: float = 0.2
    labelled: str | None = None
    needle_length: int | None = None
    needle_kind: NeedleKind = "single"
    prompts: int = 8
    seed: int = 0
    host: str = "127.0.0.1"
    port: int = 8000

    def __post_init__(self):
        for name in ("run", "model", "name", "step", "tokenizer"):
            value = getattr(self, name)
            listed = (value,) if isinstance(value, str) else value
            object.__setattr__(self, name, tuple(str(x) for x in listed if x != ""))
        n_models = len(self.run) + len(self.model)
        if not n_models:
            raise ConfigError("give --run (run directories), --model (folders or hub ids) or both")
        if (self.text_file, self.text, self.serve or None).count(None) != 2:
            raise ConfigError("give one of --text_file, --text and --serve true")
        if self.text == "":
            raise ConfigError("--text is empty; give at least one character")
        n_runs = max(1, len(self.run))
        for name, allowed in (
            ("name", {0, n_models}),
            ("step", {1, n_runs}),
            ("tokenizer", {0, 1, n_models}),
        ):
            if (given := len(getattr(self, name))) not in allowed:
                of = f"{n_runs} runs" if name == "step" else f"{n_models} models"
                many = " or ".join(map(str, sorted(allowed - {0})))
                raise ConfigError(f"--{name} has {given} entries for {of}; give {many}")
        for name, least in (("chunk", 1), ("eps", 0), ("prompts", 0), ("needle_length", 1)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ConfigError(f"--{name} is {value}; it must be {least} or above")
        if not 0 <= self.port < 65536:
            raise ConfigError(f"--port is {self.port}; it must be 0 to 65535")


@dataclasses.dataclass(frozen=True)
class _Source:
    """A model that is not loaded yet; `inference.loading.load` does that.

    Attributes:
      config: of the model.
      labelled: texts to measure the attention on, as its tokenizer cuts them.
    """

    name: str
    run: str | None
    model: str | None
    step: str
    revision: str | None
    rope_scaling: RopeScaling | None
    config: DecoderConfig
    tokenizer: Tokenizer
    labelled: Sequence[Labelled]


def _sources(config: PositionsConfig) -> list[_Source]:
    """The models, everything about them but their parameters read."""
    places = [("run", run) for run in config.run] + [("model", model) for model in config.model]
    steps = config.step if len(config.step) == len(config.run) else config.step * len(config.run)
    steps = [*steps, *["latest"] * len(config.model)]
    tokenizers = config.tokenizer or (None,)
    tokenizers = tokenizers * len(places) if len(tokenizers) == 1 else tokenizers
    names = config.name or [Path(place).resolve().name for _, place in places]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two models are called {name}; give --name, a list of names")
        if not re.search(r"\w", name):
            raise ConfigError(f"--name is {name!r}; it must have a letter or a digit")
    sources = []
    for (kind, place), name, step, tokenizer in zip(places, names, steps, tokenizers, strict=True):
        read = _read_run if kind == "run" else _read_model
        found, folder = read(place, step if kind == "run" else config.revision)
        tokenizer = Tokenizer.load(tokenizer or folder)
        where = {"run": None, "model": None, kind: place}
        scaling = dict(revision=config.revision, rope_scaling=config.rope_scaling)
        if config.labelled:
            labelled = read_labelled(config.labelled, tokenizer)
        else:
            labelled = needle_prompts(
                *(tokenizer, found.trained_length, config.needle_length, config.needle_kind),
                prompts=config.prompts,
                seed=config.seed,
            )
        for text in labelled:
            _check_ids(text.ids, name, found)
        sources.append(
            _Source(
                name,
                **where,
                step=step,
                **scaling,
                config=found,
                tokenizer=tokenizer,
                labelled=labelled,
            )
        )
    return sources


def _read_run(run: str, step: str) -> tuple[DecoderConfig, Path]:
    from repo_jax.training.checkpoints import Checkpoints
    from repo_jax.training.run_dir import read_config

    if not Path(run).is_dir():
        raise ConfigError(f"--run {run}: there is no such folder")
    config = read_config(Path(run))
    with Checkpoints(Path(run), checkpoint_dir=config.training.checkpoint_dir) as checkpoints:
        checkpoints.find(step)
    return config.model, Path(run)


def _read_model(model: str, revision: str | None) -> tuple[DecoderConfig, Path]:
    from repo_jax.interop.checkpoint import Checkpoint
    from repo_jax.interop.hub import locate
    from repo_jax.interop.load import resolve_config

    folder = locate(model, revision)
    return resolve_config(Checkpoint(folder), None, None)[1], folder


def _text(config: PositionsConfig) -> str:
    if config.text is None:
        return cli.read_text("--text_file", config.text_file)
    try:
        config.text.encode()
    except UnicodeEncodeError:
        raise ConfigError("--text has bytes that are not UTF-8; give it as a file") from None
    return config.text


def _check_ids(ids: Sequence[int], name: str, model: DecoderConfig) -> None:
    if not len(ids):
        raise ConfigError(f"the tokenizer of {name} finds no token in the text")
    if max(ids) >= model.vocab_size:
        raise ConfigError(
            f"the tokenizer of {name} gives the token {max(ids)}; the model has "
            f"{model.vocab_size}; give the --tokenizer it was trained with"
        )


def _check_layers(layers: Sequence[int], sources: Sequence[_Source]) -> None:
    depth = max(source.config.n_layers for source in sources)
    for layer in layers:
        if not 0 <= layer < depth:
            raise ConfigError(f"--layers has {layer}; it must be 0 to {depth - 1}")


def _out(config: PositionsConfig, names: Sequence[str]) -> Path:
    """Where to write.

    Raises:
      ConfigError: it is no folder, or has an analysis that is not to be overwritten.
    """
    if config.out is not None:
        out = Path(config.out)
    elif config.run and len(names) == 1:
        out = Path(config.run[0]) / "analysis"
    else:
        out = Path("analysis") / re.sub(r"[^\w+-]+", "_", "-".join(names))[:100]
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; name a folder")
    _check_new(out, config.overwrite)
    return out


def _check_new(out: Path, overwrite: bool) -> None:
    for name in _NAMES:
        cli.check_new("--out", out / name, overwrite=overwrite, kind="folder")


@contextlib.contextmanager
def _whole(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write into, whose content is put into `out` when it is complete."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=".", dir=out)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}") from None
    with scratch as folder:
        new, old = Path(folder) / "new", Path(folder) / "old"
        new.mkdir()
        old.mkdir()
        yield new
        _check_new(out, overwrite)  # it may have come meanwhile
        for path in sorted(new.iterdir()):
            # Moved away first: a folder, or a link to one, cannot be replaced.
            if os.path.lexists(out / path.name):
                os.rename(out / path.name, old / path.name)
            os.rename(path, out / path.name)


def _analyse(config: PositionsConfig) -> None:
    from repo_jax.analysis.page.build import write_page

    text = _text(config)
    plots.import_pyplot(drawing.FEATURE)
    if importlib.util.find_spec("plotly") is None:
        raise MissingPackageError("plotly", "the page", "plots")
    sources = _sources(config)
    for source in sources:
        _check_ids(source.tokenizer.encode(text), source.name, source.config)
    _check_layers(config.layers or (), sources)
    out = _out(config, [source.name for source in sources])

    readings, report = [], Report()
    options = {name: getattr(config, name) for name in ("prompts", "chunk", "eps", "seed")}
    with _whole(out, config.overwrite) as made:
        for source in sources:
            print(f"{source.name}: loading, reading, measuring", file=sys.stderr)
            loaded = load(source)
            arguments = (loaded.model, loaded.params, source.tokenizer, text)
            try:
                reading, rows = analyse(
                    *arguments, name=source.name, labelled=source.labelled, **options
                )
            except ConfigError:
                raise
            except ValueError as error:
                raise ConfigError(f"{source.name}: {error}") from None
            readings.append(reading)
            report += rows
            del loaded, arguments  # one at a time is in memory
        print("drawing", file=sys.stderr)
        report.write(made)
        drawn = figures.draw_all(readings, report, made / "figures", layers=config.layers)
        write_page(made / "page.html", readings)
    for reading in readings:
        print(table(reading, report), end="\n\n")
    print(f"{out}/page.html: to explore in a browser")
    print(f"{out}/report.json, *.csv: all numbers, by layer and head")
    print(f"{out}/figures: {', '.join(path.stem for path in drawn)}, as PNG and SVG")


def _serve(config: PositionsConfig) -> None:
    from repo_jax.analysis.page import Served, listen, serve

    with listen(config.host, config.port) as listening:
        models = []
        for source in _sources(config):
            print(f"{source.name}: loading", file=sys.stderr)
            loaded = load(source)
            models.append(Served(source.name, loaded.model, loaded.params, source.tokenizer))
        serve(models, listening, host=config.host)


def table(reading: Reading, report: Report) -> str:
    """A model's numbers for a reader: a line a layer, over its heads.

    Ranges and correlations are medians, of the whole text; shares of patterns and attention, in
    hundredths per token of each part, are means. The last line is of all layers with learned
    positions; its attention is of all layers, as in the paper's table 4.
    """
    mine = {
        name: [row for row in getattr(report, name) if row.model == reading.name]
        for name in ("ranges", "patterns", "correlations", "masses")
    }
    n_tokens = reading.positions.shape[2]
    parts = list(dict.fromkeys(row.part for row in mine["masses"]))
    patterns = ("constant", "monotonic", "hybrid")
    columns = ["layer", "kind", "range", *patterns, "correlation", *(part[:12] for part in parts)]
    lines = [columns]
    every = range(len(reading.kinds))
    learned = [i for i in every if reading.kinds[i] == "repo"]
    groups = [(str(i), reading.kinds[i], [i], [i]) for i in every]
    if learned:
        groups.append(("all", "repo", learned, every))

    def cell(how, table: str, layers: Sequence[int], value, digits: int) -> str:
        found = [value(row) for row in mine[table] if row.layer in layers]
        found = [number for number in found if number is not None]
        return f"{how(found):.{digits}f}" if found else "-"

    for label, kind, layers, attending in groups:
        whole = lambda row: row.range if row.tokens == n_tokens else None
        share = lambda pattern: lambda row: getattr(row, pattern)
        mass = lambda part: lambda row: 100 * row.mass if row.part == part else None
        pearson = lambda row: row.pearson
        median, mean = statistics.median, statistics.fmean
        lines.append(
            [
                *(label, kind, cell(median, "ranges", layers, whole, 1)),
                *(cell(mean, "patterns", layers, share(name), 2) for name in patterns),
                cell(median, "correlations", layers, pearson, 2),
                *(cell(mean, "masses", attending, mass(part), 3) for part in parts),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ("  ".join(map(str.rjust, line, widths)) for line in lines)
    unit = f"; {', '.join(parts)}: attention per token x 1e-2" if parts else ""
    return "\n".join([f"{reading.name}: {n_tokens} tokens{unit}", *rows])


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the analysis and prints its summary, or serves the page."""
    about = "Shows where models place the tokens of a text, and what they look at."
    config, _ = cli.parse(PositionsConfig, "positions", about, arguments)
    _serve(config) if config.serve else _analyse(config)


def run() -> None:
    """The console script."""
    cli.run(main)
