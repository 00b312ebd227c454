"""Tasks of lm-eval by name, with their data; and what to say where they cannot be had."""

import difflib
import importlib.util
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.tasks import TaskManager

from repo_jax.errors import ConfigError, MissingPackageError
from repo_jax.evaluation.harness.local_data import data_sets_in
from repo_jax.evaluation.harness.suites import SUITES


def seed_globals() -> None:
    """As lm-eval does before it loads tasks: some draw from global generators, and each is to
    draw the same whatever came before it.
    """
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)  # noqa: NPY002


def load_tasks(manager: TaskManager, name: str, data_dir: str | None) -> dict[str, Any]:
    """lm-eval's tasks of a name, with their data."""
    if name not in manager.all_tasks:
        known = [*SUITES, *manager.all_tasks]
        (near,) = difflib.get_close_matches(name, known, n=1) or [""]
        hint = f"; did you mean {near}?" if near else ""
        raise ConfigError(
            f"--tasks has {name!r}, which is no suite ({', '.join(SUITES)}) and no task of "
            f"lm-eval or --tasks_dir{hint}"
        )
    seed_globals()
    try:
        with data_sets_in(data_dir):
            tasks = manager.load([name])["tasks"]
    except (ConfigError, MissingPackageError):
        raise
    except ImportError as error:
        missing = _missing(error)
        package = missing.partition(".")[0]
        if not package.isidentifier():
            raise ConfigError(f"the task {name} cannot be loaded: {missing}") from error
        if importlib.util.find_spec(package):
            raise ConfigError(
                f"the task {name} does not work with the installed {package}, which has no "
                f"{missing}"
            ) from error
        in_suites = {t.task for groups in SUITES.values() for group in groups for t in group.tasks}
        extra = "eval" if name in in_suites else None  # which brings what the suites need
        raise MissingPackageError(package, f"the task {name}", extra) from error
    except Exception as error:  # of whatever lies between here and the hub
        raise ConfigError(_no_data(manager, name, data_dir, error)) from error
    return dict(sorted(tasks.items()))


def _missing(error: BaseException) -> str:
    """What could not be imported; lm-eval says so in words of its own."""
    while isinstance(inner := error.__cause__ or error.__context__, ImportError):
        error = inner
    return getattr(error, "name", None) or str(error)


def _no_data(manager: TaskManager, name: str, data_dir: str | None, error: Exception) -> str:
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    place = data_dir or "DATA_DIR"
    first, _, kind = name.partition("_")
    files, hub = {
        "nlgraph": (
            f"NLGraph/{kind}/main.json of github.com/Arthur-Heng/NLGraph",
            "huayangli/nlgraph",
        ),
        "hybridqa": (
            "hybridqa/dev.traced.json of github.com/wenhuchen/HybridQA and hybridqa/tables_tok/ of "
            "github.com/wenhuchen/WikiTables-WithLinks",
            "huayangli/hybrid_qa",
        ),
    }.get(first, ("", ""))
    wanted = _data_sets(manager, name)
    if files:
        what = (
            f"put {files} into {place} and give --data_dir, or run once with a network, which "
            f"fetches {hub}"
        )
    elif wanted:
        folders = " and ".join(f"{place}/{path}" for path in wanted)
        sets = " and ".join(
            path + (f" (configuration {', '.join(names)})" if names else "")
            for path, names in wanted.items()
        )
        what = (
            f"fetch the data set {sets} from huggingface.co by running once with a network, or "
            f"copy the cache of such a run (HF_HOME), or put a copy of its repository into "
            f"{folders} and give --data_dir"
        )
    else:
        what = "the files are named in data_files of the task's file"
    return f"the data of the task {name} cannot be had ({reason}); {what}"


def _data_sets(manager: TaskManager, name: str) -> dict[str, list[str]]:
    """The configurations of the hub's data sets that a task, group or tag reads."""
    found: dict[str, list[str]] = {}
    for config in _task_files(manager.task_index, name):
        path = config.get("dataset_path")
        if path and "data_files" not in (config.get("dataset_kwargs") or {}):
            names, configuration = found.setdefault(path, []), config.get("dataset_name")
            if configuration and configuration not in names:
                names.append(configuration)
    return found


def _task_files(index: Mapping[str, Any], asked: str | dict) -> Iterator[dict[str, Any]]:
    """What the files of a task say, or those of the tasks in a group or under a tag."""
    if isinstance(asked, str):
        entry = index.get(asked)
        asked = {} if entry is None else entry.cfg or {"task": sorted(entry.tags)}
    members = asked.get("task")
    if isinstance(members, list):
        for member in members:
            yield from _task_files(index, member)
    else:  # a group may name a task and change it
        named = index.get(members)
        yield ((named and named.cfg) or {}) | asked
