"""Token files cut into windows, and windows into batches.

A batch is a dict of numpy arrays:

    tokens       int32 [B, T]
    segment_ids  int32 [B, T], with `document_mask`: 1 for the first document of a window, 2 for
                 the next, and so on; eos belongs to the document it ends, 0 is padding
    valid        bool [B], where some rows may have no loss
    source       int32 [B], the number of each row's source in a mixture
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from repo_jax.data import object_store
from repo_jax.data.mixture import Mixture
from repo_jax.data.object_store import StoredTokens, Tokens
from repo_jax.data.repetition import repeats
from repo_jax.data.token_files import check_ids
from repo_jax.errors import ConfigError

Batch = dict[str, np.ndarray]

# Threads of `iterate`, each of which reads whole batches. More hardly help: mapped pages that
# are not in memory yet are read with the interpreter locked.
_READERS = 2


class TrainingBatches:
    """An endless sequence of batches, each a function of `seed` and its step alone.

    Every epoch of a source visits all its windows once, in an order of its own; a batch may
    hold the end of one epoch and the start of the next. There is no state to save but the
    step.

    Args:
      tokens: arrays of ids, [tokens] each, as from `open_tokens`. Windows do not overlap and
        do not reach from one array into another; the rest of each array is left out.
      sequence_length: T.
      batch_size: B.
      seed: of the order; any whole number from 0.
      document_mask: adds `segment_ids`.
      eos_id: the id that ends a document; needed for `document_mask`.
      vocab_size: ids must be below it; None: they are not checked.
      prefetch: batches that `iterate` reads ahead.
      rows: which rows of each batch to read, for a process that needs only its share: a
        slice, or their numbers.
      mixture: of the sources; None: there is one.
      source_of: with `mixture`, the number of each array's source, ascending; every source
        has a window. Batches then have `source`.
      repetition_filter: windows in which `repeats` finds so many copies are not `valid`;
        None: there is no `valid`.

    Raises:
      ConfigError: there are fewer windows than a batch has, or no `eos_id` is given.
    """

    def __init__(
        self,
        tokens: Sequence[Tokens],
        *,
        sequence_length: int,
        batch_size: int,
        seed: int = 0,
        document_mask: bool = False,
        eos_id: int | None = None,
        vocab_size: int | None = None,
        prefetch: int = 2,
        rows: slice | np.ndarray = slice(None),
        mixture: Mixture | None = None,
        source_of: Sequence[int] = (),
        repetition_filter: int | None = None,
    ):
        self._windows = _Windows(tokens, sequence_length, document_mask, eos_id, vocab_size)
        self._source_of = None if mixture is None else np.array(source_of, np.int32)
        self._repetition_filter = repetition_filter
        if len(self._windows) < batch_size:
            total = sum(len(array) for array in tokens)
            raise ConfigError(
                f"the training data has {len(self._windows)} windows of sequence_length "
                f"{sequence_length} ({total} tokens); batch_size is {batch_size}, and an epoch "
                "must have a batch at least"
            )
        import grain  # Here, so that all else works on machines without it.

        def order(start: int, stop: int, seed: int):
            return grain.MapDataset.range(start, stop).seed(seed).shuffle().repeat()

        if mixture is None:
            windows = order(0, len(self._windows), seed)
        else:
            last = np.searchsorted(self._source_of, range(self._source_of[-1] + 1), side="right")
            ends = [0, *(int(end) for end in self._windows.ends[last - 1])]
            orders = [
                order(start, stop, _seed(seed, source))
                for source, (start, stop) in enumerate(itertools.pairwise(ends))
            ]
            windows = grain.MapDataset.select_from_datasets(orders, mixture)
        self._batches = windows.batch(batch_size).map(lambda indices: self._read(indices[rows]))
        self._options = grain.ReadOptions(
            num_threads=min(_READERS, prefetch), prefetch_buffer_size=prefetch
        )

    def _read(self, indices: np.ndarray) -> Batch:
        batch = self._windows.read(indices)
        if self._repetition_filter is not None:
            batch["valid"] = ~repeats(batch["tokens"], self._repetition_filter)
        if self._source_of is not None:
            batch["source"] = self._source_of[self._windows.files(indices)]
        return batch

    def at(self, step: int) -> Batch:
        """The batch of `step`, from 0.

        Raises:
          ConfigError: it has an id of `vocab_size` or more.
          TrainingError: an object store does not give it.
        """
        return self._batches[step]

    def iterate(self, start_step: int = 0) -> Iterator[Batch]:
        """`at(start_step)`, `at(start_step + 1)`, ..., read ahead by threads.

        A generator: its close() stops the threads.
        """
        batches = iter(self._batches[start_step:].to_iter_dataset(self._options))
        try:
            yield from batches
        finally:
            batches.close()


class ValidationBatches:
    """A fixed sequence of batches, to go through any number of times.

    Each batch also has `valid`, bool [B]: False for rows that only fill the last batch,
    whose tokens and segment ids are 0.

    Args:
      tokens, sequence_length, batch_size, document_mask, eos_id, vocab_size: as for
        `TrainingBatches`.
      max_windows: at most so many windows, spread evenly over all; None: all.

    Raises:
      ConfigError: no array has a whole window, or no `eos_id` is given.
    """

    def __init__(
        self,
        tokens: Sequence[Tokens],
        *,
        sequence_length: int,
        batch_size: int,
        document_mask: bool = False,
        eos_id: int | None = None,
        vocab_size: int | None = None,
        max_windows: int | None = None,
    ):
        self._windows = _Windows(tokens, sequence_length, document_mask, eos_id, vocab_size)
        available = len(self._windows)
        if not available:
            total = sum(len(array) for array in tokens)
            names = self._windows.names
            files = names[0] if len(names) == 1 else f"{len(names)} files"
            raise ConfigError(
                f"the validation data has no window of sequence_length {sequence_length}: it "
                f"has {total} tokens in {files}; give a longer file, or a smaller sequence_length"
            )
        count = min(available, max_windows or available)
        self._indices = np.arange(count) * available // count
        self._batch_size = batch_size

    @property
    def windows(self) -> int:
        """Windows in all batches together."""
        return len(self._indices)

    def __len__(self) -> int:
        """Batches."""
        return math.ceil(self.windows / self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """From the first batch, each time."""
        for start in range(0, self.windows, self._batch_size):
            batch = self._windows.read(self._indices[start : start + self._batch_size])
            batch["valid"] = np.ones(len(batch["tokens"]), bool)
            missing = self._batch_size - len(batch["valid"])
            yield {
                name: np.pad(value, [(0, missing)] + [(0, 0)] * (value.ndim - 1))
                for name, value in batch.items()
            }


def trim_tokens(
    tokens: Sequence[Tokens], multiple: int, max_tokens: int | None = None
) -> tuple[Tokens, ...]:
    """Cuts arrays so that windows of several lengths cover the same tokens.

    Args:
      tokens: [tokens] each.
      multiple: the length of each becomes a multiple of it; the longest window, say, where
        the others divide it.
      max_tokens: at most so many in all, from the start; None: all.

    Returns:
      Views of the arrays, those that are left with nothing dropped.
    """
    left = sum(len(array) for array in tokens) if max_tokens is None else max_tokens
    trimmed = []
    for array in tokens:
        length = min(len(array), left) // multiple * multiple
        left -= length
        if length:
            trimmed.append(array[:length])
    return tuple(trimmed)


def segment_ids(tokens: np.ndarray, eos_id: int) -> np.ndarray:
    """Numbers the documents of each row from 1: [B, T] ids to int32 [B, T]."""
    ends = (tokens == eos_id).astype(np.int32)
    return 1 + np.cumsum(ends, axis=1, dtype=np.int32) - ends


def _seed(seed: int, source: int) -> int:
    """A seed for each source: sources of one size are not to go in step."""
    return int(np.random.SeedSequence([seed, source]).generate_state(1)[0])


class _Windows:
    """Windows of all arrays, numbered in order; read as batches.

    Attributes:
      ends: int64 [arrays], one more than the number of the last window of each.
      names: of the files that they are, to tell of.
    """

    def __init__(
        self,
        tokens: Sequence[Tokens],
        sequence_length: int,
        document_mask: bool,
        eos_id: int | None,
        vocab_size: int | None,
    ):
        if document_mask and eos_id is None:
            raise ConfigError("document_mask needs eos_id, the id that ends a document")
        self.sequence_length = sequence_length
        self._eos_id = eos_id if document_mask else None
        self._vocab_size = vocab_size
        self.names = [str(getattr(array, "filename", "the data")) for array in tokens]
        # Slices of a plain array are several times cheaper than those of a memmap.
        self._arrays = [a if isinstance(a, StoredTokens) else np.asarray(a) for a in tokens]
        counts = [len(array) // sequence_length for array in tokens]
        self.ends = np.cumsum(counts, dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def files(self, indices: np.ndarray) -> np.ndarray:
        """The number of the array that each window is in."""
        return np.searchsorted(self.ends, indices, side="right")

    def read(self, indices: np.ndarray) -> Batch:
        tokens_BT = np.empty((len(indices), self.sequence_length), np.int32)
        files = self.files(indices)
        starts = (indices - np.concatenate([[0], self.ends])[files]) * self.sequence_length
        windows = [
            self._arrays[file][start : start + self.sequence_length]
            for file, start in zip(files, starts, strict=True)
        ]
        for row, window_T in enumerate(object_store.read(windows)):
            tokens_BT[row] = window_T
        # The cast made ids of 2**31 and more negative.
        if self._vocab_size is not None and tokens_BT.view(np.uint32).max() >= self._vocab_size:
            for row_T, file in zip(tokens_BT.view(np.uint32), files, strict=True):
                check_ids(row_T, self._vocab_size, self.names[file])
        batch = {"tokens": tokens_BT}
        if self._eos_id is not None:
            batch["segment_ids"] = segment_ids(tokens_BT, self._eos_id)
        return batch
