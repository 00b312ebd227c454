"""Batches from local token files: tokens per second on one core.

    python -m benchmarks.data

Random uint32 ids in a few files, cut into windows of T tokens, in batches of B, in an order
shuffled by a seed. Contenders, each making the same int32 [B, T]:

- `repo-jax`: `TrainingBatches.iterate`;
- `repo-jax, all checks`: the same with document masks, the repetition filter, a mixture of two
  sources and ids checked against a vocabulary;
- `repo-jax, from disk`: `repo-jax` after the system was told to forget what it had read;
- `grain`: a Grain pipeline as its guides write one: a source whose records are windows of memory
  maps, `.shuffle().repeat().batch()`, `.to_iter_dataset()` with Grain's own settings;
- `per item`: a loop over windows in a shuffled order, each read from its memory map and
  converted, then stacked: what a PyTorch `Dataset` of memory maps and the default `collate` do,
  without torch and without worker processes.

All are kept to one CPU (`--threads 1`), so what is measured is per core. A call reads
`--batches` batches from a pipeline opened anew. Grain's ends with them, because its buffer of
500 would else be filled for nothing; ours reads two or three batches more than are counted.

Limits: all but `from disk` read pages that are in memory already. `from disk` says as much of
this machine's disk as of the program. No object store is measured: there a run waits for the
network, not for a core.
"""

import itertools
import os
import shutil
import statistics
import tempfile
import time
from importlib import metadata
from pathlib import Path

import grain
import numpy as np

from benchmarks import harness
from repo_jax.data import Mixture, TrainingBatches, open_tokens

VOCAB = 100_352
EOS = VOCAB - 1
OURS, CHECKED, DISK = "repo-jax", "repo-jax, all checks", "repo-jax, from disk"
GRAIN, PER_ITEM = "grain", "per item"
PAIRS = ((OURS, GRAIN), (OURS, PER_ITEM))


def options():
    p = harness.parser(__doc__.splitlines()[0])
    p.set_defaults(threads=1, no_torch=True)
    p.add_argument("--sequence_length", type=int, default=4096)
    p.add_argument("--batch_size", type=int, default=512)
    p.add_argument("--batches", type=int, default=32, help="in a call")
    p.add_argument("--files", type=int, default=4)
    p.add_argument("--file_tokens", type=int, default=2**25)
    p.add_argument("--folder", type=Path, help="where the files are written, for this run only")
    return p


def write_files(args, folder: Path) -> list[np.ndarray]:
    """Token files with a document's end about every thousand ids."""
    rng = np.random.default_rng(args.seed)
    for i in range(args.files):
        ids = rng.integers(0, EOS, args.file_tokens, dtype=np.uint32)
        ids[rng.integers(0, len(ids), len(ids) // 1000)] = EOS
        ids.tofile(folder / f"{i}.npy")
    return open_files(folder)


def open_files(folder: Path) -> list[np.ndarray]:
    return [open_tokens(file, "uint32") for file in sorted(folder.iterdir())]


def forget(folder: Path):
    """Makes the system read the files from disk again; they must not be mapped."""
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Windows:
    """What Grain and a loop read one by one: int32 [T] each."""

    def __init__(self, arrays: list[np.ndarray], length: int):
        self.arrays, self.length = arrays, length
        self.ends = np.cumsum([len(array) // length for array in arrays])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        file = int(np.searchsorted(self.ends, index, side="right"))
        start = (index - (self.ends[file - 1] if file else 0)) * self.length
        return self.arrays[file][start : start + self.length].astype(np.int32)


def per_item(windows: Windows, args):
    order = np.random.default_rng(args.seed).permutation(len(windows))
    for first in range(0, len(order), args.batch_size):
        rows = order[first : first + args.batch_size]
        yield {"tokens": np.stack([windows[i] for i in rows])}


def contenders(args, folder: Path) -> dict[str, harness.Contender]:
    """Writes files into `folder` twice: those that are read from disk are not to be mapped."""
    warm, cold = folder / "warm", folder / "cold"
    warm.mkdir()
    arrays = write_files(args, warm)
    shutil.copytree(warm, cold)

    shape = (args.batch_size, args.sequence_length)
    sizes = dict(sequence_length=shape[1], batch_size=shape[0], seed=args.seed)
    half = len(arrays) // 2
    checks = dict(
        document_mask=True,
        eos_id=EOS,
        vocab_size=VOCAB,
        repetition_filter=32,
        mixture=Mixture([2, 1]),
        source_of=[0] * half + [1] * (len(arrays) - half),
    )
    plain = TrainingBatches(arrays, **sizes)
    checked = TrainingBatches(arrays, **sizes, **checks)
    windows = Windows(arrays, args.sequence_length)
    records = grain.MapDataset.source(windows).seed(args.seed).shuffle().repeat()
    records = records.batch(args.batch_size)[: args.batches]
    records = records.map(lambda tokens: {"tokens": tokens})

    def contender(stream, before=lambda: None):
        def run(calls: int) -> float:
            seconds = 0.0
            for _ in range(calls):
                before()
                start = time.perf_counter()
                batches = stream()
                for batch in itertools.islice(batches, args.batches):
                    assert batch["tokens"].shape == shape
                batches.close()
                seconds += time.perf_counter() - start
            return seconds / calls

        return run

    from_disk = lambda: TrainingBatches(open_files(cold), **sizes).iterate()
    return {
        OURS: contender(plain.iterate),
        CHECKED: contender(checked.iterate),
        DISK: contender(from_disk, before=lambda: forget(cold)),
        GRAIN: contender(lambda: iter(records.to_iter_dataset())),
        PER_ITEM: contender(lambda: per_item(windows, args)),
    }


def main():
    args = options().parse_args()
    path = harness.prepare(args, "data")
    with tempfile.TemporaryDirectory(prefix="benchmark-data-", dir=args.folder) as folder:
        times, _ = harness.measure(contenders(args, Path(folder)), args, least_seconds=0.5)
    tokens = args.batches * args.batch_size * args.sequence_length
    speed = {name: tokens / statistics.median(t) / args.threads for name, t in times.items()}
    ratios = {f"{a} / {b}": harness.compare(times[b], times[a], args.seed) for a, b in PAIRS}
    lines = [
        f"B {args.batch_size}, T {args.sequence_length}, {args.files} files of "
        f"{args.file_tokens:,} uint32 ids, {args.batches} batches a call; median over rounds.",
        "",
        *harness.table(
            ("contender", "million tokens/s per core"),
            (f"{name} | {value / 1e6:,.1f}" for name, value in speed.items()),
        ),
        *harness.table(
            ("ratio of tokens/s", "median", "95 % interval"),
            (f"{what} | {harness.show(ratio)}" for what, ratio in ratios.items()),
        ),
        f"- grain {metadata.version('grain')}",
    ]
    data = {
        "grain": metadata.version("grain"),
        "tokens_per_second_per_core": speed,
        "ratios": ratios,
        "call_seconds": times,
    }
    harness.report(path, "Data", lines, data, args, None)


if __name__ == "__main__":
    main()
