"""What a Pallas TPU kernel costs, read from the schedule that TPU's compiler dumps.

    dump = llo.start()                  # before anything is compiled for a TPU
    ...lower and compile for a TPU topology...
    kernels = llo.kernels(dump)         # {name of the pallas_call: Kernel}; empties the dump

A kernel's code is a list of VLIW bundles, each about one cycle, waiting for DMAs aside. It is
given as `Segment`s, in program order: stretches without a label, a branch or a change of loop
depth. Depth 0 runs once, depth 1 once a grid step, deeper ones are loops within a step. The
body of a `pl.when` is the stretch marked `FT` (fallen through to where the branch around it is
not taken), up to a `PF`. How often each is taken is for the caller to say.
"""

import atexit
import dataclasses
import os
import re
import shutil
import tempfile
from pathlib import Path

_BUNDLE = re.compile(r"\s*(0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*: (>*) ?\s*\{(.*)")
_FINAL = re.compile(r"^\d+-(.+?)(?:\.\d+)?-\d+-final_bundles\.txt$")
_UNITS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLD", "FILL", "VST", "SPILL", "SALU")


@dataclasses.dataclass(frozen=True)
class Segment:
    """A stretch of bundles.

    Attributes:
      start: address of the first bundle.
      bundles: how many.
      depth: of loops; 1 is the grid.
      label: LB loop body, LH loop header, LE loop exit, PB predicated body, PF where that
        joins again, CT another control target, FT after a branch, or "".
      units: how many operations of each kind: MXU, XLU, VALU, VPOP, EUP, VLD, FILL, VST,
        SPILL, SALU (as the compiler reports them).
    """

    start: int
    bundles: int
    depth: int
    label: str
    units: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The schedule of one kernel: its segments in program order."""

    name: str
    segments: tuple[Segment, ...]

    @property
    def bundles(self) -> int:
        """All of them, each counted once."""
        return sum(s.bundles for s in self.segments)

    def loops(self, depth: int) -> list[int]:
        """Bundles of one turn of each loop at this depth, in order, what is deeper left out."""
        turns = []
        for s in self.segments:
            if s.depth == depth and (s.label == "LB" or not turns):
                turns.append(0)
            if s.depth == depth:
                turns[-1] += s.bundles
        return turns


def start() -> Path:
    """Has libtpu, not yet loaded, dump its schedules; the folder goes when the process ends."""
    dump = Path(tempfile.mkdtemp(prefix="llo-"))
    atexit.register(shutil.rmtree, dump, ignore_errors=True)
    os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
    return dump


def kernels(dump: Path) -> dict[str, Kernel]:
    """The Pallas kernels compiled since the last call, by name; empties the folder."""
    found = {}
    for file in sorted(dump.glob("*-final_bundles.txt")):
        named = _FINAL.match(file.name)
        if named and "schedule-analysis" not in file.name and "<" not in named[1]:
            found[named[1]] = Kernel(named[1], _segments(file))
    for file in dump.iterdir():
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    found.pop("TLP", None)  # XLA's own program
    return found


def _segments(file: Path) -> tuple[Segment, ...]:
    units = _utilization(file)
    stretches: list[list] = []  # [start, depth, label, end]
    branched = False
    for line in file.read_text().splitlines():
        bundle = _BUNDLE.match(line)
        if not bundle:
            continue  # the rest of an operation that is printed on several lines
        address, label, depth = int(bundle[1], 16), bundle[2] or "", len(bundle[3])
        if bundle[4].startswith("}") and stretches:
            depth = stretches[-1][1]  # an empty bundle is printed without its depth
        if branched and depth >= 1:
            label = label or "FT"
        if not stretches or label or depth != stretches[-1][1]:
            stretches.append([address, depth, label, address])
        stretches[-1][3] = address + 1
        branched = "sbr.rel" in bundle[4]
    stretches = _rejoined(stretches)
    return tuple(
        Segment(
            start=start,
            bundles=end - start,
            depth=depth,
            label=label,
            units={name: sum(row[i] for row in units[start:end]) for i, name in enumerate(_UNITS)},
        )
        for start, depth, label, end in stretches
    )


def _rejoined(stretches: list[list]) -> list[list]:
    """Puts back into a loop the few bundles of it that are printed with the depth outside."""
    joined: list[list] = []
    for stretch in stretches:
        _, depth, label, end = stretch
        # The last stretch as deep as this one, if only shallower, unlabelled ones came since.
        back = len(joined) - 1
        while back >= 0 and joined[back][1] < depth and not joined[back][2]:
            back -= 1
        inside = label in ("", "FT") and 0 <= back < len(joined) - 1 and joined[back][1] == depth
        if inside:
            joined[back][3] = end
            del joined[back + 1 :]
        else:
            joined.append(stretch)
    return joined


def _utilization(file: Path) -> list[list[int]]:
    """Operations of each unit by bundle; [] where the compiler did not write them."""
    prefix = file.name[: file.name.rindex("-final_bundles.txt")].rsplit("-", 1)[0]
    files = sorted(file.parent.glob(f"{prefix}-*-final_hlo-static-per-bundle-utilization.txt"))
    if not files:
        return []
    lines = files[-1].read_text().split("UTILIZATION:")[-1].splitlines()
    return [[int(x) for x in line.split()] for line in lines if line.strip()]
