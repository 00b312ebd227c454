"""XLA's own estimate of what a compiled TPU program costs, its Pallas kernels left out.

Every instruction that becomes code carries `estimated_cycles` in its backend config, for one
execution. Here they are added up from the entry computation, bodies of loops times their
known trip count, and of a conditional the costliest branch. Copies between memories that run
beside the computation (`copy-start`, `slice-start`) carry none.
"""

import re

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_BODY = re.compile(r"\bbody=%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))"
)
_CALL = re.compile(r"\bcall\(.*to_apply=%?([\w.\-]+)")


def estimated_cycles(text: str) -> int:
    """Of the program `compiled.as_text()`. ValueError for a loop of unknown length."""
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            current.append(line)
    return _cost(computations, entry)


def _cost(computations: dict[str, list[str]], name: str) -> int:
    total = 0
    for line in computations[name]:
        cycles = _CYCLES.search(line)
        total += int(cycles[1]) if cycles else 0
        body = _BODY.search(line) if " while(" in line else None
        if body:
            trips = _TRIPS.search(line)
            if not trips:
                raise ValueError(f"a loop of unknown length: {line.strip()[:200]}")
            total += int(trips[1]) * _cost(computations, body[1])
        if " conditional(" in line:
            names = [n.strip(" %") for a, b in _BRANCHES.findall(line) for n in (a or b).split(",")]
            total += max(_cost(computations, n) for n in names)
        call = _CALL.search(line)
        if call:
            total += _cost(computations, call[1])
    return total
