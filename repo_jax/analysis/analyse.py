"""All measures of one model on one text."""

import sys
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from repo_jax.analysis import measures
from repo_jax.analysis.attention_mass import attention_mass, visible_tokens
from repo_jax.analysis.prompts import Labelled, NeedleKind, Table, needle_prompt, table_prompt
from repo_jax.analysis.reading import Reading, read, read_positions
from repo_jax.analysis.records import (
    CorrelationRow,
    DistanceRow,
    MassRow,
    PatternRow,
    RangeRow,
    Report,
)
from repo_jax.data import Tokenizer
from repo_jax.errors import ConfigError
from repo_jax.modeling import RePoLM

# As in the paper; and what a prompt without filler takes at most, also in bytes.
_LONGEST_NEEDLE, _SHORTEST_NEEDLE = 4096, 512
_TABLE = dict(rows=8, columns=5)


def analyse(
    model: RePoLM,
    params,
    tokenizer: Tokenizer,
    text: str,
    *,
    name: str,
    needle_length: int | None = None,
    needle_kind: NeedleKind = "single",
    prompts: int = 8,
    chunk: int = 16,
    eps: float = 0.2,
    seed: int = 0,
    labelled: Sequence[Labelled] = (),
) -> tuple[Reading, Report]:
    """Reads a text, and prompts made here, and measures positions and attention.

    Ranges are of the text's beginnings, patterns and correlations of all of it; attention mass is
    on needle prompts, distances in tables. Neither depends on the text. A model that was not
    trained to find needles or to read tables is measured all the same.

    Memory grows with the length, not with its square.

    Args:
      model, params: as `from_pretrained` or `load_run` returns them.
      tokenizer: that of the model.
      text: as in `read`.
      name: of the model, in all rows.
      needle_length: tokens of a needle prompt, at most. None: the model's `max_length`, but 512
        to 4096.
      needle_kind: as in `needle_prompt`.
      prompts: how many needle prompts, and how many tables; 0: none.
      chunk, eps: of `measures.local_patterns`. A text shorter than a chunk has no patterns.
      seed: of the first needle prompt and of the first table; each following has the next one.
      labelled: texts to measure attention mass on, instead of needle prompts.

    Returns:
      The text as the model reads it, and the rows.

    Raises:
      ConfigError: `chunk`, `eps` or `prompts` is out of range, no needle prompt is as short as
        `needle_length`, the tokenizer lacks words of the prompts, or the model's positions or its
        attention are not finite.
      ValueError: as `read` raises it, for the text or a prompt.
    """
    for what, value, least in (("chunk", chunk, 1), ("eps", eps, 0), ("prompts", prompts, 0)):
        if not value >= least:
            raise ConfigError(f"{what} is {value}; it must be {least} or above")
    if not labelled:
        length = model.config.trained_length
        labelled = needle_prompts(
            *(tokenizer, length, needle_length, needle_kind), prompts=prompts, seed=seed
        )
    tables = [table_prompt(tokenizer, **_TABLE, seed=s) for s in range(seed, seed + prompts)]
    _check_vocabulary(tokenizer, [table.text for table in tables], prompts)

    reading = read(model, params, tokenizer, text, name=name)
    positioned = [i for i, kind in enumerate(reading.kinds) if kind not in ("nope", "cope")]
    ranges, patterns, correlations = [], [], []
    for layer in positioned:
        z_NT = reading.positions[layer]
        if not np.isfinite(z_NT).all():
            raise ConfigError(
                f"the model {name} gives positions in layer {layer} that are not finite numbers"
            )
        ranges += _ranges(name, layer, z_NT)
        patterns += _patterns(name, layer, z_NT, chunk, eps) if chunk <= z_NT.shape[1] else ()
        correlations += _correlations(name, layer, z_NT)
    masses = _masses(model, params, name, labelled)
    distances = _distances(model, params, name, positioned, tables)
    return reading, Report(*map(tuple, (ranges, patterns, correlations, masses, distances)))


def needle_prompts(
    tokenizer: Tokenizer,
    max_length: int,
    needle_length: int | None,
    needle_kind: NeedleKind,
    *,
    prompts: int,
    seed: int,
) -> list[Labelled]:
    """The needle prompts of `analyse`, for a model of this `max_length`."""
    if needle_length is None:
        needle_length = min(max(max_length, _SHORTEST_NEEDLE), _LONGEST_NEEDLE)
    made = [
        needle_prompt(tokenizer, needle_length, kind=needle_kind, seed=seed + i)
        for i in range(prompts)
    ]
    _check_vocabulary(tokenizer, [prompt.text for prompt in made], prompts)
    return made


def _check_vocabulary(tokenizer: Tokenizer, texts: Sequence[str], prompts: int) -> None:
    for text in texts:
        if (unknown := tokenizer.unknown_in(text)) is not None:
            raise ConfigError(
                f"prompts is {prompts}; it must be 0, since the model's tokenizer cannot write the "
                f"prompts made here: it has no token for {unknown!r}"
            )


def _shown(items, what: str):
    return tqdm(items, what, leave=False, disable=not sys.stderr.isatty())


def _ranges(name: str, layer: int, z_NT: np.ndarray):
    for tokens in measures.prefix_lengths(z_NT.shape[1]):
        r = measures.position_ranges(z_NT[:, :tokens])
        columns = (r.low, r.high, r.range, r.low_whisker, r.high_whisker, r.outliers)
        yield from (
            RangeRow(name, layer, head, tokens, *(column[head].item() for column in columns))
            for head in range(len(z_NT))
        )


def _patterns(name: str, layer: int, z_NT: np.ndarray, chunk: int, eps: float):
    p = measures.local_patterns(z_NT, chunk=chunk, eps=eps)
    for head, shares in enumerate(zip(p.constant, p.monotonic, p.hybrid, strict=True)):
        yield PatternRow(name, layer, head, chunk, float(eps), p.chunks, *map(float, shares))


def _correlations(name: str, layer: int, z_NT: np.ndarray):
    for head, found in enumerate(zip(*measures.index_correlation(z_NT), strict=True)):
        known = (None if np.isnan(value) else float(value) for value in found)
        yield CorrelationRow(name, layer, head, z_NT.shape[1], *known)


def _masses(model: RePoLM, params, name: str, prompts: Sequence[Labelled]):
    found: dict[str, list] = {}
    for prompt in _shown(prompts, "attention mass"):
        mass_LNP = attention_mass(model, params, prompt.ids, prompt.labels, prompt.queries)
        if not np.isfinite(mass_LNP).all():
            raise ConfigError(f"the model {name} gives attention that is not a finite number")
        seen = visible_tokens(prompt.labels, prompt.queries)
        for part, part_name in enumerate(prompt.names):
            if seen[part]:
                per_token = mass_LNP[:, :, part] / seen[part]
                found.setdefault(part_name, []).append((per_token, seen[part]))
    for layer, head in np.ndindex(model.config.n_layers, model.config.n_heads):
        for part_name, each in found.items():
            mass = np.mean([per_token[layer, head] for per_token, _ in each])
            tokens = np.mean([seen for _, seen in each])
            yield MassRow(name, layer, head, part_name, float(mass), float(tokens), len(each))


def _distances(model: RePoLM, params, name: str, layers, tables: Sequence[Table]):
    if not layers or not tables:
        return
    relations = measures.table_pairs(**_TABLE)
    z_sums, index_sums = dict.fromkeys(relations, 0.0), dict.fromkeys(relations, 0.0)
    for table in _shown(tables, "tables"):
        positions = read_positions(model, params, table.ids)[layers]
        z, index = measures.centroids(positions, table.cells)
        for relation, pairs in relations.items():
            z_sums[relation] += measures.distance_sums(z, pairs)
            index_sums[relation] += measures.distance_sums(index, pairs)
    n = {relation: len(tables) * pairs.shape[1] for relation, pairs in relations.items()}
    ratio = lambda x, to: float(x / to) if to else None
    for i, layer in enumerate(layers):
        for head in range(model.config.n_heads):
            for relation, count in n.items():
                z, index = z_sums[relation][i, head] / count, index_sums[relation] / count
                to_z = z_sums["unrelated"][i, head] / n["unrelated"]
                to_index = index_sums["unrelated"] / n["unrelated"]
                distances = (float(z), float(index), ratio(z, to_z), ratio(index, to_index))
                yield DistanceRow(name, layer, head, relation, count, *distances)
