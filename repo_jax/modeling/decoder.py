"""The language model, and the walk over its layers."""

import dataclasses
import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from repo_jax.config import DecoderConfig
from repo_jax.modeling.block import DecoderBlock, layer_positions, repositioning
from repo_jax.modeling.layers import RMSNorm, init_weights, linear, look_up

_REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse"),
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse"),
    ),
}


@flax.struct.dataclass
class DecoderOutput:
    """What the model returns: logits, float32 [B, T, V]."""

    logits: jax.Array


def _init_layers(rng: jax.Array, config: DecoderConfig):
    """Parameters of all layers, stacked: [L, ...], and [R, ...] for f_phi of the R RePo layers.

    The tree depends on the model alone. A RePo model's is a RoPE model's with
    `repositioning` added.
    """
    x = jnp.zeros((1, 2, config.d_model), config.dtype)
    # Whatever runs attention, weights are drawn without it: not every kernel can be mapped.
    config = dataclasses.replace(config, attention="xla")

    def stack(module, rng, n):
        init = jax.jit(jax.vmap(lambda key: module.init(key, x)["params"]))
        return meta.add_axis(init(jax.random.split(rng, n)), 0, {nn.PARTITION_NAME: "layers"})

    block_rng, f_phi_rng = jax.random.split(rng)
    kind = "cope" if "cope" in config.kinds else "rope"
    params = stack(DecoderBlock(config, kind, parent=None), block_rng, config.n_layers)
    n_repo = config.kinds.count("repo")
    if n_repo:
        params["repositioning"] = stack(repositioning(config, parent=None), f_phi_rng, n_repo)
    return params


class RePoLM(nn.Module):
    """OLMo-2 decoder with context re-positioning (arXiv 2512.14391).

    `model.apply({"params": params}, tokens_BT)` is pure. Parameters:
    `embedding/embedding` [V, D]; `layers/...`, every layer's stacked on a leading axis L
    (`layers/repositioning`: on R, the RePo layers in order); `final_norm/scale` [D];
    `head/kernel` [D, V].
    """

    config: DecoderConfig

    def setup(self):
        c = self.config
        self.embedding = nn.Embed(
            c.vocab_size,
            c.d_model,
            param_dtype=c.param_dtype,
            embedding_init=init_weights(c.embedding_init_std or c.init_std, ("vocab", "embed")),
        )
        self.layers = self.param("layers", functools.partial(_init_layers, config=c))
        self.final_norm = RMSNorm(c, ("norm",))
        self.head = linear(c, (c.vocab_size,), ("embed", "vocab"), out_dtype=jnp.float32)

    def __call__(
        self,
        tokens_BT: jax.Array,
        segment_ids: jax.Array | None = None,
        index_weight: float | jax.Array = 0.0,
    ) -> DecoderOutput:
        """Next-token logits.

        Args:
          tokens_BT: int32 [B, T].
          segment_ids: int32 [B, T], nondecreasing along T; a token sees its own document
            only; 0 is padding, which sees and is seen by nothing. None: one document.
          index_weight: w in [0, 1]: RePo layers use (1 - w) z + w index.

        Returns:
          `DecoderOutput` with float32 logits [B, T, V].
        """
        hidden_BTD = self.hidden(tokens_BT, segment_ids, index_weight)
        return DecoderOutput(logits=self.logits(hidden_BTD))

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """The head: what `hidden` returns, [B, T, D], to float32 [B, T, V]."""
        return self.head(hidden_BTD)

    def hidden(self, tokens_BT, segment_ids=None, index_weight=0.0, index=None) -> jax.Array:
        """The input of the head, [B, T, D] in the activation dtype.

        index: int32 [B, T], which token of its sequence each one is, where they do not lie in
          order. If all rows lie alike, a numpy array [T] lets attention skip what it may skip.
          None: in order.
        """
        x_BTD, _ = self._walk(tokens_BT, segment_ids, index_weight, index, keep_positions=False)
        return self.final_norm(x_BTD)

    def positions(self, tokens_BT, segment_ids=None, index_weight=0.0) -> jax.Array:
        """What the rotation uses: float32 [B, L, N, T]; see `capture_positions`."""
        _, positions = self._walk(tokens_BT, segment_ids, index_weight, keep_positions=True)
        return positions

    def _walk(self, tokens_BT, segment_ids, index_weight, index=None, *, keep_positions: bool):
        """Embeds, then scans the layers: one compiled body, whatever depth and preset."""
        c = self.config
        x_BTD = look_up(self.embedding.embedding, tokens_BT, c.dtype)
        x_BTD = nn.with_logical_constraint(x_BTD, ("batch", "length", None))
        layers = dict(self.layers)
        # f_phi's parameters on the axis of all layers, zeros where a layer has none: a copy of
        # the smallest ones, where a scan for each kind would have to cut up all.
        at = np.flatnonzero([kind == "repo" for kind in c.kinds])
        f_phi = layers.pop("repositioning", None)
        if len(at) < c.n_layers:
            f_phi = jax.tree.map(
                lambda p: jnp.zeros((c.n_layers, *p.shape[1:]), p.dtype).at[at].set(p), f_phi
            )
        kinds = sorted(set(c.kinds))
        which = jnp.array([kinds.index(kind) for kind in c.kinds])

        def layer(x_BTD, layer):
            params, f_phi, which = layer
            if len(kinds) > 1:
                positions = self._positions(kinds, which, f_phi, x_BTD, index_weight, index)
                given = (positions, which != kinds.index("nope") if "nope" in kinds else True)
            else:
                given = (None, True)
                params = params | ({"repositioning": f_phi} if f_phi else {})
            block = DecoderBlock(c, "given" if len(kinds) > 1 else kinds[0], parent=None)
            x_BTD, positions = block.apply(
                {"params": params}, x_BTD, segment_ids, index_weight, *given, index
            )
            return x_BTD, positions if keep_positions else None

        if c.remat != "none":
            layer = jax.checkpoint(layer, policy=_REMAT_POLICIES[c.remat], prevent_cse=False)
        x_BTD, positions = jax.lax.scan(layer, x_BTD, (layers, f_phi, which))
        if not keep_positions:
            return x_BTD, None
        if positions is None:  # every layer is `nope`, or every one `cope`
            positions = jnp.zeros((c.n_layers, *tokens_BT.shape, 1))
        none = jnp.array([kind in ("nope", "cope") for kind in c.kinds])[:, None, None, None]
        positions = jnp.where(none, jnp.nan, positions)
        positions = jnp.repeat(positions, c.n_heads // positions.shape[-1], -1)
        return x_BTD, positions.transpose(1, 0, 3, 2)

    def _positions(self, kinds, which, f_phi, x_BTD, index_weight, index):
        """The positions of a layer whose kind is kinds[which], decided at run time.

        A layer without any gets zeros: rotation by zero is the identity.
        """
        c = self.config
        columns = c.position_columns if "repo" in kinds else 1
        z = lambda f_phi: lambda x: repositioning(c, parent=None).apply({"params": f_phi}, x)

        def positions(kind, f_phi, x_BTD):
            found = layer_positions(kind, x_BTD, index_weight, z(f_phi), index)
            found = jnp.zeros((*x_BTD.shape[:2], 1)) if found is None else found
            return jnp.broadcast_to(found, (*x_BTD.shape[:2], columns))

        branches = [functools.partial(positions, kind) for kind in kinds]
        return jax.lax.switch(which, branches, f_phi, x_BTD)


def abstract_params(model: RePoLM):
    """Shapes and dtypes of the plain parameter tree, as `jax.ShapeDtypeStruct`; makes none."""
    return nn.unbox(boxed_params(model))


def boxed_params(model: RePoLM):
    """`abstract_params` in Flax's boxes, which have the logical names of the axes."""
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.eval_shape(_without_kernels(model).init, jax.random.key(0), tokens)["params"]


def _without_kernels(model: RePoLM) -> RePoLM:
    """Flax runs a model to make its weights; a kernel may not run here, or not on two tokens."""
    return RePoLM(dataclasses.replace(model.config, attention="xla"))


def init_params(model: RePoLM, rng: jax.Array, shardings=None):
    """New weights: a plain tree of arrays, the same on any number of devices.

    Args:
      model: whose config says widths and dtypes.
      rng: a `jax.random.key`.
      shardings: where they go, as `sharding.param_shardings` says; each device then draws its
        own part. None: the default device.
    """

    def init(rng):
        tokens = jnp.zeros((1, 2), jnp.int32)
        return nn.unbox(_without_kernels(model).init(rng, tokens)["params"])

    places = jax.tree.leaves(shardings)
    devices = places[0].device_set if places else jax.devices()
    # Compiles sooner, to the same weights: this runs once, and is mostly random bits. Only whole
    # programs have options, not what the caller traces.
    traced = any(isinstance(x, jax.core.Tracer) for x in (rng, jnp.zeros(())))
    on_cpu = next(iter(devices)).platform == "cpu"
    options = {"xla_backend_optimization_level": 1} if on_cpu and not traced else None
    return jax.jit(init, out_shardings=shardings, compiler_options=options)(rng)


def capture_positions(
    model: RePoLM,
    params,
    tokens_BT: jax.Array,
    segment_ids: jax.Array | None = None,
    index_weight: float = 0.0,
) -> jax.Array:
    """The positions that each layer's rotation uses.

    Args:
      model, params: as `from_pretrained` returns them.
      tokens_BT: int32 [B, T].
      segment_ids, index_weight: as in `RePoLM.__call__`.

    Returns:
      float32 [B, L, N, T], before YaRN, repeated to the N query heads; the index in RoPE
      layers and NaN in NoPE and CoPE layers.
    """
    return model.apply({"params": params}, tokens_BT, segment_ids, index_weight, method="positions")
