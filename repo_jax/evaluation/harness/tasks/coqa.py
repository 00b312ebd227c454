"""CoQA (arXiv 1808.07042): the last question of a conversation, by the story it is about.

Prompts and scores are those of lm-eval's `coqa`, whose file needs a module that newer versions
of transformers no longer have.
"""

import statistics
from collections import Counter

from repo_jax.evaluation.harness.tasks.hybridqa import normalise


def prompt(doc: dict) -> str:
    """The story, the questions with their answers, and the last question without."""
    questions, answers = (doc[name]["input_text"] for name in ("questions", "answers"))
    before = zip(questions[:-1], answers[:-1], strict=True)
    told = "".join(f"Q: {question}\n\nA: {answer}\n\n" for question, answer in before)
    return f"{doc['story']}\n\n{told}Q: {questions[-1]}\n\nA:"


def answers(doc: dict) -> list[str]:
    """What the people who were asked have said, each answer once."""
    said = [doc["answers"], *(doc.get("additional_answers") or {}).values()]
    last = len(doc["questions"]["input_text"]) - 1
    by_lower: dict[str, str] = {}
    for each in said:
        # Of a conversation for training the others have said one empty text.
        for text in filter(None, each["input_text"][last : last + 1]):
            by_lower.setdefault(text.lower(), text)
    return list(by_lower.values())


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """`f1`: the best over all answers but one, averaged over which is left out.

    As CoQA compares a person with the others; a single answer is not left out.
    """
    said, golds = results[0].strip().split("\n")[0], answers(doc)
    scores = [_f1(gold, said) for gold in golds]
    kept = [scores[:i] + scores[i + 1 :] for i in range(len(scores))]
    return {"f1": statistics.fmean(max(rest or scores) for rest in kept)}


def _f1(gold: str, said: str) -> float:
    """Of the words that both have, normalised as SQuAD's are."""
    gold_words, said_words = normalise(gold).split(), normalise(said).split()
    if not gold_words or not said_words:
        return float(gold_words == said_words)
    common = sum((Counter(gold_words) & Counter(said_words)).values())
    return 2 * common / (len(gold_words) + len(said_words))
