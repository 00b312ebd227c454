"""The tasks, one a file."""

from repo_jax.evidence.tasks.base import EvaluationSet, Examples, Score, Task, score
from repo_jax.evidence.tasks.graphs import Graphs
from repo_jax.evidence.tasks.recall import Recall
from repo_jax.evidence.tasks.reversal import Reversal
from repo_jax.evidence.tasks.tables import Tables
from repo_jax.evidence.tasks.text import Text

__all__ = [
    "EvaluationSet",
    "Examples",
    "Graphs",
    "Recall",
    "Reversal",
    "Score",
    "Tables",
    "Task",
    "Text",
    "score",
]
