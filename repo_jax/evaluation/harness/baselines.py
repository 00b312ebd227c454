"""What answers that know nothing would score, by a task's own scoring."""

import dataclasses
import statistics
from collections import Counter
from typing import Any

# Tried as constant answers beside the most frequent right ones.
_GUESSES = ("yes", "no")
_FREQUENT = 3


@dataclasses.dataclass(frozen=True)
class Baseline:
    """Mean scores of one answer to every example.

    Attributes:
      empty: of the empty answer; None where there is no such answer, as in multiple choice.
      constant: of the best constant answer.
      answer: which that is: a text, or `choice 2`.
    """

    empty: float | None
    constant: float | None
    answer: str | None


def baseline(tasks: list, metric: str, filter_name: str) -> Baseline:
    """Scores the empty and constant answers on the examples that were evaluated.

    Args:
      tasks: of lm-eval, after an evaluation; their examples are pooled.
      metric, filter_name: which of their scores.

    Returns:
      All None for tasks that neither generate nor choose, and for scores that are no mean.
    """
    examples = [example for task in tasks for example in _examples(task)]
    kinds = {task.OUTPUT_TYPE for task in tasks}
    if any(task.aggregation()[metric].__name__ != "mean" for task in tasks):
        return Baseline(None, None, None)
    if kinds == {"generate_until"}:
        answers = [*_GUESSES, *_frequent(examples)]
        empty = _mean([_generated(*example, "", metric, filter_name) for example in examples])
        scores = {
            answer: _mean(
                [_generated(*example, answer, metric, filter_name) for example in examples]
            )
            for answer in dict.fromkeys(answers)
        }
        best = max(scores, key=scores.get)
        return Baseline(empty, scores[best], best)
    if kinds == {"multiple_choice"}:
        most = max(len(instances) for _, instances in examples)
        scores = [
            _mean([_chosen(*example, i, metric) for example in examples]) for i in range(most)
        ]
        best = scores.index(max(scores))
        return Baseline(None, scores[best], f"choice {best + 1}")
    return Baseline(None, None, None)


def _examples(task) -> list[tuple[Any, list]]:
    """Each example's task and requests."""
    by_doc: dict[int, list] = {}
    for instance in task.instances:
        by_doc.setdefault(instance.doc_id, []).append(instance)
    return [(task, sorted(requests, key=lambda r: r.idx)) for requests in by_doc.values()]


def _frequent(examples) -> list[str]:
    counts: Counter[str] = Counter()
    for task, (request, *_) in examples:
        target = task.doc_to_target(request.doc)
        counts.update(map(str, target if isinstance(target, list) else [target]))
    return [answer for answer, _ in counts.most_common(_FREQUENT)]


def _generated(task, requests, answer: str, metric: str, filter_name: str) -> float:
    made = [_answered(request, answer) for request in requests]
    # Others may want more than is here.
    next(each for each in task._filters if each.name == filter_name).apply(made)
    results = [request.filtered_resps[filter_name] for request in made]
    # A filter may look for words around an answer, and find none around this one.
    if answer and all(isinstance(result, str) for result in results):
        results = [answer] * len(results)
    return float(task.process_results(requests[0].doc, results)[metric])


def _answered(request, answer: str):
    # dataclasses.replace does not make requests: they derive fields from others.
    fields = ("request_type", "doc", "arguments", "idx", "metadata")
    resps = [answer] * max(1, len(request.resps))  # as often as it was asked
    return type(request)(**{name: getattr(request, name) for name in fields}, resps=resps)


def _chosen(task, requests, choice: int, metric: str) -> float:
    if choice >= len(requests):
        return 0.0
    results = [(0.0, True) if i == choice else (-1e9, False) for i in range(len(requests))]
    return float(task.process_results(requests[0].doc, results)[metric])


def _mean(values: list[float]) -> float:
    return statistics.fmean(values)
