"""Reading on: a decoder that keeps the keys and values of the tokens before.

A token's position never depends on later tokens, RePo's z included, so keys are kept rotated.
The layers are walked one by one here, not scanned: an array for each layer is updated in place
and read where it lies, while a scan would cut each layer's weights and keys out of the stack,
which costs more than multiplying one token by them.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.attention.masks import NEVER
from repo_jax.config import DecoderConfig
from repo_jax.modeling.block import DecoderBlock
from repo_jax.modeling.layers import RMSNorm, linear, look_up


@flax.struct.dataclass
class LayerCache:
    """Keys, as attention compares them, and values of one layer: `layer` in Flax's collection
    `cache` of an `Attention`, which then writes and reads it.

    Attributes:
      keys, values: tuples of parts along S, each [B * K, S_i, H] in the activation dtype, or one
        part [B, K, S, H] under a mesh, whose axes split B and K; where keys have a position for
        each query head, N for K. Flat, XLA for CPUs multiplies by them where they lie; with one
        more axis it copies all of them.
      index: int32 [B, S], which token of its sequence is in each slot; `NEVER` where none is.
      start: int32 [], the slot that the first of the new tokens has.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    index: jax.Array
    start: jax.Array

    def write(self, k_BTKH: jax.Array, v_BTKH: jax.Array) -> "LayerCache":
        """With the keys and values of the new tokens; of one, where there are several parts."""

        def put(cache, new_BTKH, start):
            new = new_BTKH.swapaxes(1, 2).astype(cache.dtype)
            new = new.reshape(*cache.shape[:-2], *new.shape[2:])
            at = (*[0] * (cache.ndim - 2), start, 0)
            cache = jax.lax.dynamic_update_slice(cache, new, at)
            if cache.ndim == 3:
                return cache
            return nn.with_logical_constraint(cache, ("batch", "kv_heads", None, None))

        def put_both(keys, values, start):
            return put(keys, k_BTKH, start), put(values, v_BTKH, start)

        start, written = self.start, []
        for part in zip(self.keys, self.values, strict=True):
            slots = part[0].shape[-2]
            if len(self.keys) == 1:
                written.append(put_both(*part, start))
            else:
                inside = (start >= 0) & (start < slots)
                as_it_was = lambda keys, values, start: (keys, values)
                written.append(jax.lax.cond(inside, put_both, as_it_was, *part, start))
            start -= slots
        keys, values = zip(*written, strict=True)
        return self.replace(keys=keys, values=values)

    def read(self) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        """The parts of keys and values, [B, S_i, K, H]."""
        B = self.index.shape[0]
        whole = lambda x: x.reshape(B, -1, *x.shape[-2:]).swapaxes(1, 2)
        return tuple(map(whole, self.keys)), tuple(map(whole, self.values))


@flax.struct.dataclass
class Cache:
    """Keys and values of the tokens that a model has read.

    Attributes:
      keys, values: for each layer, as in `LayerCache`.
      index: int32 [B, S], as in `LayerCache`.
      filled: int32 [], how many were written, of every row alike; after the last slot comes the
        first again.
    """

    keys: tuple[tuple[jax.Array, ...], ...]
    values: tuple[tuple[jax.Array, ...], ...]
    index: jax.Array
    filled: jax.Array

    def in_parts(self) -> "Cache":
        """For reading on a token at a time on a CPU: slots in four parts, one after the other.

        A cache has more slots than tokens, so that few programs are compiled; parts after the
        first that are empty are not read. If S is the least power of two that suffices, more
        than half of the slots are used in the end: S / 2, S / 8, S / 8, S / 4. On other devices,
        where branches were not timed, and under a mesh: the cache as it is.
        """

        def split(x):
            ends = [x.shape[1] * n // 8 for n in (4, 5, 6)]
            return tuple(jnp.split(x, ends, axis=1))

        several = self.index.shape[1] % 8 == 0 and dispatch.target()[0] == "cpu"
        if not several or self.keys[0][0].ndim == 4:
            return self
        each = lambda layers: tuple(split(x) for (x,) in layers)
        return self.replace(keys=each(self.keys), values=each(self.values))


def empty_cache(config: DecoderConfig, batch_size: int, slots: int) -> Cache:
    """A `Cache` of S = `slots`, with nothing in it."""
    flat = jax.sharding.get_abstract_mesh().empty
    rows = lambda heads: (batch_size * heads,) if flat else (batch_size, heads)
    per_query = config.position_columns > config.n_kv_heads

    def arrays():
        heads = (
            config.n_heads if per_query and kind == "repo" else config.n_kv_heads
            for kind in config.kinds
        )
        shapes = ((*rows(n), slots, config.head_dim) for n in heads)
        return tuple((jnp.zeros(shape, config.dtype),) for shape in shapes)

    index = jnp.full((batch_size, slots), NEVER, jnp.int32)
    return Cache(arrays(), arrays(), index, jnp.int32(0))


def split_layers(config: DecoderConfig, params):
    """The parameter tree with a tuple of trees, one for each layer, where layers are stacked."""
    layers = dict(params["layers"])
    f_phi = layers.pop("repositioning", None)
    split, n_repo = [], 0
    for i, kind in enumerate(config.kinds):
        layer = jax.tree.map(lambda x, i=i: x[i], layers)
        if kind == "repo":
            layer["repositioning"] = jax.tree.map(lambda x, i=n_repo: x[i], f_phi)
            n_repo += 1
        split.append(layer)
    return params | {"layers": tuple(split)}


def extend(
    config: DecoderConfig, params, tokens_BT: jax.Array, index_BT: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Reads tokens that follow those in the cache.

    Args:
      config: of the model.
      params: what `split_layers` makes of its parameters.
      tokens_BT: int32 [B, T].
      index_BT: int32 [B, T], which token of its sequence each one is; -1 for padding, which
        sees and is seen by nothing.
      cache: with T slots before its end, or at its beginning if it is full. Unchecked: that these
        T have nothing, or padding of every row, that T is 1 if it is in parts, and, for CoPE,
        that it was never full.

    Returns:
      The input of the head, [B, T, D], as `RePoLM.hidden`, and the new cache.
    """
    kept = jnp.where(index_BT < 0, NEVER, index_BT)
    start = cache.filled % cache.index.shape[1]
    index = jax.lax.dynamic_update_slice(cache.index, kept, (0, start))
    x_BTD = look_up(params["embedding"]["embedding"], tokens_BT, jnp.dtype(config.dtype))
    keys, values = [], []
    for i, kind in enumerate(config.kinds):
        layer = LayerCache(cache.keys[i], cache.values[i], index, start)
        given = {"params": params["layers"][i], "cache": {"attention": {"layer": layer}}}
        block = DecoderBlock(config, kind, parent=None)
        (x_BTD, _), written = block.apply(given, x_BTD, index=index_BT, mutable="cache")
        layer = written["cache"]["attention"]["layer"]
        keys.append(layer.keys)
        values.append(layer.values)
    norm = RMSNorm(config, ("norm",), parent=None)
    x_BTD = norm.apply({"params": params["final_norm"]}, x_BTD)
    filled = cache.filled + tokens_BT.shape[1]
    return x_BTD, Cache(tuple(keys), tuple(values), index, filled)


def head(config: DecoderConfig, params, hidden_BTD: jax.Array) -> jax.Array:
    """Logits, float32 [B, T, V], of what `extend` returns."""
    to_vocab = linear(
        config, (config.vocab_size,), ("embed", "vocab"), out_dtype=jnp.float32, parent=None
    )
    return to_vocab.apply({"params": params["head"]}, hidden_BTD)
