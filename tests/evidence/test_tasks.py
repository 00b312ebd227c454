"""Examples can be solved from their prompts, guessing gives what is said, nothing leaks."""

import collections
import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repo_jax.data import Tokenizer
from repo_jax.errors import ConfigError
from repo_jax.evidence.tasks import Examples, Graphs, Recall, Reversal, Tables, Text, base, score
from repo_jax.evidence.tasks.base import PAD

small = st.integers(1, 4)


@st.composite
def reversals(draw):
    shortest = draw(small)
    return Reversal(
        alphabet=draw(st.integers(2, 30)),
        shortest=shortest,
        longest=shortest + draw(small),
        end=draw(st.booleans()),
        test_lengths=(1, draw(st.integers(2, 12))),
        examples=6,
    )


@st.composite
def recalls(draw):
    needles, lone = draw(small), draw(st.integers(0, 4))
    return Recall(
        context=2 * needles + lone + draw(st.integers(0, 9)),
        factors=(1, draw(small)),
        needles=needles,
        asked=draw(st.integers(1, needles)),
        lone=lone,
        keys=needles + draw(small),
        values=needles + lone + draw(small),
        noise=draw(small),
        examples=6,
    )


@st.composite
def tables(draw):
    rows, columns, factor = draw(st.integers(2, 4)), draw(st.integers(2, 4)), draw(small)
    return Tables(
        rows=rows,
        columns=columns,
        questions=draw(small),
        factors=(1, factor),
        row_names=rows * factor + draw(small),
        column_names=columns + draw(small),
        numbers=rows * columns * factor + draw(small),
        examples=6,
    )


@st.composite
def graphs(draw):
    farthest, chords = draw(st.integers(2, 4)), draw(st.integers(0, 2))
    nodes = 2 * (farthest + chords + 1 + draw(small))
    return Graphs(
        nodes=nodes,
        questions=draw(small),
        factors=(1, 2),
        farthest=farthest,
        chords=chords,
        names=2 * nodes + draw(small),
        examples=6,
    )


any_task = st.one_of(reversals(), recalls(), tables(), graphs())
TASKS = (Reversal(), Reversal(end=True), Recall(), Tables(), Graphs())
each_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)


@settings(max_examples=60)
@given(task=any_task, seed=st.integers(0, 9), step=st.integers(0, 9))
def test_an_oracle_solves_every_example_from_its_prompt(task, seed, step):
    for examples in task.evaluation_sets().values():
        np.testing.assert_array_equal(task.oracle(examples.prompts()), examples.tokens)
    batch = task.training_batch(seed, step, 5)
    prompts = np.where(batch.answers, -1, batch.tokens)
    np.testing.assert_array_equal(task.oracle(prompts), batch.tokens)


@settings(max_examples=60)
@given(task=any_task)
def test_batches_have_the_shape_and_the_tokens_that_the_task_says(task):
    batch = task.training_batch(0, 0, 5)
    assert batch.tokens.shape == batch.answers.shape == (5, task.length)
    assert batch.tokens.dtype == np.int32
    assert len(set(task.symbols())) == task.vocab_size
    for examples in (batch, *task.evaluation_sets().values()):
        assert 0 <= examples.tokens.min() <= examples.tokens.max() < task.vocab_size
        assert examples.answers.any(1).all()
        # Padding is at the end and never asked for.
        padding = examples.tokens == PAD
        np.testing.assert_array_equal(padding, np.maximum.accumulate(padding, 1))
        assert not (padding & examples.answers).any()


@each_task
def test_a_batch_is_a_function_of_seed_and_step(task):
    one = task.training_batch(1, 2, 8)
    np.testing.assert_array_equal(one.tokens, task.training_batch(1, 2, 8).tokens)
    for other in (task.training_batch(1, 3, 8), task.training_batch(2, 2, 8)):
        assert not np.array_equal(one.tokens, other.tokens)


@each_task
def test_chance_is_what_draws_from_the_choices_get(task):
    rng = np.random.default_rng(0)
    for name, examples in task.evaluation_sets().items():
        n, answers = len(examples.tokens), examples.answers
        choices = examples.choices
        for row in range(n):
            assert set(examples.tokens[row][answers[row]]) <= set(choices[row]), name
            assert len(set(choices[row])) == choices.shape[1], name
        repeats = 20
        exact = tokens = 0.0
        for _ in range(repeats):
            drawn = rng.integers(choices.shape[1], size=examples.tokens.shape)
            found = score(np.take_along_axis(choices, drawn, 1), examples)
            exact, tokens = exact + found.exact / repeats, tokens + found.tokens / repeats
        for share, chance, draws in (
            (exact, examples.chance_exact, repeats * n),
            (tokens, examples.chance_tokens, repeats * answers.sum()),
        ):
            # Five standard deviations.
            assert abs(share - chance) <= 5 * math.sqrt(chance * (1 - chance) / draws), name


@each_task
def test_training_and_tests_are_drawn_with_different_keys(task, monkeypatch):
    keys, generator = set(), base._generator

    def recorded(*key):
        # A seed sequence is the same with zeros after it.
        keys.add(tuple(np.trim_zeros(key, "b")))
        return generator(*key)

    monkeypatch.setattr(base, "_generator", recorded)
    for seed in range(3):
        for step in range(50):
            task.training_batch(seed, step, 2)
    trained, keys = keys, set()
    for test_seed in range(5):
        dataclasses.replace(task, test_seed=test_seed, examples=2).evaluation_sets()
    assert trained
    assert keys
    assert not trained & keys


@each_task
def test_no_context_of_a_test_is_trained_on(task):
    """Contexts are what comes before the question; those long enough that chance makes no two
    alike."""
    questions = {Reversal: (2,), Recall: (2,), Tables: (3, 4), Graphs: (3, 4)}[type(task)]

    def contexts(tokens):
        ends = np.isin(tokens, questions).argmax(1)
        return {tuple(row[:end]) for row, end in zip(tokens.tolist(), ends, strict=True)}

    trained = set().union(*(contexts(task.training_batch(0, s, 64).tokens) for s in range(100)))
    for name, examples in task.evaluation_sets().items():
        if not (isinstance(task, Reversal) and examples.x <= 5):
            assert not trained & contexts(examples.tokens), name


@pytest.mark.parametrize("task", [Tables(questions=5), Graphs(questions=5)], ids=repr)
def test_tables_and_graphs_are_asked_several_questions_in_training_but_none_twice(task):
    batches = [task.training_batch(0, step, 20) for step in range(10)]  # of several sizes
    rows = [row for b in batches for row in zip(b.tokens, b.answers, strict=True)]
    counted = set()
    for tokens, answers in rows:
        marks = np.flatnonzero(np.isin(tokens, (3, 4)))
        length = marks[1] - marks[0]
        # Whether nodes are connected does not depend on their order.
        order = sorted if isinstance(task, Graphs) else tuple
        asked = [tuple(order(tokens[i + 1 : i + length - 1].tolist())) for i in marks]
        first = [asked.index(question) == i for i, question in enumerate(asked)]
        assert len(asked) == 5
        assert set(np.flatnonzero(answers)) == set(marks[first] + length - 1)
        counted.add(sum(first))
    assert 5 in counted
    assert len(counted) > 1
    for examples in task.evaluation_sets().values():
        assert set(examples.answers.sum(1)) == {1}


def test_reversal_is_never_trained_on_longer_sequences():
    task = Reversal(longest=6)
    for step in range(20):
        turn = (task.training_batch(0, step, 64).tokens == 2).argmax(1)
        assert set(turn - 1) == set(range(2, 7))


def test_recall_trains_on_all_kinds():
    task = Recall()
    answers = task.training_batch(0, 0, 400).answers.sum(1)
    # One of the four kinds asks for two values, the others ask twelve questions.
    assert set(answers) == {2, 12}
    assert abs((answers == 2).mean() - 0.25) < 0.11  # 5 standard deviations


def test_the_kinds_of_recall_differ_in_the_keys_of_the_context_and_in_what_is_asked():
    task = Recall(factors=(1,))
    # Keys of a context, how often each is there, and how many different ones are asked for.
    expected = {
        "single": ([1], 1, 1),
        "multi_key": ([1] * task.needles, 1, 1),
        "multi_value": ([1] * (task.needles - task.asked) + [task.asked], 1, task.asked),
        "multi_query": ([1] * task.needles, task.asked, task.asked),
    }
    for kind, (counts, keys_asked, values_asked) in expected.items():
        examples = task.evaluation_sets()[f"{kind}_{task.length}"]
        for tokens, answers in zip(examples.tokens, examples.answers, strict=True):
            end = tokens.tolist().index(2)
            is_key = (tokens >= 3) & (tokens < 3 + task.keys)
            found = collections.Counter(tokens[:end][is_key[:end]])
            assert sorted(found.values()) == counts, kind
            assert len(set(tokens[end:][is_key[end:]])) == keys_asked, kind
            assert len(set(tokens[answers])) == answers.sum() == values_asked, kind


@settings(max_examples=30)
@given(task=recalls())
def test_longer_recall_has_longer_rows_than_training_and_the_same_size_the_same_context(task):
    for examples in task.evaluation_sets().values():
        factor, length = examples.x // task.length, examples.tokens.shape[1]
        if factor > 1:
            assert length >= (factor - 0.1) * task.length
        else:
            ends = (examples.tokens == 2).argmax(1)
            assert set(ends) == {1 + task.context}
            assert length <= task.length


def test_values_of_one_key_are_asked_for_in_the_order_of_the_context():
    examples = Recall().evaluation_sets()["multi_value_101"]
    for tokens, answers in zip(examples.tokens, examples.answers, strict=True):
        asked = list(tokens[answers])
        context = list(tokens[: tokens.tolist().index(2)])
        assert [token for token in context if token in asked] == asked


def test_columns_come_in_any_order():
    task = Tables(column_names=4, columns=4)
    headers = {tuple(t[1:5]) for t in task.evaluation_sets()["lookup_6"].tokens}
    assert len(headers) == math.factorial(4)


def balanced(values, choices):
    counts = collections.Counter(values.tolist())
    n, share = len(values), 1 / choices
    bound = 5 * math.sqrt(n * share * (1 - share))
    return len(counts) == choices and all(abs(c - n * share) < bound for c in counts.values())


@pytest.mark.parametrize("factor", [1, 2])
def test_graph_answers_are_balanced_and_so_are_the_distances_of_connected_nodes(factor):
    task = Graphs(examples=4000)
    sets = task.evaluation_sets()
    nodes = factor * task.nodes
    connectivity, shortest = sets[f"connectivity_{nodes}"], sets[f"shortest_path_{nodes}"]
    assert balanced(connectivity.tokens[connectivity.answers], 2)
    assert balanced(shortest.tokens[shortest.answers], task.farthest)
    connected = connectivity.tokens[connectivity.tokens[:, -1] == 6]
    connected[:, -4] = 4  # asks how far apart they are
    assert balanced(task.oracle(connected)[:, -1], task.farthest)


@pytest.mark.parametrize("factor", [1, 2])
def test_the_edges_of_neither_node_tell_whether_they_are_connected(factor):
    task = Graphs(examples=20_000, factors=(factor,))
    tokens = task.evaluation_sets()[f"connectivity_{factor * task.nodes}"].tokens
    edges, asked, yes = (
        tokens[:, 1:-4].reshape(len(tokens), -1, 3),
        tokens[:, -3:-1],
        tokens[:, -1] == 6,
    )
    for end in asked.T:
        degrees = (edges[..., 1:] == end[:, None, None]).sum((1, 2))
        difference = degrees[yes].mean() - degrees[~yes].mean()
        error = math.sqrt(degrees[yes].var() / yes.sum() + degrees[~yes].var() / (~yes).sum())
        assert 5 * error < 0.1
        assert abs(difference) < 5 * error


def test_an_example_is_right_only_if_all_its_answers_are():
    tokens = np.array([[1, 5, 6, 0], [1, 7, 8, 9]])
    answers = np.array([[0, 1, 1, 0], [0, 1, 1, 1]], bool)
    predicted = np.array([[9, 5, 6, 9], [9, 7, 8, 8]])
    found = score(predicted, Examples(tokens, answers))
    assert (found.exact, found.tokens) == (0.5, 0.8)


def test_text_is_tested_on_documents_that_are_not_trained_on(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(40):
        letters = rng.choice(list("abcdefgh "), 400)
        (tmp_path / f"{i}.txt").write_text(f"{i:03}" + "".join(letters))
    task = Text(
        text=str(tmp_path),
        cache_dir=str(tmp_path / "cache"),
        context=16,
        factors=(1, 2),
        examples=4,
    )
    sets = task.evaluation_sets()
    one, two = sets["context_16"], sets["context_32"]
    np.testing.assert_array_equal(one.tokens.reshape(-1), two.tokens.reshape(-1))
    batch = task.training_batch(0, 0, 200)
    assert batch.tokens.shape == (200, 16)
    trained = {row.tobytes() for row in batch.tokens}
    trained |= {r.tobytes() for s in range(50) for r in task.training_batch(0, s, 200).tokens}
    assert not trained & {row.tobytes() for row in one.tokens}
    assert (one.chance_exact, one.chance_tokens) == (None, None)
    with pytest.raises(ConfigError, match=r"text\.examples is 4000; the held-out text has"):
        Text(text=str(tmp_path), cache_dir=str(tmp_path / "cache"), examples=4000).evaluation_sets()


@each_task
def test_examples_can_be_written_and_read_as_text(task, tmp_path):
    task.tokenizer().save(tmp_path / "tokenizer")
    tokens = task.training_batch(0, 0, 1).tokens[0]
    names = task.symbols()
    text = " ".join(names[token] for token in tokens)
    assert Tokenizer.load(tmp_path / "tokenizer").encode(text) == tokens.tolist()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Reversal(shortest=5, longest=4), "reversal.shortest is 5; it must be 1 to"),
        (lambda: Reversal(alphabet=1), "reversal.alphabet is 1; it must be at least 2"),
        (lambda: Recall(asked=5), r"recall.asked is 5; it must be 1 to recall.needles \(4\)"),
        (lambda: Recall(context=10), "recall.context is 10; .* take 16 tokens"),
        (lambda: Tables(row_names=10), "tables.row_names is 10; it must be 24 or more"),
        (lambda: Graphs(nodes=7), "graphs.nodes is 7; it must be even and at least 14"),
        (lambda: Graphs(names=20), "graphs.names is 20; there are graphs of 32 nodes"),
        (lambda: Text(context=1), "text.context is 1; it must be at least 2"),
        (lambda: Graphs(chords=-1), "graphs.chords is -1; it must be 0 or more"),
        *(
            (lambda task=task, option=option, value=value: task(**{option: value}), said)
            for task in (Reversal, Recall, Tables, Graphs, Text)
            for sizes in ["test_lengths" if task is Reversal else "factors"]
            for option, value, said in (
                (sizes, (), rf"{task.__name__.lower()}\.{sizes} is empty; give one or more"),
                (sizes, (2, 0), rf"\.{sizes} has 0; it must be 1 or more"),
                ("examples", 0, r"\.examples is 0; it must be 1 or more"),
            )
        ),
    ],
)
def test_impossible_difficulties_are_refused(make, said):
    with pytest.raises(ConfigError, match=said):
        make()
