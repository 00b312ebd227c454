"""Cases of `rotate` that a kernel has to get right, and the truth about them in float64.

`full()` goes through what a device is to be checked on. The error of an array is
|found - true| / |true| in the 2-norm over the whole array, as in attention_cases.py; the truth
takes inputs rounded to the case's dtype, and sin and cos in float64 of the angle rounded to
float32.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import rotate

TOLERANCE = {"bfloat16": 1e-2, "float32": 2e-5}
EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of `rotate`.

    Attributes:
      T, N, K, H: lengths and heads; queries and keys share their positions.
      columns: "shared", "kv" or "none" (which needs a norm).
      norm, given: whether there is a norm; whether its mean squares are given.
      scale: on cos and sin.
      dtype: of q and k.
      B: rows.
      spread: of the positions, in standard deviations.
    """

    T: int
    N: int
    K: int
    H: int
    columns: str = "kv"
    norm: bool = False
    given: bool = False
    scale: float = 1.0
    dtype: str = "float32"
    B: int = 1
    spread: float = 30.0

    def __str__(self):
        flags = [name for name in ("norm", "given") if getattr(self, name)]
        words = [f"{self.dtype}-T{self.T}-{self.N}x{self.K}x{self.H}", self.columns, *flags]
        return "-".join(words + ["yarn"] * (self.scale != 1.0))

    def arrays(self, seed: int = 0) -> dict:
        """Array arguments by name; "positions" is of both."""
        rng = np.random.default_rng(seed)
        normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
        B, T = self.B, self.T
        heads = {"q": self.N, "k": self.K}
        args = {x: normal(B, T, X, self.H).astype(self.dtype) for x, X in heads.items()}
        if self.columns != "none":
            P = 1 if self.columns == "shared" else self.K
            args["positions"] = normal(B, T, P) * self.spread
        if self.norm:
            args |= {f"{x}_norm": normal(X, self.H) for x, X in heads.items()}
        if self.given:
            args |= {f"{x}_mean_square": normal(B, T) ** 2 + 0.5 for x in heads}
        return args

    def cotangents(self, seed: int = 0) -> tuple:
        """Of both outputs, in the case's dtype."""
        rng = np.random.default_rng([seed, 1])
        shapes = ((self.B, self.T, X, self.H) for X in (self.N, self.K))
        return tuple(jnp.asarray(rng.normal(size=s), self.dtype) for s in shapes)

    def frequencies(self) -> np.ndarray:
        return (10_000.0 ** (-np.arange(0, self.H, 2) / self.H)).astype(np.float32)


def call(case: Case, args: dict, implementation: str | None):
    """`rotate` with the arrays of a case."""
    args = dict(args)
    q, k, z = (args.pop(name, None) for name in ("q", "k", "positions"))
    options = {"rope_scale": case.scale, "norm_eps": EPS, "implementation": implementation}
    return rotate(q, k, z, z, inv_freq=case.frequencies(), **args, **options)


def plain(case: Case, args: dict):
    """The same as one reads it, in whatever precision jax has."""

    def one(name):
        x = args[name]
        if case.norm:
            given = args.get(f"{name}_mean_square")
            mean = jnp.mean(x * x, (2, 3)) if given is None else given
            x = x * (mean + EPS)[..., None, None] ** -0.5 * args[f"{name}_norm"][None, None]
        if "positions" not in args:
            return x
        z = args["positions"]
        z = jnp.repeat(z, x.shape[2] // z.shape[2], 2)[..., None]
        angle = z * case.frequencies().astype(z.dtype)[None, None, None]
        # Rounded to float32, which its derivative does not know of.
        angle += jax.lax.stop_gradient(angle.astype(jnp.float32).astype(z.dtype) - angle)
        a, b = jnp.split(x, 2, -1)
        cos, sin = case.scale * jnp.cos(angle), case.scale * jnp.sin(angle)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    return one("q"), one("k")


def _both(f, args, cotangents) -> dict:
    """{"q", "k", "dq", ...}."""
    (q, k), vjp = jax.vjp(f, args)
    return {"q": q, "k": k} | {f"d{name}": x for name, x in vjp(cotangents)[0].items()}


def errors(case: Case, implementation: str | None, seed: int = 0) -> dict[str, float]:
    """The error of every output and gradient."""
    args, cotangents = case.arrays(seed), case.cotangents(seed)
    found = jax.jit(lambda *x: _both(lambda a: call(case, a, implementation), *x))(args, cotangents)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (args, cotangents))
        true = jax.device_get(_both(lambda a: plain(case, a), *wide))
    assert found.keys() == true.keys()
    result = {}
    for name, x in jax.device_get(found).items():
        difference = np.linalg.norm(np.asarray(x, np.float64) - true[name])
        size = np.linalg.norm(true[name])
        result[name] = float(difference / size) if np.isfinite(difference) else np.inf
    return result


def full():
    """The cases that a device is checked on."""
    heads = ((16, 16), (32, 8), (40, 40), (4, 1))
    norms = ((False, False), (True, False), (True, True))
    product = itertools.product(heads, (64, 80, 96, 128, 256), norms, ("bfloat16", "float32"))
    for i, ((N, K), H, (norm, given), dtype) in enumerate(product):
        T = (1, 7, 300, 1024, 1057, 2048, 4097)[i % 7]
        columns, scale = ("kv", "shared")[i // 2 % 2], (1.0, 1.1386)[i // 4 % 2]
        yield Case(T, N, K, H, columns, norm, given, scale, dtype)
    for H in (64, 128):
        yield Case(33, 16, 16, H, "none", norm=True, dtype="bfloat16")
        yield Case(300, 16, 16, H, spread=5000.0)
