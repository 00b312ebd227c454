"""What an instruction of a compiled program costs: products, bytes, transfers between devices."""

import dataclasses
import math
import re

import numpy as np

from repo_jax.planning.hlo import (
    Computation,
    Instruction,
    Module,
    Run,
    Shape,
    inside,
    operand_shapes,
)

# Instructions that move nothing: names for what is there already, and control.
_FREE = (
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional"),
    *("call", "after-all", "partition-id", "replica-id", "copy-done", "slice-done", "async-done"),
    *("async-update", "optimization-barrier", "opt-barrier"),
)
COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)


def flops(module: Module, instruction: Instruction, computation: Computation) -> int:
    """Of the dots and convolutions in it: 2 for a product and its sum. Kernels have 0."""
    total = _own_flops(instruction, computation)
    return total + sum(_own_flops(*inner) for inner in inside(module, instruction))


def _own_flops(instruction: Instruction, computation: Computation) -> int:
    if instruction.opcode == "dot":
        left = computation[instruction.operands[0]].shapes[0]
        contracted = _numbers(instruction.text, "lhs_contracting_dims")
        return 2 * instruction.shapes[0].size * math.prod(left.dims[i] for i in contracted)
    if instruction.opcode == "custom-call" and '"__cublas$' in instruction.text:
        left = computation[instruction.operands[0]].shapes[0]
        found = re.search(r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]', instruction.text)
        contracted = map(int, re.findall(r"\d+", found[1]))
        return 2 * instruction.shapes[0].size * math.prod(left.dims[i] for i in contracted)
    if instruction.opcode == "convolution":
        shapes = [computation[name].shapes[0] for name in instruction.operands]
        return _convolution_flops(instruction, *shapes)
    return 0


def _numbers(text: str, name: str) -> tuple[int, ...]:
    found = re.search(rf"\b{name}=\{{([\d,]*)\}}", text)
    return tuple(map(int, found[1].split(","))) if found and found[1] else ()


def _convolution_flops(instruction: Instruction, left: Shape, right: Shape) -> int:
    """Products with elements that exist: a TPU's matmuls are convolutions with much padding."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.text)
    window = re.search(r"window=\{([^}]*)\}", instruction.text)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    spatial = sorted(c for c in labels[3] if c.isdigit())
    listed = lambda name, empty: (
        fields[name].split("x") if name in fields else [empty] * len(spatial)
    )
    valid = 1
    for i, axis in enumerate(spatial):
        low = int(listed("pad", "0_0")[i].split("_")[0])
        stride, left_step, right_step = (
            int(listed(name, "1")[i]) for name in ("stride", "lhs_dilate", "rhs_dilate")
        )
        length = left.dims[labels[1].index(axis)]
        outputs = np.arange(instruction.shapes[0].dims[labels[3].index(axis)])
        taps = np.arange(right.dims[labels[2].index(axis)])
        at = outputs[:, None] * stride - low + taps[None] * right_step
        inside_left = (at >= 0) & (at <= (length - 1) * left_step) & (at % left_step == 0)
        valid *= int(inside_left.sum())
    out = instruction.shapes[0]
    rows, columns = (out.dims[labels[3].index(axis)] for axis in "bf")
    contracted = right.dims[labels[2].index("i")]  # of one group already
    # With batch groups, each output feature sees its group of the batch only: the output's
    # batch is that of one group.
    return 2 * valid * rows * columns * contracted


def main_memory_bytes(module: Module, run: Run) -> int:
    """Read from and written to the device's main memory by one execution.

    Of an operand that is only sliced, the slice; of a result that is updated in place, the
    update. What stays in a TPU's vector memory moves nothing.
    """
    instruction, computation = run.instruction, run.computation
    if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
        return 0
    if _collective_opcode(instruction) or instruction.opcode == "async-start":
        return 0  # counted as a transfer between devices
    main = lambda shape: shape.bytes if shape.memory == 0 else 0
    if instruction.opcode in ("copy-start", "slice-start"):
        # (result, operand, context), or ((operand), result, context)
        moved = min(s.bytes for s in instruction.shapes[:2])
        return moved * sum(s.memory == 0 for s in instruction.shapes[:2])
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        read = instruction.bytes if main(operand_shapes(computation, instruction)[0]) else 0
        return read + sum(map(main, instruction.shapes))
    if instruction.opcode == "dynamic-update-slice":
        update = computation[instruction.operands[1]].shapes[0]
        return main(update) + (update.bytes if main(instruction.shapes[0]) else 0)
    if instruction.opcode == "fusion":
        return _fusion_bytes(module, instruction, computation)
    return sum(map(main, operand_shapes(computation, instruction))) + sum(
        map(main, instruction.shapes)
    )


def _fusion_bytes(module: Module, fusion: Instruction, computation: Computation) -> int:
    body = module.computations[fusion.attribute("calls")]
    users: dict[str, list[Instruction]] = {}
    for instruction in body.values():
        for name in instruction.operands:
            users.setdefault(name, []).append(instruction)

    def used(name: str) -> list[Instruction]:
        """By what, names for the same array skipped."""
        found = []
        for user in users.get(name, []):
            same = user.opcode in ("bitcast", "reshape", "copy")
            found += used(user.name) if same else [user]
        return found

    def part(parameter: Instruction) -> int:
        """How much of it is read."""
        total = 0
        for user in used(parameter.name):
            if user.opcode in ("dynamic-slice", "slice", "gather"):
                total += user.bytes
            elif user.opcode != "dynamic-update-slice" or _updates(user) is not parameter:
                return parameter.bytes
        return min(total, parameter.bytes)

    def _updates(update: Instruction) -> Instruction:
        """What a dynamic-update-slice writes into."""
        into = body[update.operands[0]]
        while into.opcode in ("bitcast", "reshape", "copy"):
            into = body[into.operands[0]]
        return into

    total = 0
    shapes = [computation[name].shapes for name in fusion.operands]
    for parameter in body.values():
        if parameter.opcode != "parameter":
            continue
        outer = shapes[int(parameter.argument)]
        if any(shape.memory == 0 for shape in outer):
            total += part(parameter)
    roots = [body[body.root]]
    if roots[0].opcode == "tuple":
        roots = [body[name] for name in roots[0].operands]
    for root, shape in zip(roots, fusion.shapes, strict=False):
        if shape.memory:
            continue
        while root.opcode in ("bitcast", "reshape"):
            root = body[root.operands[0]]
        if root.opcode == "dynamic-update-slice":
            total += body[root.operands[1]].bytes
        else:
            total += shape.bytes
    return total


@dataclasses.dataclass(frozen=True)
class Collective:
    """A transfer between devices.

    Attributes:
      kind: `all-gather`, ...
      shapes: of what is gathered, reduced or sent: the larger of input and output.
      groups: numbers of the devices, in the mesh's order, that take part together; for a
        collective-permute pairs (from, to).
      overlaps: it runs beside what stands between its start and its end.
      op_name: the path of JAX's functions that it comes from.
    """

    kind: str
    shapes: tuple[Shape, ...]
    groups: tuple[tuple[int, ...], ...]
    overlaps: bool
    op_name: str

    @property
    def group_size(self) -> int:
        """Devices that take part together."""
        if self.kind == "collective-permute":
            return len({device for pair in self.groups for device in pair})
        return len(self.groups[0])

    @property
    def bytes(self) -> int:
        """Of `shapes`."""
        return sum(shape.bytes for shape in self.shapes)

    @property
    def sent(self) -> float:
        """Bytes that each device sends, in rings: n - 1 of n parts, twice for an all-reduce."""
        if self.kind == "collective-permute":
            return float(self.bytes)
        n = self.group_size
        return (2 if self.kind == "all-reduce" else 1) * self.bytes * (n - 1) / n


def collectives(module: Module, instruction: Instruction, n_devices: int) -> list[Collective]:
    """The transfers that an instruction begins.

    TPU's compiler spreads one over up to three fusions: the one that starts it counts.
    """
    kind = _collective_opcode(instruction)
    if kind:
        started = instruction.opcode.endswith("-start")
        return [_collective(kind, instruction, n_devices, overlaps=started)]
    found = []
    for inner, computation in inside(module, instruction):
        kind = _collective_opcode(inner)
        if kind is None:
            continue
        overlaps = instruction.opcode == "async-start" or _starts(computation)
        if not overlaps and inner.attribute("channel_id") in _started_channels(module):
            continue
        scattered = any(i.opcode == "dynamic-slice" for i in computation.values())
        if kind == "all-reduce" and instruction.opcode == "fusion" and scattered:
            kind = "reduce-scatter"
        found.append(_collective(kind, inner, n_devices, overlaps))
    return found


def _starts(computation: Computation) -> bool:
    return any('"AsyncCollectiveStart"' in i.text for i in computation.values())


def _started_channels(module: Module) -> set[str | None]:
    """Of collectives that one fusion starts and others carry on."""
    return {
        instruction.attribute("channel_id")
        for computation in filter(_starts, module.computations.values())
        for instruction in computation.values()
        if _collective_opcode(instruction)
    }


def _collective_opcode(instruction: Instruction) -> str | None:
    opcode = instruction.opcode.removesuffix("-start")
    return opcode if opcode in COLLECTIVES else None


def _collective(kind: str, instruction: Instruction, n_devices: int, overlaps: bool) -> Collective:
    shapes = [shape for shape in instruction.shapes if shape.dims or kind == "all-reduce"]
    groups = _groups(instruction.text, kind, n_devices)
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        # Inputs, outputs, and what the device remembers in between.
        half = len(shapes) // 2
        shapes = shapes[half:] if kind == "all-gather" else shapes[:half]
    elif instruction.opcode == "reduce-scatter":
        n = len(groups[0])
        shapes = [dataclasses.replace(s, dims=(n, *s.dims)) for s in shapes]
    return Collective(kind, tuple(shapes), groups, overlaps, instruction.op_name)


def _groups(text: str, kind: str, n_devices: int) -> tuple[tuple[int, ...], ...]:
    """Who takes part: `{{0,1},{2,3}}`, `[2,4]<=[8]T(..)` or `mesh['a'=2,'b'=4] {'a'}`."""
    name = "source_target_pairs" if kind == "collective-permute" else "replica_groups"
    listed = re.search(rf"{name}=\{{((?:\{{[\d,]*\}},?)*)\}}", text)
    if listed:
        groups = re.findall(r"\{([\d,]+)\}", listed[1])
        found = tuple(tuple(map(int, group.split(","))) for group in groups)
        return found or (tuple(range(n_devices)),)
    iota = re.search(rf"{name}=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        shape, sizes = (tuple(map(int, iota[i].split(","))) for i in (1, 2))
        ids = np.arange(math.prod(sizes)).reshape(sizes)
        if iota[3]:
            ids = ids.transpose(tuple(map(int, iota[3].split(","))))
        return _rows(ids.reshape(shape))
    mesh = re.search(rf"{name}=mesh\[([^\]]*)\](?:, device_ids=\((\S+)\))? \{{([^}}]*)\}}", text)
    if mesh:
        return _mesh_groups(*mesh.groups())
    raise ValueError(f"the devices of a {kind} are not known: {text[:300]}")


def _mesh_groups(axes: str, order: str | None, together: str) -> tuple[tuple[int, ...], ...]:
    """`'a'=2,'b'=4`; `[4,2]T(1,0)` or `0,4,1,5,...`, the devices of that mesh; `'a','b':(2)2`.

    The last are the axes whose devices take part together; `'b':(2)2` is the part of b of size 2
    inside a part of size 2.
    """
    sizes = {axis: int(n) for axis, n in re.findall(r"'([^']+)'=(\d+)", axes)}
    ids = np.arange(math.prod(sizes.values()))
    if order:
        iota = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order)
        if iota:
            ids = ids.reshape(tuple(map(int, iota[1].split(","))))
            ids = ids.transpose(tuple(map(int, iota[2].split(",")))) if iota[2] else ids
        else:
            ids = np.array(list(map(int, order.split(","))))
    shape: list[int] = []
    chosen: list[int] = []
    parts = {
        axis: (before, size)
        for axis, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", together)
    }
    for axis, n in sizes.items():
        before, size = parts.get(axis, ("", ""))
        if size:
            cut = [int(before), int(size), n // int(before) // int(size)]
            chosen.append(len(shape) + 1)
        else:
            cut = [n]
            chosen += [len(shape)] if axis in parts else []
        shape += cut
    apart = [i for i in range(len(shape)) if i not in chosen]
    n = math.prod(shape[i] for i in chosen)
    return _rows(ids.reshape(shape).transpose(apart + chosen).reshape(-1, n))


def _rows(ids: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(map(int, row)) for row in ids)
