"""Bootstrap intervals of means and of differences of means."""

from collections.abc import Callable, Sequence

import numpy as np

_LEVEL = 0.95


def mean_interval(
    values: Sequence[float], *, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the mean of `values`, [n].

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
) -> tuple[float, float]:
    """The same of any statistic of the examples, each of which may be anything."""
    rng, n = np.random.default_rng(seed), len(values)
    draws = rng.integers(n, size=(resamples, n))
    return _percentiles(np.array([statistic([values[i] for i in draw]) for draw in draws]))


def _percentiles(draws: np.ndarray) -> tuple[float, float]:
    tail = 100 * (1 - _LEVEL) / 2
    low, high = np.percentile(draws, [tail, 100 - tail])
    return float(low), float(high)
