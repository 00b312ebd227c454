"""FLOPs of the model by the literature's convention, and the share of the peak that a run uses.

PaLM's (arXiv 2204.02311, appendix B): a token costs 6 flop for each parameter of a matrix product,
the embedding's look-up being none, and 12 L N H T for attention: 2 for a product and its sum,
forward once and backward twice; recomputation does not count. That takes all pairs of tokens,
also those that a causal mask leaves out; `causal=True` counts only what a query sees, T (T + 1) / 2
pairs. RePo's f_phi counts like any other product, and so does CoPE's of queries and whole
positions.
"""

from repo_jax.config import DecoderConfig
from repo_jax.hardware import chip


def matmul_parameters(config: DecoderConfig) -> int:
    """Parameters that each token is multiplied with: of all layers and the head."""
    c = config
    attention = c.d_model * c.head_dim * 2 * (c.n_heads + c.n_kv_heads)
    layer = attention + 3 * c.d_model * c.d_ff
    if c.positions.f_phi == "linear":
        f_phi = c.d_model * c.position_columns
    else:
        f_phi = 2 * c.d_model * c.d_position + c.d_position * c.position_columns
    head = c.d_model * c.vocab_size
    return c.n_layers * layer + c.kinds.count("repo") * f_phi + head


def model_flops_per_token(config: DecoderConfig, length: int, *, causal: bool = False) -> float:
    """Forward and backward, by the convention of this module.

    Args:
      config: of the model.
      length: T, tokens in a window.
      causal: count the pairs of tokens that a causal mask leaves, instead of all.
    """
    seen = (length + 1) / 2 if causal else length
    if "cope" in config.kinds:
        # Each query head also meets every whole position, which counts as half a pair.
        seen += min(config.positions.cope_positions, length + 1) / 2
    attention = 12 * config.n_layers * config.n_heads * config.head_dim * seen
    return 6 * matmul_parameters(config) + attention


def peak_flops(device_kind: str) -> float | None:
    """bf16 flop a second of one device, as published; None: not known.

    device_kind: what `jax.Device.device_kind` says.
    """
    found = chip(device_kind)
    return found.flops if found else None


def mfu(
    config: DecoderConfig, length: int, tokens_per_second: float, n_devices: int, device_kind: str
) -> float | None:
    """Model FLOPs utilisation: a share of the peak, with all pairs of tokens (`causal=False`).

    Args:
      config, length: as in `model_flops_per_token`.
      tokens_per_second: of all devices together.
      n_devices, device_kind: that run it. None is returned where the peak is not known.
    """
    peak = peak_flops(device_kind)
    if peak is None:
        return None
    return model_flops_per_token(config, length) * tokens_per_second / (n_devices * peak)
