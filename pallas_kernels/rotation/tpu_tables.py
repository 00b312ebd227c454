"""What the TPU kernels of norm and rotation know of lanes, angles and tables.

A block is some tokens by the whole width of q and k, worked on in slabs of 128 lanes. Where
a channel's partner lies depends on the head dim H:

  H = 64         a slab is two heads; partners are 32 lanes apart
  H = 128        a slab is a head; partners are 64 lanes apart
  H = 256, 512   a head is several slabs; the partner of the first half is the second

Moving values across lanes is slow on TPU and the matrix unit idles here, so bf16 slabs are
turned by a product with a permutation matrix. That is exact: every sum has one term.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.rotation.sincos import COS, PI_PARTS, SIN, horner

LANES = 128
# Adding it rounds to an integer, whose parity is then the lowest bit of the float.
ROUNDER = 1.5 * 2.0**23


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static about a call.

    Attributes:
      H: head dim: 64, 128 or a multiple of 256.
      heads: of each x.
      widths: of each x, over which its mean of squares is taken.
      columns: P, of the positions.
      norms: for each x, whether it has a norm.
      given: for each x, whether its mean of squares is given.
      eps: of the norms.
      unroll: groups of position columns in one turn of the loop; divides their number.
      tokens: in all; None: a whole number of blocks.
    """

    H: int
    heads: tuple[int, ...]
    widths: tuple[int, ...]
    columns: int
    norms: tuple[bool, ...]
    given: tuple[bool, ...]
    eps: float
    unroll: int
    tokens: int | None

    @property
    def group(self) -> int:
        """Position columns handled together: two, so that one sine serves a full slab."""
        return 2 if self.columns % 2 == 0 else 1

    def slabs(self, i: int) -> int:
        """Slabs of x_i in a group."""
        return self.group * self.heads[i] // self.columns * self.H // LANES

    def units(self, i: int) -> list[tuple[tuple[int, ...], tuple[int, ...], int]]:
        """Slabs that turn into each other: (slabs, columns of their heads, which frequencies)."""
        per_column = self.heads[i] // self.columns
        if self.H <= LANES:
            n = LANES // self.H
            column = lambda s: tuple((s * n + h) // per_column for h in range(n))
            return [((s,), column(s), 0) for s in range(self.slabs(i))]
        half = self.H // 2 // LANES
        first = [(h, j) for h in range(self.group * per_column) for j in range(half)]
        return [
            ((h * 2 * half + j, h * 2 * half + half + j), (h // per_column,), j) for h, j in first
        ]


def frequencies(H: int, inv_freq):
    """float32 [1, 128] or, with H > 128, [1, H / 2]: the frequency of each lane."""
    return inv_freq[None] if H > LANES else jnp.tile(inv_freq, 2 * LANES // H)[None]


def permutation(H: int):
    """bf16 [128, 128]: slab @ permutation is each channel's partner."""
    lane = np.arange(LANES)
    return (lane[:, None] == (lane ^ (H // 2))[None]).astype(jnp.bfloat16)


def low(H: int, shape, axis: int):
    """Whether a lane holds the first of its pair of channels (H <= 128)."""
    return (jax.lax.broadcasted_iota(jnp.int32, shape, axis) & (H // 2)) == 0


def partner(plan: Plan, slab, permutation_ref):
    """float32 partners of a slab's channels (H <= 128)."""
    if slab.dtype == jnp.bfloat16:
        return jnp.dot(slab, permutation_ref[...], preferred_element_type=jnp.float32)
    if plan.H == LANES:
        return pltpu.roll(slab, LANES // 2, 1)
    half = plan.H // 2
    up, down = pltpu.roll(slab, LANES - half, 1), pltpu.roll(slab, half, 1)
    return jnp.where(low(plan.H, slab.shape, 1), up, down)


def sincos(angle, rounder):
    """sin and cos as in sincos.py, with fewer operations on a TPU. `rounder` is `ROUNDER` as
    data: XLA, which runs this in tests, drops the sum and the difference of a constant.
    """
    t = angle * (1.0 / jnp.pi) + rounder
    half_turns = t - rounder
    r = angle
    for part in PI_PARTS:
        r = r - half_turns * part
    r2 = r * r
    odd = jax.lax.bitcast_convert_type(t, jnp.int32) << 31
    signed = lambda x: jax.lax.bitcast_convert_type(
        jax.lax.bitcast_convert_type(x, jnp.int32) ^ odd, jnp.float32
    )
    return signed(r * horner(SIN, r2)), signed(horner(COS, r2))


class Tables:
    """C and S of a group: n turns to C n + S partner(n), and back to C dy - S partner(dy)."""

    def __init__(self, plan: Plan, g, columns_ref, shared):
        self.plan, self.shared, self.made = plan, shared, {}
        if isinstance(g, int):
            self.z = columns_ref[:, g * plan.group : (g + 1) * plan.group]
        else:  # the columns to the first lanes, as lanes can't be sliced at a traced place
            self.z = pltpu.roll(columns_ref[...], (LANES - g * plan.group) & (LANES - 1), 1)

    def _sincos(self, z, j: int):
        scale, rounder = self.shared["numbers"][0], self.shared["numbers"][1]
        angle = z * self.shared["frequencies"][:, j * LANES : (j + 1) * LANES]
        sin, cos = sincos(angle, rounder)
        return sin * scale, cos * scale

    def __call__(self, columns: tuple[int, ...], j: int):
        """C and, for each slab of the unit, S."""
        key = (columns, j)
        if key not in self.made:
            self.made |= self._make(columns, j)
        return self.made[key]

    def _make(self, columns, j):
        z = lambda c: self.z[:, c : c + 1]
        H, rows = self.plan.H, self.z.shape[0]
        if H > LANES:
            sin, cos = self._sincos(z(columns[0]), j)
            return {(columns, j): (cos, (-sin, sin))}
        first_half = low(H, (rows, LANES), 1)
        if H < LANES:
            first = jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 1) < H
            z = z(columns[0]) if len(set(columns)) == 1 else jnp.where(first, *map(z, columns))
            sin, cos = self._sincos(z, j)
            return {(columns, j): (cos, (jnp.where(first_half, -sin, sin),))}
        # Two heads in one evaluation: the first has the low lanes, the second the high ones.
        a, b = 0, self.plan.group - 1
        sin, cos = self._sincos(jnp.where(first_half, z(a), z(b)), j)
        sin_other, cos_other = pltpu.roll(sin, LANES // 2, 1), pltpu.roll(cos, LANES // 2, 1)
        return {
            ((b,), j): (
                jnp.where(first_half, cos_other, cos),
                (jnp.where(first_half, -sin_other, sin),),
            ),
            ((a,), j): (
                jnp.where(first_half, cos, cos_other),
                (jnp.where(first_half, -sin, sin_other),),
            ),
        }
