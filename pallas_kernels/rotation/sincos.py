"""sin and cos of one fp32 angle, sharing the range reduction.

XLA evaluates the two separately, each with a reduction for arbitrary arguments; with
learned positions that is a large part of a layer's time (there is an angle for every
token, head and pair of channels). Both are needed at every angle, so one reduction by
pi and two short polynomials serve.
"""

import jax
import jax.numpy as jnp

# pi in three parts (Cody-Waite). The first two carry 8 bits each, so their products
# with the number of half turns are exact up to 2**16 half turns (205,887 rad); the
# third carries the rest to 1e-13.
PI_PARTS = (3.140625, 0.000965118408203125, 2.5351816930196946e-06)

# Minimax polynomials in r**2 for |r| <= pi/2: sin(r) / r (absolute error of the sine
# 3.4e-9) and cos(r) (2.2e-10). In fp32 the rounding of the evaluation dominates.
SIN = (
    0.999999976473652,
    -0.16666647559217515,
    0.00833289853906454,
    -0.00019800818437095931,
    2.5903277533846476e-06,
)
COS = (
    0.9999999997793518,
    -0.499999993552916,
    0.041666636137624107,
    -0.0013888359837408329,
    2.4760079897734482e-05,
    -2.605002795028358e-07,
)


def horner(coefficients: tuple[float, ...], x: jax.Array) -> jax.Array:
    """The polynomial with these coefficients, constant first, at x."""
    value = jnp.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = value * x + c
    return value


def sincos(angle: jax.Array) -> tuple[jax.Array, jax.Array]:
    """sin and cos of fp32 `angle` in radians, elementwise.

    Error against the exact value of the fp32 argument: below 2e-7 for
    |angle| <= 20,000 and below 1e-6 to 200,000 (tested); beyond 205,887 the
    reduction loses bits. Not differentiable by design: `rotate` has its own VJP.
    """
    half_turns = jnp.round(angle * (1.0 / jnp.pi))
    r = angle
    for part in PI_PARTS:
        r = r - half_turns * part
    r2 = r * r
    odd = (half_turns.astype(jnp.int32) & 1) == 1
    sin = r * horner(SIN, r2)
    cos = horner(COS, r2)
    return jnp.where(odd, -sin, sin), jnp.where(odd, -cos, cos)
