"""The page as a file: what is in it, and what is refused."""

import base64
import hashlib
import json
import re
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repo_jax.analysis import Reading
from repo_jax.analysis.page import write_page
from repo_jax.analysis.page.build import payload
from repo_jax.data import byte_tokenizer
from repo_jax.errors import ConfigError, MissingPackageError


def reading(text="some text", name="a", kinds=("rope", "nope", "repo", "repo"), heads=2):
    ids, spans = byte_tokenizer().encode_with_spans(text)
    positions = np.random.default_rng(0).normal(size=(len(kinds), heads, len(ids)))
    return Reading(name, text, ids, spans, kinds, positions.astype(np.float32))


def decoded(base64_bytes, dtype):
    return np.frombuffer(base64.b64decode(base64_bytes), dtype)


@given(st.text(min_size=1))
def test_spans_count_as_javascript_does(text):
    of = reading(text)
    spans = decoded(payload(of, 1000)["spans"], "<i4").reshape(-1, 2)
    units = text.encode("utf-16-le")
    pieces = [units[2 * start : 2 * end].decode("utf-16-le") for start, end in spans]
    assert pieces == of.pieces()[:1000]


def test_learned_positions_are_kept_exactly_up_to_the_limit():
    of = reading("a text of some length")
    sent = payload(of, 7)
    assert (sent["tokens"], sent["total"]) == (7, len(of.ids))
    positions = decoded(sent["positions"], "<f4").reshape(2, 2, 7)
    np.testing.assert_array_equal(positions, of.positions[2:, :, :7])


def test_a_page_has_its_data_and_runs_its_own_scripts_only(tmp_path):
    text = "</script><script>alert(1)</script><!-- <b>"
    write_page(tmp_path / "page.html", [reading(text)])
    page = (tmp_path / "page.html").read_text()
    scripts = re.findall(r"<script( [^>]*)?>(.*?)</script>", page, re.DOTALL)
    data, *programs = [content for _, content in scripts]
    assert "<" not in data
    assert json.loads(data)["text"] == text
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    allowed = re.findall(r"'sha256-([^']*)'", policy)
    hashes = [hashlib.sha256(script.encode()).digest() for script in programs]
    assert [base64.b64decode(hash) for hash in allowed] == hashes
    assert "default-src 'none'" in policy
    assert "connect-src 'none'" in policy


def test_what_does_not_go_together_is_refused(tmp_path):
    page = tmp_path / "page.html"
    with pytest.raises(ConfigError, match="at least one"):
        write_page(page, [])
    with pytest.raises(ConfigError, match="'b' has read another text than 'a'"):
        write_page(page, [reading(), reading("another", name="b")])
    with pytest.raises(ConfigError, match="2 models are named 'a'"):
        write_page(page, [reading(), reading()])
    with pytest.raises(ConfigError, match="cannot be written"):
        write_page(tmp_path / "nowhere" / "page.html", [reading()])
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_not_overwritten(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("mine")
    with pytest.raises(ConfigError, match="already exists"):
        write_page(page, [reading()])
    assert page.read_text() == "mine"


def test_plotly_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(MissingPackageError, match=r"repo-jax\[plots\]"):
        write_page(tmp_path / "page.html", [reading()])
