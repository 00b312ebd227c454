"""How long data are on the way, where it can be worked out by hand."""

import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from repo_jax import hardware
from repo_jax.planning.cost import Collective
from repo_jax.planning.hlo import Shape
from repo_jax.planning.links import Links

V5E, V5P, H200 = map(hardware.chip, ("v5e", "v5p", "h200"))
SIZE = 4_000_000


def grid(chip: hardware.Chip, lengths) -> Links:
    """A topology, its devices in row-major order."""
    return Links(chip, tuple(itertools.product(*map(range, lengths))))


def collective(kind: str, groups) -> Collective:
    return Collective(kind, (Shape("f32", (SIZE // 4,)),), groups, False, "")


def all_of(links: Links):
    return (tuple(range(len(links.coordinates))),)


@pytest.mark.parametrize(
    ("chip", "lengths", "links"),
    [
        (V5E, (4, 4), 1 + 1),  # lines: the device at an end has one link along each axis
        (V5E, (8, 16), 1 + 2),  # only 16 chips close a ring
        (V5E, (16, 16), 2 + 2),
        (V5P, (2, 2, 4), 1 + 1 + 1),
        (V5P, (4, 4, 4), 2 + 2 + 2),
    ],
)
def test_a_gather_uses_the_links_of_every_axis(chip, lengths, links):
    between = grid(chip, lengths)
    n = np.prod(lengths)
    seconds = between.seconds(collective("all-gather", all_of(between)))
    assert seconds == pytest.approx(SIZE * (n - 1) / n / (links * chip.link))


def test_an_all_reduce_takes_twice_a_gather():
    between = grid(V5E, (4, 4))
    once, twice = (
        between.seconds(collective(kind, all_of(between))) for kind in ("all-gather", "all-reduce")
    )
    assert twice == 2 * once


def test_a_group_along_one_axis_uses_that_axis_alone():
    between = grid(V5E, (4, 4))
    rows = tuple(tuple(range(4 * i, 4 * i + 4)) for i in range(4))
    seconds = between.seconds(collective("all-gather", rows))
    assert seconds == pytest.approx(SIZE * 3 / 4 / V5E.link)


@hypothesis.given(st.integers(1, 8))
def test_a_shift_along_a_ring_takes_as_many_turns_as_it_is_long(shift):
    between = grid(V5E, (16, 1))
    pairs = tuple((i, (i + shift) % 16) for i in range(16))
    seconds = between.seconds(collective("collective-permute", pairs))
    # Half way round both ways are shortest; all go the same one.
    assert seconds == pytest.approx(shift * SIZE / V5E.link)


def test_a_shift_along_a_line_goes_back_over_all_of_it_besides():
    between = grid(V5E, (4, 1))
    pairs = tuple((i, (i + 1) % 4) for i in range(4))
    # The other direction of each link is free for the way back.
    assert between.seconds(collective("collective-permute", pairs)) == SIZE / V5E.link


def test_gpus_of_a_machine_are_nearer_than_those_of_two():
    between = Links(H200, tuple(divmod(i, 8) for i in range(16)))
    inside = tuple(tuple(range(8 * i, 8 * i + 8)) for i in range(2))
    across = tuple((i, i + 8) for i in range(8))
    gather = lambda groups: between.seconds(collective("all-gather", groups))
    assert gather(inside) == pytest.approx(SIZE * 7 / 8 / H200.link)
    assert gather(across) == pytest.approx(SIZE / 2 / H200.network)
    # Eight GPUs leave a machine side by side.
    assert gather(all_of(between)) == pytest.approx(SIZE * 15 / 16 / (8 * H200.network))


def test_one_device_waits_for_nothing():
    between = grid(V5E, (1, 1))
    assert between.seconds(collective("all-gather", ((0,),))) == 0.0
