"""Which source of a mixture has which place in the order: exact proportions at every moment."""

import functools
import heapq
import math
import sys
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

# Places after which the pattern of sources starts again, at most: a table holds one for each.
_LONGEST_PERIOD = 2**18


class Mixture:
    """From a place in the order, 0, 1, ..., to a source and a number within that source.

    Of the first n places a source has its share of n, less or more than one at most, for every
    n: it is scheduled as a proportionately fair task is (Baruah et al., "Proportionate
    progress", Algorithmica 1996). Each of its turns has a first and a last place that keep it
    within one of its share, and the turn whose last place comes first is next. The order
    depends on the weights alone.

    Weights are scaled to whole numbers, exactly where their sum becomes 2**18 at most, as that
    of decimals like 0.45 and 3.2 does, else rounded to such a sum, none of them to 0.

    It is what `grain.MapDataset.select_from_datasets` takes.

    Args:
      weights: positive, one for each source, in any unit.
    """

    def __init__(self, weights: Sequence[float]):
        self._turns = _whole(weights)

    @property
    def shares(self) -> list[float]:
        """The share of each source; they sum to 1."""
        return [turns / sum(self._turns) for turns in self._turns]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, place: int) -> tuple[int, int]:
        source_P, number_P = self._period
        period, at = divmod(place, len(source_P))
        source = int(source_P[at])
        return source, period * self._turns[source] + int(number_P[at])

    @functools.cached_property
    def _period(self) -> tuple[np.ndarray, np.ndarray]:
        """Source and number within the source of each place of the first period."""
        source_P = _schedule(self._turns)
        number_P = np.empty_like(source_P)
        for source, turns in enumerate(self._turns):
            number_P[source_P == source] = np.arange(turns)
        return source_P, number_P


def _whole(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the same proportions, or nearly so; see `Mixture`."""
    exact = [Fraction(repr(float(weight))) for weight in weights]  # 0.1 is a tenth
    shares = [weight / sum(exact) for weight in exact]
    period = math.lcm(*(share.denominator for share in shares))
    if period > _LONGEST_PERIOD:
        return [max(1, round(share * _LONGEST_PERIOD)) for share in shares]
    return [int(share * period) for share in shares]


def _schedule(turns: Sequence[int]) -> np.ndarray:
    """The source of each place: int32 [sum of turns]."""
    period = sum(turns)
    order = np.empty(period, np.int32)
    # Turn j of a source may come from place j * period // turns on, and must have come at
    # place ceil((j + 1) * period / turns) - 1: to whole places, that is when n times its share
    # passes j, and when it reaches j + 1.
    taken = [0] * len(turns)
    waiting = [(0, source) for source in range(len(turns))]
    ready: list[tuple[int, int]] = []
    for place in range(period):
        while waiting and waiting[0][0] <= place:
            source = heapq.heappop(waiting)[1]
            last = -(-(taken[source] + 1) * period // turns[source]) - 1
            heapq.heappush(ready, (last, source))
        source = heapq.heappop(ready)[1]
        order[place] = source
        taken[source] += 1
        heapq.heappush(waiting, (taken[source] * period // turns[source], source))
    return order
