"""Intervals of scores, of their differences and of other statistics of the examples."""

from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

_LEVEL = 0.95

# None twice where the values at hand say nothing of how others may be.
Interval = tuple[float, float] | tuple[None, None]


def score_interval(values: Sequence[float]) -> Interval:
    """The 95 % interval of the mean of the scores of examples, [n].

    Wilson's where all are 0 or 1, which is not of no width where all are right or wrong; else
    that of `mean_interval`. None for one example.
    """
    values = np.asarray(values, np.float64)
    n = len(values)
    if n == 1 or not np.isin(values, (0.0, 1.0)).all():
        return mean_interval(values)
    share = stats.binomtest(int(values.sum()), n).proportion_ci(_LEVEL, method="wilson")
    return float(share.low), float(share.high)


def mean_interval(values: Sequence[float], *, resamples: int = 10_000, seed: int = 0) -> Interval:
    """The 95 % percentile bootstrap interval of the mean of `values`, [n]; None if they are equal.

    For the difference of two systems on the same examples give the differences: pairs are
    then drawn together.
    """
    values, counts = np.unique(np.asarray(values, np.float64), return_counts=True)
    n, rng = counts.sum(), np.random.default_rng(seed)
    # Drawing n of n examples draws how often each value comes: far fewer numbers.
    means, batch = [], max(1, 2_000_000 // len(values))
    for start in range(0, resamples, batch):
        draws = rng.multinomial(n, counts / n, size=min(batch, resamples - start))
        means.append(draws @ values / n)
    return _percentiles(np.concatenate(means))


def statistic_interval(
    values: Sequence, statistic: Callable[[list], float], *, resamples: int = 1_000, seed: int = 0
) -> Interval:
    """The same of any statistic of the examples, each of which may be anything."""
    rng, n = np.random.default_rng(seed), len(values)
    draws = rng.integers(n, size=(resamples, n))
    return _percentiles(np.array([statistic([values[i] for i in draw]) for draw in draws]))


def _percentiles(draws: np.ndarray) -> Interval:
    tail = 100 * (1 - _LEVEL) / 2
    low, high = np.percentile(draws, [tail, 100 - tail])
    return (float(low), float(high)) if low < high else (None, None)


def shown(low: float | None, high: float | None, form: str, between: str) -> str:
    """An interval for a reader: both ends in this format, `-` where there is none."""
    return "-" if low is None else f"{low:{form}}{between}{high:{form}}"
