"""The options of eval.py."""

import dataclasses
from typing import Literal

from repo_jax.config import Dtype, MeshConfig, RopeScaling
from repo_jax.errors import ConfigError

Haystack = Literal["noise", "needles", "essay"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """An evaluation: what eval.py reads.

    Attributes:
      run: a run directory; its newest checkpoint, its tokenizer, its held-out text.
      model: instead, a local folder or a hub id in Hugging Face's layout.
      step: of the run: `latest`, `best`, or a number.
      text, tokens: instead of the run's held-out text; as in the data section.
      tokenizer: with `model` and `text`; None: the model folder's tokenizer.json.
      context_lengths: each is evaluated on the same text cut into windows of that length;
        empty: the run's sequence length and its halves and doubles.
      batch_tokens: tokens in a batch; with `mesh`, a row at least for each part of the batch.
      max_tokens: of the text that are read; None: all.
      output: a JSON file; None: a new one in the run directory, or printed only. With `tasks`, a
        folder to make `evaluation/` in; None: the run directory.
      overwrite: files that are there are replaced. Not for `tasks`, which go on where they were.
      dtype: of activations.
      rope_scaling: YaRN, for contexts longer than the model was trained on. None: what the model
        has. A suite that says which factor it takes overrules it.
      mesh: how all devices share the model and its batches, say `--mesh.tensor 8`; None: one
        device has all of it.
      by_position: loss by the distance into the document, across windows, as table and plot;
        `output` is then the JSON file, and the others lie beside it.
      stride: with `by_position`, tokens between the starts of two windows of a document. None:
        half of each context length.
      tasks: instead of perplexity: suites (noisy, structured, long, general) and tasks of
        lm-eval, with commas between.
      tasks_dir: a folder of task files of your own, in lm-eval's format.
      data_dir: a folder of data sets; see docs/11-evaluation.md.
      haystack: what RULER's needles are hidden in: `noise`, a sentence again and again; `needles`,
        other needles; `essay`, the text in data_dir/ruler/essays.txt. None: as in RULER, noise for
        the single needle and for the others the essays, or, without that file, noise too.
      task_length: tokens of prompt and answer of RULER's tasks that `tasks` names one by one, and
        what the model may see there; None: 4096. Suites have lengths of their own.
      limit: examples of each task; None: all.
      num_fewshot: examples before each question; None: as the suite or the task says. A task whose
        file says 0 has none in any case.
      published_scoring: scores NLGraph as upstream does, which takes silence for a no.
    """

    run: str | None = None
    model: str | None = None
    revision: str | None = None
    step: str = "latest"
    text: tuple[str, ...] | str = ()
    tokens: tuple[str, ...] | str = ()
    tokenizer: str | None = None
    context_lengths: tuple[int, ...] = ()
    batch_tokens: int = 16_384
    max_tokens: int | None = 1_000_000
    output: str | None = None
    overwrite: bool = False
    dtype: Dtype = "float32"
    rope_scaling: RopeScaling | None = None
    mesh: MeshConfig | None = None
    by_position: bool = False
    stride: int | None = None
    tasks: tuple[str, ...] | str = ()
    tasks_dir: str | None = None
    data_dir: str | None = None
    haystack: Haystack | None = None
    task_length: int | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    published_scoring: bool = False

    def __post_init__(self):
        for name in ("text", "tokens"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        object.__setattr__(self, "context_lengths", tuple(self.context_lengths))
        tasks = self.tasks.split(",") if isinstance(self.tasks, str) else self.tasks
        object.__setattr__(self, "tasks", tuple(filter(None, (task.strip() for task in tasks))))
        needs_tasks = ("tasks_dir", "data_dir", "haystack", "task_length", "limit", "num_fewshot")
        for name in (*needs_tasks, "published_scoring"):
            value = getattr(self, name)
            given = value is not None and value is not False  # 0 is given
            _require(self.tasks or not given, f"--{name} needs --tasks")
        for name in ("text", "tokens", "context_lengths", "max_tokens"):
            given = getattr(self, name) != getattr(type(self), name)
            _require(not (self.tasks and given), f"--tasks and --{name} exclude each other")
        _require(
            not (self.tasks and self.overwrite),
            "--tasks and --overwrite exclude each other: results of tasks are added to, never "
            "replaced; give another --output",
        )
        _require(
            (self.run is None) != (self.model is None),
            "give one of --run (a run directory) and --model (a folder or hub id)",
        )
        for name in ("batch_tokens", "max_tokens", "limit", "stride", "task_length"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"--{name} is {value}; it must be positive")
        _require(self.by_position or self.stride is None, "--stride needs --by_position true")
        _require(
            not (self.by_position and self.tasks), "--by_position and --tasks exclude each other"
        )
        if self.stride is not None and self.context_lengths:
            _require(
                self.stride <= min(self.context_lengths),
                f"--stride is {self.stride}; it must be at most the shortest of --context_lengths",
            )
        _require(
            self.num_fewshot is None or self.num_fewshot >= 0,
            f"--num_fewshot is {self.num_fewshot}; it must be 0 or more",
        )
        for length in self.context_lengths:
            _require(
                1 < length <= self.batch_tokens,
                f"--context_lengths has {length}; each must be 2 to --batch_tokens "
                f"({self.batch_tokens})",
            )
