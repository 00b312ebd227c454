"""The Mosaic GPU kernels of norm and rotation; gpu.py decides what a launch is made of."""

import dataclasses
import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import TiledLayout
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu
from pallas_kernels.rotation.sincos import sincos

WARPS, LANES = 4, 32


@dataclasses.dataclass(frozen=True)
class Plan:
    """One launch: what it does, and how elements lie over the threads of a block.

    Attributes:
      heads: X of each x. All arrays are [rows, P, X / P, H]: heads grouped by position.
      head_dim: H.
      columns: P.
      normed, given: for each x, whether it has a norm, and whether its mean square is given.
      rotated: whether there are positions.
      eps: of the norm.
      vector: elements that a thread reads at a time, dividing H / 2.
      tiles, blocks: how many tiles of rows there are, and how many blocks share them.
    """

    heads: tuple[int, ...]
    head_dim: int
    columns: int
    normed: tuple[bool, ...]
    given: tuple[bool, ...]
    rotated: bool
    eps: float
    vector: int
    tiles: int = 1
    blocks: int = 1

    @property
    def half(self) -> int:
        return self.head_dim // 2

    @functools.cached_property
    def _tiled(self) -> TiledLayout:
        """Of a [rows, P, H / 2] array: lanes along channels, then positions, then rows."""
        lanes_c = math.gcd(LANES, self.half // self.vector)
        lanes_p = math.gcd(LANES // lanes_c, self.columns)
        lanes_r = LANES // (lanes_c * lanes_p)
        warps_p = math.gcd(WARPS, self.columns // lanes_p)
        warps_r = WARPS // warps_p
        lane_tile = (lanes_r, lanes_p, lanes_c * self.vector)
        tile = (warps_r * lanes_r, warps_p * lanes_p, lanes_c * self.vector)
        # Tiled it is [warps_r, warps_p, 1, lanes_r, lanes_p, lanes_c, vector].
        return TiledLayout(
            plgpu.Tiling((tile, lane_tile, (self.vector,))),
            warp_dims=(-7, -6),
            lane_dims=(-4, -3, -2),
            vector_dim=-1,
            _check_canonical=False,
        ).canonicalize()

    @functools.cached_property
    def layout(self):
        t = self._tiled
        return plgpu.Layout.TILED(t.tiling, t.warp_dims, t.lane_dims, t.vector_dim)

    @property
    def rows(self) -> int:
        """Rows in a tile."""
        return self._tiled.base_tile_shape[0]

    def narrowed(self) -> "Plan":
        """With as many columns as a tile needs: others become rows, where there is no norm."""
        columns = self._tiled.base_tile_shape[1]
        heads = tuple(X * columns // self.columns for X in self.heads)
        return dataclasses.replace(self, columns=columns, heads=heads)

    @property
    def elements(self) -> int:
        """Elements of all xs together in a tile, for each thread."""
        return sum(self.heads) * self.head_dim * self.rows // (WARPS * LANES)

    def groups(self, i: int) -> range:
        """The heads of x_i that share a position."""
        return range(self.heads[i] // self.columns)

    def spread(self, x, dims: tuple[int, ...]):
        """An array along `dims` of a tile [rows, P, H / 2], broadcast to all of it."""
        x = lax.broadcast_in_dim(x, (self.rows, self.columns, self.half), dims)
        return _cast(x, self.layout)

    def at(self, start, g: int, n: int):
        """Index of half n of head g of each group, in the tile's rows."""
        return pl.ds(start, self.rows), slice(None), g, pl.ds(n * self.half, self.half)


def _cast(x, layout):
    return x if mosaic_gpu.interpreting() else plgpu.layout_cast(x, layout)


def _sum(terms):
    return functools.reduce(lambda a, b: a + b, terms)


def _wide(parts):
    return [[x.astype(jnp.float32) for x in pair] for pair in parts]


def _load(plan: Plan, ref, start, i: int):
    """The tile of x_i: for each head of a group its two halves."""
    at = lambda g, n: mosaic_gpu.load(ref, plan.at(start, g, n), plan.layout)
    return [[at(g, 0), at(g, 1)] for g in plan.groups(i)]


def _load_weights(plan: Plan, ref, i: int):
    """The same of the norm's weights [X / P, 2, P, H / 2], for all rows."""
    layout = plan.layout.reduce((0,))
    at = lambda g, n: plan.spread(mosaic_gpu.load(ref, (g, n), layout), (1, 2))
    return [[at(g, 0), at(g, 1)] for g in plan.groups(i)]


def _store(plan: Plan, ref, start, g: int, pair) -> None:
    for n, x in enumerate(pair):
        mosaic_gpu.store(ref, plan.at(start, g, n), x.astype(ref.dtype))


def _per_row(terms):
    """The sum of arrays [rows, P, H / 2] over all but the rows."""
    return jnp.sum(jnp.sum(_sum(terms), axis=2), axis=1)


def _inverse_rms(plan: Plan, i: int, parts, square_ref, start):
    """1 / rms of each row of x_i."""
    if plan.given[i]:
        layout = plan.layout.reduce((1, 2))
        mean = mosaic_gpu.load(square_ref, (pl.ds(start, plan.rows),), layout)
    else:
        width = plan.heads[i] * plan.head_dim
        mean = _per_row([x * x for pair in parts for x in pair]) * (1.0 / width)
    return lax.rsqrt(mean + plan.eps)


def _times(a, b):
    """Of two lists of pairs of arrays, the products."""
    return [[x * y for x, y in zip(*pairs, strict=True)] for pairs in zip(a, b, strict=True)]


def _turn(x, cos, sin):
    return [x[0] * cos - x[1] * sin, x[1] * cos + x[0] * sin]


def _walk(plan: Plan, step, carry):
    """`step(first row, carry)` for every tile of this block."""
    block = lax.axis_index("block")
    steps = lax.div(plan.tiles - 1 - block, plan.blocks) + 1
    body = lambda i, carry: step((block + i * plan.blocks) * plan.rows, carry)
    return lax.fori_loop(0, steps, body, carry)


class _Refs:
    """The references of a kernel, taken one after the other."""

    def __init__(self, refs):
        self._rest = list(refs)

    def take(self, there):
        """One for each element of `there`, None where that is False."""
        return [self._rest.pop(0) if x else None for x in there]


def _common(plan: Plan, refs: _Refs):
    """What both kernels have: refs of weights and mean squares, and cos and sin of a tile."""
    weight_refs, square_refs = refs.take(plan.normed), refs.take(plan.given)
    positions_ref, freq_ref, scale_ref = refs.take([plan.rotated] * 3)
    if not plan.rotated:
        return weight_refs, square_refs, None, None
    freq = mosaic_gpu.load(freq_ref, (slice(None),), plan.layout.reduce((0, 1)))
    freq, scale = plan.spread(freq, (2,)), scale_ref[0]

    def tables(start):
        index = (pl.ds(start, plan.rows), slice(None))
        z = mosaic_gpu.load(positions_ref, index, plan.layout.reduce((2,)))
        sin, cos = sincos(plan.spread(z, (0, 1)) * freq)
        return cos * scale, sin * scale

    return weight_refs, square_refs, freq, tables


def forward(plan: Plan, *refs) -> None:
    """References: xs, weights, mean squares, positions, frequencies, scale; ys."""
    refs = _Refs(refs)
    x_refs = refs.take(plan.heads)
    weight_refs, square_refs, _, tables = _common(plan, refs)
    y_refs = refs.take(plan.heads)
    # Held in registers from tile to tile, because this pass needs few others.
    weights = [r if r is None else _load_weights(plan, r, i) for i, r in enumerate(weight_refs)]

    def step(start, carry):
        loaded = [_load(plan, ref, start, i) for i, ref in enumerate(x_refs)]
        cos_sin = tables(start) if plan.rotated else None
        for i, parts in enumerate(map(_wide, loaded)):
            if plan.normed[i]:
                inverse = _inverse_rms(plan, i, parts, square_refs[i], start)
                inverse = plan.spread(inverse, (0,))
            for g, pair in enumerate(parts):
                if plan.normed[i]:
                    pair = [x * inverse * w for x, w in zip(pair, weights[i][g], strict=True)]
                if plan.rotated:
                    pair = _turn(pair, *cos_sin)
                _store(plan, y_refs[i], start, g, pair)
        return carry

    _walk(plan, step, 0)


def _norm_backward(plan: Plan, i: int, x, dn, weight, square_ref, d_square_ref, start):
    """n = u weight, u = x / rms. Returns dx, u, and the sums' terms u dn, each by head and half."""
    inverse = _inverse_rms(plan, i, x, square_ref, start)
    wide = plan.spread(inverse, (0,))
    heads = [(g, m) for g in plan.groups(i) for m in range(2)]
    u = [[a * wide for a in pair] for pair in x]
    du = _times(weight, dn)
    dot = _per_row([u[g][m] * du[g][m] for g, m in heads])
    if plan.given[i]:
        # For every position of the row, because a store of one number is not supported.
        d_square = _cast(
            lax.broadcast_in_dim(inverse * inverse * dot * -0.5, (plan.rows, plan.columns), (0,)),
            plan.layout.reduce((2,)),
        )
        mosaic_gpu.store(d_square_ref, (pl.ds(start, plan.rows), slice(None)), d_square)
    else:
        mean = plan.spread(dot * (1.0 / (plan.heads[i] * plan.head_dim)), (0,))
        du = [[du[g][m] - u[g][m] * mean for m in range(2)] for g in plan.groups(i)]
    return [[d * wide for d in pair] for pair in du], u, [u[g][m] * dn[g][m] for g, m in heads]


def backward(plan: Plan, *refs) -> None:
    """References: kept, d_ys, weights, mean squares, positions, frequencies, scale; d_xs,
    d_weights [blocks, X / P, 2, rows of a tile, P, H / 2] to be summed up, d_mean_squares
    and d_positions [rows, P].
    """
    refs = _Refs(refs)
    kept_refs, dy_refs = refs.take(plan.heads), refs.take(plan.heads)
    weight_refs, square_refs, freq, tables = _common(plan, refs)
    dx_refs, dw_refs, d_square_refs = map(refs.take, (plan.heads, plan.normed, plan.given))
    (dz_ref,) = refs.take([plan.rotated])

    def step(start, d_weights):
        load = lambda refs: [_load(plan, ref, start, i) for i, ref in enumerate(refs)]
        kept, d_ys = load(kept_refs), load(dy_refs)
        cos, sin = tables(start) if plan.rotated else (None, None)
        cross, sums = [], []  # terms of d_positions and of d_weights
        for i in range(len(plan.heads)):
            x, dy = _wide(kept[i]), _wide(d_ys[i])
            dn = [_turn(pair, cos, -sin) for pair in dy] if plan.rotated else dy
            if plan.normed[i]:
                weight = _load_weights(plan, weight_refs[i], i)  # from cache, in every tile
                refs = square_refs[i], d_square_refs[i]
                dx, u, terms = _norm_backward(plan, i, x, dn, weight, *refs, start)
                sums.append(tuple(map(jnp.add, d_weights[i], terms)))
                n = _times(u, weight)
                dy = dn
            else:
                dx, n = dn, x
                sums.append(())
            cross += [a[0] * b[1] - a[1] * b[0] for a, b in zip(n, dy, strict=True)]
            for g, pair in enumerate(dx):
                _store(plan, dx_refs[i], start, g, pair)
        if plan.rotated:
            dz = jnp.sum(_sum(cross) * freq, axis=2)
            mosaic_gpu.store(dz_ref, (pl.ds(start, plan.rows), slice(None)), dz)
        return tuple(sums)

    zero = _cast(jnp.zeros((plan.rows, plan.columns, plan.half), jnp.float32), plan.layout)
    zeros = tuple((zero,) * (2 * len(plan.groups(i)) * x) for i, x in enumerate(plan.normed))
    d_weights = _walk(plan, step, zeros)
    for ref, parts in zip(dw_refs, d_weights, strict=True):
        for head, part in enumerate(parts):
            mosaic_gpu.store(ref, (lax.axis_index("block"), *divmod(head, 2)), part)
