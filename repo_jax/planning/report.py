"""A plan in words, and what to change where it does not fit."""

import dataclasses

from repo_jax import flops
from repo_jax.config import TrainConfig
from repo_jax.planning.plan import Memory, Plan

_GIB = 2**30


def text(plan: Plan) -> str:
    """All that is known, for a terminal."""
    parts = [_head(plan), _memory(plan.memory)]
    if plan.cost:
        parts += [_work(plan), _transfers(plan), _time(plan)]
    about = ", ".join(f"{name} {version}" for name, version in plan.versions.items())
    parts += [f"compiled in {plan.compile_seconds:.0f} s with {about}; nothing was run"]
    return "\n\n".join(parts)


def _head(plan: Plan) -> str:
    config = plan.config
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    model, data, training = config.model, config.data, config.training
    kinds = ", ".join(f"{model.kinds.count(k)} {k}" for k in sorted(set(model.kinds)))
    return "\n".join(
        (
            f"{plan.topology}: {plan.n_devices} devices; mesh {mesh}",
            f"{plan.parameters / 1e9:.3f}B parameters; {model.n_layers} layers ({kinds})",
            f"{data.batch_size} x {data.sequence_length} = {plan.tokens:,} tokens a step in "
            f"{training.accumulation} microbatches; {model.dtype}, remat {model.remat}, "
            f"attention {model.attention}",
        )
    )


def _memory(memory: Memory) -> str:
    rows = [
        ("parameters", memory.parameters),
        ("optimizer state", memory.optimizer),
        ("batch", memory.batch),
    ]
    if memory.temporary is not None:
        rows += [
            ("gradients, activations, temporary", memory.temporary),
            ("program", memory.program),
        ]
    lines = [f"  {name:36}{size / _GIB:9.3f}" for name, size in rows]
    verdict = "fits" if memory.fits else "does NOT fit"
    total = f"  {'needed, by the compiler':36}{memory.needed / _GIB:9.3f}"
    total += f"  of {memory.capacity / _GIB:.2f}: {verdict}"
    return "\n".join(("memory of a device, GiB", *lines, total))


def _work(plan: Plan) -> str:
    cost, n = plan.cost, plan.n_devices
    config = plan.config
    length, steps = config.data.sequence_length, config.training.steps
    model, causal = plan.model_flops(), plan.model_flops(causal=True)
    rows = [
        ("model, 6 N + 12 L N H T a token", model),
        ("  with what a causal mask leaves", causal),
        ("compiled, all devices", cost.flops * n),
        ("  of these in attention's kernels", cost.kernel_flops * n),
    ]
    lines = [f"  {name:36}{value:12.4e}" for name, value in rows]
    each = flops.model_flops_per_token(config.model, length)
    lines += [
        f"  {'the run: model':36}{model * steps:12.4e}  ({steps:,} steps, {each:.4e} a token)",
        f"  {'main memory, a device, GB':36}{cost.bytes / 1e9:12.1f}",
    ]
    if cost.unknown:
        lines += [f"  not counted, kernels of unknown cost: {', '.join(cost.unknown)}"]
    return "\n".join(("FLOPs of a step", *lines))


def _transfers(plan: Plan, most: int = 12) -> str:
    found = plan.cost.transfers
    if not found:
        return "transfers between devices: none"
    head = f"  {'':20}{'group':>6}{'times':>8}{'GB sent':>9}{'s':>8}  of"
    lines = []
    for row in found[:most]:
        beside = "" if row.overlaps else "*"
        line = f"  {row.kind + beside:20}{row.group_size:6}{row.times:8g}{row.sent / 1e9:9.3f}"
        lines.append(f"{line}{row.seconds:8.4f}  {row.what} {row.source}".rstrip())
    rest = found[most:]
    if rest:
        sent, seconds = sum(r.sent for r in rest) / 1e9, sum(r.seconds for r in rest)
        lines += [f"  {f'{len(rest)} more':20}{'':14}{sent:9.3f}{seconds:8.4f}"]
    title = "transfers of a step, by device (* nothing runs beside it)"
    return "\n".join((title, head, *lines))


def _time(plan: Plan) -> str:
    time = plan.cost.time
    rows = [
        ("arithmetic", time.products),
        ("the library's kernels", time.kernels),
        ("main memory", time.memory),
        ("transfers beside computation", time.beside),
        ("transfers that nothing runs beside", time.exposed),
        ("step", time.step),
        ("step, if nothing overlapped", time.without_overlap),
    ]
    lines = [f"  {name:36}{seconds:10.4f}" for name, seconds in rows]
    lines += [
        f"  {'tokens a second':36}{plan.tokens_per_second:12,.1f}",
        f"  {'MFU (6 N + 12 L N H T)':36}{100 * plan.mfu:10.1f} %",
        f"  {'days for the run':36}{plan.days:10.2f}",
    ]
    return "\n".join(("time of a step, an ESTIMATE, seconds (docs/8-planning.md)", *lines))


def advice(plan: Plan) -> str:
    """Which option to change, for a plan that does not fit: by what takes the most."""
    memory, config, mesh = plan.memory, plan.config, plan.mesh
    over = (memory.needed - memory.capacity) / _GIB
    short = f"a device needs {over:.2f} GiB more than it has"
    # The gradients of a step are as large as the parameters.
    state = 2 * memory.parameters + memory.optimizer
    if state > memory.capacity / 2:
        return f"{short}, mostly parameters, gradients and optimizer state: {_spread(config, mesh)}"
    return f"{short}, mostly activations: {_less_at_a_time(config, mesh)}"


def _spread(config: TrainConfig, mesh: dict[str, int]) -> str:
    if mesh["data"] > 1:
        return f"raise mesh.fsdp, say to {mesh['fsdp'] * mesh['data']}, and lower mesh.data to 1"
    more = "take a topology with more devices, and raise mesh.fsdp"
    if config.optimizer.name == "adamw":
        more += ", or set optimizer.name to adafactor, which is other mathematics"
    return more


def _less_at_a_time(config: TrainConfig, mesh: dict[str, int]) -> str:
    data, training, model = config.data, config.training, config.model
    rows = data.batch_size // training.accumulation // (mesh["data"] * mesh["fsdp"])
    if rows > 1:
        n = next(n for n in range(2, rows + 1) if rows % n == 0)
        return (
            f"raise training.accumulation from {training.accumulation} to "
            f"{training.accumulation * n}"
        )
    if model.remat in ("none", "dots"):
        return f"set model.remat to attention (it is {model.remat})"
    if model.remat == "attention":
        return "set model.remat to full (it is attention)"
    return f"raise mesh.context (it is {mesh['context']}) or mesh.tensor (it is {mesh['tensor']})"


def plain(plan: Plan) -> dict:
    """The numbers as JSON can hold them."""
    found = dataclasses.asdict(plan)
    data, training = plan.config.data, plan.config.training
    found["config"] = {
        "positions": list(plan.config.model.kinds),
        "sequence_length": data.sequence_length,
        "batch_size": data.batch_size,
        "accumulation": training.accumulation,
        "steps": training.steps,
        "remat": plan.config.model.remat,
    }
    found["memory"]["fits"] = plan.memory.fits
    if plan.cost:
        found |= {
            "tokens": plan.tokens,
            "tokens_per_second": plan.tokens_per_second,
            "mfu": plan.mfu,
            "days": plan.days,
            "model_flops": plan.model_flops(),
            "model_flops_causal": plan.model_flops(causal=True),
        }
    return found
