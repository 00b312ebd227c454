"""Loss by how far into its document a token stands."""

import csv
import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from repo_jax import plots, sharding
from repo_jax.evaluation.perplexity import log_probabilities
from repo_jax.modeling import RePoLM
from repo_jax.progress import progress

_RESAMPLES = 1000

# What plots are drawn for, should matplotlib be missing.
PLOT = "the plot of --by_position"


@dataclasses.dataclass(frozen=True)
class Bin:
    """Tokens at distances first .. last from the start of their document, both included.

    Attributes:
      context_length: tokens that the model saw at most, the predicted one not counted.
      first, last: the document's first token is at distance 0, and is not predicted.
      tokens, documents: how many were scored.
      loss: nats per token.
      low, high: 95 % bootstrap interval of the loss, documents resampled; None for one document.
      bits_per_byte: None where bytes are not known.
    """

    context_length: int
    first: int
    last: int
    tokens: int
    documents: int
    loss: float
    low: float | None
    high: float | None
    bits_per_byte: float | None


def split_documents(
    tokens: Sequence[np.ndarray],
    eos_id: int | None,
    max_tokens: int | None = None,
    *,
    cut: bool = False,
) -> list[np.ndarray]:
    """Documents of at least two tokens, each with the eos that ends it.

    Args:
      tokens: [tokens] each.
      eos_id: what ends a document; None: each array is one.
      max_tokens: of these, from the start; the last document may be cut. None: all.
      cut: the arrays begin anywhere, so what comes before the first eos of each is left out:
        how far it is into its document is not known.
    """
    documents, left = [], math.inf if max_tokens is None else max_tokens
    for array in tokens:
        array = np.asarray(array[: int(min(left, len(array)))])
        left -= len(array)
        ends = [] if eos_id is None else np.flatnonzero(array == eos_id) + 1
        parts = np.split(array, ends)[int(cut) :]
        documents += (part for part in parts if len(part) > 1)
    return documents


def windows(length: int, context_length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """How a document of `length` tokens is cut.

    Yields:
      start, first, end: tokens start .. end - 1 are seen and first .. end - 1 predicted, each
      once over all windows. Those beyond the first window see `context_length` - `stride` + 1
      tokens or more.
    """
    start, first = 0, 1
    while first < length:
        end = min(start + context_length + 1, length)
        yield start, first, end
        start, first = start + stride, end


def score_by_position(
    model: RePoLM,
    params,
    documents: Sequence[np.ndarray],
    *,
    context_length: int,
    stride: int | None = None,
    batch_tokens: int = 16_384,
    byte_lengths: np.ndarray | None = None,
    seed: int = 0,
) -> list[Bin]:
    """Loss as a function of the true distance into the document, across windows.

    Args:
      model, params: as `from_pretrained` or `load_run` returns them; on a mesh, inside
        `sharding.use`.
      documents: int [tokens] each, as `split_documents` gives them.
      context_length: tokens that the model sees at most.
      stride: tokens between the starts of two windows of a document; smaller ones give each
        token more context and take longer. None: half the context length.
      batch_tokens: in a batch.
      byte_lengths: as in `perplexity.score`.
      seed: of the bootstrap.

    Returns:
      A bin for each power of two: distances 1, 2 to 3, 4 to 7, and so on.

    Raises:
      ValueError: `stride` is not 1 .. context_length, or there is no document.
    """
    stride = max(1, context_length // 2) if stride is None else stride
    if not 1 <= stride <= context_length:
        raise ValueError(f"stride is {stride}; it must be 1 to context_length ({context_length})")
    if not documents:
        raise ValueError("documents is empty; it must have one of two tokens or more")
    n_bins = int(max(map(len, documents)) - 1).bit_length()
    # A row a document, a column a bin.
    nll, counts, n_bytes = np.zeros((3, len(documents), n_bins))
    for document, at, losses in _losses(
        model, params, documents, context_length, stride, batch_tokens
    ):
        which = np.frexp(at)[1] - 1  # floor of the binary logarithm
        np.add.at(nll[document], which, losses)
        np.add.at(counts[document], which, 1)
        if byte_lengths is not None:
            lengths = np.pad(byte_lengths, (0, model.config.vocab_size - len(byte_lengths)))
            np.add.at(n_bytes[document], which, lengths[documents[document][at]])
    low, high = _intervals(nll, counts, seed)
    bins = []
    for i in range(n_bins):
        total, n, size = nll[:, i].sum(), int(counts[:, i].sum()), n_bytes[:, i].sum()
        several = (counts[:, i] > 0).sum() > 1
        bins.append(
            Bin(
                context_length=context_length,
                first=2**i,
                last=2 ** (i + 1) - 1,
                tokens=n,
                documents=int((counts[:, i] > 0).sum()),
                loss=float(total / n),
                low=float(low[i]) if several else None,
                high=float(high[i]) if several else None,
                bits_per_byte=float(total / math.log(2) / size) if size else None,
            )
        )
    return bins


def _losses(model, params, documents, context_length, stride, batch_tokens):
    """Document, distances [n] and losses [n], for each window."""
    cut = [
        (i, *window)
        for i, document in enumerate(documents)
        for window in windows(len(document), context_length, stride)
    ]
    width_of = lambda start, end: max(16, 1 << (end - start - 2).bit_length())
    by_width: dict[int, list] = {}
    for window in cut:
        by_width.setdefault(width_of(window[1], window[3]), []).append(window)
    with progress(f"context {context_length}", len(cut), "windows") as update:
        for width, members in sorted(by_width.items(), reverse=True):
            rows = sharding.even_rows(batch_tokens // width)
            for begin in range(0, len(members), rows):
                batch = members[begin : begin + rows]
                tokens, targets = np.zeros((2, rows, width), np.int32)
                for row, (i, start, _, end) in enumerate(batch):
                    tokens[row, : end - start - 1] = documents[i][start : end - 1]
                    targets[row, : end - start - 1] = documents[i][start + 1 : end]
                at = np.broadcast_to(np.arange(width, dtype=np.int32), tokens.shape)
                found, _ = log_probabilities(model, params, tokens, at, targets)
                found = -np.asarray(found, np.float64)
                for row, (i, start, first, end) in enumerate(batch):
                    part = slice(first - start - 1, end - start - 1)
                    yield i, np.arange(first, end), found[row, part]
                update(len(batch))


def _intervals(nll, counts, seed: int):
    """95 % bootstrap intervals of sum(nll) / sum(counts) [2, bins], documents resampled.

    Tokens of a document are alike, so resampling them would promise too much.
    """
    rng = np.random.default_rng(seed)
    n = len(nll)
    ratios = np.empty((_RESAMPLES, nll.shape[1]))
    for i in range(_RESAMPLES):
        times = np.bincount(rng.integers(n, size=n), minlength=n)
        with np.errstate(invalid="ignore"):
            ratios[i] = (times @ nll) / (times @ counts)
    known = ~np.isnan(ratios).all(axis=0)
    low, high = np.full((2, nll.shape[1]), np.nan)
    low[known], high[known] = np.nanquantile(ratios[:, known], (0.025, 0.975), axis=0)
    return low, high


def table(bins: Sequence[Bin]) -> str:
    """The bins for a reader."""
    lines = [
        f"{'context':>8} {'distance':>15} {'loss':>8}  {'95 %':<17} {'bits/byte':>9} "
        f"{'tokens':>9} {'documents':>9}"
    ]
    for b in bins:
        interval = "-" if b.low is None else f"{b.low:.4f} - {b.high:.4f}"
        bits = "-" if b.bits_per_byte is None else f"{b.bits_per_byte:.4f}"
        lines.append(
            f"{b.context_length:>8} {f'{b.first} - {b.last}':>15} {b.loss:>8.4f}  {interval:<17} "
            f"{bits:>9} {b.tokens:>9} {b.documents:>9}"
        )
    return "\n".join(lines)


def write_csv(path: Path, bins: Sequence[Bin]) -> None:
    """One line a bin, with the names of `Bin`'s attributes above."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Bin)])
        writer.writeheader()
        writer.writerows(map(dataclasses.asdict, bins))


def plot(path: Path, bins: Sequence[Bin], title: str) -> None:
    """Writes a curve for each context length as PNG and SVG; `path` has no suffix.

    Raises:
      MissingPackageError: matplotlib is not installed.
    """
    pyplot = plots.import_pyplot(PLOT)
    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    lengths = sorted({b.context_length for b in bins})
    for i, length in enumerate(lengths):
        mine = [b for b in bins if b.context_length == length]
        color, marker = plots.COLORS[i % 6], plots.MARKERS[i % 6]
        middle = [math.sqrt(b.first * b.last) for b in mine]
        style = dict(color=color, marker=marker, ms=4, lw=1.4)
        axes.plot(middle, [b.loss for b in mine], label=f"context {length}", **style)
        edges = [(m, b.low, b.high) for m, b in zip(middle, mine, strict=True) if b.low is not None]
        if edges:
            axes.fill_between(*zip(*edges, strict=True), color=color, alpha=0.15, lw=0)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens into the document", ylabel="loss (nats per token)", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    plots.save(figure, path)
