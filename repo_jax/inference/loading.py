"""Models as commands name them: `--run`, or `--model`, a folder or a hub id."""

import dataclasses
from pathlib import Path
from typing import Any, Protocol

from repo_jax.config import Dtype, RopeScaling
from repo_jax.modeling import RePoLM


class Named(Protocol):
    """What configs of commands have in common.

    Attributes:
      run: a run directory.
      model: where `run` is None, a local folder or a hub id in Hugging Face's layout.
      step: of the run: `latest`, `best`, or a number.
      revision: of the hub id.
      rope_scaling: YaRN instead of what the model has; None: what it has.
    """

    run: str | None
    model: str | None
    step: str
    revision: str | None
    rope_scaling: RopeScaling | None


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model, and where it came from.

    Attributes:
      model, params: as `from_pretrained` or `load_run` returns them.
      folder: what its tokenizer is in.
      step: of a run.
    """

    model: RePoLM
    params: Any
    folder: Path
    step: int | None = None


def folder_of(named: Named) -> Path:
    """The run directory, or the model's folder, fetched from the hub if that is where it is."""
    from repo_jax.interop.hub import locate

    return Path(named.run) if named.run is not None else locate(named.model, named.revision)


def load(named: Named, dtype: Dtype | None = None) -> Loaded:
    """Reads a model.

    Args:
      named: which.
      dtype: of activations; None: the model's.

    Raises:
      ConfigError, MissingPackageError, TrainingError: as `load_run` and `from_pretrained`.
    """
    folder, step = folder_of(named), None
    if named.run is not None:
        from repo_jax.training.checkpoints import load_run_step

        model, params, step = load_run_step(folder, named.step, named.rope_scaling)
    else:
        from repo_jax.interop import from_pretrained

        model, params = from_pretrained(folder, rope_scaling=named.rope_scaling)
    if dtype is not None:
        model = RePoLM(dataclasses.replace(model.config, dtype=dtype))
    return Loaded(model, params, folder, step)
