"""Paths of the TPU kernels, ours and splash's: which bundles are taken together, how often."""

import dataclasses

import jax
import jax.numpy as jnp

from benchmarks import llo
from pallas_kernels.attention import masks, tpu_plan
from pallas_kernels.attention import tpu as attention_tpu
from pallas_kernels.rotation import tpu as rotation_tpu


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a call: T tokens of N query and K key heads of H channels, P position columns.

    And the generation of TPU that it is compiled for, since attention's blocks depend on it.
    """

    T: int
    N: int
    K: int
    H: int
    P: int
    generation: str = ""


@dataclasses.dataclass(frozen=True)
class Path:
    """Bundles of a kernel that are executed together, and how many times in a call."""

    kernel: str
    path: str
    bundles: int
    times: int

    @property
    def total(self) -> int:
        return self.bundles * self.times


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of a program: its kernels by path, and XLA's estimate of the rest."""

    paths: tuple[Path, ...]
    rest: int

    def kernels(self, part: str = "") -> int:
        """Bundles of the kernels whose name holds `part`."""
        return sum(p.total for p in self.paths if part in p.kernel)

    @property
    def total(self) -> int:
        return self.kernels() + self.rest


def by_size(kernel: llo.Kernel, steps: int, bodies: dict[str, int], trips=()) -> list[Path]:
    """Paths of a kernel whose grid has so many steps.

    Args:
      bodies: names of `pl.when` bodies and how often each is taken, the largest one first;
        what is not one of them is taken in every step.
      trips: of the loops within a step, in order.
    """
    always = [s for s in kernel.segments if s.depth == 1]
    whens = sorted((s for s in always if s.label == "FT"), key=lambda s: -s.bundles)
    paths = []
    for (name, times), segment in zip(bodies.items(), whens, strict=False):
        paths.append(Path(kernel.name, name, segment.bundles, times))
        always.remove(segment)
    turns = [s for s in kernel.segments if s.depth == 2]
    if len(turns) != len(trips):
        raise ValueError(f"{kernel.name} has {len(turns)} loops; {len(trips)} are accounted for")
    for i, (segment, n) in enumerate(zip(turns, trips, strict=True)):
        paths.append(Path(kernel.name, f"loop {i}", segment.bundles, n * steps))
    return [Path(kernel.name, "step", sum(s.bundles for s in always), steps), *paths]


def rotation_paths(kernel: llo.Kernel, sizes: Sizes) -> list[Path]:
    """Of `rotate_forward` and `rotate_backward`."""
    x = [jax.ShapeDtypeStruct((1, sizes.T, X, sizes.H), jnp.bfloat16) for X in (sizes.N, sizes.K)]
    z = jax.ShapeDtypeStruct((1, sizes.T, sizes.P), jnp.float32)
    layout = rotation_tpu._layout(x, (None, None), (None, None), z, 1e-6)
    steps = layout.grid[0] * layout.grid[1]
    loops = [s for s in kernel.segments if s.depth == 2]
    if loops:
        raise ValueError(f"{kernel.name} loops at these sizes; its trips are not accounted for")
    return by_size(kernel, steps, {})


def attention_blocks(sizes: Sizes) -> attention_tpu.BlockSizes:
    return attention_tpu.default_blocks(sizes.generation, jnp.bfloat16, sizes.H, sizes.T)


def attention_paths(kernel: llo.Kernel, sizes: Sizes) -> list[Path]:
    """Of `rotary_attention_forward` and `rotary_attention_backward`, causal, in one stretch."""
    blocks, forward = attention_blocks(sizes), "forward" in kernel.name
    if blocks.gathered < sizes.T * sizes.N // sizes.K:
        raise NotImplementedError(f"{sizes.T} tokens go in stretches, which are not counted")
    most = (blocks.query, blocks.key) if forward else (blocks.query_backward, blocks.key_backward)
    cq, ck = (attention_tpu._block(sizes.T, size) for size in most)
    live, full = tpu_plan.plan(masks.Default(True), sizes.T, sizes.T, cq, ck)
    if not forward:
        live, full = live.swapaxes(1, 2), full.swapaxes(1, 2)
    span = attention_tpu._spans(live.shape[2], blocks.span)
    _, visits = attention_tpu._listed(live, full, span=span, keep_empty=True)
    sums, pairs, whole = live.shape[1], int(live.sum()), int(full.sum())

    # The segments by what they do; "times" are for one head, heads counted at the end.
    times: dict[str, int] = {"step": visits, "full block": whole, "partial block": pairs - whole}
    times |= {"turn of the loop over blocks": visits * span, "start of a sum": sums}
    times |= {"end of a sum": sums, "copy of an input that XLA put into VMEM, long": 1}
    times |= {"copy of an input that XLA put into VMEM, short": visits}
    each_query_block = ("zero dq", "rowsum(dout * out)", "store dq")
    times |= {name: sizes.T // cq for name in each_query_block}
    bundles = dict.fromkeys(times, 0)
    products = iter(("full block", "partial block"))
    for s in kernel.segments:
        vst, vld, valu = (s.units[name] for name in ("VST", "VLD", "VALU"))
        if s.units["MXU"]:
            name = next(products)
        elif s.depth == 0:
            continue
        elif s.depth == 2:
            name = "turn of the loop over blocks"
            if s.units["XLU"]:
                name = "rowsum(dout * out)"
            elif vst > 16:
                name = "store dq" if valu > 16 else "zero dq"
        elif vst > 16 and vld > 16:
            name = "end of a sum"
            if valu <= 16:
                name = "copy of an input that XLA put into VMEM, "
                name += "long" if vst * 8 >= sizes.T else "short"
        else:
            name = "start of a sum" if vst > 16 else "step"
        bundles[name] += s.bundles
    return [Path(kernel.name, name, n, times[name] * sizes.N) for name, n in bundles.items() if n]


def splash_blocks(sizes: Sizes):
    """Fast by this measure on v5e, for all generations; not the fastest of all there are."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    return splash_attention_kernel.BlockSizes(
        block_q=min(512, sizes.T),
        block_kv=min(1024, sizes.T),
        block_kv_compute=min(512, sizes.T),
        block_q_dkv=min(1024, sizes.T),
        block_kv_dkv=min(1024, sizes.T),
        block_kv_dkv_compute=min(512, sizes.T),
        use_fused_bwd_kernel=True,
    )


def splash_paths(kernel: llo.Kernel, sizes: Sizes) -> list[Path]:
    """Of causal splash attention. Its steps for blocks that see nothing are not counted."""
    blocks = splash_blocks(sizes)
    forward = "fwd" in kernel.name
    q, k = (
        (blocks.block_q, blocks.block_kv) if forward else (blocks.block_q_dkv, blocks.block_kv_dkv)
    )
    rows, columns = sizes.T // q, sizes.T // k
    live = sum(1 for i in range(rows) for j in range(columns) if j * k <= (i + 1) * q - 1)
    sums = rows if forward else columns
    bodies = {"block": live, "end of a sum": sums, "start of a sum": sums}
    bodies = {name: times * sizes.N for name, times in bodies.items()}
    return by_size(kernel, live * sizes.N, bodies)


PATHS = {"rotate_": rotation_paths, "splash_": splash_paths, "rotary_attention_": attention_paths}
