"""How much attention goes to the parts of a text, as the model attends and without T x T memory.

Attention is linear in its values. With the indicator of a part as values, its result is what each
query gives to that part: one more call of the model's own attention in each layer.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from repo_jax.analysis.reading import padded
from repo_jax.config import DecoderConfig, PositionKind
from repo_jax.modeling import RePoLM
from repo_jax.modeling.block import DecoderBlock
from repo_jax.modeling.layers import look_up


def attention_mass(
    model: RePoLM, params, tokens: np.ndarray, labels: np.ndarray, queries: np.ndarray
) -> np.ndarray:
    """Attention from some tokens to each part of a text, read as one document.

    A query sees itself and what comes before it. Its attention to a part is the sum over the
    part's tokens that it sees; over all visible tokens it is 1.

    Args:
      model, params: as `from_pretrained` returns them.
      tokens: int [T].
      labels: int [T], the part of each token, 0 .. P - 1; -1: of none.
      queries: bool [T], whose attention is meant.

    Returns:
      float32 [L, N, P], the mean over the queries. In bfloat16 models each query's value is
      rounded as the model rounds the result of attention.

    Raises:
      ValueError: there is no query, no part, or a token that the model does not know.
    """
    c = model.config
    n_parts = int(labels.max()) + 1
    if not queries.any() or not n_parts:
        raise ValueError("attention mass needs at least one query and one labelled token")
    if tokens.max() >= c.vocab_size:
        raise ValueError(f"there is token {tokens.max()}; the model knows {c.vocab_size}")
    # Attention is causal, so no query sees the padding after the text.
    ids = padded(tokens)
    fill = lambda x, value: np.pad(x, (0, ids.size - len(x)), constant_values=value)
    labels, queries = fill(labels, -1), jnp.asarray(fill(queries, False))
    x_BTD = look_up(params["embedding"]["embedding"], jnp.asarray(ids), jnp.dtype(c.dtype))
    mass = []
    for i, kind in enumerate(c.kinds):
        at, parts = (i, c.kinds[:i].count("repo")), []
        # The columns of values are as many parts as one call has room for.
        for first in range(0, n_parts, c.head_dim):
            new_BTD, shares = _layer(
                *(c, kind, params["layers"], at, x_BTD, jnp.asarray(labels - first), queries)
            )
            parts.append(np.asarray(shares))
        x_BTD = new_BTD
        mass.append(np.concatenate(parts, axis=1)[:, :n_parts])
    return np.stack(mass)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _layer(
    config: DecoderConfig, kind: PositionKind, layers, at, x_BTD, columns_T, queries_T
) -> tuple[jax.Array, jax.Array]:
    """A layer's output, and its queries' mean attention to each column: float32 [N, H].

    layers: of all layers, stacked, so that one program does for those of a kind.
    at: which layer it is, and how many RePo layers are below it.
    """
    layer = {name: tree for name, tree in layers.items() if name != "repositioning"}
    take = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
    layer = take(layer, at[0])
    if kind == "repo":
        layer["repositioning"] = take(layers["repositioning"], at[1])
    values_BTH = jax.nn.one_hot(columns_T, config.head_dim)[None]
    given = {"params": layer, "probe": {"attention": {"values": values_BTH}}}
    block = DecoderBlock(config, kind, parent=None)
    (x_BTD, _), sown = block.apply(given, x_BTD, mutable="intermediates")
    (probed_BTNH,) = sown["intermediates"]["attention"]["probed"]
    weights_T = queries_T / queries_T.sum()
    return x_BTD, jnp.einsum("T,TNH->NH", weights_T, probed_BTNH[0].astype(jnp.float32))


def visible_tokens(labels: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """How many tokens of each part a query sees, the mean over the queries: float64 [P].

    labels, queries: as in `attention_mass`.
    """
    counts = np.stack([np.cumsum(labels == part) for part in range(labels.max() + 1)])
    return counts[:, queries].mean(1)
