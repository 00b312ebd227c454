"""The attention of one block."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Partition, rotary_attention, rotate
from pallas_kernels.attention.api import rotation_for
from repo_jax.config import DecoderConfig
from repo_jax.modeling.cope import cope_attention
from repo_jax.modeling.layers import RMSNorm, init_weights, linear
from repo_jax.modeling.rope import rotary_frequencies
from repo_jax.sharding import parts, split_axes


def _partition(batch_size: int, length: int) -> Partition | None:
    """How mesh and logical axis rules in context split batch, heads and tokens, if they do.

    What the mesh does not divide, like the one row that a model is initialised with, is whole.
    """

    def axes(name, size):
        found = split_axes(name)
        return found if found and size % parts(found) == 0 else None

    batch, tokens, heads = axes("batch", batch_size), axes("length", length), split_axes("heads")
    return Partition(batch, heads or None, tokens) if batch or tokens or heads else None


class Attention(nn.Module):
    """OLMo-2 attention: q and k are normed over their full width, then rotated.

    Positions decide the rotation only; what a token sees is decided by index and document.
    Where Flax's collection `cache` has a `cache.LayerCache` under the name `layer`, keys and
    values are written there, and what it holds is seen.
    Where the collection `probe` has an array [B, T, H] under the name `values`, each query's mean
    of it, weighted by attention, is sown into `intermediates` as `probed`, [B, T, N, H].

    Attributes:
      config: of the model.
      cope: no rotation, but `cope.cope_attention`, whose kernel is the parameter
        `position_kernel` [H, P].
    """

    config: DecoderConfig
    cope: bool = False

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BTP: jax.Array | None,
        segment_ids: jax.Array | None = None,
        rotates: jax.Array | bool = True,
        index: np.ndarray | jax.Array | None = None,
    ) -> jax.Array:
        """x [B, T, D] -> [B, T, D].

        positions: float32 [B, T, P], P = 1, K or N, or None for no rotation.
        rotates: False, a bool scalar: positions are zeros and stand for no rotation.
        index: as in `RePoLM.hidden`.
        """
        c = self.config
        heads = lambda n, name, axis: linear(c, (n, c.head_dim), ("embed", axis, None), name=name)
        q_BTNH = heads(c.n_heads, "query", "heads")(x_BTD)
        k_BTKH = heads(c.n_kv_heads, "key", "kv_heads")(x_BTD)
        v_BTKH = heads(c.n_kv_heads, "value", "kv_heads")(x_BTD)
        q_norm = RMSNorm(c, ("heads", None), name="query_norm").scale(q_BTNH.shape[2:])
        k_norm = RMSNorm(c, ("kv_heads", None), name="key_norm").scale(k_BTKH.shape[2:])
        q_BTNH = nn.with_logical_constraint(q_BTNH, ("batch", "length", "heads", None))
        k_BTKH = nn.with_logical_constraint(k_BTKH, ("batch", "length", "kv_heads", None))
        v_BTKH = nn.with_logical_constraint(v_BTKH, ("batch", "length", "kv_heads", None))

        inv_freq, rope_scale = rotary_frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
        if rotates is not True and rope_scale != 1.0:
            rope_scale = jnp.where(rotates, rope_scale, 1.0)
        kernel = dict(
            inv_freq=inv_freq, rope_scale=rope_scale, partition=_partition(*x_BTD.shape[:2])
        )
        # Norm and rotation are one pass over q and k, and attention gets them rotated; but a
        # key with a position for each of its query heads is turned by attention, once for each.
        in_attention = positions_BTP is not None and positions_BTP.shape[-1] > c.n_kv_heads
        before, later = (None, positions_BTP) if in_attention else (positions_BTP, None)
        q_BTNH, k_BTKH = rotate(
            *(q_BTNH, k_BTKH, before, before),
            q_norm=q_norm,
            k_norm=k_norm,
            norm_eps=c.norm_eps,
            implementation=rotation_for(c.attention),
            **kernel,
        )
        kv_index = index
        if self.has_variable("cache", "layer"):
            if in_attention:
                group = c.n_heads // c.n_kv_heads
                k_BTKH, v_BTKH = (jnp.repeat(x, group, axis=2) for x in (k_BTKH, v_BTKH))
                q_BTNH, k_BTKH = rotate(q_BTNH, k_BTKH, later, later, **kernel)
                later = None
            cache = self.get_variable("cache", "layer").write(k_BTKH, v_BTKH)
            self.put_variable("cache", "layer", cache)
            k_BTKH, v_BTKH = cache.read()
            kv_index = cache.index
        visible = dict(
            q_segment_ids=segment_ids,
            kv_segment_ids=segment_ids,
            q_index=index,
            kv_index=kv_index,
        )
        if self.cope:
            position_kernel = self.param(
                *("position_kernel", init_weights(c.position_init_std, (None, "position"))),
                *((c.head_dim, c.positions.cope_positions), jnp.dtype(c.param_dtype)),
            )
            if self.has_variable("cache", "layer"):
                k_BTKH, v_BTKH = (jnp.concatenate(x, axis=1) for x in (k_BTKH, v_BTKH))
            attend = lambda v_BTKH: cope_attention(
                *(q_BTNH, k_BTKH, v_BTKH, position_kernel), scale=c.head_dim**-0.5, **visible
            )
        else:
            attend = lambda v_BTKH: rotary_attention(
                *(q_BTNH, k_BTKH, v_BTKH, later, later),
                implementation=c.attention,
                **visible,
                **kernel,
            )
        out_BTNH = attend(v_BTKH)
        if self.has_variable("probe", "values"):
            values_BTH = self.get_variable("probe", "values").astype(v_BTKH.dtype)
            probed_BTNH = attend(jnp.broadcast_to(values_BTH[:, :, None], v_BTKH.shape))
            self.sow("intermediates", "probed", probed_BTNH)
        return linear(c, (c.d_model,), ("heads", None, "embed"), inputs=2, name="out")(out_BTNH)
