"""One text as one model reads it: tokens, where they stand in the text, and their positions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from repo_jax.config import PositionKind
from repo_jax.data import Tokenizer
from repo_jax.modeling import RePoLM, capture_positions

_SHORTEST = 64


@dataclasses.dataclass(frozen=True)
class Reading:
    """A text and the positions that a model gives its tokens.

    Attributes:
      name: of the model, for readers.
      text: what was read.
      ids: int32 [T].
      spans: int32 [T, 2], first character of each token in `text` and one past its last. The
        tokens of one character that takes several have the same span.
      kinds: of the L layers.
      positions: float32 [L, N, T], as `capture_positions`: z in RePo layers, the index in RoPE
        layers, NaN where a layer has none.
    """

    name: str
    text: str
    ids: np.ndarray
    spans: np.ndarray
    kinds: tuple[PositionKind, ...]
    positions: np.ndarray

    def pieces(self) -> list[str]:
        """The characters of each token."""
        return [self.text[start:end] for start, end in self.spans]


def read(model: RePoLM, params, tokenizer: Tokenizer, text: str, *, name: str = "") -> Reading:
    """Reads a text, as one document.

    Time and memory are those of the forward pass up to the last layer, without the head: there
    is nothing of the size T x T. Programs are compiled for powers of two.

    Args:
      model, params: as `from_pretrained` returns them.
      tokenizer: whose ids the model knows.
      text: any length above nothing; beyond the model's `max_length` it is read all the same.
      name: kept in the result.

    Raises:
      ValueError: the text has no tokens, or one that the model does not know.
    """
    ids, spans = tokenizer.encode_with_spans(text)
    if not len(ids):
        raise ValueError("the text has no tokens; it must have at least one")
    if ids.max() >= model.config.vocab_size:
        raise ValueError(
            f"the tokenizer gives token {ids.max()}; the model knows {model.config.vocab_size}"
        )
    positions = read_positions(model, params, ids)
    return Reading(name, text, ids, spans, model.config.kinds, positions)


def read_positions(model: RePoLM, params, ids: np.ndarray) -> np.ndarray:
    """The positions of token ids, int32 [T], as one document: float32 [L, N, T]."""
    return np.asarray(_positions(model, params, padded(ids)))[0, :, :, : len(ids)]


def padded(ids: np.ndarray) -> np.ndarray:
    """Tokens int32 [1, S], S the next power of two; what comes after the text it does not see."""
    tokens = np.zeros((1, max(_SHORTEST, 1 << (len(ids) - 1).bit_length())), np.int32)
    tokens[0, : len(ids)] = ids
    return tokens


@functools.partial(jax.jit, static_argnums=0)
def _positions(model: RePoLM, params, tokens: jax.Array) -> jax.Array:
    return capture_positions(model, params, jnp.asarray(tokens))
