"""LongBench (arXiv 2308.14508), of the hub's data set whose prompts are whole.

In its rows `context` has the instruction around the text, `question` the words before and after
what is asked, and `answer_prefix` how the answer begins; one after the other they are LongBench's
prompt. THUDM's own rows have the bare text in `context` and what is asked in `input`.
"""

import datasets

from repo_jax.errors import ConfigError


def with_whole_prompts(rows: datasets.Dataset) -> datasets.Dataset:
    """The rows as they are.

    Raises:
      ConfigError: they lack a part of the prompt, as THUDM's do.
    """
    missing = [name for name in ("question", "answer_prefix") if name not in rows.column_names]
    if missing:
        raise ConfigError(
            f"the rows of LongBench have no {' and no '.join(missing)}, but "
            f"{', '.join(rows.column_names)}; take Xnhyacinth/LongBench of the hub, not "
            "THUDM/LongBench, whose context has no instruction"
        )
    return rows
