"""Cases of rotary attention that every implementation has to get right, and the truth about them.

`COVERING` holds every pair of values of every two factors at least once, and what training
looks like; `full()` goes through the whole product, for a device. `check` compares an
implementation with a float64 reference: output, logsumexp and the gradients to q, k, v and
both positions, under random cotangents of output and logsumexp both.

The error of an array is |found - true| / |true| in the 2-norm over the whole array, one wrong
row of 4097 being 1.6e-2 of it. (In the maximum norm, rounding q and k to bfloat16 after the
rotation alone costs up to 1e-2.) A logsumexp near zero is no more exact than one near one, so
|true| counts as at least that of ones. The reference is given the inputs as rounded to the
case's dtype, and float64 sin and cos of the float32-rounded angle. What is exactly zero in
truth (rows that see nothing, keys that nothing sees) must be zero.
"""

import dataclasses
import functools
import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import rotate
from pallas_kernels.attention import masks

FACTORS = {
    "T": (1, 7, 128, 300, 1024, 4097),
    "S": (1, 7, 128, 300, 1024, 4097),
    "H": (64, 80, 96, 128, 256),
    "group": (1, 2, 3, 8),
    "positions": ("none", "shared", "kv", "query"),
    "dtype": ("bfloat16", "float32"),
    "causal": (True, False),
    "documents": (False, True),
    "permuted": (False, True),
    "cache": (False, True),
    "yarn": (False, True),
}
TOLERANCE = {"bfloat16": 1e-2, "float32": 2e-5}
_BUDGET = 2**31  # T * S * heads * H at most: 4097 x 4097 for one head or two of 64


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of `rotary_attention`; the factors above, and the number of rows and kv heads."""

    T: int
    S: int
    H: int = 64
    group: int = 1
    positions: str = "shared"
    dtype: str = "float32"
    causal: bool = True
    documents: bool = False
    permuted: bool = False
    cache: bool = False
    yarn: bool = False
    B: int = 1
    K: int = 1

    def __str__(self):
        flags = ("documents", "permuted", "cache", "yarn")
        words = [f"{self.dtype}-T{self.T}-S{self.S}-H{self.H}-{self.group}x{self.K}"]
        words += [self.positions, "causal" if self.causal else "all"]
        return "-".join(words + [flag for flag in flags if getattr(self, flag)])

    @property
    def N(self) -> int:
        return self.K * self.group

    def _rng(self, seed: int, use: int):
        return np.random.default_rng([seed, use, self.T, self.S, self.H])

    def arrays(self, seed: int = 0) -> dict:
        """q, k, v in the case's dtype; positions_q and positions_k float32 or None."""
        rng = self._rng(seed, 0)
        q_shape, k_shape = (self.B, self.T, self.N, self.H), (self.B, self.S, self.K, self.H)
        shapes = {"q": q_shape, "k": k_shape, "v": k_shape}
        x = {name: rng.normal(size=shape) for name, shape in shapes.items()}
        x = {name: jnp.asarray(value, self.dtype) for name, value in x.items()}
        columns = {"none": 0, "shared": 1, "kv": self.K, "query": self.N}[self.positions]
        for name, length in (("positions_q", self.T), ("positions_k", self.S)):
            z = rng.uniform(-100, 100, (self.B, length, columns)).astype(np.float32)
            x[name] = jnp.asarray(z) if columns else None
        return x

    def options(self, seed: int = 0) -> dict:
        """The arrays among the keyword arguments: indices, documents, cache length."""
        rng = self._rng(seed, 1)
        B, T, S = self.B, self.T, self.S
        options = {}
        filled = rng.integers(S // 2 + 1, S + 1, B) if self.cache else np.full(B, S)
        q_index = np.arange(T)[None] + filled[:, None] - T
        kv_index = np.broadcast_to(np.arange(S), (B, S))
        if self.permuted:
            q_index = np.stack([row[_permutation(T, rng)] for row in q_index])
            kv_index = np.stack([row[_permutation(S, rng)] for row in kv_index])
            options |= {"q_index": q_index, "kv_index": kv_index}
        if self.documents:
            first = min(q_index.min(), 0)
            ids = np.sort(rng.integers(1, 5, (B, S - first)), axis=1)
            ids[0, -first : -first + S // 16] = 0
            ids[1:, S - first - S // 16 :] = 0
            at = lambda index: np.take_along_axis(ids, index - first, 1)
            options |= {"q_segment_ids": at(q_index), "kv_segment_ids": at(kv_index)}
        if self.cache:
            options["kv_length"] = filled
        return {name: jnp.asarray(x, jnp.int32) for name, x in options.items()}

    def constants(self) -> dict:
        """The keyword arguments that are not arrays of the batch."""
        inv_freq = 10_000.0 ** (-np.arange(0, self.H, 2) / self.H)
        if self.yarn:
            inv_freq *= np.linspace(1.0, 0.25, self.H // 2)
        scale = 1.1386 if self.yarn else 1.0
        return {"causal": self.causal, "inv_freq": np.float32(inv_freq), "rope_scale": scale}

    def cotangents(self, seed: int = 0) -> tuple:
        """Of the output, in the case's dtype, and of the logsumexp."""
        rng = self._rng(seed, 2)
        d_out = rng.normal(size=(self.B, self.T, self.N, self.H))
        d_lse = rng.normal(size=(self.B, self.N, self.T))
        return jnp.asarray(d_out, self.dtype), jnp.asarray(d_lse, jnp.float32)


def _permutation(n: int, rng):
    """Of single tokens when short; of eighths when long, so that some blocks stay whole."""
    if n < 256:
        return rng.permutation(n)
    parts = np.array_split(np.arange(n), 8)
    return np.concatenate([parts[i] for i in rng.permutation(8)])


def _affordable(factors: dict) -> bool:
    """Also for a partial choice: what is open counts as its least."""
    least = {"T": 1, "S": 1, "H": 64, "group": 1} | factors
    return least["T"] * least["S"] * least["H"] * least["group"] <= _BUDGET


def _sized(factors: dict) -> Case:
    """Two kv heads and some rows where that is cheap, more of them where an array is short.

    A position's gradient is a sum that may cancel; the norm of one or two such is no measure.
    """
    T, S = factors["T"], factors["S"]
    B = 1 + (T * S <= 2**17) + 4 * (min(T, S) == 1 and max(T, S) <= 1024)
    return Case(**factors, B=B, K=2 if T * S <= 2**20 else 1)


def _covering() -> tuple[Case, ...]:
    """Greedy: start from a pair not yet covered, then give each factor what covers most.

    Ties are drawn, always in the same way: taken in order, they would tie one factor to another.
    """
    names, draw = list(FACTORS), random.Random(0)
    open_pairs = {
        ((a, x), (b, y)): None  # a dict keeps its order, a set of strings does not
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(FACTORS[a], FACTORS[b])
    }

    def newly_covered(row: dict):
        known = [(name, row[name]) for name in names if name in row]
        return [pair for pair in itertools.combinations(known, 2) if pair in open_pairs]

    rows = []
    while open_pairs:
        row = dict(next(iter(open_pairs)))
        for name in draw.sample(names, len(names)):
            if name not in row:
                choices = [row | {name: x} for x in FACTORS[name] if _affordable(row | {name: x})]
                row = max(choices, key=lambda r: (len(newly_covered(r)), draw.random()))
        for pair in newly_covered(row):
            del open_pairs[pair]
        rows.append(_sized(row))
    return tuple(rows)


# What training looks like, all at once.
_TRAINING = (
    Case(T=1024, S=1024, H=128, dtype="bfloat16", positions="kv", K=2),
    Case(T=1024, S=1024, H=128, dtype="bfloat16", positions="kv", documents=True, group=2, B=2),
    Case(T=1024, S=1024, H=64, dtype="bfloat16", documents=True, permuted=True, yarn=True),
    Case(T=300, S=300, H=128, positions="query", documents=True, group=2, K=2),
)

COVERING = _covering() + _TRAINING


def full(seed: int = 0):
    """Every combination of the factors that the reference can afford, in a random order."""
    sizes = list(itertools.product(*FACTORS.values()))
    random.Random(seed).shuffle(sizes)
    for values in sizes:
        factors = dict(zip(FACTORS, values, strict=True))
        if _affordable(factors):
            yield _sized(factors)


def _turn(x, angle, scale):
    """Rotation of [L, H] by [L, H / 2] radians."""
    a, b = np.split(x, 2, -1)
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def _head(q, k, v, d_out, d_lse, visible, scale):
    """One head in float64, T queries a block at a time: out, lse, dq, dk, dv."""
    out, lse, dq, dk, dv = (np.zeros_like(x) for x in (q, d_lse, q, k, v))
    for rows in (slice(i, i + 1024) for i in range(0, len(q), 1024)):
        s = np.where(visible(rows), scale * q[rows] @ k.T, -np.inf)
        top = s.max(-1, keepdims=True)
        p = np.exp(s - np.where(np.isneginf(top), 0.0, top))
        total = p.sum(-1, keepdims=True)
        p /= np.where(total == 0, 1.0, total)
        out[rows] = p @ v
        with np.errstate(divide="ignore"):
            lse[rows] = (top + np.log(total))[:, 0]
        delta = (out[rows] * d_out[rows]).sum(-1) - d_lse[rows]
        ds = p * (d_out[rows] @ v.T - delta[:, None]) * scale
        dv += p.T @ d_out[rows]
        dq[rows] = ds @ k
        dk += ds.T @ q[rows]
    return out, lse, dq, dk, dv


def reference(case: Case, seed: int = 0) -> dict:
    """In float64: "out", "lse", and the gradients "dq", "dk", "dv", "dpositions_q", "_k"."""
    inputs, options, constants = case.arrays(seed), case.options(seed), case.constants()
    mask = masks.build(
        (case.B, case.T, case.S),
        causal=case.causal,
        **{name: options.get(name) for name in OPTIONS},
    )
    if isinstance(mask, masks.Default):
        mask = mask.arrays(case.T, case.S)
    mask = {name: np.broadcast_to(x, (case.B, x.shape[1])) for name, x in mask.items()}
    wide = {name: np.asarray(x, np.float64) for name, x in inputs.items() if x is not None}
    d_out, d_lse = (np.asarray(x, np.float64) for x in case.cotangents(seed))
    true = {"out": np.zeros(d_out.shape), "lse": np.zeros(d_lse.shape)}
    true |= {f"d{name}": np.zeros(x.shape) for name, x in wide.items()}

    for b, n in itertools.product(range(case.B), range(case.N)):
        h = n // case.group
        qkv = [wide["q"][b, :, n], wide["k"][b, :, h], wide["v"][b, :, h]]
        if case.positions != "none":
            angles = []
            for i, name in enumerate(("positions_q", "positions_k")):
                column = n * inputs[name].shape[-1] // case.N
                z = np.asarray(inputs[name])[b, :, column, None]
                angles.append(np.float64(z * constants["inv_freq"]))  # the product in float32
                qkv[i] = _turn(qkv[i], angles[i], constants["rope_scale"])

        def visible(rows, b=b):
            seen = mask["index"][b] <= mask["limit"][b, rows, None]
            if "q_segment" in mask:
                seen &= mask["q_segment"][b, rows, None] == mask["kv_segment"][b]
            return seen

        out, lse, *grads = _head(*qkv, d_out[b, :, n], d_lse[b, n], visible, case.H**-0.5)
        true["out"][b, :, n], true["lse"][b, n] = out, lse
        if case.positions != "none":
            for i, name in enumerate(("positions_q", "positions_k")):
                (y1, y2), (dy1, dy2) = np.split(qkv[i], 2, -1), np.split(grads[i], 2, -1)
                column = n * inputs[name].shape[-1] // case.N
                dz = ((y1 * dy2 - y2 * dy1) * constants["inv_freq"]).sum(-1)
                true[f"d{name}"][b, :, column] += dz
                grads[i] = _turn(grads[i], -angles[i], constants["rope_scale"])
        true["dq"][b, :, n] = grads[0]
        true["dk"][b, :, h] += grads[1]
        true["dv"][b, :, h] += grads[2]
    return true


OPTIONS = ("q_index", "kv_index", "q_segment_ids", "kv_segment_ids", "kv_length")


def through(attend):
    """A backend's `attend` as an implementation for `check`: rotation by XLA, then attention."""

    def implementation(
        q, k, v, positions_q, positions_k, *, causal, inv_freq, rope_scale, return_lse, **options
    ):
        B, T, N, H = q.shape
        S, K = k.shape[1:3]
        if positions_k is not None and positions_k.shape[-1] > K:
            k, v = jnp.repeat(k, N // K, axis=2), jnp.repeat(v, N // K, axis=2)
        options = {name: options.get(name) for name in OPTIONS}
        mask = masks.build((B, T, S), causal=causal, **options)
        q, k = rotate(q, k, positions_q, positions_k, inv_freq=inv_freq, rope_scale=rope_scale)
        return attend(q, k, v, mask, scale=H**-0.5)

    return implementation


def run(implementation, case: Case, seed: int = 0) -> dict:
    """What `reference` returns, as the implementation computes it."""
    inputs = case.arrays(seed)
    call = functools.partial(implementation, return_lse=True, **case.constants())

    @jax.jit
    def everything(inputs, options, cotangents):
        def attend(inputs):
            positions = {name: x for name, x in inputs.items() if name.startswith("positions")}
            return call(*(inputs[name] for name in "qkv"), **positions, **options)

        (out, lse), vjp = jax.vjp(attend, inputs)
        return out, lse, vjp(cotangents)[0]

    out, lse, grads = everything(inputs, case.options(seed), case.cotangents(seed))
    for name, grad in grads.items():
        if inputs[name] is not None:
            assert grad.dtype == inputs[name].dtype, f"d{name} is {grad.dtype}"
    assert out.dtype == inputs["q"].dtype
    assert lse.dtype == jnp.float32
    found = {"out": out, "lse": lse} | {f"d{n}": x for n, x in grads.items() if x is not None}
    return {name: np.asarray(x, np.float64) for name, x in found.items()}


def error(found, true, name: str) -> float:
    """|found - true| / |true|; infinite for NaN and for a wrong -inf."""
    if found.shape != true.shape or (np.isneginf(found) != np.isneginf(true)).any():
        return np.inf
    found, true = (np.where(np.isneginf(true), 0.0, x) for x in (found, true))
    difference, size = np.linalg.norm(found - true), np.linalg.norm(true)
    if name == "lse":
        size = max(size, true.size**0.5)
    if difference == 0.0:
        return 0.0
    return difference / size if np.isfinite(difference) and size else np.inf


def errors(implementation, case: Case, seed: int = 0) -> dict[str, float]:
    """The error of every array that `reference` knows."""
    found, true = run(implementation, case, seed), reference(case, seed)
    assert found.keys() == true.keys(), f"{case}: {found.keys()} instead of {true.keys()}"
    blind = np.isneginf(true["lse"]).swapaxes(1, 2)
    for name in ("out", "dq"):
        assert not found[name][blind].any(), f"{case}: {name} of a row that sees nothing"
    return {name: error(found[name], true[name], name) for name in true}


def check(implementation, case: Case, seed: int = 0) -> None:
    """Raises AssertionError unless every error is below the tolerance of the case's dtype.

    Args:
      implementation: called like `rotary_attention` with return_lse=True.
      case: see `COVERING`.
      seed: of the random inputs.
    """
    too_large = {
        n: e for n, e in errors(implementation, case, seed).items() if not e < TOLERANCE[case.dtype]
    }
    assert not too_large, f"{case}: errors {too_large}, allowed {TOLERANCE[case.dtype]}"
