"""What a model learned: where its tokens stand, and what they look at."""

from repo_jax.analysis.analyse import analyse
from repo_jax.analysis.attention_mass import attention_mass
from repo_jax.analysis.prompts import labelled, needle_prompt, read_labelled, table_prompt
from repo_jax.analysis.reading import Reading, read
from repo_jax.analysis.records import Report, read_report

__all__ = [
    "Reading",
    "Report",
    "analyse",
    "attention_mass",
    "labelled",
    "needle_prompt",
    "read",
    "read_labelled",
    "read_report",
    "table_prompt",
]
