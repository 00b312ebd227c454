"""What the cuDNN backend refuses, its VJP around a stand-in, and that it compiles for an H200.

cuDNN itself needs a GPU: benchmarks/check_device.py compares its numbers there.
"""

import enum
import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import cudnn, masks, reference

SCALE = 0.3


def arrays(dtype=jnp.bfloat16, *, T=6, S=6, H=8):
    rng = np.random.default_rng(0)
    shapes = ((2, T, 4, H), (2, S, 2, H), (2, S, 2, H))
    return tuple(jnp.asarray(rng.normal(size=s), dtype) for s in shapes)


@pytest.mark.parametrize(
    ("options", "mask", "message"),
    [
        ({}, {"limit": 0, "index": 0}, "documents, indices or cache lengths"),
        ({"T": 4}, masks.Default(causal=True), "puts 4 queries at the start.* of 6 keys"),
        ({"dtype": jnp.float32}, masks.Default(causal=True), "not float32"),
        ({"T": 0, "S": 0}, masks.Default(causal=False), "nothing to attend"),
    ],
)
def test_what_cudnn_cannot_do_is_said(options, mask, message):
    with pytest.raises(NotImplementedError, match=message):
        cudnn.attend(*arrays(**options), mask, scale=SCALE)


def test_without_cuda_packages_it_is_refused(monkeypatch):
    monkeypatch.setattr(cudnn.fused, "cuda_versions", None)
    with pytest.raises(NotImplementedError, match="jax's CUDA packages"):
        cudnn.attend(*arrays(), masks.Default(causal=True), scale=SCALE)


def test_an_interface_that_changed_is_refused(monkeypatch):
    monkeypatch.setattr(cudnn.fused, "_dot_product_attention_bwd_rule", lambda res: res)
    with pytest.raises(NotImplementedError, match="interface to cuDNN is not known"):
        cudnn.attend(*arrays(), masks.Default(causal=True), scale=SCALE)


class MaskType(enum.Enum):
    NO_MASK = 0
    CAUSAL = 2


def attend_instead(q, k, v, *, scale, mask_type, **_):
    return reference.attend(q, k, v, masks.Default(mask_type is MaskType.CAUSAL), scale=scale)


def backward_instead(
    scale, seed, dropout_rate, variadic_args, mask_type, layout, sliding_window_length,
    is_training, return_residual, res, grad_output,
):  # fmt: skip
    """As cuDNN's: of the output alone."""
    options = {"scale": scale, "mask_type": mask_type}
    _, vjp = jax.vjp(lambda *x: attend_instead(*x, **options)[0], *res[:3])
    return (*vjp(grad_output), *(None,) * 7)


@pytest.fixture
def stand_in(monkeypatch):
    """The reference in cuDNN's place, so that our VJP around it can run."""
    fake = types.SimpleNamespace(
        cuda_versions=object(),
        MaskType=MaskType,
        AttentionLayout=enum.Enum("AttentionLayout", ["BTNH"]),
        dot_product_attention=attend_instead,
        _dot_product_attention_bwd_rule=backward_instead,
    )
    monkeypatch.setattr(cudnn, "fused", fake)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("by", ["out", "lse", "both"])
def test_gradients_by_either_output(causal, by):
    q, k, v = arrays(jnp.float16)
    d_out = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)

    def loss(attend, *x):
        out, lse = attend(*x, masks.Default(causal), scale=SCALE)
        by_out = jnp.vdot(out.astype(jnp.float32), d_out) * (by != "lse")
        return by_out + jnp.sum(lse**2) if by != "out" else by_out

    got = jax.jit(jax.grad(lambda *x: loss(cudnn.attend, *x), (0, 1, 2)))(q, k, v)
    want = jax.grad(lambda *x: loss(reference.attend, *x), (0, 1, 2))(q, k, v)
    for a, b in zip(got, want, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max() <= 1e-2 * np.abs(b).max()


@pytest.mark.usefixtures("stand_in")
def test_a_remat_policy_can_keep_what_the_backward_pass_needs():
    calls = []

    def attend(*x):
        out, _ = cudnn.attend(*x, masks.Default(causal=True), scale=SCALE)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    original = cudnn.fused.dot_product_attention
    cudnn.fused.dot_product_attention = lambda *x, **o: calls.append(1) or marked(*x, **o)

    @jax.jit
    def expensive(q, k, v):
        return reference.attend(q, k, v, masks.Default(causal=True), scale=SCALE)

    def marked(q, k, v, **options):
        del options
        return expensive(q, k, v)

    policy = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
    gradient = jax.grad(jax.checkpoint(attend, policy=policy))
    text = str(jax.make_jaxpr(gradient)(*arrays()))
    cudnn.fused.dot_product_attention = original
    assert calls
    assert text.count("name=expensive") == 1


COMPILES = """
from benchmarks import targets
targets.prepare()
import jax, jax.numpy as jnp
from pallas_kernels.attention import cudnn, masks

def gradient(*x):
    loss = lambda *x: cudnn.attend(*x, masks.Default(True), scale=0.1)[0].astype(jnp.float32).sum()
    return jax.grad(loss, (0, 1, 2))(*x)

x = jax.ShapeDtypeStruct((1, 256, 4, 64), jnp.bfloat16)
print(targets.compile(targets.h200(), gradient, x, x, x).as_text())
"""


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="jax's CUDA packages are not installed",
)
def test_compiles_for_an_h200():
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", COMPILES]
    run = subprocess.run(command, cwd=root, env=os.environ, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert '"__cudnn$fmhaSoftmax"' in run.stdout
    assert '"__cudnn$fmhaSoftmaxBackward"' in run.stdout
