"""From a model and its parameters to a checkpoint."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from flax.core import meta

from repo_jax.errors import ConfigError
from repo_jax.interop import checkpoint, config_json
from repo_jax.interop.names import parameter_shapes, table
from repo_jax.modeling import RePoLM

MAX_SHARD_BYTES = 5_000_000_000

# Files beside the weights that say how text becomes tokens and how to generate.
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "generation_config.json"),
)


def save_pretrained(
    path: str | Path,
    model: RePoLM,
    params: dict[str, Any],
    *,
    format: config_json.Format = "huggingface",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tokenizer_dir: str | Path | None = None,
) -> None:
    """Writes config.json and safetensors, in the dtype of the parameters.

    Format `huggingface` is what transformers and the RePo authors' fork load; format
    `repo_jax` has the same tensors and keeps every option of the config, for this library.

    Args:
      path: a folder, made where there is none; never one that has a model.
      model, params: as `from_pretrained` or `model.init` returns them; parameters in
        float32, bfloat16 or float16, as JAX or NumPy arrays.
      format: see above.
      max_shard_bytes: above this, several files with an index.
      tokenizer_dir: tokenizer files are copied from here.

    Raises:
      ConfigError: upstream cannot express a field of the config, which is named with its
        value; the parameters do not fit the model; the folder has a model.
    """
    folder = Path(path)
    checkpoint.refuse_existing(folder)
    leaves = traverse_util.flatten_dict(meta.unbox(params))
    _check(leaves, model)
    dtypes = {path: np.dtype(leaf.dtype) for path, leaf in leaves.items()}
    config = config_json.write(model.config, dtypes["head", "kernel"].name, format)
    entries = {entry.name: entry for entry in table(model.config)}
    tensors = [
        checkpoint.Tensor(entry.name, entry.stored, dtypes[entry.path])
        for entry in entries.values()
    ]

    def rows(tensor: checkpoint.Tensor) -> Iterable[np.ndarray]:
        entry = entries[tensor.name]
        leaf = leaves[entry.path]
        # A slice on the device: only one layer comes to the host at a time.
        yield entry.to_stored(jax.device_get(leaf if entry.index is None else leaf[entry.index]))

    checkpoint.write(
        folder,
        config,
        tensors,
        rows,
        max_shard_bytes=max_shard_bytes,
        copies=tokenizer_files(tokenizer_dir),
    )


def tokenizer_files(folder: str | Path | None) -> list[Path]:
    """The tokenizer's files in a folder.

    Raises:
      ConfigError: there is no such folder.
    """
    if folder is None:
        return []
    if not Path(folder).is_dir():
        raise ConfigError(f"tokenizer_dir is {folder}; there is no such folder")
    return [path for name in _TOKENIZER_FILES if (path := Path(folder) / name).is_file()]


def _check(leaves: dict[tuple[str, ...], Any], model: RePoLM) -> None:
    """Refuses parameters that are not the model's."""
    wanted = parameter_shapes(model.config)
    for path in sorted(wanted.keys() ^ leaves.keys()):
        what = "lack" if path in wanted else "have the unknown"
        raise ConfigError(f"the parameters {what} {'/'.join(path)}")
    for path, leaf in leaves.items():
        if leaf.shape != wanted[path]:
            raise ConfigError(
                f"parameter {'/'.join(path)} is {list(leaf.shape)}; the model's is "
                f"{list(wanted[path])}"
            )
        if np.dtype(leaf.dtype) not in checkpoint.DTYPES.values():
            raise ConfigError(
                f"parameter {'/'.join(path)} is {leaf.dtype}; it must be float32, bfloat16 or "
                "float16"
            )
