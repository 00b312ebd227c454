"""Models and runs, as frozen dataclasses, with all validation.

`DecoderConfig` describes a model and is all that the model needs. `TrainConfig` describes a run
and is what train.py reads from YAML and the command line; the other commands have their options
beside them. Each class checks itself when it is made, so a bad value is a
`ConfigError` before anything expensive starts, wherever the config came from.
"""

import dataclasses
import math
import re
from typing import Any, Literal

from repo_jax.errors import ConfigError

PositionKind = Literal["rope", "nope", "repo", "cope"]
Preset = Literal["rope", "nope", "r2n1", "n2r1", "repo", "cope"]
RematPolicy = Literal["none", "full", "attention", "dots"]
AttentionName = Literal["xla", "pallas_tpu", "pallas_gpu", "cudnn", "reference"]
Dtype = Literal["float32", "bfloat16"]

_OLMO2_LENGTH = 4096


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _positive(config: Any, section: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value is None or value > 0, f"{section}.{name} is {value}; it must be positive")


def _fraction(config: Any, section: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(0.0 <= value < 1.0, f"{section}.{name} is {value}; it must be in [0, 1)")


def _pattern(section: str, text: str) -> None:
    try:
        re.compile(text)
    except re.error as error:
        raise ConfigError(f"{section} has the pattern {text!r}: {error}") from None


@dataclasses.dataclass(frozen=True)
class PositionConfig:
    """What each layer knows of position.

    Attributes:
      preset: `rope`, integer positions in all layers; `nope`, none; `r2n1`, of every
        three layers two RoPE then one NoPE; `n2r1`, the opposite; `repo`, RoPE below
        `start_layer` and learned positions from there on (paper 4.1); `cope`, in all layers
        CoPE (arXiv 2405.18719), by which a query counts keys, in O(T^2) time without kernels.
      layers: one kind per layer, overriding the preset; `cope` for all layers or none.
      start_layer: first RePo layer of the `repo` preset, 0-based. None: ceil(L / 3) - 1.
      f_phi: `swiglu`, r = silu(h W_g) * (h W_c) and z = r W_z (eq. 4, 5); `linear`, z = h W.
      heads: columns of z: `kv`, one per key/value head (for MHA this is the paper);
        `query`, one per query head; `shared`, one for the layer.
      d_position: width of r. None: d_model / 8.
      cope_positions: positions that CoPE tells apart; a key further off stands at the last.
      init_std: of new weights that make positions, f_phi's or CoPE's. None: the model's
        `init_std`. The larger, the less a new RePo layer is like NoPE.
    """

    preset: Preset = "repo"
    layers: tuple[PositionKind, ...] | None = None
    start_layer: int | None = None
    f_phi: Literal["swiglu", "linear"] = "swiglu"
    heads: Literal["kv", "query", "shared"] = "kv"
    d_position: int | None = None
    cope_positions: int = 4096
    init_std: float | None = None

    def __post_init__(self):
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
            for kind in self.layers:
                _require(
                    kind in ("rope", "nope", "repo", "cope"),
                    f"positions.layers names {kind!r}; each must be rope, nope, repo or cope",
                )
            others = sorted(set(self.layers) - {"cope"})
            _require(
                "cope" not in self.layers or not others,
                f"positions.layers has cope and {' and '.join(others)}; cope must be the kind of "
                "all layers or of none",
            )
        _positive(self, "positions", "d_position", "cope_positions", "init_std")

    def kinds(self, n_layers: int) -> tuple[PositionKind, ...]:
        """The kind of each of `n_layers` layers."""
        if self.layers is not None:
            _require(
                len(self.layers) == n_layers,
                f"positions.layers has {len(self.layers)} entries; n_layers is {n_layers}",
            )
            return self.layers
        if self.preset == "repo":
            start = self.start_layer
            start = math.ceil(n_layers / 3) - 1 if start is None else start
            _require(
                0 <= start < n_layers,
                f"positions.start_layer is {start}; with n_layers {n_layers} it must be "
                f"0 to {n_layers - 1}",
            )
            return ("rope",) * start + ("repo",) * (n_layers - start)
        pattern = {
            "rope": ("rope",),
            "nope": ("nope",),
            "cope": ("cope",),
            "r2n1": ("rope", "rope", "nope"),
            "n2r1": ("nope", "nope", "rope"),
        }[self.preset]
        return tuple(pattern[i % len(pattern)] for i in range(n_layers))


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """YaRN (arXiv 2309.00071) at test time, static: frequencies and scale, never z.

    Attributes:
      factor: how many times longer the context may get.
      original_length: tokens the model was trained on. None: the model's `trained_length`.
      beta_fast, beta_slow: turns over `original_length` above which a pair keeps its
        frequency, and below which it is divided by `factor`; a linear ramp between.
    """

    factor: float
    original_length: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self):
        _require(self.factor >= 1.0, f"rope_scaling.factor is {self.factor}; it must be at least 1")
        _positive(self, "rope_scaling", "original_length", "beta_fast", "beta_slow")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """An OLMo-2 decoder with per-layer positions.

    Attributes:
      vocab_size: rows of the embedding and of the head, padding included.
      d_model, n_layers, n_heads, d_ff: widths and depth.
      n_kv_heads: key/value heads; None: n_heads.
      head_dim: None: d_model / n_heads.
      max_length: context length trained on; a fact for exports and YaRN, not a limit. None: not
        known, see `trained_length`. In a run without YaRN it is at least `data.sequence_length`,
        and that if None; weights of `init.checkpoint` that saw longer texts keep their length.
      rope_theta: base of the rotary frequencies.
      norm_eps: of every RMSNorm.
      init_std: standard deviation of the truncated normal (cut at 3 sigma) of all weights.
      embedding_init_std: of the embedding; None: `init_std`. Blocks have no norm in front, so f_phi
        of the first layers reads nearly nothing where embeddings are small.
      positions: see `PositionConfig`.
      rope_scaling: YaRN, or None.
      eos_ids: ids that end a document; the first is the one written between documents.
      pad_id: id of padding, where there is any.
      dtype: of activations. Positions, angles, norms' statistics and softmax are float32.
      param_dtype: of parameters; float32 in a run, since bfloat16 rounds small updates away.
      remat: what the backward pass keeps of each layer: `none`, everything; `full`,
        only its input; `attention`, that and attention's output; `dots`, all matrix products.
      attention: implementation of `pallas_kernels.rotary_attention`, None: automatic.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int
    n_kv_heads: int | None = None
    head_dim: int | None = None
    max_length: int | None = None
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-6
    init_std: float = 0.02
    embedding_init_std: float | None = None
    positions: PositionConfig = PositionConfig()
    rope_scaling: RopeScaling | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    remat: RematPolicy = "none"
    attention: AttentionName | None = None

    def __post_init__(self):
        object.__setattr__(self, "eos_ids", tuple(self.eos_ids))
        _positive(
            self,
            "model",
            *("vocab_size", "d_model", "n_layers", "n_heads", "d_ff", "n_kv_heads"),
            *("head_dim", "max_length", "rope_theta", "norm_eps", "init_std"),
            "embedding_init_std",
        )
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        _require(
            self.n_heads % self.n_kv_heads == 0,
            f"model.n_kv_heads is {self.n_kv_heads}; it must divide model.n_heads ({self.n_heads})",
        )
        if self.head_dim is None:
            _require(
                self.d_model % self.n_heads == 0,
                f"model.n_heads is {self.n_heads}; it must divide model.d_model "
                f"({self.d_model}) unless model.head_dim is given",
            )
            object.__setattr__(self, "head_dim", self.d_model // self.n_heads)
        _require(self.head_dim % 2 == 0, f"model.head_dim is {self.head_dim}; it must be even")
        for name in self.eos_ids:
            _require(
                0 <= name < self.vocab_size,
                f"model.eos_ids has {name}; model.vocab_size is {self.vocab_size}",
            )
        self.positions.kinds(self.n_layers)
        scaling = self.rope_scaling
        if scaling is not None and scaling.original_length is None:
            scaling = dataclasses.replace(scaling, original_length=self.trained_length)
            object.__setattr__(self, "rope_scaling", scaling)
        if scaling is not None and self.max_length is None:
            object.__setattr__(self, "max_length", scaling.original_length)

    @property
    def kinds(self) -> tuple[PositionKind, ...]:
        """The position kind of each layer."""
        return self.positions.kinds(self.n_layers)

    @property
    def trained_length(self) -> int:
        """`max_length`, or where that is not known 4096, as OLMo 2 was trained on."""
        return _OLMO2_LENGTH if self.max_length is None else self.max_length

    @property
    def d_position(self) -> int:
        """Width of r in f_phi."""
        return self.positions.d_position or max(1, self.d_model // 8)

    @property
    def position_init_std(self) -> float:
        """Of new weights that make positions."""
        return self.init_std if self.positions.init_std is None else self.positions.init_std

    @property
    def position_columns(self) -> int:
        """Columns of z in a RePo layer."""
        return {"kv": self.n_kv_heads, "query": self.n_heads, "shared": 1}[self.positions.heads]


_OLMO2 = dict(vocab_size=100352, max_length=_OLMO2_LENGTH, eos_ids=(100257,), pad_id=100277)

# OLMo 2 (arXiv 2501.00656), as published on the Hugging Face hub.
PRESETS: dict[str, dict[str, Any]] = {
    "olmo2_1b": dict(_OLMO2, d_model=2048, n_layers=16, n_heads=16, d_ff=8192),
    "olmo2_7b": dict(_OLMO2, d_model=4096, n_layers=32, n_heads=32, d_ff=11008),
    "olmo2_13b": dict(_OLMO2, d_model=5120, n_layers=40, n_heads=40, d_ff=13824),
    "olmo2_32b": dict(_OLMO2, d_model=5120, n_layers=64, n_heads=40, n_kv_heads=8, d_ff=27648),
}


def decoder_config(preset: str, **changes: Any) -> DecoderConfig:
    """A published OLMo-2 shape: olmo2_1b, olmo2_7b, olmo2_13b or olmo2_32b, with changes."""
    _require(preset in PRESETS, f"model preset {preset!r} is unknown; known: {', '.join(PRESETS)}")
    return DecoderConfig(**{**PRESETS[preset], **changes})


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of a mixture.

    Give `text` or `tokens`, not both.

    Attributes:
      text, tokens: as in the data section.
      weight: of its windows among all, in any unit: weights need not sum to 1. None, for all
        sources alike: the number of its windows.
    """

    text: tuple[str, ...] | str = ()
    tokens: tuple[str, ...] | str = ()
    weight: float | None = None

    def __post_init__(self):
        for name in ("text", "tokens"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where tokens come from and how they become batches.

    Give one of `text` (tokenised once, on first use), `tokens` (token files) and `sources`
    (several of these, mixed).

    Attributes:
      text: files, folders or globs: plain text, or JSON lines (also .gz, .zst). The name
        `python-stdlib` stands for the sources of the running Python's standard library.
      text_suffixes: which files of a folder are read.
      text_field: the field of a JSONL line that holds the text.
      tokenizer: `bytes`; `bpe:N`, a byte-level BPE of N entries trained on the text; or a
        tokenizer.json or a folder that has one.
      cache_dir: where tokenised text is kept, one folder per corpus and tokenizer.
      tokens: headerless token files (OLMo's `.npy` or ours), globs of them, or folders
        written by `python -m repo_jax.tokenize`; files and globs may be in an object store,
        as gs://bucket/path (extra `gcs`) or s3://bucket/path (extra `s3`).
      sources: by name, what is mixed in the proportions of the weights, the same at every
        moment of the run; a source that is too small for its share is repeated.
      tokens_dtype: of token files; `auto`: what their manifest says, else uint32.
      validation_tokens: token files to validate on, else `validation_fraction` is held out.
      validation_fraction: of documents (text) or of windows (token files) held out.
      eos_id: the id between documents; None: the manifest's, which it must not contradict,
        else the model's first.
      sequence_length: tokens in a window; each window has one target fewer.
      batch_size: windows in a step, over all devices and accumulation steps.
      document_mask: attention stays within a document, and the target across a boundary
        does not count. False is the paper's recipe.
      repetition_filter: a window in which up to 13 tokens stand so many times or more in a
        row, one copy after the other, has no loss and keeps its place; 32 is the paper's
        recipe. None: all windows count.
      seed: of the order of windows, which depends on it and the step alone.
      prefetch: batches read ahead.
    """

    text: tuple[str, ...] | str = ()
    text_suffixes: tuple[str, ...] | str = (".txt", ".md", ".rst", ".py", ".jsonl")
    text_field: str = "text"
    tokenizer: str = "bytes"
    cache_dir: str = "data"
    tokens: tuple[str, ...] | str = ()
    sources: dict[str, SourceConfig] = dataclasses.field(default_factory=dict)
    tokens_dtype: Literal["auto", "uint16", "uint32"] = "auto"
    validation_tokens: tuple[str, ...] | str = ()
    validation_fraction: float = 0.02
    eos_id: int | None = None
    sequence_length: int = 4096
    batch_size: int = 512
    document_mask: bool = False
    repetition_filter: int | None = None
    seed: int = 0
    prefetch: int = 2

    def __post_init__(self):
        for name in ("text", "text_suffixes", "tokens", "validation_tokens"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        _positive(self, "data", "sequence_length", "batch_size", "prefetch")
        _require(
            self.sequence_length > 1,
            f"data.sequence_length is {self.sequence_length}; it must be at least 2",
        )
        _fraction(self, "data", "validation_fraction")
        _require(self.seed >= 0, f"data.seed is {self.seed}; it must not be negative")
        given = [f"data.{name}" for name in ("text", "tokens", "sources") if getattr(self, name)]
        _require(len(given) < 2, f"{' and '.join(given)} are given; give one of them")
        _require(
            self.repetition_filter is None or self.repetition_filter > 1,
            f"data.repetition_filter is {self.repetition_filter}; it must be at least 2, "
            "or null for no filter",
        )
        if self.tokenizer.startswith("bpe:"):
            size = self.tokenizer[4:]
            _require(
                size.isdigit() and int(size) >= 257,
                f"data.tokenizer is {self.tokenizer!r}; bpe:N needs a whole N of at least 257 "
                "(256 bytes and eos)",
            )
        self._check_sources()

    def _check_sources(self):
        weighted = [name for name, source in self.sources.items() if source.weight is not None]
        for name, source in self.sources.items():
            _require(
                bool(source.text) != bool(source.tokens),
                f"data.sources.{name} must have one of text and tokens",
            )
            _require(
                source.weight is None or 0 < source.weight < math.inf,
                f"data.sources.{name}.weight is {source.weight}; it must be positive",
            )
            _require(
                not weighted or source.weight is not None,
                f"data.sources.{name} has no weight and data.sources.{(weighted or [''])[0]} has "
                "one; give all sources a weight, or none",
            )
            _require(
                not (source.text and self.tokenizer.startswith("bpe:")),
                f"data.sources.{name} is text and data.tokenizer is {self.tokenizer}, which would "
                "be trained for each source anew; name a tokenizer.json or bytes",
            )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as in the paper's recipe (section 3 there), or what needs less memory.

    Attributes:
      name: `adamw`, with two moments the size of the parameters; or `adafactor` (arXiv
        1804.04235), without a first moment and with the second one factored into rows and
        columns: next to no memory, and not the paper's mathematics.
      mu_dtype: of AdamW's first moment; None: the parameters'.
      learning_rate: the peak.
      schedule: after warm-up, `linear` or `cosine` to `final_fraction` of the peak at the
        last step of the schedule, or `constant`.
      warmup_steps: of a linear rise from 0.
      final_fraction: learning rate at the end, as a share of the peak.
      b1, b2, eps: AdamW's.
      weight_decay: decoupled, on linear maps and norms; the embedding has none.
      clip_norm: global norm to which gradients are clipped; None: not clipped.
      rates: regular expressions over parameter paths such as
        `layers/repositioning/.*`, each with a factor on the learning rate; the first that
        matches the whole path counts; 0 freezes.
    """

    name: Literal["adamw", "adafactor"] = "adamw"
    mu_dtype: Dtype | None = None
    learning_rate: float = 7.4487e-5
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = 0
    final_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    rates: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        _positive(self, "optimizer", "learning_rate", "eps", "clip_norm")
        _fraction(self, "optimizer", "b1", "b2")
        _require(
            self.mu_dtype is None or self.name == "adamw",
            f"optimizer.mu_dtype is {self.mu_dtype}; only adamw has a first moment, and "
            f"optimizer.name is {self.name}",
        )
        for name in ("warmup_steps", "weight_decay"):
            value = getattr(self, name)
            _require(value >= 0, f"optimizer.{name} is {value}; it must not be negative")
        _require(
            0.0 <= self.final_fraction <= 1.0,
            f"optimizer.final_fraction is {self.final_fraction}; it must be in [0, 1]",
        )
        for pattern, factor in self.rates.items():
            _pattern("optimizer.rates", pattern)
            _require(
                factor >= 0, f"optimizer.rates[{pattern!r}] is {factor}; it must not be negative"
            )


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How long, and what one step does.

    Attributes:
      steps: to run.
      schedule_steps: length of the learning-rate schedule; None: `steps`. The paper's runs
        stop 10 steps after the end of theirs, at learning rate 0.
      accumulation: microbatches a step is split into.
      z_loss: weight of mean(logsumexp ** 2).
      seed: of new weights and of the state's random key.
      validate_every: steps between validations; None: only at the end.
      validation_windows: windows read in one validation; None: all held out.
      log_every: steps between lines of metrics.jsonl.
      checkpoint_every: steps between checkpoints; None: only at the end.
      keep_last: newest checkpoints kept; the best by validation loss is kept besides.
      checkpoint_dir: where checkpoints go, a folder or gs:// or s3:// (extras `gcs`, `s3`);
        None: into the run directory.
      loss_chunk: positions whose logits exist at a time.
      progress: a bar where standard error is a terminal, else a line every half minute.
      position_stats_every: steps between lines that also have the range and the spread of z in
        each RePo layer; None: never.
      profile_steps: first and last step that XLA's profiler traces into the run directory;
        None: none.
      tensorboard: also write TensorBoard events (extra `loggers`).
      wandb_project: also log to this Weights & Biases project (extra `loggers`).
    """

    steps: int = 23_842
    schedule_steps: int | None = None
    accumulation: int = 1
    z_loss: float = 1e-4
    seed: int = 0
    validate_every: int | None = 1000
    validation_windows: int | None = 256
    log_every: int = 1
    checkpoint_every: int | None = 1000
    keep_last: int = 2
    checkpoint_dir: str | None = None
    loss_chunk: int = 1024
    progress: bool = True
    position_stats_every: int | None = 100
    profile_steps: tuple[int, int] | None = None
    tensorboard: bool = False
    wandb_project: str | None = None

    def __post_init__(self):
        _positive(
            self,
            "training",
            *("steps", "schedule_steps", "accumulation", "validate_every", "validation_windows"),
            *("log_every", "checkpoint_every", "keep_last", "loss_chunk", "position_stats_every"),
        )
        if self.profile_steps is not None:
            object.__setattr__(self, "profile_steps", tuple(self.profile_steps))
            first, last = self.profile_steps
            _require(
                0 < first <= last,
                f"training.profile_steps is [{first}, {last}]; it must be a first step of at "
                "least 1 and a last one that is not before it",
            )
        _require(self.z_loss >= 0, f"training.z_loss is {self.z_loss}; it must not be negative")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices each way of splitting the work has; their product is all devices.

    At most one is -1, which takes what the others leave.

    Attributes:
      data: copies of the model, each with its rows of the batch.
      fsdp: rows of the batch, like `data`, and parts of parameters and optimizer state,
        gathered when a layer needs them (ZeRO 3).
      tensor: heads, MLP columns and vocabulary.
      context: tokens of a sequence; keys and values are gathered.
      slices: TPU slices that the data centre's network joins; `data` is split over them
        first, so `slices` must divide it.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    context: int = 1
    slices: int = 1

    def __post_init__(self):
        sizes = {name: getattr(self, name) for name in ("data", "fsdp", "tensor", "context")}
        for name, size in sizes.items():
            _require(
                size == -1 or size > 0,
                f"mesh.{name} is {size}; it must be positive, or -1 to take what is left",
            )
        fill = [f"mesh.{name}" for name, size in sizes.items() if size == -1]
        _require(
            len(fill) < 2, f"{' and '.join(fill)} are -1; only one can take what the others leave"
        )
        _positive(self, "mesh", "slices")


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Weights to start from.

    Attributes:
      checkpoint: a local folder or a hub id; None: new weights. The `model` section says
        what is trained; a RePo model may start from a RoPE checkpoint, f_phi being new.
      revision: branch, tag or commit on the hub; None for a folder.
    """

    checkpoint: str | None = None
    revision: str | None = None


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run: what train.py reads."""

    model: DecoderConfig
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    init: InitConfig = InitConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        _require(
            bool(self.data.text or self.data.tokens or self.data.sources),
            "neither data.text nor data.tokens is given; name files or folders to train on, or "
            "data.sources",
        )
        _require(
            self.model.param_dtype == "float32",
            f"model.param_dtype is {self.model.param_dtype}; it must be float32 to train, since "
            "what a step adds would be rounded away (model.dtype bfloat16 is for activations)",
        )
        _require(
            self.data.batch_size % self.training.accumulation == 0,
            f"training.accumulation is {self.training.accumulation}; it must divide "
            f"data.batch_size ({self.data.batch_size})",
        )
        schedule = self.training.schedule_steps or self.training.steps
        _require(
            self.optimizer.warmup_steps < schedule,
            f"optimizer.warmup_steps is {self.optimizer.warmup_steps}; the schedule has "
            f"only {schedule} steps",
        )
        # With YaRN max_length is the length before it, which a run's windows do not tell.
        length = max(self.model.max_length or 0, self.data.sequence_length)
        if self.model.rope_scaling is None and self.model.max_length != length:
            model = dataclasses.replace(self.model, max_length=length)
            object.__setattr__(self, "model", model)


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain values that YAML and JSON can hold."""
    plain = lambda v: [plain(x) for x in v] if isinstance(v, tuple) else v
    return dataclasses.asdict(config, dict_factory=lambda items: {k: plain(v) for k, v in items})
