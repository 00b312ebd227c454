"""`python -m repo_jax.convert`: a checkpoint to Hugging Face's layout, without loading it.

Reads what `from_pretrained` reads: a folder or a hub id, Hugging Face's or OLMo's names.
Numbers go from file to file a few rows at a time, so a model of any size converts in less
than a gigabyte of memory.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from repo_jax import cli
from repo_jax.config import PositionConfig, RopeScaling
from repo_jax.errors import ConfigError
from repo_jax.interop import checkpoint, config_json, hub
from repo_jax.interop.load import Source, resolve_config
from repo_jax.interop.save import MAX_SHARD_BYTES, tokenizer_files

# Numbers that are read and converted at a time.
_CHUNK = 8 * 2**20


def convert(
    model: str,
    out: str,
    *,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    positions: PositionConfig | None = None,
    rope_scaling: RopeScaling | None = None,
    format: config_json.Format = "huggingface",
    seed: int = 0,
    revision: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Converts a checkpoint of OLMo 2 or RePo.

    Loading the result gives what `from_pretrained(model, positions=positions,
    rng=jax.random.key(seed))` gives, bit for bit where the dtype is kept.

    Args:
      model: a folder or hub id, with Hugging Face's or OLMo's names.
      out: a folder, made where there is none; never one that has a model.
      dtype: of the result. None: each tensor's own.
      positions: to impose, e.g. RePo on a RoPE checkpoint.
      rope_scaling: YaRN instead of what the checkpoint says.
      format: `huggingface`, or `repo_jax` for what only this library can express.
      seed: of new weights.
      revision: branch, tag or commit on the hub.
      max_shard_bytes: above this, several files with an index.
      report: gets a line for every file written.

    Raises:
      ConfigError: as `from_pretrained` and `save_pretrained`; or a number is beyond float16.
    """
    folder = Path(out)
    checkpoint.refuse_existing(folder)
    given = checkpoint.Checkpoint(hub.locate(model, revision))
    stored, wanted = resolve_config(given, positions, rope_scaling)
    source = Source(given, stored, wanted, jax.random.key(seed))
    head = source.entries[-1]
    # New weights are like the head where each tensor keeps its dtype.
    kept = lambda entry: given.dtype_of(entry if source.has(entry) else head)
    target = None if dtype is None else np.dtype(jax.numpy.dtype(dtype))
    entries = {entry.name: entry for entry in source.entries}
    tensors = [
        checkpoint.Tensor(entry.name, entry.stored, target or kept(entry))
        for entry in entries.values()
    ]

    def rows(tensor: checkpoint.Tensor) -> Iterable[np.ndarray]:
        entry = entries[tensor.name]
        if not source.has(entry):
            yield entry.to_stored(source.read(entry)).astype(tensor.dtype)
            return
        n_rows = tensor.shape[0]
        step = max(1, _CHUNK // math.prod(tensor.shape[1:]))
        for start in range(0, n_rows, step):
            x = given.read_entry(entry, start, min(start + step, n_rows))
            yield _cast(x, tensor)

    checkpoint.write(
        folder,
        config_json.write(wanted, (target or kept(head)).name, format),
        tensors,
        rows,
        max_shard_bytes=max_shard_bytes,
        copies=tokenizer_files(given.folder),
        report=report,
    )


def _cast(x: np.ndarray, tensor: checkpoint.Tensor) -> np.ndarray:
    try:
        with np.errstate(over="raise"):
            return x.astype(tensor.dtype, copy=False)
    except FloatingPointError:
        raise ConfigError(f"{tensor.name} has numbers beyond {tensor.dtype}") from None


def main(arguments: Sequence[str] | None = None) -> None:
    """Converts what the command line says."""
    parser = cli.Parser(
        prog="convert",
        description="Converts a checkpoint to Hugging Face's layout, without loading it.",
    )
    parser.add_function_arguments(convert, skip={"report"})
    try:
        options = parser.instantiate(parser.parse_args(arguments))
    except ValueError as error:  # jsonargparse wraps what a dataclass says about its values
        parser.error(str(error), error)
    convert(**vars(options), report=print)


def run() -> None:
    """The console script."""
    cli.run(main)


if __name__ == "__main__":
    run()
