"""Data sets of the hub, from a user's folder."""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets


@contextlib.contextmanager
def data_sets_in(data_dir: str | None) -> Iterator[None]:
    """Within it, a folder in `data_dir` named as a data set of the hub is taken in its place."""
    if not data_dir:
        yield
        return
    load = datasets.load_dataset

    def load_dataset(path: str, *args: Any, **kwargs: Any) -> Any:
        if Path(path).is_dir():
            # The library's cache knows such a folder by its last name and its README only, and
            # would give what another one held, or the same one before.
            kwargs["cache_dir"] = Path(datasets.config.HF_DATASETS_CACHE) / _digest(Path(path))
        return load(path, *args, **kwargs)

    datasets.load_dataset = load_dataset
    try:
        with contextlib.chdir(data_dir):
            yield
    finally:
        datasets.load_dataset = load


def _digest(folder: Path) -> str:
    """Another if a file of a folder was changed, or if it is another folder."""
    files = sorted(path for path in folder.resolve().rglob("*") if path.is_file())
    parts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return f"local-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"
