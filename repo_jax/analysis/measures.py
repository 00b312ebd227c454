"""Measures of positions, in numpy.

Positions are float [..., T], such as the [L, N, T] of `Reading`; every measure is of the last
axis, for all others at once, and takes memory in proportion to what it is given.
"""

import dataclasses

import numpy as np
import scipy.stats

_SHORTEST = 16


@dataclasses.dataclass(frozen=True)
class Ranges:
    """Where the tokens of a text stand.

    Attributes:
      low, high: float64 [...], smallest and largest z.
      low_whisker, high_whisker: float64 [...], smallest and largest z within 1.5 interquartile
        ranges of the quartiles, these interpolated linearly.
      outliers: int64 [...], tokens beyond the whiskers.
    """

    low: np.ndarray
    high: np.ndarray
    low_whisker: np.ndarray
    high_whisker: np.ndarray
    outliers: np.ndarray

    @property
    def range(self) -> np.ndarray:
        """high - low, float64 [...]."""
        return self.high - self.low


def position_ranges(positions: np.ndarray) -> Ranges:
    """Extremes, and whiskers by the 1.5 IQR rule (Tukey), of positions [..., T], T >= 1."""
    z = positions.astype(np.float64)
    quartiles = np.quantile(z, (0.25, 0.75), axis=-1)[..., None]
    reach = 1.5 * (quartiles[1] - quartiles[0])
    above, below = z >= quartiles[0] - reach, z <= quartiles[1] + reach
    return Ranges(
        low=z.min(-1),
        high=z.max(-1),
        low_whisker=np.where(above, z, np.inf).min(-1),
        high_whisker=np.where(below, z, -np.inf).max(-1),
        outliers=(~(above & below)).sum(-1),
    )


def prefix_lengths(length: int) -> list[int]:
    """Powers of two from 16 up to a text's length, and the length itself."""
    powers = [2**i for i in range(_SHORTEST.bit_length() - 1, length.bit_length())]
    return sorted({*powers, length})


@dataclasses.dataclass(frozen=True)
class Patterns:
    """Shares of chunks, float64 [...]; the three sum to 1. `chunks`: how many there are."""

    constant: np.ndarray
    monotonic: np.ndarray
    hybrid: np.ndarray
    chunks: int


def local_patterns(positions: np.ndarray, *, chunk: int = 16, eps: float = 0.2) -> Patterns:
    """The shapes of z within chunks that do not overlap (paper, section on learned patterns).

    A chunk is constant if all its z are within `eps` of their mean. Otherwise it is monotonic if
    z rises strictly, or falls strictly, from each token to the next. Otherwise it is hybrid.

    Args:
      positions: [..., T].
      chunk: tokens in a chunk; a last incomplete one is left out.
      eps: in units of z.

    Raises:
      ValueError: `chunk` is not 1 to T, or `eps` is negative.
    """
    T = positions.shape[-1]
    if not 1 <= chunk <= T:
        raise ValueError(f"chunk is {chunk}; it must be 1 to the {T} tokens of the text")
    if not eps >= 0:
        raise ValueError(f"eps is {eps}; it must be 0 or above")
    n = T // chunk
    z = positions[..., : n * chunk].astype(np.float64).reshape(*positions.shape[:-1], n, chunk)
    constant = (np.abs(z - z.mean(-1, keepdims=True)) <= eps).all(-1)
    steps = np.diff(z)
    monotonic = ((steps > 0).all(-1) | (steps < 0).all(-1)) & ~constant
    share = lambda of: of.mean(-1)
    return Patterns(share(constant), share(monotonic), share(~constant & ~monotonic), n)


def index_correlation(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pearson's and Spearman's correlation of positions [..., T] with 0 .. T - 1.

    Returns:
      Two float64 [...], NaN where all positions are equal.
    """
    index = np.arange(positions.shape[-1], dtype=np.float64)
    ranks = scipy.stats.rankdata(positions, axis=-1)
    varies = positions.min(-1) < positions.max(-1)
    pearson, spearman = (_pearson(x, index, varies) for x in (positions, ranks))
    return pearson, spearman


def _pearson(x, y, varies):
    x = x.astype(np.float64)
    x, y = x - x.mean(-1, keepdims=True), y - y.mean()
    scale = np.sqrt((x * x).sum(-1) * (y * y).sum())
    # Rounding may leave a constant x, less its mean, a little off zero.
    return np.where(varies, x @ y / np.where(varies, scale, 1.0), np.nan)


def centroids(positions: np.ndarray, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean position and the mean index of the tokens of each cell.

    Args:
      positions: [..., T].
      cells: int [T], 0 .. C - 1, each at least once; -1 where a token is in no cell.

    Returns:
      float64 [..., C] and float64 [C].
    """
    (at,) = np.nonzero(cells >= 0)
    counts = np.bincount(cells[at])
    index = np.bincount(cells[at], at) / counts
    z = positions[..., at].reshape(-1, len(at))
    z = np.stack([np.bincount(cells[at], row) for row in z]) / counts
    return z.reshape(*positions.shape[:-1], -1), index


def table_pairs(rows: int, columns: int) -> dict[str, np.ndarray]:
    """Pairs of the cells of a table, cell c being in row c // columns and column c % columns.

    Returns:
      int [2, pairs] of `same_row`, `same_column` and `unrelated`, which is neither; each pair
      of two cells once.
    """
    pairs = np.stack(np.triu_indices(rows * columns, 1))
    same_row = np.equal(*(pairs // columns))
    same_column = np.equal(*(pairs % columns))
    return {
        "same_row": pairs[:, same_row],
        "same_column": pairs[:, same_column],
        "unrelated": pairs[:, ~same_row & ~same_column],
    }


def distance_sums(points: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """The sum of |x_i - x_j| over pairs (i, j), int [2, pairs], of points x [..., C]: [...]."""
    return np.abs(points[..., pairs[0]] - points[..., pairs[1]]).sum(-1)
