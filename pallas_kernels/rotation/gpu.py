"""Norm and rotation on NVIDIA GPUs, in Pallas Mosaic GPU. The contract is in api.py.

Both passes are bound by memory: each element of q and k is read once and written once, from
registers straight to global memory, up to 16 bytes a thread, so there is no shared memory to
manage and several blocks fit on a multiprocessor. With a norm a block of 128 threads takes a few
tokens at a time, all heads of them, so that it sees their whole width without reading x twice.
Lanes lie along the channels of a half head first, so that a warp reads whole lines of memory,
then along heads; warps along heads too, where there are enough. Blocks walk over the tokens with
a stride; the sums for the gradients of weights stay in registers meanwhile, the weights too in
the forward pass. One sine and cosine serves the channel pair of every head, of q and of k, that
shares the position, where both fit into registers (`BlockSizes`).

At 4.3 TB/s an H200 has time for about 110 instructions for the 16 bytes that a channel pair of q
and of k moves. The PTX has about 75 for it with a norm, forward, 25 of them the exact sine of
sincos.py, so no approximate one is used; backward it has about 160 for 24 bytes, near the limit.
None of this has been timed on a GPU.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic_gpu
from pallas_kernels.rotation import gpu_kernel

CAPABILITIES = (9,)  # the major numbers for which the kernels were compiled
LOAD_BYTES = 16  # the most that a thread reads at once


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """What a launch is made of.

    An element is one of q or k in a tile, for each thread; those of a norm wait in registers
    for the sum over their row, and count twice in its backward pass.

    Attributes:
      blocks: at most so many share the tokens.
      sum_blocks: the same where each leaves sums of its own for the gradients of weights.
      plain: elements without a norm.
      together: elements with a norm, of one launch for q and k. At OLMo 2's 1B width, backward,
        one launch would leave two blocks to a multiprocessor; two launches, four.
      alone, most: elements with a norm, of a launch for one of them: where there is a choice,
        and at all.
    """

    blocks: int = 1056
    sum_blocks: int = 528
    plain: int = 80
    together: int = 32
    alone: int = 40
    most: int = 80


def default_blocks() -> BlockSizes:
    """Eight and four blocks for each of an H200's 132 multiprocessors.

    The limits are from the registers that ptxas reports (benchmarks/gpu_static.py): no spills,
    and no fewer than two blocks to a multiprocessor. None was tuned by time.
    """
    return BlockSizes()


def _check(xs) -> None:
    mosaic_gpu.check_device(*CAPABILITIES)
    for x in xs:
        if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32) or x.dtype != xs[0].dtype:
            dtypes = " and ".join(str(x.dtype) for x in xs)
            raise NotImplementedError(f"xs must be all bfloat16, float16 or float32, not {dtypes}")
        if x.shape[3] % 8:
            raise NotImplementedError(f"head dim {x.shape[3]} is not a multiple of 8")
        if x.size == 0:
            raise NotImplementedError(f"there is nothing to do for shape {x.shape}")


def _plans(xs, weights, mean_squares, positions, eps, *, backward: bool):
    """(which xs, plan) of each launch: one for all, where they fit into registers together."""
    sizes = default_blocks()
    rows = math.prod(xs[0].shape[:2])
    normed = any(w is not None for w in weights)

    def plan(which, vector):
        columns = math.gcd(*(xs[i].shape[2] for i in which))
        plan = gpu_kernel.Plan(
            heads=tuple(xs[i].shape[2] for i in which),
            head_dim=xs[0].shape[3],
            columns=columns,
            normed=tuple(weights[i] is not None for i in which),
            given=tuple(mean_squares[i] is not None for i in which),
            rotated=positions is not None,
            eps=eps,
            vector=vector,
        )
        plan = plan if normed else plan.narrowed()
        tiles = -(-rows * (columns // plan.columns) // plan.rows)
        blocks = min(tiles, sizes.sum_blocks if backward and normed else sizes.blocks)
        return dataclasses.replace(plan, tiles=tiles, blocks=blocks)

    together, alone = [tuple(range(len(xs)))], [(i,) for i in range(len(xs))]
    choices = [(together, sizes.together), (alone, sizes.alone), (alone, sizes.most)]
    if not normed:
        choices = [(together, sizes.plain), (alone, sizes.plain)]
    # Narrower reads spread a head over more lanes, and fewer rows over the block.
    widest = math.gcd(xs[0].shape[3] // 2, LOAD_BYTES // xs[0].dtype.itemsize)
    vectors = [widest >> n for n in range(widest.bit_length())]
    for launches, most in choices:
        fitting = [
            [p for v in vectors if (p := plan(which, v)).elements * (1 + backward * normed) <= most]
            for which in launches
        ]
        if all(fitting):
            return [(which, plans[0]) for which, plans in zip(launches, fitting, strict=True)]
    heads = " and ".join(str(x.shape[2]) for x in xs)
    raise NotImplementedError(
        f"{heads} heads of {xs[0].shape[3]} do not fit into the registers of a block"
    )


def _rows(x, plan, shape, *, fill=1.0):
    """x as rows of that shape, in whole tiles. What pads them must keep the norm finite."""
    x = x.reshape(-1, *shape)
    padding = [(0, plan.tiles * plan.rows - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding, constant_values=fill)


def _unpadded(x, shape):
    """The rows of x that there are, in their own shape."""
    return x.reshape(-1)[: math.prod(shape)].reshape(shape)


def _split(weight, plan):
    """[X, H] -> [X / P, 2, P, H / 2]: contiguous for each head of a group and each half."""
    return weight.reshape(plan.columns, -1, 2, plan.half).transpose(1, 2, 0, 3)


def _join(weight, plan):
    """The inverse of `_split`."""
    return weight.transpose(2, 0, 1, 3).reshape(-1, plan.head_dim)


def _operands(plan, xs, weights, mean_squares, positions, inv_freq, rope_scale, d_ys=()):
    heads = [(plan.columns, X // plan.columns, plan.head_dim) for X in plan.heads]
    operands = [_rows(x, plan, shape) for x, shape in zip(xs, heads, strict=True)]
    operands += [_rows(d, plan, shape, fill=0.0) for d, shape in zip(d_ys, heads, strict=False)]
    operands += [_split(w, plan) for w in weights if w is not None]
    operands += [_rows(m, plan, ()) for m in mean_squares if m is not None]
    if plan.rotated:
        # A column for every group of heads that lies together.
        columns = xs[0].shape[2] // (plan.heads[0] // plan.columns)
        each = jnp.repeat(positions, columns // positions.shape[2], axis=2)
        operands += [_rows(each, plan, (plan.columns,)), inv_freq, rope_scale.reshape(1)]
    return operands


def _call(body, plan, operands, out_type):
    name = f"rotate_{body.__name__}"
    kernel = mosaic_gpu.kernel(
        functools.partial(body, plan),
        out_type=out_type,
        grid=(plan.blocks,),
        grid_names=("block",),
        name=name,
        # Each thread reads and writes elements of its own: nothing to wait for.
        params={"unsafe_no_auto_barriers": True, "reduction_scratch_bytes": 16384},
    )
    return list(kernel(*operands))


def forward(xs, weights, mean_squares, positions, inv_freq, rope_scale, eps):
    """See api.py."""
    _check(xs)
    inputs = (xs, weights, mean_squares)
    _plans(*inputs, positions, eps, backward=True)  # raises if that cannot be done
    ys = [None] * len(xs)
    for which, plan in _plans(*inputs, positions, eps, backward=False):
        some = [[each[i] for i in which] for each in inputs]
        operands = _operands(plan, *some, positions, inv_freq, rope_scale)
        out_type = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands[: len(which)]]
        outs = _call(gpu_kernel.forward, plan, operands, out_type)
        for i, y in zip(which, outs, strict=True):
            ys[i] = _unpadded(y, xs[i].shape)
    return tuple(ys)


def backward(kept, d_ys, weights, mean_squares, positions, inv_freq, rope_scale, eps):
    """See api.py."""
    B, T = kept[0].shape[:2]
    d_xs, d_weights, d_squares = ([None] * len(kept) for _ in range(3))
    d_positions = None if positions is None else jnp.zeros_like(positions)
    inputs = (kept, weights, mean_squares)
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    for which, plan in _plans(*inputs, positions, eps, backward=True):
        some = [[each[i] for i in which] for each in inputs]
        dys = [d_ys[i] for i in which]
        operands = _operands(plan, *some, positions, inv_freq, rope_scale, dys)
        rows = operands[0].shape[0]
        out_type = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands[: len(which)]]
        normed = [i for i in which if weights[i] is not None]
        given = [i for i in which if mean_squares[i] is not None]
        for i in normed:
            groups = kept[i].shape[2] // plan.columns
            out_type.append(struct(plan.blocks, groups, 2, plan.rows, plan.columns, plan.half))
        out_type += [struct(rows, plan.columns)] * (len(given) + plan.rotated)
        outs = _call(gpu_kernel.backward, plan, operands, out_type)
        for i in which:
            d_xs[i] = _unpadded(outs.pop(0), kept[i].shape)
        for i in normed:
            d_weights[i] = _join(outs.pop(0).sum((0, 3)), plan)
        for i in given:
            d_squares[i] = outs.pop(0)[: B * T, 0].reshape(B, T)
        if plan.rotated:
            columns = kept[which[0]].shape[2] // (plan.heads[0] // plan.columns)
            each = _unpadded(outs.pop(0), (B, T, columns))
            d_positions += each.reshape(*positions.shape, -1).sum(-1)
    return tuple(d_xs), tuple(d_weights), tuple(d_squares), d_positions
