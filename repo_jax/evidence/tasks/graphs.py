"""Graphs as lists of edges: are two nodes connected, and how far apart are they."""

import dataclasses
from typing import ClassVar

import numpy as np

from repo_jax.errors import ConfigError
from repo_jax.evidence.tasks.base import (
    START,
    EvaluationSet,
    Examples,
    WordTask,
    check_positive,
    distinct,
    first_asked,
    padded,
    shuffled,
    test_rng,
    training_rng,
)

_EDGE, _CONNECTED, _DISTANCE, _NO, _YES, _FIRST = 2, 3, 4, 5, 6, 7

KINDS = ("connectivity", "shortest_path")


@dataclasses.dataclass(frozen=True)
class Graphs(WordTask):
    """`<edge> a b` for each edge, in any order and direction, then a question and its answer.

    A graph has two connected halves that are made alike: a path of `farthest + chords` edges,
    `chords` edges that cut a corner of it, and the other nodes, each tied to one before it. So
    there are pairs at every distance up to `farthest`, and nothing but the edges tells whether
    two nodes are connected.

    `connectivity`: `<connected> a b yes|no`, half of each, connected nodes being 1 to `farthest`
    apart as often. Where they are not connected, b is the second of a pair drawn by the same rule
    in the other half, so the number of edges of neither tells the answer. Less than a search
    still beats chance: to say yes to neighbours only is right in (`farthest` + 1) of
    2 `farthest` cases.

    `shortest_path`: `<distance> a b d`, each distance 1 to `farthest` as often.

    In training a graph is asked `questions` of one kind, of which those about a pair that was asked
    for before do not count; in the evaluation sets, one.

    Attributes:
      nodes: in training; even.
      factors: how many times more nodes the graphs of the evaluation sets have.
      farthest, chords, questions: see above.
      names: different tokens for nodes.
      examples: in each evaluation set.
      test_seed: of the evaluation sets.
    """

    nodes: int = 16
    factors: tuple[int, ...] = (1, 2)
    farthest: int = 4
    chords: int = 2
    questions: int = 8
    names: int = 64
    examples: int = 500
    test_seed: int = 0

    x_label: ClassVar[str] = "nodes"
    metric: ClassVar[str] = "exact"

    def __post_init__(self):
        object.__setattr__(self, "factors", tuple(self.factors))
        options = {"factors": self.factors, "questions": self.questions, "examples": self.examples}
        check_positive("graphs", **options)
        if self.chords < 0:
            raise ConfigError(f"graphs.chords is {self.chords}; it must be 0 or more")
        path = self.farthest + self.chords + 1
        if self.nodes % 2 or self.nodes < 2 * path:
            raise ConfigError(
                f"graphs.nodes is {self.nodes}; it must be even and at least {2 * path}, twice "
                f"the {path} nodes of a path of graphs.farthest + graphs.chords edges"
            )
        if self.farthest < 2:
            raise ConfigError(f"graphs.farthest is {self.farthest}; it must be at least 2")
        if self.names < self.nodes * max(self.factors):
            raise ConfigError(
                f"graphs.names is {self.names}; there are graphs of "
                f"{self.nodes * max(self.factors)} nodes"
            )

    @property
    def length(self) -> int:
        """Tokens of an example."""
        return 1 + 3 * (self.nodes - 2 + 2 * self.chords) + 4 * self.questions

    @property
    def trained_to(self) -> int:
        """Nodes of a graph in training."""
        return self.nodes

    def symbols(self) -> tuple[str, ...]:
        """Distances as numbers, and node7."""
        return (
            *("<pad>", "<start>", "<edge>", "<connected>", "<distance>", "no", "yes"),
            *(str(i + 1) for i in range(self.farthest)),
            *(f"node{i}" for i in range(self.names)),
        )

    def training_batch(self, seed: int, step: int, batch_size: int) -> Examples:
        """Rows of kinds drawn for each."""
        rng = training_rng(seed, step)
        distance = rng.random(batch_size) < 0.5
        return self._examples(rng, distance, self.nodes, self.questions)

    def evaluation_sets(self) -> dict[str, EvaluationSet]:
        """One for each kind and factor."""
        sets, answers = (
            {},
            {
                "connectivity": (_NO, _YES),
                "shortest_path": tuple(range(_FIRST, _FIRST + self.farthest)),
            },
        )
        for i, kind in enumerate(KINDS):
            for factor in self.factors:
                nodes = factor * self.nodes
                rng = test_rng(self.test_seed, i, nodes)
                made = self._examples(rng, np.full(self.examples, bool(i)), nodes, 1)
                choices = np.broadcast_to(
                    np.array(answers[kind], np.int32), (self.examples, len(answers[kind]))
                )
                sets[f"{kind}_{nodes}"] = EvaluationSet(
                    made.tokens, made.answers, nodes, kind, choices
                )
        return sets

    def oracle(self, prompts: np.ndarray) -> np.ndarray:
        """Searches breadth first."""
        out = prompts.copy()
        for row in out:
            neighbours: dict[int, set[int]] = {}
            for at in np.flatnonzero(row == _EDGE):
                a, b = row[at + 1], row[at + 2]
                neighbours.setdefault(a, set()).add(b)
                neighbours.setdefault(b, set()).add(a)
            for ask in np.flatnonzero((row == _CONNECTED) | (row == _DISTANCE)):
                start, goal = row[ask + 1], row[ask + 2]
                seen, edge, steps = {start}, {start}, 0
                while edge and goal not in edge:
                    edge = set().union(*(neighbours[node] for node in edge)) - seen
                    seen, steps = seen | edge, steps + 1
                if row[ask] == _CONNECTED:
                    row[ask + 3] = _YES if edge else _NO
                else:
                    row[ask + 3] = _FIRST + steps - 1
        return out

    def _examples(
        self, rng: np.random.Generator, distance: np.ndarray, nodes: int, questions: int
    ) -> Examples:
        """Examples [n, T]; `distance`, bool [n], says which ask for it."""
        n, half = len(distance), nodes // 2
        each = np.arange(n)
        edges = self._half(rng, n, half)
        other = self._half(rng, n, half)
        steps, other_steps = self._steps(edges, half), self._steps(other, half)

        def pair(steps: np.ndarray, wanted: np.ndarray) -> np.ndarray:
            fits = (steps == wanted[:, None, None]).reshape(n, -1)
            return np.stack(np.divmod((rng.random(fits.shape) * fits).argmax(1), half))

        def question() -> list[np.ndarray]:
            wanted = rng.integers(1, self.farthest, n, endpoint=True)
            connected = distance | (rng.random(n) < 0.5)
            first = rng.random(n) < 0.5  # a is of the first half
            in_first, in_other = pair(steps, wanted), half + pair(other_steps, wanted)
            a, same = np.where(first, in_first, in_other)
            b = np.where(connected, same, np.where(first, in_other, in_first)[1])
            answer = np.where(connected, _YES, _NO)
            return [a, b, np.where(distance, _FIRST + wanted - 1, answer)]

        a, b, answer = np.stack([question() for _ in range(questions)], 2)  # [n, questions]
        edges = np.concatenate([edges, half + other], 1)
        names = _FIRST + self.farthest + distinct(rng, n, nodes, self.names)
        named = names[each[:, None, None], edges]
        (named,) = shuffled(rng, named)
        flip = rng.random(named.shape[:2])[..., None] < 0.5
        named = np.where(flip, named[..., ::-1], named)
        lines = np.concatenate([np.full((*named.shape[:2], 1), _EDGE), named], 2).reshape(n, -1)
        mark = np.broadcast_to(np.where(distance, _DISTANCE, _CONNECTED)[:, None], answer.shape)
        named = (names[each[:, None], node] for node in (a, b))
        ask = np.stack([mark, *named, answer], 2).reshape(n, -1)
        tokens = np.concatenate([np.full((n, 1), START), lines, ask], 1)
        answers = np.zeros(tokens.shape, bool)
        answers[:, lines.shape[1] + 4 :: 4] = first_asked(np.minimum(a, b), np.maximum(a, b))
        return padded(tokens, answers, tokens.shape[1])

    def _steps(self, edges: np.ndarray, size: int) -> np.ndarray:
        """Steps from each node to each, int [n, size, size]; `farthest` + 1 if there are more."""
        adjacent = np.zeros((len(edges), size, size), bool)
        adjacent[np.arange(len(edges))[:, None], edges[..., 0], edges[..., 1]] = True
        adjacent |= adjacent.transpose(0, 2, 1)
        steps = np.full(adjacent.shape, self.farthest + 1)
        reached = np.broadcast_to(np.eye(size, dtype=bool), steps.shape)
        for d in range(self.farthest + 1):
            steps = np.where(reached & (steps > d), d, steps)
            # float32 products are fast, and exact for such small counts.
            reached = reached.astype(np.float32) @ adjacent.astype(np.float32) > 0
        return steps

    def _half(self, rng: np.random.Generator, n: int, size: int) -> np.ndarray:
        """Edges of a connected graph: int [n, size - 1 + chords, 2]."""
        path = self.farthest + self.chords
        child = np.arange(1, size)
        parent = np.where(child <= path, child - 1, (rng.random((n, size - 1)) * child).astype(int))
        tree = np.stack([np.broadcast_to(child[None], parent.shape), parent], 2)
        # A chord saves one step of the path, whose ends so stay `farthest` apart or more.
        corner = distinct(rng, n, self.chords, path - 1)
        return np.concatenate([tree, np.stack([corner, corner + 2], 2)], 1)
