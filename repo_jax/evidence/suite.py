"""What a suite is: tasks, a model and a training for each, methods and seeds."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from repo_jax import cli
from repo_jax.config import DecoderConfig, Dtype, OptimizerConfig, PositionConfig, to_dict
from repo_jax.errors import ConfigError
from repo_jax.evidence import methods
from repo_jax.evidence.methods import Method
from repo_jax.evidence.tasks import Graphs, Recall, Reversal, Tables, Task, Text

_OPTIMIZER = OptimizerConfig(learning_rate=2e-3, schedule="cosine", warmup_steps=100)

_TASKS = ("reversal", "recall", "tables", "graphs", "text")


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """The shape of a RoPE model, which the others are matched to.

    Attributes:
      d_model, n_layers, n_heads, d_ff, rope_theta, init_std, embedding_init_std: as in
        `DecoderConfig`.
    """

    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4
    d_ff: int = 352
    rope_theta: float = 10_000.0
    init_std: float = 0.02
    embedding_init_std: float | None = None


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A task with its model and its training. One of the tasks is given.

    Attributes:
      reversal, recall, tables, graphs, text: the task with its difficulty.
      model: the shape.
      optimizer: as in a training config.
      position_rate: a factor on the learning rate of f_phi.
      position_init_std: of new weights that make positions; None: the model's `init_std`.
      steps, batch_size: of the training.
      rope_steps: of a RoPE model's training, whose weights are then trained with the method's
        positions for `steps` more, as in continual pretraining; None: weights are new.
      z_loss: weight of mean(logsumexp ** 2).
      loss_over: what the loss of a batch is a mean over: all its `answers`, or its `examples`, of
        each of which it is the mean over its answers.
      headline: evaluation sets, or means over kinds, that short tables show; empty: all.
      methods: those of the suite that it is about; empty: all.
    """

    reversal: Reversal | None = None
    recall: Recall | None = None
    tables: Tables | None = None
    graphs: Graphs | None = None
    text: Text | None = None
    model: ModelSize = ModelSize()
    optimizer: OptimizerConfig = _OPTIMIZER
    position_rate: float = 1.0
    position_init_std: float | None = None
    steps: int = 2500
    batch_size: int = 32
    rope_steps: int | None = None
    z_loss: float = 1e-4
    loss_over: Literal["answers", "examples"] = "answers"
    headline: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("headline", "methods"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def check(self, name: str) -> None:
        """Looks for mistakes.

        Args:
          name: of the experiment, for what is said.

        Raises:
          ConfigError: there is one.
        """
        given = [task for task in _TASKS if getattr(self, task) is not None]
        if len(given) != 1:
            raise ConfigError(
                f"experiments.{name} has {' and '.join(given) or 'no task'}; it must have one of "
                f"{', '.join(_TASKS)}"
            )
        for option in ("steps", "batch_size", "rope_steps", "position_rate"):
            value = getattr(self, option)
            if value is not None and value <= 0:
                raise ConfigError(f"experiments.{name}.{option} is {value}; it must be positive")
        steps = min(self.steps, self.rope_steps or self.steps)
        if self.optimizer.warmup_steps >= steps:
            raise ConfigError(
                f"experiments.{name}.optimizer.warmup_steps is {self.optimizer.warmup_steps}; "
                f"there are only {steps} steps"
            )
        for method in self.methods:
            methods.method(method, self.model.n_layers)

    @property
    def all_steps(self) -> int:
        """Those of the RoPE model that is continued, too."""
        return (self.rope_steps or 0) + self.steps

    @property
    def task(self) -> Task:
        """The task that is given."""
        return next(filter(None, (getattr(self, name) for name in _TASKS)))


@dataclasses.dataclass(frozen=True)
class Suite:
    """A grid of cells: every experiment with every method and every seed.

    Attributes:
      experiments: by name.
      methods: of `methods.NAMES`.
      seeds: of the weights and of the training batches.
      dtype: of activations.
      vmap_seeds: the seeds of an experiment and method train together, in one program; not on
        CPUs.
    """

    experiments: dict[str, Experiment]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    dtype: Dtype = "float32"
    vmap_seeds: bool = False

    def __post_init__(self):
        for name in ("methods", "seeds"):
            value = tuple(getattr(self, name))
            object.__setattr__(self, name, value)
            if not value:
                raise ConfigError(f"{name} is empty; give one or more")
            if len(set(value)) < len(value):
                raise ConfigError(f"{name} is {list(value)}; nothing may stand twice in it")
        if not self.experiments:
            raise ConfigError("experiments is empty; give one or more")
        if min(self.seeds) < 0:
            raise ConfigError(f"seeds has {min(self.seeds)}; they must not be negative")
        for name, experiment in self.experiments.items():
            if not re.fullmatch(r"[\w.-]+", name):
                raise ConfigError(
                    f"an experiment is named {name!r}; names have letters, digits and _.- only"
                )
            experiment.check(name)
            found: dict[Method, str] = {}
            for method in self.methods:
                same = found.setdefault(_resolved(method, experiment.model.n_layers), method)
                if same != method:
                    raise ConfigError(
                        f"methods has {same} and {method}, which are the same model in {name}, "
                        f"with its {experiment.model.n_layers} layers; leave one out"
                    )

    def cells(self) -> "list[Cell]":
        """All cells: first one seed of everything, then the next."""
        return [
            Cell(name, method, seed, experiment, self.dtype)
            for seed in self.seeds
            for name, experiment in self.experiments.items()
            for method in self.methods
            if method in (experiment.methods or self.methods)
        ]


def _resolved(name: str, n_layers: int) -> Method:
    """The method with the kinds of its layers spelt out, so that equal models are equal."""
    found = methods.method(name, n_layers)
    kinds = found.positions.kinds(n_layers)
    positions = dataclasses.replace(found.positions, layers=kinds, preset="rope", start_layer=None)
    return dataclasses.replace(found, positions=positions)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training and its evaluation.

    Attributes:
      experiment, method, seed: which.
      definition: of the experiment.
      dtype: of activations.
    """

    experiment: str
    method: str
    seed: int
    definition: Experiment
    dtype: Dtype = "float32"

    @property
    def name(self) -> str:
        """For people and files: `reversal-repo-0`."""
        return f"{self.experiment}-{self.method}-{self.seed}"

    @property
    def task(self) -> Task:
        """What is learned."""
        return self.definition.task

    def method_and_model(self) -> tuple[Method, DecoderConfig]:
        """The method, and a model for it: of the RoPE model's number of parameters, or where that
        one is continued, of its shape, with f_phi besides."""
        size = self.definition.model
        found = methods.method(self.method, size.n_layers)
        rope = DecoderConfig(
            vocab_size=self.task.vocab_size,
            **dataclasses.asdict(size),
            max_length=self.task.length,
            eos_ids=(self.task.tokenizer().eos_id,),
            positions=PositionConfig(preset="rope"),
            dtype=self.dtype,
        )
        std = self.definition.position_init_std
        found = dataclasses.replace(
            found, positions=dataclasses.replace(found.positions, init_std=std)
        )
        if self.definition.rope_steps:
            return found, dataclasses.replace(rope, positions=found.positions)
        return found, methods.matched(rope, found.positions)

    def config_hash(self) -> str:
        """16 digits of the hash of all that decides the numbers, but for software and hardware."""
        facts = [definition(self.definition, self.dtype), self.method, self.seed]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def definition(experiment: Experiment, dtype: Dtype) -> dict[str, Any]:
    """All that decides the numbers of an experiment, flat: names with dots to plain values."""
    plain = to_dict(experiment) | {"dtype": dtype}
    for name in ("headline", "methods"):  # decide what is shown, and what is run
        del plain[name]
    flat: dict[str, Any] = {}
    for section, value in plain.items():
        if isinstance(value, dict):
            flat |= {f"{section}.{name}": inner for name, inner in value.items()}
        elif value is not None:
            flat[section] = value
    if experiment.optimizer.rates:  # the order of patterns counts, which mappings do not tell
        flat["optimizer.rates"] = [list(rate) for rate in experiment.optimizer.rates.items()]
    return flat


def load(
    name: str,
    *,
    methods: Sequence[str] = (),
    experiments: Sequence[str] = (),
    seeds: Sequence[int] = (),
    changes: Sequence[str] = (),
) -> Suite:
    """Reads a suite.

    Args:
      name: a YAML file, or the name of one in configs/evidence/.
      methods, experiments, seeds: instead of the file's, or a part of it; empty: all.
      changes: `experiments.reversal.steps=100` and the like; values are YAML. `*` stands for
        every experiment.

    Raises:
      ConfigError: there is no such file, or it has a mistake.
    """
    path = _find(name)
    try:
        sections = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"--suite {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(sections, dict) or not isinstance(sections.get("experiments"), dict):
        raise ConfigError(f"--suite {path} has no experiments in it")
    # YAML's aliases are one object; a change must reach one of them.
    sections = json.loads(json.dumps(sections, default=str))
    found = sections["experiments"]
    for wanted in experiments:
        if wanted not in found:
            raise ConfigError(
                f"--tasks has {wanted!r}; the suite {path.stem} has {', '.join(found)}"
            )
    sections["experiments"] = {name: found[name] for name in experiments or found}
    sections |= {"methods": list(methods)} if methods else {}
    sections |= {"seeds": list(seeds)} if seeds else {}
    for change in changes:
        _change(sections, change)
    text = lambda value: value if isinstance(value, str) else json.dumps(value)
    options = [f"--{name}={text(value)}" for name, value in sections.items()]
    try:
        suite, _ = cli.parse(Suite, "suite", "", options)
    except ConfigError as error:
        where = f"--suite {path.stem}" + (f" with --set {', '.join(changes)}" if changes else "")
        said = str(error).removesuffix(" (--help lists them)").replace(" --", " ")
        raise ConfigError(f"{where}: {said}") from None
    return suite


def _find(name: str) -> Path:
    folder = cli.packaged_configs() / "evidence"
    for path in (Path(name), folder / f"{name}.yaml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    raise ConfigError(f"--suite {name}: there is no such file or suite; suites: {known}")


def _change(sections: dict[str, Any], change: str) -> None:
    path, equals, text = change.partition("=")
    *parents, last = path.split(".")
    if not equals or not last:
        raise ConfigError(f"--set has {change!r}; a change is written name.name=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set has {change!r}, whose value is not YAML") from None
    # YAML 1.1 takes 2e-3 for a word.
    value = _number(value) if isinstance(value, str) else value
    known = sections["experiments"]
    if parents[:1] == ["experiments"] and parents[1:2] and parents[1] not in ("*", *known):
        raise ConfigError(f"--set has {change!r}; the experiments are {', '.join(known)}")
    for section in _sections(sections, parents):
        if not isinstance(section, dict):
            raise ConfigError(f"--set has {change!r}; the suite has no {'.'.join(parents)}")
        section[last] = value


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _sections(section: Any, names: Sequence[str]) -> list[Any]:
    """The mappings under `section` that `names` lead to; the last ones are made."""
    if not names:
        return [section]
    first, *rest = names
    if not isinstance(section, dict):
        return [None]
    if first == "*":
        return [found for inner in section.values() for found in _sections(inner, rest)]
    return _sections(section.setdefault(first, {}), rest)
