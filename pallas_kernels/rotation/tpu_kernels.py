"""The bodies of the TPU kernels of norm and rotation: a block of tokens, all of q and k.

Written out for all slabs of 128 lanes, or for as many as `Plan.unroll` says: the compiler
keeps the vector units busy only within straight-line code.
"""

import functools
import operator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.rotation.tpu_tables import LANES, Plan, Tables, low, partner


def _lanes(start, count: int = LANES):
    return pl.ds(start if isinstance(start, int) else pl.multiple_of(start, LANES), count)


def divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most`, at least 1."""
    return max(d for d in range(1, n + 1) if n % d == 0 and d <= max(most, 1))


def _loop(turns: int, unroll: int, body) -> None:
    """body(i) for all i < turns, `unroll` at a time; with Python integers if that is all."""
    if turns == unroll:
        for i in range(turns):
            body(i)
    else:

        @pl.loop(0, turns // unroll)
        def _(i):
            for u in range(unroll):
                body(i * unroll + u)


def _unit(plan: Plan, ref, start, slabs, permutation_ref):
    """Of a unit's slabs: where they are, their values and their partners, fp32."""
    places = [_lanes(start + s * LANES) for s in slabs]
    values = [ref[:, at] for at in places]
    wide = [x.astype(jnp.float32) for x in values]
    if len(slabs) == 2:
        return places, wide, wide[::-1]
    return places, wide, [partner(plan, values[0], permutation_ref)]


def _weights(plan: Plan, x, scratch, g, i: int, slabs):
    """Of a unit's slabs the weights [1, 128] and their partners."""
    row = lambda ref, s: ref[pl.ds(g * plan.slabs(i) + s, 1), :]
    weights = [row(x["weight"], s) for s in slabs]
    return weights, weights[::-1] if len(slabs) == 2 else [row(scratch["partners"], slabs[0])]


def _prepare(plan: Plan, i: int, x, scratch) -> None:
    """1 / rms of every token, in all lanes, and the partners of the weights."""
    if plan.H <= LANES:
        scratch["partners"][...] = partner(plan, x["weight"][...], None)
    if plan.given[i]:
        mean_square = x["mean_square"][...]
    else:
        squares = jnp.zeros(scratch["inverse"].shape, jnp.float32)
        for s in range(x["x"].shape[1] // LANES):
            slab = x["x"][:, _lanes(s * LANES)].astype(jnp.float32)
            squares += slab * slab
        mean_square = jnp.sum(squares, 1, keepdims=True) * (1.0 / plan.widths[i])
    inverse = jax.lax.rsqrt(mean_square + plan.eps)
    scratch["inverse"][...] = jnp.broadcast_to(inverse, scratch["inverse"].shape)


def forward(plan: Plan, shared, xs, ys, columns_ref, scratch):
    """Normalizes and turns R tokens.

    Args:
      plan: what is static.
      shared: refs by name: `positions` [R, P], `frequencies` and `permutation` as of
        tpu_tables.py, and in scalar memory `numbers`, rope_scale and ROUNDER.
      xs: for each x refs of `x` [R, D] and, with a norm, of its `weight` [D / 128, 128] and
        maybe its `mean_square` [R, 1].
      ys: outputs [R, D].
      columns_ref, scratch: scratch [R, 128]; for each x with a norm `inverse` [R, 128] and,
        with H <= 128, `partners` like the weight.
    """
    columns_ref[:, : plan.columns] = shared["positions"][...]
    for i, (x, s) in enumerate(zip(xs, scratch, strict=True)):
        if plan.norms[i]:
            _prepare(plan, i, x, s)

    def group(g):
        tables = Tables(plan, g, columns_ref, shared)
        for i, (x, y_ref, s) in enumerate(zip(xs, ys, scratch, strict=True)):
            start = g * (plan.slabs(i) * LANES)
            for slabs, columns, j in plan.units(i):
                cos, sins = tables(columns, j)
                places, own, other = _unit(plan, x["x"], start, slabs, shared["permutation"])
                if plan.norms[i]:
                    weights, partners = _weights(plan, x, s, g, i, slabs)
                for part, (at, sin) in enumerate(zip(places, sins, strict=True)):
                    if plan.norms[i]:
                        y = own[part] * (cos * weights[part])
                        y += other[part] * (sin * partners[part])
                        y *= s["inverse"][...]
                    else:
                        y = own[part] * cos + other[part] * sin
                    y_ref[:, at] = y.astype(y_ref.dtype)

    _loop(plan.columns // plan.group, plan.unroll, group)


def backward(plan: Plan, shared, xs, d_positions_ref, outs, columns_ref, d_columns_ref, scratch):
    """The gradients for R tokens.

    Args:
      plan, shared, columns_ref: as in `forward`.
      xs: as in `forward`, and `dy`; `x` is y where there is no norm.
      d_positions_ref: output [R, P].
      outs: for each x outputs `x` [R, D] and, with a norm, `weight` [1, 8, D], which is
        summed over the steps of the grid but not over its 8 rows, and maybe `mean_square`
        [R, 1].
      d_columns_ref, scratch: scratch [R, 128]; for each x with a norm as in `forward`, and
        `dot` [R, 128] and `dx` [R, D].
    """
    columns_ref[:, : plan.columns] = shared["positions"][...]
    d_columns_ref[...] = jnp.zeros_like(d_columns_ref)
    rows = columns_ref.shape[0]
    for i, (x, out, s) in enumerate(zip(xs, outs, scratch, strict=True)):
        if plan.norms[i]:
            _prepare(plan, i, x, s)
            s["dot"][...] = jnp.zeros_like(s["dot"])

            @pl.when(pl.program_id(1) == 0)
            def _(out=out):
                out["weight"][...] = jnp.zeros_like(out["weight"])

    def group(g):
        tables = Tables(plan, g, columns_ref, shared)
        turned = {}  # by the columns of a slab's heads: what its lanes add to d_positions
        for i in range(len(xs)):
            dots = []
            for slabs, columns, j in plan.units(i):
                unit(i, g, slabs, tables(columns, j), j, turned.setdefault(columns, []), dots)
            if dots:
                scratch[i]["dot"][...] += _sum(dots)
        lane = jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)
        totals = {}
        for columns, terms in turned.items():
            terms = _sum(terms)
            for c in dict.fromkeys(columns):
                of_c = terms
                if len(set(columns)) > 1:
                    of_c = jnp.where((lane < plan.H) == (c == columns[0]), terms, 0.0)
                totals.setdefault(c, []).append(jnp.sum(of_c, 1, keepdims=True))
        d_columns = d_columns_ref[...]
        for c, terms in totals.items():
            d_columns = jnp.where(lane == g * plan.group + c, _sum(terms), d_columns)
        d_columns_ref[...] = d_columns

    def unit(i, g, slabs, table, j, turned, dots):
        x, out, s = xs[i], outs[i], scratch[i]
        cos, sins = table
        start = g * (plan.slabs(i) * LANES)
        places, dys, dy_partners = _unit(plan, x["dy"], start, slabs, shared["permutation"])
        # What a product n * partner(dn) counts in the gradient of the position.
        frequency = shared["frequencies"][:, j * LANES : (j + 1) * LANES]
        if plan.H <= LANES:
            frequency = jnp.where(low(plan.H, (1, LANES), 1), frequency, -frequency)
        if plan.norms[i]:
            _, ns, n_partners = _unit(plan, x["x"], start, slabs, shared["permutation"])
            weights, weight_partners = _weights(plan, x, s, g, i, slabs)
        for part, (at, sin) in enumerate(zip(places, sins, strict=True)):
            dn = dys[part] * cos - dy_partners[part] * sin
            signed = -frequency if part else frequency
            if not plan.norms[i]:
                y = x["x"][:, at].astype(jnp.float32)
                turned.append(y * dy_partners[part] * signed)
                out["x"][:, at] = dn.astype(out["x"].dtype)
                continue
            dn = dn * s["inverse"][...]
            turned.append(n_partners[part] * dn * (weight_partners[part] * -signed))
            d_weight = ns[part] * dn
            if plan.tokens is not None:  # the rows of the last block that are not there
                row = jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
                d_weight = jnp.where(row < plan.tokens - step() * rows, d_weight, 0.0)
            out["weight"][0, :, at] += d_weight.reshape(rows // 8, 8, LANES).sum(0)
            dx = dn * weights[part]
            dots.append(dx * ns[part])
            s["dx"][:, at] = dx

    step = lambda: pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)
    _loop(plan.columns // plan.group, plan.unroll, group)
    d_positions_ref[...] = d_columns_ref[:, : plan.columns]
    for i, (x, out, s) in enumerate(zip(xs, outs, scratch, strict=True)):
        if plan.norms[i]:
            _unnormalize(plan, i, x["x"], out, s)


def _sum(terms):
    return functools.reduce(operator.add, terms)


def _unnormalize(plan: Plan, i: int, x_ref, out, s):
    """Takes from dx, as it is for a constant rms, x mean(x dx) / rms^2; not if that was given."""
    inverse = s["inverse"][...]
    dot = jnp.sum(s["dot"][...], 1, keepdims=True)
    if plan.given[i]:
        out["mean_square"][...] = -0.5 * inverse[:, :1] * inverse[:, :1] * dot
    else:
        s["dot"][...] = inverse * inverse * (dot * (1.0 / plan.widths[i]))

    def slab(index):
        at = _lanes(index * LANES)
        dx = s["dx"][:, at]
        if not plan.given[i]:
            dx -= x_ref[:, at].astype(jnp.float32) * s["dot"][...]
        out["x"][:, at] = dx.astype(out["x"].dtype)

    slabs = x_ref.shape[1] // LANES
    _loop(slabs, divisor(slabs, 16), slab)
