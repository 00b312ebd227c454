"""Compiles a run's train step for a topology and adds up what it costs."""

import dataclasses
import importlib.metadata
import re
import time
from collections import Counter

import jax
import numpy as np

from repo_jax import flops, sharding
from repo_jax.config import TrainConfig
from repo_jax.planning import cost, hlo, kernels, links
from repo_jax.planning.targets import Topology
from repo_jax.training.program import Program, make_program


@dataclasses.dataclass(frozen=True)
class Memory:
    """Of one device, in bytes.

    Attributes:
      parameters, optimizer, batch: what goes into a step, from the shardings.
      temporary: gradients, activations and everything else that lives in a step, as the
        compiler planned it, with what is fragmented; None: it found no plan.
      program: code and constants.
      needed: all of it, as the compiler says.
      capacity: what a program may use.
    """

    parameters: int
    optimizer: int
    batch: int
    temporary: int | None
    program: int
    needed: float
    capacity: float

    @property
    def fits(self) -> bool:
        """Whether it does."""
        return self.temporary is not None and self.needed <= self.capacity


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Collectives of a step that are alike.

    Attributes:
      kind: `all-gather`, ...
      what: element type and shape of what is gathered, reduced or sent.
      group_size: devices that take part together.
      times: in a step.
      sent: bytes that a device sends, in all of them.
      seconds: on the way, in all of them.
      overlaps: beside computation.
      source: where in the model, a name from the program.
    """

    kind: str
    what: str
    group_size: int
    times: float
    sent: float
    seconds: float
    overlaps: bool
    source: str


@dataclasses.dataclass(frozen=True)
class Time:
    """Estimated seconds of a step. Nothing was run.

    Attributes:
      products: arithmetic, by XLA's estimates of cycles on a TPU, or at the peak rate on a GPU.
      kernels: the library's kernels, by their bundles.
      memory: to read and write main memory at the published bandwidth.
      beside, exposed: transfers that may run beside computation, and those that may not.
      step: in each loop the slowest of computation, memory and `beside`, then `exposed`.
      without_overlap: all of them one after the other.
    """

    products: float
    kernels: float
    memory: float
    beside: float
    exposed: float
    step: float
    without_overlap: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of a step, for each device unless it says otherwise.

    Attributes:
      flops: of products in the compiled program, kernels included, recomputation too.
      kernel_flops: of those, in kernels.
      bytes: to and from main memory.
      transfers: between devices.
      time: an estimate.
      unknown: kernels that no cost is known of.
    """

    flops: float
    kernel_flops: float
    bytes: float
    transfers: tuple[Transfer, ...]
    time: Time
    unknown: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a run before it is started.

    Attributes:
      config: of the run, its attention chosen.
      topology: by name.
      device: the chip's name.
      n_devices: of the topology.
      peak: bf16 flop a second of a device.
      mesh: sizes of its axes.
      parameters: of the model.
      memory: of a device.
      cost: of a step; None where the compiler found no room for it.
      compile_seconds: on this machine.
      versions: of what compiled.
    """

    config: TrainConfig
    topology: str
    device: str
    n_devices: int
    peak: float
    mesh: dict[str, int]
    parameters: int
    memory: Memory
    cost: Cost | None
    compile_seconds: float
    versions: dict[str, str]

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.config.data.batch_size * self.config.data.sequence_length

    @property
    def tokens_per_second(self) -> float:
        """Of all devices, an estimate."""
        return self.tokens / self.cost.time.step

    @property
    def days(self) -> float:
        """Of all steps of the run, an estimate; validation, saving and starting left out."""
        return self.config.training.steps * self.cost.time.step / 86_400

    def model_flops(self, *, causal: bool = False) -> float:
        """Of a step on all devices; see `repo_jax.flops`."""
        length = self.config.data.sequence_length
        each = flops.model_flops_per_token(self.config.model, length, causal=causal)
        return each * self.tokens

    @property
    def mfu(self) -> float:
        """By PaLM's convention, an estimate."""
        return self.model_flops() / (self.n_devices * self.peak * self.cost.time.step)


def plan(config: TrainConfig, topology: Topology) -> Plan:
    """Compiles the train step of `config` for `topology`. A minute or two, one core.

    Raises:
      ConfigError: the mesh does not fit the topology, or divide the model or the batch.
    """
    if config.model.attention is None:
        name = "pallas_tpu" if topology.chip.axes else "cudnn"
        model = dataclasses.replace(config.model, attention=name)
        config = dataclasses.replace(config, model=model)
    mesh = sharding.make_mesh(config.mesh, topology.devices)
    program = make_program(config, mesh)
    start = time.perf_counter()
    compiled, refusal = _compile(program)
    seconds = time.perf_counter() - start
    capacity = topology.chip.memory
    if compiled is None:
        memory, found = _refused(program, refusal, capacity), None
    else:
        memory = _memory(program, compiled.memory_analysis(), capacity)
        between = links.of_devices(topology.chip, list(mesh.devices.flat))
        found = count(hlo.parse(compiled.as_text()), between, shares(config))
    packages = ("jax", "jaxlib", "libtpu" if topology.chip.axes else "jax-cuda13-plugin")
    return Plan(
        config=config,
        topology=topology.name,
        device=topology.chip.name,
        n_devices=mesh.size,
        peak=topology.chip.flops,
        mesh=dict(mesh.shape),
        parameters=sum(x.size for x in jax.tree.leaves(program.state.params)),
        memory=memory,
        cost=found,
        compile_seconds=seconds,
        versions={name: importlib.metadata.version(name) for name in packages},
    )


def _compile(program: Program):
    """The compiled step, or None and why it does not fit."""
    with sharding.use(program.mesh):
        lowered = program.step.lower(program.state, program.batch)
        try:
            return lowered.compile(), ""
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return None, str(error)


def local_bytes(tree) -> int:
    """Of one device's part of abstract arrays with shardings."""
    part = lambda x: int(np.prod(x.sharding.shard_shape(x.shape), dtype=np.int64))
    return sum(part(x) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _parts(program: Program) -> dict[str, int]:
    state = program.state
    return {
        "parameters": local_bytes(state.params),
        "optimizer": local_bytes((state.opt_state, state.step, state.rng)),
        "batch": local_bytes(program.batch),
    }


def _memory(program: Program, analysis, capacity: float) -> Memory:
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    temporary = analysis.temp_size_in_bytes + results
    code = analysis.generated_code_size_in_bytes
    needed = analysis.argument_size_in_bytes + temporary + code
    return Memory(
        **_parts(program), temporary=temporary, program=code, needed=needed, capacity=capacity
    )


_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _refused(program: Program, message: str, capacity: float) -> Memory:
    """From the compiler's complaint, which names sizes such as 21.5G."""
    sizes = [float(x) * _UNITS[unit] for x, unit in re.findall(r"\b([\d.]+)([KMGT])\b", message)]
    needed = max(sizes, default=float("inf"))
    return Memory(**_parts(program), temporary=None, program=0, needed=needed, capacity=capacity)


def shares(config: TrainConfig) -> hlo.Weights:
    """How often the branches on a layer's kind of positions are taken."""
    kinds = config.model.kinds
    each = [kinds.count(kind) / len(kinds) for kind in sorted(set(kinds))]

    def weights(conditional: hlo.Instruction, branches: int) -> list[float] | None:
        of_kind = "RePoLM._positions" in conditional.op_name and branches == len(each)
        return each if of_kind else None

    return weights


def count(module: hlo.Module, between: links.Links, weights: hlo.Weights) -> Cost:
    """Adds up a compiled step."""
    chip, n_devices = between.chip, len(between.coordinates)
    products, in_kernels, read = Counter(), Counter(), Counter()  # seconds of each loop
    beside, exposed = Counter(), Counter()
    total, kernel_flops, moved = 0.0, 0.0, 0.0
    found: dict[cost.Collective, float] = Counter()
    unknown = set()
    for run in hlo.executed(module, weights):
        instruction, times, loop = run.instruction, run.times, run.loop
        own = times * cost.flops(module, instruction, run.computation)
        total += own
        if chip.clock:
            products[loop] += times * hlo.estimated_cycles(instruction) / chip.clock
        else:
            products[loop] += own / chip.flops
        if call := kernels.call(run):
            kernel_flops += times * call.flops
            each = call.flops / chip.flops
            if chip.clock:
                each = call.cycles[chip.name] / chip.cores / chip.clock
            in_kernels[loop] += times * each
        elif kernels.kernel_name(run):
            unknown.add(kernels.kernel_name(run))
        main = times * cost.main_memory_bytes(module, run)
        moved += main
        read[loop] += main / chip.bandwidth
        for collective in cost.collectives(module, instruction, n_devices):
            found[collective] += times
            where = beside if collective.overlaps else exposed
            where[loop] += times * between.seconds(collective)
    loops = {*products, *in_kernels, *read, *beside, *exposed}
    slowest = lambda i: max(products[i] + in_kernels[i], read[i], beside[i])
    computing = sum(max(products[i] + in_kernels[i], read[i]) for i in loops)
    sums = [sum(x.values()) for x in (products, in_kernels, read, beside, exposed)]
    return Cost(
        flops=total + kernel_flops,
        kernel_flops=kernel_flops,
        bytes=moved,
        transfers=_transfers(found, between),
        time=Time(
            *sums,
            step=sum(map(slowest, loops)) + sums[-1],
            without_overlap=computing + sums[-2] + sums[-1],
        ),
        unknown=tuple(sorted(unknown)),
    )


def _transfers(found: dict[cost.Collective, float], between: links.Links) -> tuple[Transfer, ...]:
    """Alike ones together, the longest first."""
    rows: dict[tuple, Transfer] = {}
    for collective, times in found.items():
        first = collective.shapes[0] if collective.shapes else hlo.Shape("u32", ())
        what = f"{first.dtype}[{','.join(map(str, first.dims))}]"
        what += f" and {len(collective.shapes) - 1} more" if len(collective.shapes) > 1 else ""
        source = _source(collective.op_name)
        key = (collective.kind, what, collective.group_size, collective.overlaps, source)
        seconds = times * between.seconds(collective)
        old = rows.get(key) or Transfer(*key[:3], 0.0, 0.0, 0.0, *key[3:])
        rows[key] = dataclasses.replace(
            old,
            times=old.times + times,
            sent=old.sent + times * collective.sent,
            seconds=old.seconds + seconds,
        )
    return tuple(sorted(rows.values(), key=lambda row: -row.seconds))


# Parts of a path of JAX's functions that say nothing of the model.
_NOISE = re.compile(
    r"jit\(\w*\)|while|body|cond|closed_call|checkpoint|rematted_computation|shard_map|"
    r"jvp\(\)|transpose\(jvp\(\)\)|RePoLM\._walk|branch_\d+_fun"
)


def _source(op_name: str) -> str:
    path = op_name.split(":")[0].replace("/(", "/")
    parts = [part for part in path.split("/") if part and not _NOISE.fullmatch(part)]
    backward = "transpose(" in op_name
    parts = [re.sub(r"^(transpose\()?jvp\((.*?)\)+$", r"\2", part) for part in parts]
    parts = [part for part in parts if part not in ("RePoLM.hidden", "DecoderBlock")]
    again = ", recomputed" if "rematted_computation" in op_name else ""
    return "/".join(parts[:3]) + again + (", backward" if backward and not again else "")
