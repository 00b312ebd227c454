"""Which implementation runs."""

import warnings

import pytest

from pallas_kernels import dispatch


def cannot():
    raise NotImplementedError("not on Sundays")


ALL = {"best": cannot, "slow": lambda: "slow", "named only": lambda: "named"}


def run(name, order=("best", "slow")):
    return dispatch.first_able(name, order, ALL, lambda implementation: implementation())


def test_automatic_order_falls_back_and_says_why_once(monkeypatch):
    monkeypatch.setattr(dispatch, "_said", set())
    with pytest.warns(UserWarning, match="best cannot, slow instead: not on Sundays"):
        assert run(None) == "slow"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(None) == "slow"


def test_a_named_one_runs_or_raises():
    assert run("named only") == "named"
    with pytest.raises(NotImplementedError, match="not on Sundays"):
        run("best")
    with pytest.raises(ValueError, match="'fast' is unknown; known: best, slow, named only"):
        run("fast")


def test_nothing_left_says_all_reasons():
    with pytest.raises(NotImplementedError, match="best: not on Sundays"):
        run(None, order=("best",))


def test_mistakes_are_not_fallen_back_from():
    def mistaken():
        raise ValueError("no such shape")

    with pytest.raises(ValueError, match="no such shape"):
        dispatch.first_able(None, ("a", "b"), {"a": mistaken, "b": cannot}, lambda f: f())
