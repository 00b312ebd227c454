"""FLOPs by the convention, held against the parameter tree and published numbers."""

import dataclasses

import jax
import pytest

from repo_jax import flops, hardware
from repo_jax.config import DecoderConfig, PositionConfig, decoder_config
from repo_jax.modeling import RePoLM, abstract_params
from repo_jax.training.optimizer import parameter_paths

PRESETS = ("rope", "nope", "r2n1", "n2r1", "repo")


def small(**changes):
    sizes = dict(vocab_size=96, d_model=48, n_layers=5, n_heads=6, n_kv_heads=3, d_ff=80)
    return DecoderConfig(**(sizes | changes))


@pytest.mark.parametrize("heads", ["kv", "query", "shared"])
@pytest.mark.parametrize("f_phi", ["swiglu", "linear"])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_matrix_that_multiplies_a_token_is_counted(preset, f_phi, heads):
    config = small(positions=PositionConfig(preset=preset, f_phi=f_phi, heads=heads))
    params = abstract_params(RePoLM(config))
    leaves = zip(parameter_paths(params), jax.tree.leaves(params), strict=True)
    matrices = sum(x.size for path, x in leaves if path.endswith("/kernel"))
    assert flops.matmul_parameters(config) == matrices


def test_attention_by_hand():
    config = small()
    rest = 6 * flops.matmul_parameters(config)
    attention = flops.model_flops_per_token(config, 10) - rest
    # Scores and weighted sums: 2 products of 2 flop, forward once and backward twice.
    assert attention == 5 * 6 * 8 * 10 * (2 * 2 * 3)
    assert flops.model_flops_per_token(config, 10, causal=True) - rest == attention * 5.5 / 10


def test_repo_costs_at_most_one_percent_more_than_rope():
    rope, repo = (
        flops.model_flops_per_token(decoder_config("olmo2_1b", positions=PositionConfig(p)), 4096)
        for p in ("rope", "repo")
    )
    assert 1.0 < repo / rope <= 1.01


def test_a_run_at_the_peak_has_an_mfu_of_one():
    config = decoder_config("olmo2_1b")
    per_token = flops.model_flops_per_token(config, 4096)
    tokens_per_second = 16 * 197e12 / per_token
    assert flops.mfu(config, 4096, tokens_per_second, 16, "TPU v5 lite") == pytest.approx(1.0)


def test_an_unknown_device_has_no_peak():
    assert flops.peak_flops("cpu") is None
    assert flops.mfu(decoder_config("olmo2_1b"), 4096, 1.0, 1, "cpu") is None


def test_chips_are_told_apart_by_name_and_kind():
    names = [name for chip in hardware.CHIPS for name in (chip.name, *chip.kinds)]
    assert len(set(names)) == len(names)
    assert all(hardware.chip(name) in hardware.CHIPS for name in names)
    for chip in hardware.CHIPS:
        rates = [getattr(chip, name) for name in ("flops", "memory", "bandwidth", "link")]
        assert all(rate > 0 for rate in rates), dataclasses.asdict(chip)
