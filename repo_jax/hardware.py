"""What accelerators can do at most, as their makers publish it.

Sources, by chip. TPUs: the pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" of Google Cloud's
documentation (peak compute, HBM and inter-chip bandwidth for each chip; a link has the
bidirectional bandwidth / 2 / links); clocks from "How to Scale Your Model" (Austin et al. 2025),
but v6e's is inferred: its peak over 524,288 flop a cycle, since XLA estimates more than half of
that; usable memory is the limit at which XLA refuses a program. GPUs: NVIDIA's data sheets of the
A100, H100 and H200 (SXM; dense, without sparsity; NVLink) and of ConnectX-6 and -7 (one port for
each GPU, as in DGX machines); usable memory is about what the driver leaves.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator: what JAX calls a device.

    Attributes:
      name: as in a topology, `v5e`.
      kinds: what `jax.Device.device_kind` says.
      flops: bf16 products and sums with float32 accumulation, a second.
      memory: bytes that a program may use.
      bandwidth: of that memory, bytes a second.
      link: bytes a second in one direction: of one link to a neighbour in a TPU's torus, of
        all NVLinks of a GPU together.
      network: bytes a second in one direction for each GPU, between machines.
      axes: of a TPU's torus; 0: all GPUs of a machine reach each other.
      ring: a TPU axis closes into a ring if its length is a multiple; for GPUs, how many a
        machine has.
      clock: cycles a second of a TPU's compute units.
      cores: TensorCores of a TPU chip, over which XLA splits an operation.
    """

    name: str
    kinds: tuple[str, ...]
    flops: float
    memory: float
    bandwidth: float
    link: float
    network: float = 0.0
    axes: int = 0
    ring: int = 8
    clock: float = 0.0
    cores: int = 1


_GIB = 2**30

CHIPS = (
    Chip(
        "v4",
        ("TPU v4",),
        flops=275e12,
        memory=30.5 * _GIB,
        bandwidth=1228e9,
        link=50e9,
        axes=3,
        ring=4,
        clock=1.05e9,
        cores=2,
    ),
    Chip(
        "v5e",
        ("TPU v5 lite", "TPU v5e"),
        flops=197e12,
        memory=15.75 * _GIB,
        bandwidth=819e9,
        link=50e9,
        axes=2,
        ring=16,
        clock=1.5e9,
    ),
    Chip(
        "v5p",
        ("TPU v5", "TPU v5p"),
        flops=459e12,
        memory=95.74 * _GIB,
        bandwidth=2765e9,
        link=100e9,
        axes=3,
        ring=4,
        clock=1.75e9,
        cores=2,
    ),
    Chip(
        "v6e",
        ("TPU v6 lite", "TPU v6e"),
        flops=918e12,
        memory=31.25 * _GIB,
        bandwidth=1638e9,
        link=100e9,
        axes=2,
        ring=16,
        clock=1.75e9,
    ),
    Chip(
        "a100",
        ("NVIDIA A100-SXM4-80GB",),
        flops=312e12,
        memory=79.2 * _GIB,
        bandwidth=2039e9,
        link=300e9,
        network=25e9,
    ),
    Chip(
        "h100",
        ("NVIDIA H100 80GB HBM3",),
        flops=989.4e12,
        memory=79.1 * _GIB,
        bandwidth=3350e9,
        link=450e9,
        network=50e9,
    ),
    Chip(
        "h200",
        ("NVIDIA H200",),
        flops=989.4e12,
        memory=139.8 * _GIB,
        bandwidth=4800e9,
        link=450e9,
        network=50e9,
    ),
)


def chip(kind: str) -> Chip | None:
    """The chip of this name or `device_kind`; None: not in the table."""
    return next((c for c in CHIPS if kind == c.name or kind in c.kinds), None)
