"""Which layers are scanned together.

Layers of one pattern, repeated, are one `lax.scan` whose body holds the pattern once, so
the compiled program does not grow with depth. All presets take at most two scans, the
second of r2n1 and n2r1 being the one or two layers left over.
"""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Segment:
    """Layers start .. start + len(pattern) * repeats - 1: `pattern`, `repeats` times."""

    start: int
    pattern: tuple[str, ...]
    repeats: int


def plan(kinds: Sequence[str]) -> list[Segment]:
    """Cuts the layers into repeated patterns with the fewest layer bodies to compile.

    Ties go to fewer segments, then to whole patterns first. Shortest paths over cut points:
    O(L^3), L being tens.
    """
    best: list[tuple[int, list[Segment]]] = [(0, [])]
    for end in range(1, len(kinds) + 1):
        options = []
        for start in range(end):
            cost, before = best[start]
            layers = tuple(kinds[start:end])
            period = _period(layers)
            segment = Segment(start, layers[:period], len(layers) // period)
            options.append((cost + period, [*before, segment]))
        best.append(min(options, key=lambda o: (o[0], len(o[1]), _length(o[1][-1]))))
    segments = best[-1][1]
    # What is left after the last whole pattern is not worth a loop of its own.
    if len(segments) > 1 and _length(segments[-1]) < len(segments[-2].pattern):
        rest = segments[-1]
        segments[-1] = Segment(rest.start, rest.pattern * rest.repeats, 1)
    return segments


def _length(segment: Segment) -> int:
    return len(segment.pattern) * segment.repeats


def _period(layers: tuple[str, ...]) -> int:
    n = len(layers)
    return next(p for p in range(1, n + 1) if n % p == 0 and layers[:p] * (n // p) == layers)
