"""One layer of the decoder."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from repo_jax.config import DecoderConfig, PositionKind
from repo_jax.modeling.attention import Attention
from repo_jax.modeling.layers import MLP, RMSNorm
from repo_jax.modeling.repositioning import ContextRePositioning


def repositioning(config: DecoderConfig, **options) -> ContextRePositioning:
    """The f_phi of one RePo layer of `config`."""
    columns = {"kv": "kv_heads", "query": "heads", "shared": None}[config.positions.heads]
    return ContextRePositioning(
        columns=config.position_columns,
        d_position=config.d_position,
        f_phi=config.positions.f_phi,
        init_std=config.position_init_std,
        logical_axes=("embed", "position", columns),
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        **options,
    )


def layer_positions(
    kind: PositionKind, x_BTD: jax.Array, index_weight, f_phi, index=None
) -> jax.Array | None:
    """The positions of a layer of this kind: float32 [B, T, P], or None for no rotation.

    index_weight: w of (1 - w) z + w index where `kind` is `repo`.
    f_phi: x_BTD -> z, called for `repo` only.
    index: as in `RePoLM.hidden`.
    """
    if kind in ("nope", "cope"):
        return None
    index_BT = jnp.atleast_2d(jnp.arange(x_BTD.shape[1]) if index is None else index)
    index_BT1 = jnp.broadcast_to(index_BT.astype(jnp.float32)[:, :, None], (*x_BTD.shape[:2], 1))
    if kind == "rope":
        return index_BT1
    z_BTP = f_phi(x_BTD)
    if isinstance(index_weight, float) and index_weight == 0.0:
        return z_BTP
    return (1.0 - index_weight) * z_BTP + index_weight * index_BT1


class DecoderBlock(nn.Module):
    """OLMo-2 block: x + norm(attention(x)), then x + norm(mlp(x)).

    Norms come after attention and MLP (arXiv 2501.00656), so f_phi reads the raw residual
    stream, the same tensor that feeds q, k and v.

    Attributes:
      config: of the model.
      kind: `rope`, integer positions; `nope`, none; `repo`, learned; `cope`, counted by each
        query in attention; `given`, by the caller.
    """

    config: DecoderConfig
    kind: PositionKind | Literal["given"]

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        segment_ids: jax.Array | None = None,
        index_weight: float | jax.Array = 0.0,
        positions: jax.Array | None = None,
        rotates: jax.Array | bool = True,
        index: np.ndarray | jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Runs the layer.

        Args:
          x_BTD: [B, T, D] in the activation dtype.
          segment_ids: int32 [B, T], nondecreasing documents from 1; 0 is padding.
          index_weight: w of (1 - w) z + w index in a `repo` layer.
          positions: float32 [B, T, P], P = 1, K or N, for the kind `given`.
          rotates: False where the given positions are the zeros of a layer without any, which
            YaRN does not scale either.
          index: as in `RePoLM.hidden`.

        Returns:
          The new x, and the positions used: float32 [B, T, P], None for `nope`
          and `cope`.
        """
        c = self.config
        if self.kind != "given":
            f_phi = lambda x: repositioning(c, name="repositioning")(x)
            positions = layer_positions(self.kind, x_BTD, index_weight, f_phi, index)
        attention = Attention(c, cope=self.kind == "cope", name="attention")
        attended = attention(x_BTD, positions, segment_ids, rotates, index)
        x_BTD = x_BTD + RMSNorm(c, ("norm",), name="attention_norm")(attended)
        x_BTD = x_BTD + RMSNorm(c, ("norm",), name="mlp_norm")(MLP(c, name="mlp")(x_BTD))
        return nn.with_logical_constraint(x_BTD, ("batch", "length", None)), positions
