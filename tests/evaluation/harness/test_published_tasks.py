"""The suites' tasks on data sets of the hub, on rows in the published schemas.

The model's answers are chosen; the scores they are to have were worked out by hand.
"""

import json
from pathlib import Path

import lm_eval.tasks
import pytest
import yaml
from datasets import Dataset
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from repo_jax.errors import ConfigError
from repo_jax.evaluation import command
from repo_jax.evaluation.harness import model as harness
from repo_jax.evaluation.harness.suites import SUITES, TASKS_DIR
from repo_jax.evaluation.harness.task_loading import load_tasks
from repo_jax.evaluation.harness.tasks import coqa as coqa_task
from repo_jax.inference.generator import Completion
from tests.tiny_runs import make_run, parse, write_config


def publish(folder, configs):
    """A data set as its repository on the hub is laid out, from configuration to split to rows."""
    listed = []
    for config, splits in configs.items():
        files = []
        features = Dataset.from_list([row for rows in splits.values() for row in rows]).features
        for split, rows in splits.items():
            path = f"{config}/{split}-00000-of-00001.parquet"
            (folder / config).mkdir(parents=True, exist_ok=True)
            Dataset.from_list(rows, features=features).to_parquet(folder / path)
            files.append({"split": split, "path": path})
        listed.append({"config_name": config, "data_files": files})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': listed})}---\n")


def arc(question, texts, key, labels="ABCDE"):
    choices = {"text": texts, "label": list(labels[: len(texts)])}
    return {"id": question, "question": question, "choices": choices, "answerKey": key}


def boolq(question, label):
    return {"question": question, "passage": f"On {question}.", "idx": 0, "label": label}


def hellaswag(activity, ctx_a, ctx_b, endings, label):
    return {
        "ind": 0,
        "activity_label": activity,
        "ctx_a": ctx_a,
        "ctx_b": ctx_b,
        "ctx": f"{ctx_a} {ctx_b}",
        "endings": endings,
        "source_id": "activitynet~v_1",
        "split": "val",
        "split_type": "indomain",
        "label": label,
    }


def turns(*texts):
    ids = [i + 1 for i in range(len(texts))]
    return {"input_text": [*texts], "turn_id": ids}


def spans(*texts):
    blank = [-1] * len(texts)
    return turns(*texts) | {"span_start": blank, "span_end": blank, "span_text": [*texts]}


def coqa(story, questions, answers, *others):
    return {
        "id": story,
        "source": "mctest",
        "story": story,
        "questions": turns(*questions),
        "answers": spans(*answers),
        "additional_answers": {str(i): spans(*other) for i, other in enumerate(others)},
    }


def drop(passage, question, *answers):
    """An answer is a number, spans or a date; all but the first are the validators'.

    Rows for training have one validated answer, which is empty.
    """
    no_date = dict.fromkeys(("day", "month", "year"), "")
    made = [
        {
            "number": answer if isinstance(answer, str) else "",
            "date": answer if isinstance(answer, dict) else no_date,
            "spans": answer if isinstance(answer, list) else [],
            "worker_id": "w",
            "hit_id": "h",
        }
        for answer in (*answers, "")[: max(2, len(answers))]
    ]
    return {
        "section_id": "nfl_1",
        "passage": passage,
        "question": question,
        "query_id": question,
        "answer": made[0],
        "validated_answers": {name: [each[name] for each in made[1:]] for name in made[0]},
    }


def mmlu_pro(category, question, answer):
    return {
        "question_id": 0,
        "question": question,
        "options": ["ant", "bee", "cat"],
        "answer": answer,
        "answer_index": "ABC".index(answer),
        "cot_content": f"A: Let's think step by step. The answer is ({answer}).",
        "category": category,
        "src": "ori",
    }


def triviaqa(question, *aliases):
    """As in the configurations without a context, whose lists of pages are empty."""
    pages = ("doc_source", "filename", "title", "wiki_context")
    found = ("description", "filename", "rank", "title", "url", "search_context")
    return {
        "question": question,
        "question_id": question,
        "question_source": "http://www.example.com/",
        "entity_pages": {name: [] for name in pages},
        "search_results": {name: [] for name in found},
        "answer": {
            "aliases": [*aliases],
            "normalized_aliases": [alias.lower() for alias in aliases],
            "matched_wiki_entity_name": "",
            "normalized_matched_wiki_entity_name": "",
            "normalized_value": aliases[0].lower(),
            "type": "WikipediaEntity",
            "value": aliases[0],
        },
    }


def longbench(name, context, question, answer_prefix, *answers):
    """As in the hub's Xnhyacinth/LongBench: THUDM's rows with the instruction in the context."""
    return {
        "question": question,
        "context": context,
        "answers": [*answers],
        "length": len(context.split()),
        "dataset": name,
        "language": "en",
        "all_classes": None,
        "_id": name,
        "answer_prefix": answer_prefix,
        "task": name,
        "max_new_tokens": 52,
    }


SUBJECTS = (
    *("biology", "business", "chemistry", "computer science", "economics", "engineering"),
    *("health", "history", "law", "math", "other", "philosophy", "physics", "psychology"),
)
# One more than are shown, as lm-eval asks for where it draws them; MMLU-Pro's are five.
TRAIN = range(6)
ARC_SHOTS = [arc(f"Shot {i}?", ["one", "two"], "B") for i in TRAIN]
DROP_DATE = {"day": "3", "month": "May", "year": "1999"}
GENERAL = {
    "allenai/ai2_arc": {
        "ARC-Challenge": {
            "train": ARC_SHOTS,
            "test": [
                arc("Which is long?", ["no", "a long answer"], "B"),
                arc("Which is last?", ["w", "x", "y", "z"], "4", "1234"),
                arc("Which of five?", ["aa", "bb", "cc", "dd", "ee"], "E"),
            ],
        },
        "ARC-Easy": {
            "train": ARC_SHOTS,
            "test": [arc("Hot?", ["sun", "ice"], "A"), arc("Cold?", ["sun", "ice"], "B")],
        },
    },
    "aps/super_glue": {
        "boolq": {
            "train": [boolq(f"is {i} a number", 1) for i in TRAIN],
            "validation": [boolq("is it so", 1), boolq("was it so", 1), boolq("will it be", 0)],
        }
    },
    "EleutherAI/coqa": {
        "default": {
            "train": [coqa("It is.", ["Is it?", "So?"], ["yes", "so"], *[[""]] * 3)],
            "validation": [
                coqa(
                    "The sky is blue.",
                    ["What is up?", "Its colour?"],
                    ["sky", "blue"],
                    ["sky", "It is blue"],
                    ["the sky", "Blue"],
                    ["sky", "light blue"],
                ),
                coqa("He went to Paris.", ["Where?"], ["in Paris"], *[["in Paris"]] * 3),
            ],
        }
    },
    "EleutherAI/drop": {
        "default": {
            "train": [drop(f"Team {i} won.", f"Who won {i}?", [f"team {i}", "all"]) for i in TRAIN],
            "validation": [
                drop("He ran 12 yards.", "How far?", "12", "13"),
                drop("Brady and Manning threw.", "Who threw?", ["Tom Brady", "Eli Manning"]),
                drop("It was a day in May.", "When?", DROP_DATE, ["May"]),
            ],
        }
    },
    "Rowan/hellaswag": {
        "default": {
            "train": [
                hellaswag("Rest", f"He sits {i}.", "he", ["stands.", "up."], "0") for i in TRAIN
            ],
            "validation": [
                hellaswag("Roof", "A man climbs.", "he", ["falls.", "goes down slowly."], "1"),
                hellaswag("Tea", "Boil it [title] Pour.", "", ["Go [substeps] on.", "No."], "1"),
            ],
        }
    },
    "TIGER-Lab/MMLU-Pro": {
        "default": {
            "validation": [mmlu_pro(s, f"{s} shot {i}?", "C") for s in SUBJECTS for i in range(5)],
            "test": [mmlu_pro(s, f"In {s}?", "B" if s == "math" else "A") for s in SUBJECTS],
        }
    },
    "mandarjoshi/trivia_qa": {
        "rc.nocontext": {
            "train": [triviaqa(f"Shot {i}?", f"Answer {i}", "none") for i in TRAIN],
            "validation": [
                triviaqa("Which kingdom?", "UK", "United Kingdom"),
                triviaqa("What shines?", "Moon", "The Moon"),
                triviaqa("What is nearest?", "Luna", "Moon"),
            ],
        }
    },
}
# By what a prompt ends with; of texts what follows, of choices their log-probabilities.
GENERAL_ANSWERS = {
    # Per character -1 and -1/2.
    "Which is long?": {"no": -2.0, "a long answer": -6.5},
    "Which is last?": {"w": -4.0, "x": -4.0, "y": -1.0, "z": -2.0},
    "Which of five?": {"aa": -4.0, "bb": -4.0, "cc": -4.0, "dd": -4.0, "ee": -1.0},
    "Hot?": {"sun": -1.0, "ice": -2.0},
    "Cold?": {"sun": -2.0, "ice": -1.0},
    "is it so?": {"yes": -1.0, "no": -2.0},
    "was it so?": {"yes": -2.0, "no": -1.0},
    "will it be?": {"yes": -1.0, "no": -2.0},
    "Roof: A man climbs. He": {"falls.": -6.0, "goes down slowly.": -8.0},
    "Tea: Boil it. Pour.": {"Go on.": -1.0, "No.": -2.0},
    "Its colour?": " light blue\n\nQ: And what else?",
    "Where?": " Paris",
    "How far?": " about 12 yards\n\nPassage: Another.",
    "Who threw?": " Tom Brady",
    "When?": " May 1999",
    "Which kingdom?": " united kingdom.",
    "What shines?": " The Moon, of course",
    "What is nearest?": " Mars",
    **{f"In {subject}?": " The answer is (A)." for subject in SUBJECTS},
    "In math?": " Hm. The answer is (B). Question: The answer is (A).",
    "In law?": " It is A.",
}
PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output "
    "any other words.\n\nThe following are given passages.\n{}\n\nAnswer the question based on "
    "the given passages. Only give me the answer and do not output any other words.\n\n"
)
STORY = (
    "You are given a story, which can be either a novel or a movie script, and a question. Answer "
    "the question asconcisely as you can, using a single phrase if possible. Do not provide any "
    "explanation.\n\nStory: {}\n\nNow, answer the question based on the story asconcisely as you "
    "can, using a single phrase if possible. Do not provide any explanation.\n\n"
)
TEXT = (
    "Read the following text and answer briefly.\n\n{}\n\nNow, answer the following question based "
    "on the above text, only give me the answer and do not output any other words.\n\n"
)
REPORT = (
    "You are given a report by a government agency. Write a one-page summary of the report.\n\n"
    "Report:\n{}\n\n"
)
MEETING = (
    "You are given a meeting transcript and a query containing a question or instruction. Answer "
    "the query in one or more sentences.\n\nTranscript:\n{}\n\nNow, answer the query based on the "
    "above meeting transcript in one or more sentences.\n\n"
)
EXAMPLES = (
    "Answer the question based on the given passage. Only give me the answer and do not output any "
    "other words. The following are some examples.\n\n{}\n\n"
)
# Context, question, how the answer begins, and answers.
LONG = {
    "2wikimqa": (
        PASSAGES.format("It was found."),
        *("Question: Who found it?\n", "Answer:", "Marie Curie"),
    ),
    "musique": (
        PASSAGES.format("A year."),
        *("Question: Which year?\n", "Answer:", "1867", "the year 1867"),
    ),
    "multifieldqa_en": (TEXT.format("It is."), "Question: What is it?\n", "Answer:", "a thing"),
    "narrativeqa": (
        STORY.format("A boat."),
        *("Question: What floats?\n\n", "Answer:", "a red boat", "boat"),
    ),
    "gov_report": (
        REPORT.format("Cats ran."),
        *("Now, write a one-page summary of the report.\n\n", "Summary:", "dogs chase small cats"),
    ),
    "qmsum": (
        MEETING.format("A: B."),
        *("Query: What was said?\n", "Answer:", "we meet on monday at noon"),
    ),
    "triviaqa": (
        EXAMPLES.format("Passage:\nIt is.\nQuestion:\nIs it?\nAnswer:\nYes"),
        *("Passage:\nOn it.\nQuestion:\nCapital?\n", "Answer:", "Paris", "Lutetia"),
    ),
}
LONG_ROWS = {name: longbench(name, *parts) for name, parts in LONG.items()}
LONG_ANSWERS = {
    "Who found it?": " Marie Sklodowska Curie",
    "Which year?": " The year 1867.",
    "What is it?": "",
    "What floats?": " boat",
    "write a one-page summary": " dogs chase cats",
    "What was said?": " on monday at noon we meet",
    "Capital?": " Paris\nPassage: Rome is a city.",
}
# LongBench's own prompts, of which two are written out.
LONG_PROMPTS = {
    "qmsum": "You are given a meeting transcript and a query containing a question or "
    "instruction. Answer the query in one or more sentences.\n\nTranscript:\nA: B.\n\nNow, answer "
    "the query based on the above meeting transcript in one or more sentences.\n\nQuery: What was "
    "said?\nAnswer:",
    "triviaqa": "Answer the question based on the given passage. Only give me the answer and do "
    "not output any other words. The following are some examples.\n\nPassage:\nIt is.\nQuestion:\n"
    "Is it?\nAnswer:\nYes\n\nPassage:\nOn it.\nQuestion:\nCapital?\nAnswer:",
}


# metric, examples, shots, score, score of the empty answer, of the best constant one, and which.
GENERAL_SCORES = {
    "arc_challenge": ("acc_norm", 3, 5, 2 / 3, None, 1 / 3, "choice 2"),
    "arc_easy": ("acc_norm", 2, 5, 1.0, None, 1 / 2, "choice 1"),
    "boolq": ("acc", 3, 5, 1 / 3, None, 2 / 3, "choice 2"),
    # "light blue" by blue 2/3, by It is blue 2/5, by light blue 1; one left out, the best is
    # 1, 1 and 2/3. Paris by in Paris is 2/3. Only blue: (2/3 + 1 + 1) / 3, and 0.
    "general_coqa": ("f1", 2, 0, (8 / 9 + 2 / 3) / 2, 0.0, 4 / 9, "blue"),
    # One of three words, all of one; one of two spans; two of three words.
    "general_drop": ("f1", 3, 5, (0.5 + 0.5 + 0.8) / 3, 0.0, 1 / 3, "12"),
    "hellaswag": ("acc_norm", 2, 5, 1 / 2, None, 1.0, "choice 2"),
    "mmlu_pro": ("exact_match", 14, 5, 13 / 14, 0.0, 13 / 14, "A"),
    "triviaqa": ("exact_match", 3, 5, 2 / 3, 0.0, 2 / 3, "Moon"),
}
# What the first example's prompt ends with, and what it shows before, of which there are six.
GENERAL_PROMPTS = {
    "arc_challenge": ("Question: Which is long?\nAnswer:", "Question: Shot {}?\nAnswer: two"),
    "arc_easy": ("Question: Hot?\nAnswer:", "Question: Shot {}?\nAnswer: two"),
    "boolq": (
        "On is it so.\nQuestion: is it so?\nAnswer:",
        "On is {0} a number.\nQuestion: is {0} a number?\nAnswer: yes",
    ),
    "general_drop": (
        "Passage: He ran 12 yards.\nQuestion: How far?\nAnswer:",
        "Passage: Team {0} won.\nQuestion: Who won {0}?\nAnswer: team {0}, all",
    ),
    "hellaswag": ("Roof: A man climbs. He", "Rest: He sits {}. He stands."),
    # Questions end with a mark, and lm-eval's prompt adds another.
    "triviaqa": ("Question: Which kingdom??\nAnswer:", "Question: Shot {0}??\nAnswer: Answer {0}"),
}
# Only answers: a constant one is always right, there being one example.
LONG_SCORES = {
    "2wikimqa": 4 / 5,  # two of three words, all of two
    "musique": 1.0,
    "multifieldqa_en": 0.0,
    "narrativeqa": 1.0,
    "gov_report": 6 / 7,  # a subsequence of three words, of three and of four
    "qmsum": 2 / 3,  # of four, of six and of six
    "triviaqa": 1.0,
}


def evaluate(folder, suite, published, answers):
    """The report and the rows of each task, for a model that gives the chosen answers."""
    make_run(folder / "run", parse(write_config(folder), "--model.max_length", "8192"))
    for name, configs in published.items():
        publish(folder / "data" / name, configs)
    chosen = lambda prompt: answers[max(answers, key=prompt.rfind)]

    def complete(self, prompts, *, tokenizer, **options):
        texts = [chosen(tokenizer.decode(prompt)) for prompt in prompts]
        return [Completion(tokenizer.encode(text), [], "eos") for text in texts]

    def score(self, requests, **options):
        return [(chosen(context)[text.strip()], False) for (context, text), _, _ in requests]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        patch.setattr(harness.Generator, "complete", complete)
        patch.setattr(harness.RepoJaxLM, "_loglikelihood_tokens", score)
        patch.setitem(SUITES, "chosen", suite)
        places = ["--run", str(folder / "run"), "--data_dir", str(folder / "data")]
        command.main([*places, "--tasks", "chosen"])
    found = folder / "run" / "evaluation"
    rows = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in found.glob("*.jsonl")
    }
    return json.loads((found / "tasks.json").read_text()), rows


@pytest.fixture(scope="module")
def general(tmp_path_factory):
    return evaluate(tmp_path_factory.mktemp("general"), SUITES["general"], GENERAL, GENERAL_ANSWERS)


@pytest.fixture(scope="module")
def longbench_results(tmp_path_factory):
    for package in ("jieba", "fuzzywuzzy", "rouge"):
        pytest.importorskip(package, reason="LongBench's scores need lm-eval[longbench]")
    published = {"Xnhyacinth/LongBench": {name: {"test": [row]} for name, row in LONG_ROWS.items()}}
    suite = [group for group in SUITES["long"] if group.name == "longbench"]
    return evaluate(tmp_path_factory.mktemp("long"), suite, published, LONG_ANSWERS)


@pytest.mark.parametrize("task", GENERAL_SCORES)
def test_scores_of_the_general_suite(general, task):
    metric, examples, shots, score, empty, constant, answer = GENERAL_SCORES[task]
    row = general[0]["tasks"][task]
    assert (row["metric"], row["examples"], row["shots"]) == (metric, examples, shots)
    assert row["score"] == pytest.approx(score)
    assert row["empty"] == empty
    assert row["constant"] == pytest.approx(constant)
    assert row["constant_answer"] == answer


def test_the_general_suite_is_the_mean_of_its_eight_tasks(general):
    mean = sum(score for _, _, _, score, *_ in GENERAL_SCORES.values()) / 8
    assert list(general[0]["tasks"]) == list(GENERAL_SCORES)
    assert general[0]["groups"]["general"]["score"] == pytest.approx(mean)


@pytest.mark.parametrize("task", GENERAL_PROMPTS)
def test_five_examples_are_shown_with_their_answers(general, task):
    *shown, asked = general[1][task][0]["prompt"].split("\n\n")
    ending, example = GENERAL_PROMPTS[task]
    assert asked == ending
    assert len(set(shown)) == len(shown) == 5
    assert set(shown) < {example.format(i) for i in TRAIN}


def test_mmlu_pro_shows_the_five_of_the_subject(general):
    for row in general[1]["mmlu_pro"]:
        about, *shown = row["prompt"].split("Question:\n")
        subject = row["task"].removeprefix("mmlu_pro_").replace("_", " ")
        assert subject in about
        questions = [question.split("\n")[0] for question in shown]
        assert questions == [f"{subject} shot {i}?" for i in range(5)] + [f"In {subject}?"]
        for question in shown[:5]:
            assert question.endswith("Answer: Let's think step by step. The answer is (C).\n\n")
        assert shown[5].endswith("A. ant\nB. bee\nC. cat\nAnswer: Let's think step by step.")


def test_coqa_asks_the_last_question_of_a_conversation(general):
    row = general[1]["general_coqa"][0]
    assert row["prompt"] == "The sky is blue.\n\nQ: What is up?\n\nA: sky\n\nQ: Its colour?\n\nA:"
    assert row["target"] == ["blue", "It is blue", "light blue"]


def test_coqa_of_a_conversation_for_training():
    (doc,) = GENERAL["EleutherAI/coqa"]["default"]["train"]
    assert coqa_task.answers(doc) == ["so"]
    assert coqa_task.process_results(doc, ["So!\nQ: Why?"]) == {"f1": 1.0}
    assert coqa_task.process_results(doc, ["the"]) == {"f1": 0.0}


@pytest.mark.parametrize("task", LONG_SCORES)
def test_scores_of_longbench(longbench_results, task):
    report, rows = longbench_results
    row = report["tasks"][f"long_{task}"]
    assert (row["metric"], row["examples"], row["shots"]) == ("score", 1, 0)
    assert (row["max_length"], row["rope_scaling"]["factor"]) == (16_384, 4.0)
    assert row["score"] == pytest.approx(LONG_SCORES[task])
    assert row["empty"] == 0.0
    assert row["constant"] == pytest.approx(1.0)
    assert row["constant_answer"] == LONG_ROWS[task]["answers"][0]
    (example,) = rows[f"long_{task}"]
    assert example["prompt"] == LONG_PROMPTS.get(task, "".join(LONG[task][:3]))


def test_longbench_is_the_mean_of_its_seven_tasks(longbench_results):
    mean = sum(LONG_SCORES.values()) / 7
    assert longbench_results[0]["groups"]["longbench"]["score"] == pytest.approx(mean)


@pytest.mark.parametrize("task", LONG)
def test_answers_on_longbench_are_cut_and_scored_as_lm_evals(task):
    published = Path(lm_eval.tasks.__file__).parent / "longbench" / f"{task}.yaml"
    ours, theirs = (
        load_yaml(path, resolve_func=False) for path in (TASKS_DIR / f"long_{task}.yaml", published)
    )
    for name in ("dataset_path", "dataset_name", "test_split"):
        assert ours[name] == theirs[name]
    for name in ("until", "max_gen_toks", "do_sample"):
        assert ours["generation_kwargs"][name] == theirs["generation_kwargs"][name]
    function = lambda config: config["process_results"].rpartition(".")[2]
    assert function(ours) == function(theirs)
    assert ours["metric_list"] == theirs["metric_list"][:1]


def test_longbench_rows_of_its_authors_are_refused(tmp_path, monkeypatch):
    pytest.importorskip("rouge", reason="LongBench's scores need lm-eval[longbench]")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    row = {"input": "What was said?"} | LONG_ROWS["qmsum"]
    for name in ("question", "answer_prefix", "task", "max_new_tokens"):
        del row[name]
    publish(tmp_path / "Xnhyacinth" / "LongBench", {"qmsum": {"test": [row]}})
    message = (
        r"^the rows of LongBench have no question and no answer_prefix, but input, context, .*; "
        r"take Xnhyacinth/LongBench of the hub, not THUDM/LongBench, whose context has no "
    )
    manager = TaskManager(include_path=str(TASKS_DIR), include_defaults=False)
    with pytest.raises(ConfigError, match=message):
        load_tasks(manager, "long_qmsum", str(tmp_path))
