"""Loss, perplexity and bits per byte of a model on held-out tokens."""

import dataclasses
import functools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from repo_jax.modeling import RePoLM
from repo_jax.training.loss import chunks
from repo_jax.training.step import batch_loss, batch_targets


@dataclasses.dataclass(frozen=True)
class Score:
    """Sums over targets, and the figures made of them.

    Attributes:
      nll: negative log-likelihood in nats.
      targets: tokens predicted.
      bytes: UTF-8 bytes that those tokens stand for; None where that is not known. The end
        of a document costs bits and stands for no byte.
    """

    nll: float
    targets: int
    bytes: int | None

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nll / self.targets

    @property
    def perplexity(self) -> float:
        """exp(loss), per token."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """nll in bits, over bytes."""
        return self.nll / math.log(2) / self.bytes if self.bytes else None


@functools.partial(jax.jit, static_argnames=("model", "chunk"))
def _batch_sums(model, params, batch, byte_lengths, chunk):
    targets, counts = batch_targets(batch)
    sums = batch_loss(model, params, batch, n_targets=1, z_loss=0.0, chunk=chunk)
    return sums.ce, counts.sum(), jnp.where(counts, byte_lengths[targets], 0).sum()


def score(
    model: RePoLM,
    params,
    batches: Iterable[dict[str, np.ndarray]],
    byte_lengths: np.ndarray | None = None,
    *,
    chunk: int = 1024,
) -> Score:
    """Scores every target of `batches`.

    Args:
      model, params: as `from_pretrained` or `load_run` returns them; on a mesh, inside
        `sharding.use`.
      batches: of `tokens` int32 [B, T], `valid` bool [B] and perhaps `segment_ids`, as
        `data.ValidationBatches` gives them; a mesh must divide B.
      byte_lengths: int32 [V'], bytes of each id; ids beyond are padding of the vocabulary.
      chunk: positions whose logits exist at a time.
    """
    known = byte_lengths is not None
    lengths = np.zeros(model.config.vocab_size, np.int32)
    if known:
        lengths[: len(byte_lengths)] = byte_lengths
    nll, targets, n_bytes = 0.0, 0, 0
    for batch in batches:
        # Summed on the host in float64: float32 would lose digits over millions of tokens.
        sums = jax.device_get(_batch_sums(model, params, batch, lengths, chunk))
        nll, targets, n_bytes = nll + float(sums[0]), targets + int(sums[1]), n_bytes + int(sums[2])
    return Score(nll, targets, n_bytes if known else None)


@functools.partial(jax.jit, static_argnames=("model", "chunk"))
def log_probabilities(model: RePoLM, params, tokens_BT, at_BP, targets_BP, *, chunk: int = 1024):
    """Of single targets; no logits [B, T, V] exist, only those of `chunk` positions.

    Args:
      model, params: as `from_pretrained` or `load_run` returns them; on a mesh, inside
        `sharding.use`. A mesh must divide B and not split tokens.
      tokens_BT: int32 [B, T]. What is right of a token is not seen by it.
      at_BP: int32 [B, P], where in the row the target comes next.
      targets_BP: int32 [B, P].
      chunk: positions whose logits exist at a time, but one of each row at least.

    Returns:
      float32 [B, P], and bool [B, P]: whether the target is the likeliest.
    """
    hidden_BTD = model.apply({"params": params}, tokens_BT, method="hidden")
    picked_BPD = jnp.take_along_axis(hidden_BTD, at_BP[..., None], axis=1)

    def body(_, xs):
        h_BCD, target_BC = xs
        logits = model.apply({"params": params}, h_BCD, method="logits")
        logprob = jnp.take_along_axis(logits, target_BC[..., None], -1)[..., 0]
        logprob -= jax.nn.logsumexp(logits, axis=-1)
        return None, (logprob, logits.argmax(-1) == target_BC)

    # Cut along P, not B * P, so that on a mesh every device has the logits of its own rows.
    _, found = jax.lax.scan(body, None, (chunks(picked_BPD, chunk), chunks(targets_BP, chunk)))
    B, P = targets_BP.shape
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(B, -1)[:, :P], found)
