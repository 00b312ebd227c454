"""`eval.py --tasks`: tasks, then the model, then what is written of them."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import statistics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lm_eval.evaluator import evaluate as run_tasks
from lm_eval.tasks import TaskManager

from repo_jax import cli
from repo_jax.config import DecoderConfig, to_dict
from repo_jax.data import Tokenizer, check_vocabulary
from repo_jax.errors import ConfigError
from repo_jax.evaluation.config import EvalConfig
from repo_jax.evaluation.harness.baselines import baseline
from repo_jax.evaluation.harness.cache import RequestCache
from repo_jax.evaluation.harness.compare import read_examples
from repo_jax.evaluation.harness.model import RepoJaxLM
from repo_jax.evaluation.harness.requests import prompt_room, reach
from repo_jax.evaluation.harness.statistics import score_interval, shown, statistic_interval
from repo_jax.evaluation.harness.suites import (
    RULER_TASKS,
    SUITES,
    TASKS_DIR,
    Group,
    SuiteTask,
    alone,
)
from repo_jax.evaluation.harness.task_loading import load_tasks, seed_globals
from repo_jax.inference.loading import config_of, folder_of, load, open_mesh
from repo_jax.training import lock

_PUBLISHED = "published_match"
# What lm-eval marks tasks with that it runs only if it is told to, or for other models.
_MARKS = {
    "UNSAFE_CODE": "runs code that the model writes",
    "MULTIMODAL": "shows images or plays sounds",
}


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One line of the results, with lm-eval's tasks behind it, by name."""

    name: str
    asked: SuiteTask
    group: Group
    tasks: dict[str, Any]
    settings: dict[str, Any]


def evaluate_tasks(config: EvalConfig) -> dict[str, Any]:
    """Evaluates a run or a model on tasks.

    Examples are made and read before the model, which takes longer. Everything is written as
    soon as it is known, so that the same command goes on where it was stopped.

    Returns:
      What tasks.json holds: `source`, `step`, `dtype`, `model` (a digest), `tasks` by name, and
      `groups`, the means of a suite's tasks.

    Raises:
      ConfigError: a task is unknown, lacks its data or cannot be scored, the folder has other
        results, or the mesh or the tokenizer does not fit.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    out = _output(config)
    groups = _groups(config)
    folder = folder_of(config)
    mesh = open_mesh(config, config.mesh)
    place, model = config.tokenizer or folder, config_of(config)
    tokenizer = Tokenizer.load(place)
    check_vocabulary(f"the tokenizer {place}", tokenizer.vocab_size, model)
    entries = _entries(config, groups, place, model)
    _check_room(entries)
    with _held(out):
        found = _found(out, entries)
        for entry in entries:
            _check_examples(entry, config, out)
        loaded = load(config, config.dtype, mesh)
        lm = RepoJaxLM(
            *(loaded.model, loaded.params, tokenizer),
            batch_tokens=config.batch_tokens,
            cache=RequestCache(out / "requests.sqlite"),
            mesh=mesh,
        )
        report = _started(out, config, loaded.step, lm.identity, found)
        for group, members in itertools.groupby(entries, lambda entry: entry.group):
            scaling = group.rope_scaling or loaded.model.config.rope_scaling
            scaled = lm.scaled(scaling, group.max_length)
            for entry in members:
                _evaluate(entry, scaled, config, out, report)
        return report


@contextlib.contextmanager
def _held(out: Path) -> Iterator[None]:
    """Makes the folder, for this evaluation alone until it ends; two would lose results."""
    with cli.writing("--output"):
        out.mkdir(parents=True, exist_ok=True)
    try:
        with lock.hold(out, "--output"):
            yield
    finally:
        with contextlib.suppress(OSError):
            out.rmdir()  # where nothing has come into it


def _groups(config: EvalConfig) -> tuple[Group, ...]:
    """The groups of the suites, and one of each other task, in the order given."""
    if config.task_length is not None and not set(RULER_TASKS) & set(config.tasks):
        raise ConfigError(
            f"--task_length is {config.task_length}, which is for {', '.join(RULER_TASKS)}; "
            "--tasks names none of them"
        )
    groups: list[Group] = []
    for name in config.tasks:
        groups += SUITES.get(name, (alone(name, config.task_length),))
    return tuple(groups)


def _output(config: EvalConfig) -> Path:
    if config.output is None and config.run is None:
        raise ConfigError("--model with --tasks needs --output, the folder for the results")
    out = Path(config.run if config.output is None else config.output) / "evaluation"
    cli.check_folder("--output", out)
    return out


def _entries(
    config: EvalConfig, groups: Iterable[Group], tokenizer: Path | str, model: DecoderConfig
) -> list[_Entry]:
    absolute = lambda path: path and str(Path(path).expanduser().absolute())
    for option in ("data_dir", "tasks_dir"):
        path = absolute(getattr(config, option))
        if path is not None and not Path(path).is_dir():
            raise ConfigError(f"--{option} {getattr(config, option)}: there is no such folder")
    own_paths = [str(TASKS_DIR), *filter(None, [absolute(config.tasks_dir)])]
    shared = {"tokenizer": absolute(tokenizer), "data_dir": absolute(config.data_dir)}
    if config.haystack is not None:
        shared["haystack"] = config.haystack
    if config.limit is not None:
        shared["samples"] = config.limit
    everything: TaskManager | None = None
    entries: dict[str, _Entry] = {}
    for group in groups:
        scaling = group.rope_scaling or model.rope_scaling
        scaled = dataclasses.replace(model, rope_scaling=scaling)
        # lm-eval's own thousands of files take seconds to look through.
        metadata = shared | group.metadata
        own = TaskManager(include_path=own_paths, include_defaults=False, metadata=metadata)
        for asked in group.tasks:
            manager = own
            if asked.task not in own.all_tasks:
                everything = everything or TaskManager(include_path=own_paths, metadata=shared)
                manager = everything
            tasks = load_tasks(manager, asked.task, config.data_dir)
            entry = _entry(config, group, asked, tasks, scaled)
            if entry.name in entries:
                raise ConfigError(f"--tasks names {entry.name} twice")
            entries[entry.name] = entry
    if config.haystack and not any(entry.settings["haystack"] for entry in entries.values()):
        raise ConfigError(
            f"--haystack is {config.haystack}; none of --tasks, {', '.join(config.tasks)}, hides "
            "needles in one"
        )
    return list(entries.values())


def _entry(
    config: EvalConfig,
    group: Group,
    asked: SuiteTask,
    tasks: dict[str, Any],
    model: DecoderConfig,
) -> _Entry:
    name = asked.name or asked.task
    shots = asked.shots if config.num_fewshot is None else config.num_fewshot
    for member, task in tasks.items():
        for mark, what in _MARKS.items():
            if getattr(task, mark, False):
                raise ConfigError(
                    f"the task {member} {what}, which eval.py does not; leave it out of --tasks"
                )
        own = task.get_config("num_fewshot")
        if own == 0 and config.num_fewshot:
            what = f"{member} shows no examples, whatever --num_fewshot says"
            print(f"{what}: its file has num_fewshot 0", file=sys.stderr)
        # As in lm-eval: a task whose file says 0 has no examples to show.
        if own is None or (own != 0 and shots is not None):
            task.set_config(key="num_fewshot", value=shots or 0)
        _seed_shots(task)
        _check_shots(task)
    first = next(iter(tasks.values()))
    metrics = list(first.aggregation())
    metric = asked.metric or metrics[0]
    if config.published_scoring and _PUBLISHED in metrics:
        metric = _PUBLISHED
    filter_name = asked.filter or first._filters[0].name
    _check_scoring(name, tasks, metric, filter_name)
    scaling = model.rope_scaling
    settings = {
        "metric": metric,
        "filter": filter_name,
        "shots": first.get_config("num_fewshot"),
        "limit": config.limit,
        "rope_scaling": scaling and to_dict(scaling),
        "max_length": group.max_length or reach(model),
        "group": group.name,
        "haystack": ", ".join(sorted(set().union(*map(_haystacks, tasks.values())))) or None,
    }
    return _Entry(name, asked, group, tasks, settings)


def _check_scoring(name: str, tasks: dict[str, Any], metric: str, filter_name: str) -> None:
    """The metric and the filter are those of the first of the tasks, whose scores are pooled."""
    mixed = f"--tasks {name} mixes tasks that are scored differently; name them one by one"
    for member, task in tasks.items():
        metrics, filters = task.aggregation(), [each.name for each in task._filters]
        for what, wanted, known in (
            ("metric", metric, metrics),
            ("filter", filter_name, filters),
        ):
            if wanted not in known:
                lacks = f"the task {member} has no {what} {wanted}; it has {', '.join(known)}"
                raise ConfigError(f"{mixed} ({lacks})" if len(tasks) > 1 else lacks)
    if len({task.aggregation()[metric].__name__ for task in tasks.values()}) > 1:
        raise ConfigError(f"{mixed} ({metric} is aggregated in different ways)")


def _seed_shots(task) -> None:
    task.set_fewshot_seed(seed=1234)


def _check_shots(task) -> None:
    """lm-eval would find out on the first question."""
    shots, sampler = task.get_config("num_fewshot"), getattr(task, "sampler", None)
    if not shots or sampler is None:
        return
    # Examples from among the questions leave out the one that is asked.
    others = task.fewshot_cfg.split == task.config.test_split
    if len(sampler.df) < shots + others:
        raise ConfigError(
            f"the task {task.config.task} is to show {shots} examples before a question and has "
            f"{len(sampler.df) - others}; --num_fewshot asks for fewer"
        )


def _check_room(entries: Iterable[_Entry]) -> None:
    """The model would find out when it comes to the task."""
    for entry in entries:
        for name, task in entry.tasks.items():
            if task.OUTPUT_TYPE == "generate_until":
                options = task.get_config("generation_kwargs") or {}
                prompt_room(f"the task {name}", options, entry.settings["max_length"])


def _found(out: Path, entries: Iterable[_Entry]) -> dict[str, Any] | None:
    """What tasks.json in the folder has, of evaluations that this one goes on with."""
    path = out / "tasks.json"
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or not found.keys() >= {"model", "tasks", "groups"}:
        raise ConfigError(f"{path} is no report of tasks; give another --output")
    for entry in entries:
        before = found["tasks"].get(entry.name)
        for name, value in entry.settings.items() if before else ():
            if before.get(name) != value:
                raise ConfigError(
                    f"{path} has {entry.name} with {name} {before.get(name)}, not {value}; "
                    "give another --output"
                )
    return found


def _check_examples(entry: _Entry, config: EvalConfig, out: Path) -> None:
    """Results of other examples are kept. To find out after the answers would be late."""
    path = out / f"{entry.name}.jsonl"
    if not path.exists():
        return
    before = [(row["task"], row["doc_id"], row["example"]) for row in read_examples(path)]
    # All as lm-eval is going to do it, since some tasks draw on the way.
    seed_globals()
    for task in entry.tasks.values():
        task.build_all_requests(limit=config.limit)
    examples = []
    for name, task in entry.tasks.items():
        requests: dict[int, list] = {}
        for request in sorted(task.instances, key=lambda request: request.idx):
            requests.setdefault(request.doc_id, []).append(request.args)
        for doc_id, doc in task.doc_iterator(limit=config.limit):
            example = _example(doc_id, requests[doc_id], task.doc_to_target(doc))
            examples.append((name, doc_id, example))
        _seed_shots(task)
    if before != sorted(examples):
        raise ConfigError(
            f"{path} has results of other examples: the data or the task's file were changed; "
            "give another --output"
        )


def _started(
    out: Path, config: EvalConfig, step: int | None, identity: str, found: dict | None
) -> dict[str, Any]:
    """The report so far: what the folder has of this model."""
    report = {
        "source": config.run or config.model,
        "step": step,
        "dtype": config.dtype,
        "model": identity,
        "tasks": {},
        "groups": {},
    }
    if found is None:
        return report
    if found["model"] != identity:
        raise ConfigError(
            f"{out / 'tasks.json'} has results of another model ({found['source']}, step "
            f"{found['step']}, {found['dtype']}) or of another version of this program; give "
            "another --output"
        )
    return report | {"tasks": found["tasks"], "groups": found["groups"]}


def _evaluate(entry: _Entry, lm: RepoJaxLM, config: EvalConfig, out: Path, report: dict) -> None:
    """Adds an entry to the report, and writes it and its examples."""
    seed_globals()
    found = run_tasks(
        lm=lm,
        task_dict={"tasks": entry.tasks, "groups": {}, "group_map": {}},
        limit=config.limit,
        bootstrap_iters=0,
        log_samples=True,
    )
    metric, filter_name = entry.settings["metric"], entry.settings["filter"]
    rows = []
    for name in entry.tasks:
        for sample in found["samples"][name]:
            if sample["filter"] == filter_name:
                dropped = max(map(lm.dropped, sample["arguments"]))
                rows.append(_row(name, sample, metric, dropped))
    rows.sort(key=lambda row: (row["task"], row["doc_id"]))
    scores = [row["score"] for row in rows]
    aggregate = next(iter(entry.tasks.values())).aggregation()[metric]
    if aggregate.__name__ == "mean":
        score, interval = statistics.fmean(scores), score_interval(scores)
    else:
        score, interval = aggregate(scores), statistic_interval(scores, aggregate)
    known = baseline(list(entry.tasks.values()), metric, filter_name)
    report["tasks"][entry.name] = {
        **entry.settings,
        "examples": len(rows),
        "truncated": sum(row["dropped_tokens"] > 0 for row in rows),
        "score": score,
        "low": interval[0],
        "high": interval[1],
        "empty": known.empty,
        "constant": known.constant,
        "constant_answer": known.answer,
    }
    tasks = report["tasks"]
    members = [task.name or task.task for task in entry.group.tasks]
    if len(members) > 1 and all(member in tasks for member in members):
        means = statistics.fmean(tasks[member]["score"] for member in members)
        report["groups"][entry.group.name] = {"score": means, "tasks": members}
    _write(out / f"{entry.name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    _write(out / "tasks.json", json.dumps(report, indent=1) + "\n")
    print(f"{entry.name}: {metric} {score:.4f} on {len(rows)} examples", file=sys.stderr)


def _haystacks(task) -> set[str]:
    # Other tasks may have so many examples that looking at them takes long.
    made_here = callable(task.get_config("custom_dataset"))
    return {doc["haystack"] for doc in task.eval_docs if "haystack" in doc} if made_here else set()


def _row(task: str, sample: dict, metric: str, dropped: int) -> dict[str, Any]:
    if metric not in sample:
        known = ", ".join(sample["metrics"])
        raise ConfigError(f"the task {task} has no metric {metric}; it has {known}")
    requests = sample["arguments"]
    chosen = len(requests) > 1
    prompt = requests[0][0]
    output = [resps if len(resps) > 1 else resps[0] for resps in sample["resps"]]
    score = sample[metric]
    row = {
        "task": task,
        "doc_id": sample["doc_id"],
        "metric": metric,
        "score": list(score) if isinstance(score, (tuple, list)) else float(score),
        "prompt": prompt,
        "dropped_tokens": dropped,
        **({"choices": [request[1] for request in requests]} if chosen else {}),
        "output": output if chosen else output[0],
        "target": sample["target"],
    }
    return row | {"example": _example(sample["doc_id"], requests, sample["target"])}


def _example(doc_id: int, requests: list[tuple], target: Any) -> str:
    """A digest of what is asked, and of what is right."""
    choices = [[request[1] for request in requests]] if len(requests) > 1 else []
    example = [doc_id, requests[0][0], *choices, target]
    return hashlib.sha256(json.dumps(example).encode()).hexdigest()[:16]


def _write(path: Path, content: str) -> None:
    """The whole file or none of it."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(content, encoding="utf-8")
    os.replace(part, path)


def table(report: dict[str, Any]) -> str:
    """The report for a reader."""
    lines = [
        f"{'task':<26} {'metric':<16} {'n':>6} {'shots':>5} {'score':>8}  {'95 %':<17} "
        f"{'empty':>7} {'constant':>8}"
    ]
    number = lambda value: "-" if value is None else f"{value:.4f}"
    for name, row in report["tasks"].items():
        answer = row["constant_answer"]
        interval = shown(row["low"], row["high"], ".4f", " - ")
        lines.append(
            f"{name:<26} {row['metric']:<16} {row['examples']:>6} {row['shots']:>5} "
            f"{row['score']:>8.4f}  {interval:<17} "
            f"{number(row['empty']):>7} {number(row['constant']):>8}"
            + (f" ({' '.join(answer.split())[:30]})" if answer is not None else "")
            + (f" haystack: {row['haystack']}" if row["haystack"] else "")
            + (f" truncated: {truncated}" if (truncated := row.get("truncated")) else "")
        )
    for name, row in report["groups"].items():
        lines.append(f"{name:<26} mean of {len(row['tasks'])} tasks {'':>13} {row['score']:>8.4f}")
    return "\n".join(lines)
