"""Reads XLA's optimised programs, as `compiled.as_text()` prints them.

    module = parse(compiled.as_text())
    for run in executed(module): run.instruction, run.times

XLA's own totals count the body of a loop once; here every instruction comes with how often it
runs.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator

import numpy as np

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_BITS = re.compile(r"\d+")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array: its element type as XLA names it, its sizes, and the memory it is in.

    `memory` is 0 for a device's main memory, else the number of another, such as a TPU's
    vector memory.
    """

    dtype: str
    dims: tuple[int, ...]
    memory: int = 0

    @property
    def size(self) -> int:
        """Elements."""
        return int(np.prod(self.dims, dtype=np.int64))

    @property
    def bytes(self) -> int:
        """Of the elements, padding left out; 0 for what has none, such as a token."""
        if self.dtype == "pred":
            return self.size
        bits = _BITS.search(self.dtype)
        return -(-self.size * int(bits[0]) // 8) if bits else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name, opcode: without `%`.
      shapes: of the result, all parts of a tuple, nested ones too.
      operands: names.
      argument: what stands between the parentheses, the value of a constant.
      text: what follows, with all attributes.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    argument: str
    text: str

    def attribute(self, name: str) -> str | None:
        """`%name` or a number given as `attribute=`."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.text)
        return found[1] if found else None

    @property
    def op_name(self) -> str:
        """The path of JAX's functions that it comes from, or ""."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else ""

    @property
    def bytes(self) -> int:
        """Of the result."""
        return sum(shape.bytes for shape in self.shapes)


class Computation(dict):
    """Instructions by name, in order; `root` is the name of the result."""

    root: str = ""

    def constant(self, name: str) -> int | None:
        """The value of an integer scalar, if it is known."""
        instruction = self[name]
        if instruction.opcode == "constant":
            return int(instruction.argument) if _is_integer(instruction.argument) else None
        if instruction.opcode in ("copy", "bitcast", "convert"):
            return self.constant(instruction.operands[0])
        return None


def _is_integer(text: str) -> bool:
    return re.fullmatch(r"-?\d+", text) is not None


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: its computations, and the name of the one that is run."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Reads a module as `compiled.as_text()` prints it."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = computations.setdefault(head[2], Computation())
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _LINE.match(line)):
            instruction = _instruction(found[2], found[3])
            current[found[2]] = instruction
            if found[1]:
                current.root = found[2]
    return Module(computations, entry)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at
    raise ValueError(f"unbalanced parentheses: {text[:200]}")


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shapes = tuple(_shape(*found.groups()) for found in _SHAPE.finditer(text[:end]))
    opening = text.index("(", end)
    closing = _closing(text, opening)
    argument = text[opening + 1 : closing]
    return Instruction(
        name=name,
        opcode=text[end:opening].strip(),
        shapes=shapes,
        operands=tuple(_NAME.findall(argument)),
        argument=argument,
        text=text[closing + 1 :],
    )


def _shape(dtype: str, dims: str, layout: str | None) -> Shape:
    memory = re.search(r"S\((\d+)\)", layout or "")
    sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
    return Shape(dtype, sizes, int(memory[1]) if memory else 0)


@dataclasses.dataclass(frozen=True)
class Run:
    """An instruction that the device executes.

    Attributes:
      instruction: a fusion counts as one; what is in it is not told.
      computation: where it stands.
      times: how often it runs in one execution of the program.
      loop: the body of the innermost loop that it is in, as a number; 0 is outside of all.
    """

    instruction: Instruction
    computation: Computation
    times: float
    loop: int


Weights = Callable[[Instruction, int], list[float] | None]


def executed(module: Module, weights: Weights = lambda instruction, branches: None) -> list[Run]:
    """Everything that runs, with how often.

    Args:
      module: of `parse`.
      weights: of a conditional and the number of its branches: how often each is taken, of
        one execution. None: not known; the branch with the most instructions counts alone.

    Raises:
      ValueError: a loop whose length is not known.
    """
    runs: list[Run] = []
    loops = iter(range(1, 10**9))

    def visit(name: str, times: float, loop: int):
        computation = module.computations[name]
        for instruction in computation.values():
            runs.append(Run(instruction, computation, times, loop))
            if instruction.opcode == "while":
                trips = trip_count(module, computation, instruction)
                visit(instruction.attribute("body"), times * trips, next(loops))
            elif instruction.opcode == "conditional":
                branches = _branches(instruction)
                shares = weights(instruction, len(branches))
                if shares is None:
                    sizes = [len(module.computations[branch]) for branch in branches]
                    shares = [float(i == int(np.argmax(sizes))) for i in range(len(sizes))]
                for branch, share in zip(branches, shares, strict=True):
                    visit(branch, times * share, loop)
            elif instruction.opcode == "call":
                visit(instruction.attribute("to_apply"), times, loop)

    visit(module.entry, 1.0, 0)
    return runs


def _branches(conditional: Instruction) -> list[str]:
    """In the order of the number that chooses; False is 0."""
    listed = re.search(r"branch_computations=\{([^}]*)\}", conditional.text)
    if listed:
        return _NAME.findall(listed[1])
    return [conditional.attribute(f"{case}_computation") for case in ("false", "true")]


def trip_count(module: Module, outer: Computation, loop: Instruction) -> int:
    """How often the body of a `while` of `outer` runs: as XLA says, or for `i < n; i += k`.

    Raises:
      ValueError: neither.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text)
    if known:
        return int(known[1])
    condition, body = (module.computations[loop.attribute(x)] for x in ("condition", "body"))
    root = condition[condition.root]
    unknown = ValueError(f"the loop {loop.name} has no known length; its condition is {root}")
    if root.opcode != "compare" or "direction=LT" not in root.text:
        raise unknown
    counter, limit = condition[root.operands[0]], condition.constant(root.operands[1])
    if counter.opcode != "get-tuple-element" or limit is None:
        raise unknown
    at = int(counter.attribute("index"))
    state = outer[loop.operands[0]]
    start = outer.constant(state.operands[at]) if state.opcode == "tuple" else None
    step = _step(body, body[body[body.root].operands[at]], at)
    if start is None or not step:
        raise unknown
    return max(0, -(-(limit - start) // step))


def _step(body: Computation, total: Instruction, at: int) -> int:
    """What is added to element `at` of the loop's state in a turn; 0: not known."""
    while total.opcode in ("copy", "bitcast"):
        total = body[total.operands[0]]
    if total.opcode != "add":
        return 0
    added = [body.constant(name) for name in total.operands]
    known = [value for value in added if value is not None]
    return known[0] if len(known) == 1 else 0


def inside(module: Module, instruction: Instruction) -> Iterator[tuple[Instruction, Computation]]:
    """The instructions of a fusion, those of fusions in it too, with where they stand.

    Another instruction has none.
    """
    if instruction.opcode not in ("fusion", "async-start"):
        return
    computation = module.computations[instruction.attribute("calls")]
    for inner in computation.values():
        yield inner, computation
        yield from inside(module, inner)


def operand_shapes(computation: Computation, instruction: Instruction) -> list[Shape]:
    """Of all operands, parts of tuples too."""
    return [shape for name in instruction.operands for shape in computation[name].shapes]


def estimated_cycles(instruction: Instruction) -> int:
    """XLA's own estimate for one execution on a TPU; 0 where it has none."""
    found = re.search(r'"estimated_cycles":"(\d+)"', instruction.text)
    return int(found[1]) if found else 0


def total_cycles(text: str) -> int:
    """XLA's own estimate for a whole TPU program, its Pallas kernels left out.

    Copies between memories that run beside the computation (`copy-start`) carry no estimate.
    """
    runs = executed(parse(text))
    return round(sum(run.times * estimated_cycles(run.instruction) for run in runs))
