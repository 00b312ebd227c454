"""The paper's suites: which tasks, with how many shots, which metric and which YaRN factor."""

import dataclasses
from pathlib import Path
from typing import Any

from repo_jax.config import RopeScaling

TASKS_DIR = Path(__file__).parent / "tasks"


@dataclasses.dataclass(frozen=True)
class SuiteTask:
    """One line of a table of results.

    Attributes:
      task: lm-eval's name of a task or of a group, whose examples are then pooled.
      metric, filter: which of the task's; None: its first.
      shots: None: as the task says.
      name: in the results; None: `task`.
    """

    task: str
    metric: str | None = None
    shots: int | None = None
    filter: str | None = None
    name: str | None = None


@dataclasses.dataclass(frozen=True)
class Group:
    """Tasks whose mean is reported, and what the model is for them.

    Attributes:
      name: of the mean.
      tasks: what it is the mean of.
      rope_scaling: YaRN; None: as the model is.
      max_length: tokens the model may see; None: the model's.
      metadata: for tasks that make their own data.
    """

    name: str
    tasks: tuple[SuiteTask, ...]
    rope_scaling: RopeScaling | None = None
    max_length: int | None = None
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)


_NEEDLES = ("single", "multikey", "multivalue", "multiquery")
_TRAINED_LENGTH = 4096
# Whose prompts are made as long as is asked for.
RULER_TASKS = (
    *(f"needle_{kind}" for kind in _NEEDLES),
    *("variable_tracking", "common_words", "frequent_words"),
)


def alone(task: str, length: int | None) -> Group:
    """The group of a task that is in no suite.

    Args:
      length: of RULER's prompts and answers, and what the model then may see; None: 4096.
    """
    if task not in RULER_TASKS:
        return Group(task, (SuiteTask(task),))
    length = _TRAINED_LENGTH if length is None else length
    return Group(task, (SuiteTask(task),), max_length=length, metadata={"length": length})


def _ruler(length: int) -> Group:
    factor = length / _TRAINED_LENGTH
    return Group(
        f"ruler_{length}",
        tuple(
            SuiteTask(f"needle_{kind}", "recall", 0, name=f"needle_{kind}_{length}")
            for kind in _NEEDLES
        ),
        RopeScaling(factor, _TRAINED_LENGTH) if factor > 1 else None,
        length,
        {"length": length},
    )


# The seven of upstream's script. Qualities are F1, and ROUGE-L for the two summaries.
_LONGBENCH = tuple(
    SuiteTask(f"long_{name}", "score", 0)
    for name in (
        *("2wikimqa", "musique", "multifieldqa_en", "narrativeqa", "gov_report", "qmsum"),
        "triviaqa",
    )
)

SUITES: dict[str, tuple[Group, ...]] = {
    "noisy": (_ruler(_TRAINED_LENGTH),),
    "structured": (
        Group(
            "nlgraph",
            tuple(
                SuiteTask(f"nlgraph_{graph}", "exact_match", 0)
                for graph in ("connectivity", "cycle", "flow", "shortest_path")
            ),
            max_length=_TRAINED_LENGTH,
        ),
        Group(
            "hybridqa", (SuiteTask("hybridqa", "substring_match", 0),), max_length=_TRAINED_LENGTH
        ),
    ),
    "long": (
        _ruler(8192),
        _ruler(16_384),
        Group("longbench", _LONGBENCH, RopeScaling(4.0, _TRAINED_LENGTH), 16_384),
    ),
    "general": (
        Group(
            "general",
            (
                SuiteTask("arc_challenge", "acc_norm", 5),
                SuiteTask("arc_easy", "acc_norm", 5),
                SuiteTask("boolq", "acc", 5),
                SuiteTask("general_coqa", "f1", 0),
                SuiteTask("general_drop", "f1", 5),
                SuiteTask("hellaswag", "acc_norm", 5),
                SuiteTask("mmlu_pro", "exact_match", 5, "custom-extract"),
                SuiteTask("triviaqa", "exact_match", 5),
            ),
        ),
    ),
}
