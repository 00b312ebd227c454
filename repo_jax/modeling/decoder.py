"""The language model, and the walk over its layers."""

import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.core import meta

from repo_jax.config import DecoderConfig
from repo_jax.modeling import scan
from repo_jax.modeling.block import DecoderBlock, repositioning
from repo_jax.modeling.layers import RMSNorm, init_weights, linear

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

    def stack(module, rng, n):
        init = jax.jit(jax.vmap(lambda key: module.init(key, x)["params"]))
        return meta.add_axis(init(jax.random.split(rng, n)), 0, {nn.PARTITION_NAME: "layers"})

    block_rng, f_phi_rng = jax.random.split(rng)
    params = stack(DecoderBlock(config, "rope", parent=None), block_rng, config.n_layers)
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
            dtype=c.dtype,
            param_dtype=c.param_dtype,
            embedding_init=init_weights(c.init_std, ("vocab", "embed")),
        )
        self.layers = self.param("layers", functools.partial(_init_layers, config=c))
        self.final_norm = RMSNorm(c, ("embed",))
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

    def hidden(self, tokens_BT, segment_ids=None, index_weight=0.0) -> jax.Array:
        """The input of the head, [B, T, D] in the activation dtype."""
        x_BTD, _ = self._walk(tokens_BT, segment_ids, index_weight, keep_positions=False)
        return self.final_norm(x_BTD)

    def positions(self, tokens_BT, segment_ids=None, index_weight=0.0) -> jax.Array:
        """What the rotation uses: float32 [B, L, N, T]; see `capture_positions`."""
        _, positions = self._walk(tokens_BT, segment_ids, index_weight, keep_positions=True)
        return positions

    def _walk(self, tokens_BT, segment_ids, index_weight, *, keep_positions: bool):
        """Embeds, then runs every segment of the scan plan."""
        c = self.config
        x_BTD = self.embedding(tokens_BT)
        x_BTD = nn.with_logical_constraint(x_BTD, ("batch", "length", "embed"))
        segments = scan.plan(c.kinds)
        common = {k: v for k, v in self.layers.items() if k != "repositioning"}
        common = _split(common, [(s.repeats, len(s.pattern)) for s in segments])
        f_phi = self.layers.get("repositioning")
        f_phi = _split(f_phi, [(s.repeats, s.pattern.count("repo")) for s in segments])
        kept = []
        for segment, params in zip(segments, zip(common, f_phi, strict=True), strict=True):
            run = functools.partial(self._run_pattern, segment.pattern, keep_positions)
            x_BTD, positions = jax.lax.scan(
                lambda x, params, run=run: run(params, x, segment_ids, index_weight), x_BTD, params
            )
            if keep_positions:  # [repeats, period, B, T, N]
                kept.append(positions.reshape(-1, *positions.shape[2:]))
        if not keep_positions:
            return x_BTD, None
        return x_BTD, jnp.concatenate(kept).transpose(1, 0, 3, 2)

    def _run_pattern(self, pattern, keep_positions, params, x_BTD, segment_ids, index_weight):
        common, f_phi = params
        n_repo_done = 0
        kept = []
        for i, kind in enumerate(pattern):
            layer = jax.tree.map(lambda p, i=i: p[i], common)
            if kind == "repo":
                layer["repositioning"] = jax.tree.map(lambda p, i=n_repo_done: p[i], f_phi)
                n_repo_done += 1
            block = DecoderBlock(self.config, kind, parent=None)
            run = lambda layer, *args, block=block: block.apply({"params": layer}, *args)
            if self.config.remat != "none":
                policy = _REMAT_POLICIES[self.config.remat]
                run = jax.checkpoint(run, policy=policy, prevent_cse=False)
            x_BTD, positions = run(layer, x_BTD, segment_ids, index_weight)
            kept.append(jnp.repeat(positions, self.config.n_heads // positions.shape[-1], -1))
        return x_BTD, jnp.stack(kept) if keep_positions else None


def _split(params, groups: list[tuple[int, int]]):
    """Cuts stacked params into a tree for each (repeats, size), arrays [repeats, size, ...].

    By `lax.split`, whose gradient is one concatenation; slices would each be padded to the
    whole stack and added up.
    """
    leaves, structure = jax.tree.flatten(params)
    parts = [jax.lax.split(leaf, [r * size for r, size in groups]) for leaf in leaves]
    return [
        jax.tree.unflatten(
            structure, [part[i].reshape(r, size, *part[i].shape[1:]) for part in parts]
        )
        for i, (r, size) in enumerate(groups)
    ]


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
      layers and NaN in NoPE layers.
    """
    return model.apply({"params": params}, tokens_BT, segment_ids, index_weight, method="positions")
