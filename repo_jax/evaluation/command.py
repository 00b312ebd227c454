"""The eval command: held-out loss at several context lengths."""

import contextlib
import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from repo_jax import cli, plots, sharding
from repo_jax.config import DataConfig, DecoderConfig
from repo_jax.data import Data, Tokenizer, ValidationBatches, open_data, open_text, trim_tokens
from repo_jax.errors import ConfigError, MissingPackageError
from repo_jax.evaluation import by_position
from repo_jax.evaluation.config import EvalConfig
from repo_jax.evaluation.perplexity import Score, score
from repo_jax.inference.loading import check_step, config_of, folder_of, load, open_mesh
from repo_jax.progress import progress


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Scores a run or a model on held-out text.

    The same tokens are cut into windows of each context length, so that the rows differ in
    nothing else. The first token of a window is context only.

    Returns:
      `source`, `step` and `results`: one dict per context length with `context_length`,
      `loss` (nats per token), `perplexity`, `bits_per_byte` (None for token files),
      `targets` and `bytes`.

    Raises:
      ConfigError: nothing to score, or it does not fit.
    """
    data, mesh = _open(config)
    lengths = _lengths(config, data)
    shared = trim_tokens(data.validation, max(lengths), config.max_tokens)
    if not shared:
        raise ConfigError(_too_short(config, data, max(lengths)))
    loaded = load(config, config.dtype, mesh)
    results = []
    with sharding.use(loaded.mesh):
        for length in lengths:
            batches = ValidationBatches(
                shared,
                sequence_length=length,
                batch_size=sharding.even_rows(config.batch_tokens // length),
                document_mask=data.config.document_mask,
                eos_id=data.eos_id,
                vocab_size=loaded.model.config.vocab_size,
            )
            with progress(f"context {length}", len(batches), "batches") as update:
                counted = _counted(batches, update)
                found = score(loaded.model, loaded.params, counted, data.byte_lengths)
            results.append(_row(length, found))
    return {"source": config.run or config.model, "step": loaded.step, "results": results}


def evaluate_by_position(config: EvalConfig) -> tuple[list[by_position.Bin], int | None]:
    """Scores a run or a model by the distance of tokens into their documents.

    Returns:
      The bins of all context lengths, and the step of the run.

    Raises:
      ConfigError: nothing to score, or it does not fit.
    """
    data, mesh = _open(config)
    lengths = _lengths(config, data)
    if config.stride is not None and config.stride > min(lengths):
        raise ConfigError(
            f"--stride is {config.stride}; it must be at most the shortest context length, which "
            f"is {min(lengths)} unless --context_lengths is given"
        )
    # Of a token file the last windows are held out, which may begin within a document.
    cut = data.tokenizer is None and not data.config.validation_tokens
    documents = by_position.split_documents(
        data.validation, data.eos_id, config.max_tokens, cut=cut
    )
    if not documents:
        most = config.max_tokens
        within = "" if most is None else f" within --max_tokens, {most}"
        raise ConfigError(f"the held-out text has no document of two tokens or more{within}")
    loaded = load(config, config.dtype, mesh)
    bins = []
    with sharding.use(loaded.mesh):
        for length in lengths:
            bins += by_position.score_by_position(
                *(loaded.model, loaded.params, documents),
                context_length=length,
                stride=config.stride,
                batch_tokens=max(config.batch_tokens, length),
                byte_lengths=data.byte_lengths,
            )
    return bins, loaded.step


def _counted(items: Iterable[Any], update: Callable[[int], object]) -> Iterator[Any]:
    for item in items:
        yield item
        update(1)  # it has been scored


def _row(length: int, result: Score) -> dict[str, Any]:
    return {
        "context_length": length,
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "targets": result.targets,
        "bytes": result.bytes,
    }


def _lengths(config: EvalConfig, data: Data) -> tuple[int, ...]:
    trained_on = data.config.sequence_length
    return config.context_lengths or (trained_on // 2, trained_on, trained_on * 2)


def _too_short(config: EvalConfig, data: Data, length: int) -> str:
    """Why there is no window of the longest context length."""
    sizes, most = [len(tokens) for tokens in data.validation], config.max_tokens
    longest = max(sizes, default=0)
    if most is not None and most <= longest:
        return f"--max_tokens is {most}; it must be at least the longest context length, {length}"
    whose = "the held-out text" if len(sizes) < 2 else f"the longest of {len(sizes)} held-out files"
    return (
        f"{whose} has {longest} tokens, which is less than the longest of --context_lengths, "
        f"{length}"
    )


def _open(config: EvalConfig) -> tuple[Data, Mesh | None]:
    """All that can be wrong, before parameters are read, which may take minutes."""
    if config.run is None and not (config.text or config.tokens):
        raise ConfigError("--model needs --text or --tokens: what to evaluate it on")
    check_step(config)
    mesh = open_mesh(config, config.mesh)
    return _data(config, config_of(config)), mesh


def _data(config: EvalConfig, model: DecoderConfig) -> Data:
    if config.run is not None:
        from repo_jax.training.run_dir import read_config

        section = read_config(folder_of(config)).data
        if not (config.text or config.tokens):
            return open_data(section, model)
    else:
        section = DataConfig(sequence_length=model.trained_length)
    if config.tokens:
        section = dataclasses.replace(
            section, text=(), tokens=(), sources={}, validation_tokens=config.tokens
        )
        return open_data(section, model)
    section = dataclasses.replace(section, text=config.text, tokens=(), sources={})
    tokenizer = Tokenizer.load(config.tokenizer or folder_of(config))
    return open_text(section, tokenizer, model, max_tokens=config.max_tokens)


def table(report: dict[str, Any]) -> str:
    """The report for a reader."""
    lines = [f"{'context':>8} {'loss':>8} {'perplexity':>11} {'bits/byte':>10} {'targets':>10}"]
    for row in report["results"]:
        bits = "-" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
        lines.append(
            f"{row['context_length']:>8} {row['loss']:>8.4f} {row['perplexity']:>11.3f} "
            f"{bits:>10} {row['targets']:>10}"
        )
    return "\n".join(lines)


def _compare(arguments: Sequence[str]) -> None:
    from repo_jax.evaluation.harness import compare

    config, options = cli.parse(
        compare.CompareConfig, "eval.py --compare", compare.__doc__, arguments, _add_compare
    )
    outputs = () if config.output is None else (Path(config.output),)
    _check(outputs, config.overwrite)
    result = compare.compare(*options.compare, resamples=config.resamples, seed=config.seed)
    print(compare.table(result))
    if outputs:
        with _writing(outputs, config.overwrite):
            _write(outputs[0], result)


def _add_compare(parser) -> None:
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="Alone: two run directories that --tasks was done for; differences of scores.",
    )


def _evaluate_tasks(config: EvalConfig) -> None:
    try:
        from repo_jax.evaluation.harness import run
    except ImportError as error:
        raise MissingPackageError(error.name or "lm_eval", "--tasks", "eval") from None
    print(run.table(run.evaluate_tasks(config)))


def _by_position(config: EvalConfig) -> None:
    outputs = _outputs(config, "by_position", ".csv", ".png", ".svg")
    if outputs:
        plots.import_pyplot(by_position.PLOT)  # before the long work
    bins, step = evaluate_by_position(config)
    print(by_position.table(bins))
    if not outputs:
        return
    source = config.run or config.model
    report = {"source": source, "step": step, "stride": config.stride}
    with _writing(outputs, config.overwrite):
        _write(outputs[0], report | {"results": [dataclasses.asdict(b) for b in bins]})
        by_position.write_csv(outputs[1], bins)
        by_position.plot(outputs[0].with_suffix(""), bins, Path(source).name)


def _outputs(config: EvalConfig, name: str, *beside: str) -> tuple[Path, ...]:
    """The JSON file to write, and those beside it by their suffixes; checked before long work.

    In a run directory, where nobody has named it, a second one is `name-2`, and so on.
    """
    if config.output is None and config.run is None:
        return ()
    files = lambda output: (output, *(output.with_suffix(suffix) for suffix in beside))
    if config.output is None:
        folder = Path(config.run) / "evaluation"
        names = itertools.chain((name,), (f"{name}-{n}" for n in itertools.count(2)))
        free = (files(folder / f"{name}.json") for name in names)
        taken = lambda outputs: not config.overwrite and any(map(os.path.lexists, outputs))
        outputs = next(itertools.dropwhile(taken, free))
    else:
        outputs = files(Path(config.output))
    if outputs[0].suffix in beside:
        raise ConfigError(
            f"--output is {config.output}, which --{name} writes beside the JSON file; name a "
            ".json file"
        )
    _check(outputs, config.overwrite)
    return outputs


def _check(outputs: Sequence[Path], overwrite: bool) -> None:
    for path in outputs:
        cli.check_file("--output", path, overwrite=overwrite)


@contextlib.contextmanager
def _writing(outputs: Sequence[Path], overwrite: bool) -> Iterator[None]:
    _check(outputs, overwrite)  # they may have come meanwhile
    with cli.writing("--output"):
        outputs[0].parent.mkdir(parents=True, exist_ok=True)
        yield


def _write(output: Path, report: dict[str, Any]) -> None:
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {output}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table and writes the JSON."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "--compare" in arguments:
        return _compare(arguments)
    about = "Loss, perplexity and bits per byte on held-out text, or scores on tasks."
    config, _ = cli.parse(EvalConfig, "eval.py", about, arguments, _add_compare)
    if config.tasks:
        return _evaluate_tasks(config)
    if config.by_position:
        return _by_position(config)
    outputs = _outputs(config, "perplexity")
    report = evaluate(config)
    print(table(report))
    if outputs:
        with _writing(outputs, config.overwrite):
            _write(outputs[0], report)


def run() -> None:
    """The console script."""
    cli.run(main)
