"""Finds windows in which a few tokens are repeated over and over."""

import numpy as np

# OLMo's, and so the paper's.
MAX_PERIOD = 13


def repeats(tokens_BT: np.ndarray, count: int, max_period: int = MAX_PERIOD) -> np.ndarray:
    """Whether some tokens stand `count` times or more in a row, one copy after the other.

    What OLMo's training calls an instance filter, with `repetition_max_count` `count` and
    periods 1 to `max_period`: for a count of 3 or more it finds the same windows. Copies are
    whole: p tokens repeated need `count` * p tokens, each of which, after the first p, equals
    the one p before it.

    Args:
      tokens_BT: [B, T] ids.
      count: 2 or more.
      max_period: the longest n-gram looked for.

    Returns:
      bool [B].
    """
    found = np.zeros(len(tokens_BT), bool)
    for period in range(1, max_period + 1):
        run = (count - 1) * period
        # A run of equal pairs has a whole block of this size, wherever blocks begin.
        block = (run + 1) // 2
        length = max(0, tokens_BT.shape[1] - period)
        blocks = length // block
        if length < run:
            break
        pairs = tokens_BT[:, : blocks * block] == tokens_BT[:, period : period + blocks * block]
        candidates = pairs.reshape(len(tokens_BT), blocks, block).all(2).any(1) & ~found
        for row in np.flatnonzero(candidates):
            tokens_T = tokens_BT[row]
            equal = tokens_T[period:] == tokens_T[:-period]
            unequal = np.flatnonzero(np.concatenate([[True], ~equal, [True]]))
            found[row] = np.diff(unequal).max() > run
    return found
