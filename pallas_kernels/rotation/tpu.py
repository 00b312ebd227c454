"""Norm and rotation on TPU, one pass over q and k each way. The contract is in api.py.

The kernels are in tpu_kernels.py and tpu_tables.py. Here is what surrounds them: the layout
(tokens by all channels, as the projections write it), blocks, and the padding of head dims
that do not fill lanes.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.rotation import tpu_kernels, tpu_tables, xla
from pallas_kernels.rotation.tpu_tables import LANES

_HELD = 24 * 2**20  # bytes of blocks and scratch in a step; v5p has 64 MiB of vector memory
_LIMIT = 48 * 2**20  # with room for what the compiler spills


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """What is handled at a time.

    Attributes:
      tokens: in a step of the grid, a multiple of 16.
      slabs: of 128 lanes, of q and k together, in one turn of the loop within a step.
    """

    tokens: int = 128
    slabs: int = 32


def default_blocks(tokens: int, bytes_per_token: int) -> BlockSizes:
    """By the number of tokens and what a step holds for each of them.

    Chosen by the compiler's schedules for v5e, v5p and v6e, which want the same, not by
    timing on a TPU: larger blocks of straight-line code keep the vector units fuller, at
    the price of seconds of compilation.
    """
    most = 128
    while most > 16 and most * bytes_per_token > _HELD:
        most //= 2
    return BlockSizes(tokens=min(most, pl.cdiv(tokens, 16) * 16))


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How a call lies in the kernel: [rows, X * padded] arrays, in blocks of rows.

    Attributes:
      B, T, H: of the caller's arrays.
      padded: channels of a head in the kernel.
      rows: B * T, or one block if that is more.
      blocks: the block sizes.
      plan: what the kernels have to know.
    """

    B: int
    T: int
    H: int
    padded: int
    rows: int
    blocks: BlockSizes
    plan: tpu_tables.Plan

    @property
    def parts(self) -> int:
        """Of the grid, which a chip's cores share; each has its own sums over tokens."""
        return 2 if pl.cdiv(self.rows, self.blocks.tokens) % 2 == 0 else 1

    @property
    def grid(self) -> tuple[int, int]:
        return self.parts, pl.cdiv(self.rows, self.blocks.tokens) // self.parts

    def pad(self, x):
        """Each half of the last axis padded, so that pairs stay half the axis apart."""
        if self.padded == self.H:
            return x
        halves = x.reshape(*x.shape[:-1], 2, self.H // 2)
        halves = jnp.pad(halves, [(0, 0)] * x.ndim + [(0, (self.padded - self.H) // 2)])
        return halves.reshape(*x.shape[:-1], self.padded)

    def flat(self, x):
        """[B, T, ...] -> [rows, everything else]."""
        x = x.reshape(self.B * self.T, -1)
        return jnp.pad(x, ((0, self.rows - self.B * self.T), (0, 0)))

    def unflat(self, x):
        """[rows, n] -> [B, T, n]."""
        return x[: self.B * self.T].reshape(self.B, self.T, -1)

    def heads(self, x):
        """[..., X * padded] -> [..., X, H]."""
        if self.padded == self.H:
            return x.reshape(*x.shape[:-1], -1, self.H)
        x = x.reshape(*x.shape[:-1], -1, 2, self.padded // 2)[..., : self.H // 2]
        return x.reshape(*x.shape[:-2], self.H)

    def tokens(self, lanes: int) -> pl.BlockSpec:
        """A block of tokens of an array [rows, lanes]."""
        steps = self.grid[1]
        return pl.BlockSpec((self.blocks.tokens, lanes), lambda p, s: (p * steps + s, 0))

    def scratch(self, lanes: int = LANES):
        """[a block's tokens, lanes]."""
        return pltpu.VMEM((self.blocks.tokens, lanes), jnp.float32)

    def norm_scratch(self, x) -> dict:
        """For an x of `_inputs`."""
        if "weight" not in x:
            return {}
        found = {"inverse": self.scratch()}
        if self.padded <= LANES:
            found["partners"] = pltpu.VMEM(x["weight"].shape, jnp.float32)
        return found


def _layout(xs, weights, mean_squares, positions, eps) -> _Layout:
    B, T, _, H = xs[0].shape
    heads, columns = tuple(x.shape[2] for x in xs), positions.shape[2]
    for x in xs:
        if x.dtype not in (jnp.bfloat16, jnp.float32):
            raise NotImplementedError(f"the kernel takes bfloat16 and float32, not {x.dtype}")
    if columns > LANES:
        raise NotImplementedError(f"the kernel takes {LANES} columns of positions, not {columns}")
    if H == 64 and all(X % 2 == 0 for X in heads):
        padded = H
    else:
        unit = LANES if H <= LANES else 2 * LANES
        padded = pl.cdiv(H, unit) * unit
    # x, dy and dx, each twice for the pipeline, and fp32 in between.
    held = sum(x.shape[2] * padded * (6 * x.dtype.itemsize + 4) for x in xs)
    blocks = default_blocks(B * T, held)
    rows = max(B * T, blocks.tokens)
    plan = tpu_tables.Plan(
        H=padded,
        heads=heads,
        widths=tuple(X * H for X in heads),
        columns=columns,
        norms=tuple(w is not None for w in weights),
        given=tuple(m is not None for m in mean_squares),
        eps=eps,
        unroll=1,
        tokens=rows if rows % blocks.tokens else None,
    )
    slabs = sum(plan.slabs(i) for i in range(len(xs)))
    unroll = tpu_kernels.divisor(columns // plan.group, blocks.slabs // slabs)
    plan = dataclasses.replace(plan, unroll=unroll)
    return _Layout(B, T, H, padded, rows, blocks, plan)


def _inputs(layout: _Layout, arrays, weights, mean_squares, positions, inv_freq, rope_scale):
    """The kernel's inputs and their specs. arrays: for each x a dict of [B, T, X, H]."""
    inv_freq = jnp.pad(inv_freq, (0, (layout.padded - layout.H) // 2))
    frequencies = tpu_tables.frequencies(layout.padded, inv_freq)
    numbers = jnp.stack([rope_scale, tpu_tables.ROUNDER])
    permutation = tpu_tables.permutation(min(layout.padded, LANES))
    whole = lambda x: pl.BlockSpec(x.shape, lambda p, s: (0, 0))
    shared = {
        "positions": (layout.flat(positions), layout.tokens(positions.shape[2])),
        "frequencies": (frequencies, whole(frequencies)),
        "numbers": (numbers, pl.BlockSpec(memory_space=pltpu.SMEM)),
        "permutation": (permutation, whole(permutation)),
    }
    inputs, specs = ([{name: x[i] for name, x in shared.items()}, []] for i in (0, 1))
    for of_x, weight, mean_square in zip(arrays, weights, mean_squares, strict=True):
        of_x = {name: layout.flat(layout.pad(x)) for name, x in of_x.items()}
        of_spec = {name: layout.tokens(x.shape[1]) for name, x in of_x.items()}
        if weight is not None:
            of_x["weight"] = layout.pad(weight).reshape(-1, LANES)
            of_spec["weight"] = whole(of_x["weight"])
        if mean_square is not None:
            of_x["mean_square"] = layout.flat(mean_square)
            of_spec["mean_square"] = layout.tokens(1)
        inputs[-1].append(of_x)
        specs[-1].append(of_spec)
    return inputs, specs


def _call(layout: _Layout, kernel, inputs, in_specs, out_shape, out_specs, scratch, name: str):
    return pl.pallas_call(
        functools.partial(kernel, layout.plan),
        grid=layout.grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_LIMIT
        ),
        name=name,
    )(*inputs)


def forward(xs, weights, mean_squares, positions, inv_freq, rope_scale, eps):
    """See api.py. Without positions it is a norm alone, which XLA does as well as it can be."""
    if positions is None:
        return xla.forward(xs, weights, mean_squares, positions, inv_freq, rope_scale, eps)
    dispatch.refuse_partitioner()
    layout = _layout(xs, weights, mean_squares, positions, eps)
    inputs, specs = _inputs(
        layout, [{"x": x} for x in xs], weights, mean_squares, positions, inv_freq, rope_scale
    )
    flat = [x["x"] for x in inputs[-1]]
    (ys,) = _call(
        *(layout, tpu_kernels.forward, inputs, specs),
        [[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in flat]],
        [[layout.tokens(x.shape[1]) for x in flat]],
        [layout.scratch(), [layout.norm_scratch(x) for x in inputs[-1]]],
        "rotate_forward",
    )
    return tuple(layout.heads(layout.unflat(y)) for y in ys)


def backward(kept, d_ys, weights, mean_squares, positions, inv_freq, rope_scale, eps):
    """See api.py."""
    if positions is None:
        return xla.backward(kept, d_ys, weights, mean_squares, positions, inv_freq, rope_scale, eps)
    layout = _layout(kept, weights, mean_squares, positions, eps)
    arrays = [{"x": x, "dy": dy} for x, dy in zip(kept, d_ys, strict=True)]
    inputs, specs = _inputs(layout, arrays, weights, mean_squares, positions, inv_freq, rope_scale)
    struct = jax.ShapeDtypeStruct
    columns = positions.shape[2]
    out_shape = [struct((layout.rows, columns), jnp.float32), []]
    out_specs = [layout.tokens(columns), []]
    scratch = [layout.scratch(), layout.scratch(), []]
    for i, of_x in enumerate(inputs[-1]):
        lanes = of_x["x"].shape[1]
        shape, spec = {"x": of_x["x"]}, {"x": layout.tokens(lanes)}
        if weights[i] is not None:
            shape["weight"] = struct((layout.parts, 8, lanes), jnp.float32)
            spec["weight"] = pl.BlockSpec((1, 8, lanes), lambda p, s: (p, 0, 0))
        if mean_squares[i] is not None:
            shape["mean_square"] = struct((layout.rows, 1), jnp.float32)
            spec["mean_square"] = layout.tokens(1)
        shape["x"] = struct(shape["x"].shape, shape["x"].dtype)
        out_shape[1].append(shape)
        out_specs[1].append(spec)
        scratch[2].append(layout.norm_scratch(of_x))
        if weights[i] is not None:
            scratch[2][i] |= {"dot": layout.scratch(), "dx": layout.scratch(lanes)}
    d_positions, outs = _call(
        *(layout, tpu_kernels.backward, inputs, specs, out_shape, out_specs, scratch),
        "rotate_backward",
    )
    given = lambda name, f: tuple(f(o[name]) if name in o else None for o in outs)
    return (
        given("x", lambda x: layout.heads(layout.unflat(x))),
        given("weight", lambda x: layout.heads(x.sum((0, 1)))),
        given("mean_square", lambda x: layout.unflat(x)[..., 0]),
        layout.unflat(d_positions),
    )
