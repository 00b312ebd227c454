"""The decoder: OLMo-2 blocks whose attention may stand on learned positions.

How data flows: `decoder.RePoLM` embeds tokens and scans the layers, one compiled body
for all; each `block.DecoderBlock` gets its positions (index, none, or
`repositioning.ContextRePositioning` of its input), runs `attention.Attention`, then the
MLP; `rope.py` says how fast each pair of channels turns.
"""

from repo_jax.modeling.block import DecoderBlock
from repo_jax.modeling.decoder import (
    DecoderOutput,
    RePoLM,
    abstract_params,
    boxed_params,
    capture_positions,
    init_params,
)
from repo_jax.modeling.repositioning import ContextRePositioning

__all__ = [
    "ContextRePositioning",
    "DecoderBlock",
    "DecoderOutput",
    "RePoLM",
    "abstract_params",
    "boxed_params",
    "capture_positions",
    "init_params",
]
