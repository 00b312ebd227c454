"""From a path or a Hugging Face hub id to a folder on this machine."""

import re
from pathlib import Path

from repo_jax.errors import ConfigError, MissingPackageError

# What a model is read from, and the tokenizer beside it; never code, never pickles.
PATTERNS = ("*.json", "*.safetensors", "config.yaml", "merges.txt", "vocab.txt", "*.jinja")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def locate(path_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint; downloaded, or taken from the hub's cache, for a hub id.

    Whatever exists here wins over the hub.

    Args:
      path_or_hub_id: a folder, or an id such as `allenai/OLMo-2-0425-1B`.
      revision: branch, tag or commit on the hub.

    Raises:
      ConfigError: there is no such folder, model or revision, or the hub cannot be reached.
      MissingPackageError: a hub id needs the package huggingface_hub.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.exists():
        if not path.is_dir():
            raise ConfigError(f"{path} is a file; name the folder that it is in")
        if revision is not None:
            raise ConfigError(
                f"revision is {revision!r}, but {path} is a folder here, which has none; leave it "
                "out (of a recipe with --init.revision null)"
            )
        return path
    hub_id = str(path_or_hub_id)
    if isinstance(path_or_hub_id, Path) or not _HUB_ID.fullmatch(hub_id):
        raise ConfigError(f"there is no folder {hub_id} (and hub ids look like owner/name)")
    return _download(hub_id, revision)


def _download(hub_id: str, revision: str | None) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise MissingPackageError(
            "huggingface_hub", f"reading {hub_id} from the hub", "hub"
        ) from None
    try:
        folder = huggingface_hub.snapshot_download(
            hub_id,
            revision=revision,
            allow_patterns=list(PATTERNS),
            ignore_patterns=["*/*"],
        )
    except errors.RevisionNotFoundError:
        raise ConfigError(f"{hub_id} on the hub has no revision {revision!r}") from None
    except errors.GatedRepoError:
        raise ConfigError(
            f"{hub_id} on the hub is gated: accept its terms there and log in with `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ConfigError(
            f"{hub_id} is neither a folder here nor a public model on the hub"
        ) from None
    except errors.LocalEntryNotFoundError as error:
        answer = getattr(error.__cause__, "response", None)
        reason = "cannot be reached" if answer is None else f"answered {answer.status_code}"
        raise ConfigError(
            f"{hub_id} is neither a folder here nor in the hub's cache, and the hub {reason}"
        ) from None
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise ConfigError(
            f"{hub_id} cannot be read from the hub: {str(error).splitlines()[0]}"
        ) from None
    return Path(folder)
