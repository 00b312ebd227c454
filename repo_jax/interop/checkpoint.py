"""Folders of safetensors files: read one tensor at a time, written as a stream.

Format: huggingface.co/docs/safetensors. Nothing else is ever opened: no pickles.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors

from repo_jax.errors import ConfigError
from repo_jax.interop import olmo
from repo_jax.interop.names import Entry, Layout, stored_shapes

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where the bytes of a tensor are."""

    path: Path
    offset: int


class Checkpoint:
    """The tensors of a folder, read when asked for.

    Attributes:
      layout: whose names its tensors have.
      shapes: of every tensor, by name.
      dtypes: likewise; float32, float16 or bfloat16.

    Raises:
      ConfigError: the folder has no safetensors, or a file of them is missing, truncated,
        or of another kind.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self._places: dict[str, _Place] = {}
        for path in _files(folder):
            self._index(path)
        is_olmo = any(name.startswith("transformer.") for name in self.shapes)
        self.layout: Layout = "olmo" if is_olmo else "huggingface"

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start .. stop - 1 of a tensor, or all of it, in its own dtype."""
        # Neither of the library's ways will do for parts of large tensors: mapped pages count
        # as this process's memory, and its slices without a map read the whole tensor.
        place, dtype, shape = self._places[name], self.dtypes[name], self.shapes[name]
        n_rows = (shape[0] if stop is None else stop) - start
        row = math.prod(shape[1:]) * dtype.itemsize
        raw = np.fromfile(place.path, np.uint8, n_rows * row, offset=place.offset + start * row)
        return raw.view(dtype).reshape(n_rows, *shape[1:])

    def read_entry(self, entry: Entry, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows of what `entry` names, of the shape `entry.stored` when all are read."""
        name, first = entry.source(self.layout)
        stop = entry.stored[0] if stop is None else stop
        return self.read(name, first + start, first + stop)

    def dtype_of(self, entry: Entry) -> np.dtype:
        """The dtype of the tensor that `entry` names."""
        return self.dtypes[entry.source(self.layout)[0]]

    def check(self, entries: list[Entry]) -> None:
        """Refuses tensors that are missing, surplus or of another shape than `entries` say."""
        wanted = stored_shapes(entries, self.layout)
        problems = []
        if missing := [name for name in wanted if name not in self.shapes]:
            problems.append(f"it lacks {_listed(missing)}")
        if surplus := [name for name in self.shapes if name not in wanted]:
            problems.append(f"it has {_listed(surplus)}, of which the config knows nothing")
        misshapen = [
            f"{name} {list(self.shapes[name])} where the config needs {list(shape)}"
            for name, shape in wanted.items()
            if name in self.shapes and self.shapes[name] != shape
        ]
        if misshapen:
            problems.append(f"it has {_listed(misshapen)}")
        if problems:
            raise ConfigError(f"{self.folder} does not fit its config: {'; '.join(problems)}")

    def _index(self, path: Path) -> None:
        for key, entry, offset in _header(path):
            name = olmo.decode_name(key)
            if name.endswith("rotary_emb.inv_freq"):  # computed from the config
                continue
            if entry["dtype"] not in DTYPES:
                raise ConfigError(
                    f"{path}: {name} has the dtype {entry['dtype']}; it must be one of "
                    f"{', '.join(DTYPES)}"
                )
            self.shapes[name] = tuple(entry["shape"])
            self.dtypes[name] = DTYPES[entry["dtype"]]
            self._places[name] = _Place(path, offset)


def _header(path: Path) -> Iterator[tuple[str, dict, int]]:
    """Each tensor's key, its entry in the header, and where in the file it begins."""
    try:
        with safetensors.safe_open(path, "numpy"):  # the library's checks of sizes and offsets
            pass
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path} is truncated or not a safetensors file: {reason}") from None
    for key, entry in header.items():
        if key != "__metadata__":
            yield key, entry, 8 + size + entry["data_offsets"][0]


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(f"{index} is no index of safetensors files") from None
        for name in names:
            if Path(name).name != name:
                raise ConfigError(f"{index} names {name!r}, which is outside its folder")
            if not (folder / name).is_file():
                raise ConfigError(f"{index} names {name}, which is missing")
        return [folder / name for name in names]
    found = sorted(folder.glob("*.safetensors"))
    if folder / _SINGLE in found:
        return [folder / _SINGLE]
    if len(found) == 1:
        return found
    if found:
        raise ConfigError(f"{folder} has {len(found)} safetensors files but no {INDEX}")
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLED)
    if pickled:
        raise ConfigError(
            f"{folder} has {pickled[0]} but no safetensors; pickled weights can run code when "
            "loaded and are not read, so convert them to safetensors first"
        )
    raise ConfigError(f"{folder} has no .safetensors file")


def _listed(names: list[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


@dataclasses.dataclass(frozen=True)
class Tensor:
    """What a tensor will be, before there is any of it."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Its size in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


def refuse_existing(folder: Path) -> None:
    """Raises ConfigError where `folder` has a model already, or is no folder."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; name a folder to write to")
    for pattern in ("config.json", "*.safetensors", "*.safetensors.index.json"):
        for path in folder.glob(pattern):
            raise ConfigError(f"{path} exists; nothing is overwritten, so name another folder")


def write(
    folder: Path,
    config: Mapping,
    tensors: list[Tensor],
    rows: Callable[[Tensor], Iterable[np.ndarray]],
    *,
    max_shard_bytes: int,
    copies: Iterable[Path] = (),
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Writes a checkpoint: config.json and safetensors, in parts where there is more.

    All files get their names once all are complete, config.json last; after a failure none
    of them is left. Memory: one array of `rows`.

    Args:
      folder: is made where it does not exist; holds no model yet.
      config: for config.json.
      tensors: what to write, in this order.
      rows: gives a tensor's rows, from the first on, in arrays of its dtype.
      max_shard_bytes: a part has no more, unless one tensor is larger.
      copies: files to copy along, under their names.
      report: gets a line for every file.

    Raises:
      ConfigError: the folder has a model, or the disk too little space.
    """
    refuse_existing(folder)
    shards = _split(tensors, max_shard_bytes)
    total = sum(tensor.nbytes for tensor in tensors)
    with _staged(folder) as stage:
        free = shutil.disk_usage(folder).free
        if free < total:
            raise ConfigError(
                f"{folder} needs {total / 1e9:.1f} GB; its disk has {free / 1e9:.1f} GB free"
            )
        weight_map = {}
        for i, shard in enumerate(shards, 1):
            name = _SINGLE
            if len(shards) > 1:
                name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            weight_map |= {tensor.name: name for tensor in shard}
            _write_file(stage(name), shard, rows)
            report(f"{name}: {len(shard)} tensors, {sum(t.nbytes for t in shard) / 1e9:.2f} GB")
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            stage(INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for source in copies:
            if not (folder / source.name).exists():
                shutil.copyfile(source, stage(source.name))
        stage("config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _split(tensors: list[Tensor], max_shard_bytes: int) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    # Wider numbers first keep every tensor aligned, as the format's own writer does.
    return [sorted(shard, key=lambda tensor: -tensor.dtype.itemsize) for shard in shards]


def _write_file(path: Path, tensors: list[Tensor], rows) -> None:
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            written = 0
            for array in rows(tensor):
                if array.dtype != tensor.dtype:
                    raise TypeError(f"{tensor.name}: {array.dtype} given for {tensor.dtype}")
                array = np.ascontiguousarray(array)
                file.write(array.reshape(-1).view(np.uint8).data)
                written += array.nbytes
            if written != tensor.nbytes:
                raise ValueError(f"{tensor.name}: {written} bytes given for {tensor.nbytes}")


@contextlib.contextmanager
def _staged(folder: Path) -> Iterator[Callable[[str], Path]]:
    """Gives temporary paths for file names; renames all at the end, or removes all."""
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    staged: dict[str, Path] = {}

    def stage(name: str) -> Path:
        staged[name] = folder / f".{name}.{os.getpid()}.partial"
        return staged[name]

    try:
        yield stage
        refuse_existing(folder)
        for name, path in staged.items():
            path.rename(folder / name)
    except BaseException:
        for path in staged.values():
            path.unlink(missing_ok=True)
        if created:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
