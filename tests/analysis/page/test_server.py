"""The live page's server, asked over real sockets."""

import asyncio
import base64
import concurrent.futures
import dataclasses
import http.client
import json
import os
import re
import signal
import socket
import sys
import threading
import time

import numpy as np
import pytest

from repo_jax.analysis.page import listen, serve
from repo_jax.analysis.page.server import create_app
from repo_jax.errors import ConfigError, MissingPackageError
from tests.analysis.page.conftest import (
    JSON,
    MAX_CHARACTERS,
    MAX_TOKENS,
    begun,
    reading_of,
    running,
)

TEXT = {"text": "x", "model": "small"}


def ask(port, method="GET", path="/api/read", body=None, headers=JSON):
    """Status and content of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    return response.status, response.read()


def post(port, content, headers=JSON):
    return ask(port, "POST", body=json.dumps(content).encode(), headers=headers)


def events(port, text, model="small"):
    """What is said on the way to a reading."""
    status, content = post(port, {"text": text, "model": model})
    assert status == 200, content
    return [json.loads(line) for line in content.splitlines()]


def test_ten_at_once_get_their_own_positions(port, models, gate):
    gate.opened.set()
    texts = [f"def f{i}(x):\n    return x + {i}\n" * (i + 1) for i in range(10)]
    asked = [(text, models[i % 2]) for i, text in enumerate(texts)]
    with concurrent.futures.ThreadPoolExecutor(10) as threads:
        answers = list(threads.map(lambda one: events(port, one[0], one[1].name), asked))
    for (text, model), answer in zip(asked, answers, strict=True):
        reading = answer[-1]["reading"]
        expected = reading_of(model, text)
        learned = [kind == "repo" for kind in expected.kinds]
        positions = np.frombuffer(base64.b64decode(reading["positions"]), "<f4")
        np.testing.assert_array_equal(positions, expected.positions[learned].ravel())
        assert (reading["name"], reading["tokens"]) == (model.name, len(expected.ids))
    assert gate.most == 1


def test_those_who_wait_are_told_their_place(port, gate):
    _, first = begun(port, "hold")
    assert json.loads(first.readline()) == {"state": "running"}
    waiting = []
    for place in (1, 2):
        _, response = begun(port, f"text {place}")
        assert json.loads(response.readline()) == {"state": "queued", "place": place}
        waiting.append(response)
    gate.opened.set()
    states = [[json.loads(line)["state"] for line in response] for response in waiting]
    assert states == [["running", "done"], ["queued", "running", "done"]]


def test_who_hangs_up_leaves_the_queue(port, gate):
    _, first = begun(port, "hold")
    leaving, waiting = begun(port, "hold on")
    _, last = begun(port, "text")
    assert json.loads(last.readline())["place"] == 2
    waiting.close()
    leaving.close()
    assert json.loads(last.readline())["place"] == 1
    gate.opened.set()
    assert json.loads(last.read().splitlines()[-1])["state"] == "done"
    assert first.readline()


def test_a_full_queue_says_so(models, gate):
    with running(create_app(models, queue=2)) as port:
        held = [begun(port, "hold") for _ in range(2)]
        status, content = post(port, {"text": "x", "model": "small"})
        assert status == 503
        assert "try again" in json.loads(content)["error"]
        gate.opened.set()
        assert all(b"done" in response.read() for _, response in held)
        assert events(port, "x")[-1]["state"] == "done"


class Slow:
    """A tokenizer that holds back the first text it gets."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.begun, self.opened = threading.Event(), threading.Event()

    def encode_with_spans(self, text):
        if not self.begun.is_set():
            self.begun.set()
            assert self.opened.wait(60)
        return self.tokenizer.encode_with_spans(text)


@pytest.fixture
def slow(models):
    tokenizer = Slow(models[0].tokenizer)
    yield dataclasses.replace(models[0], tokenizer=tokenizer)
    tokenizer.opened.set()


@pytest.mark.parametrize("text", ["x", ""])
def test_a_text_has_its_place_while_its_tokens_are_found(slow, text):
    with (
        running(create_app([slow], queue=2)) as port,
        concurrent.futures.ThreadPoolExecutor(1) as threads,
    ):
        first = threads.submit(post, port, TEXT | {"text": text})
        assert slow.tokenizer.begun.wait(60)
        _, second = begun(port, "later")
        assert json.loads(second.readline()) == {"state": "queued", "place": 1}
        assert post(port, TEXT)[0] == 503
        slow.tokenizer.opened.set()
        assert first.result()[0] == (200 if text else 422)
        assert json.loads(second.read().splitlines()[-1])["state"] == "done"
        assert events(port, "x")[-1]["state"] == "done"


def test_who_hangs_up_while_sending_is_let_go(models):
    """Nothing is raised, which the server would log."""
    received = [
        {"type": "http.request", "body": b'{"text": ', "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive():
        return received.pop(0)

    async def send(message):
        pass

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/api/read", "headers": headers}
    asyncio.run(create_app(models)(scope, receive, send))
    assert received == []


def test_a_failure_is_told_and_the_next_is_read(port, gate):
    gate.opened.set()
    failed = events(port, "fail")[-1]
    assert failed == {"state": "failed", "error": "the text could not be read: out of memory"}
    gate.running.clear()
    assert events(port, "text")[-1]["state"] == "done"


BAD = {
    "not JSON": (400, b"{", "not JSON"),
    "too deep": (400, b"[" * 200_000, "not JSON"),
    "not UTF-8": (400, b'{"text": "\xff"}', "not JSON"),
    "no object": (422, b"[]", "an object"),
    "no text": (422, b'{"model": "small"}', "text must be given"),
    "text of another type": (422, b'{"text": 3, "model": "small"}', "text must be given"),
    "no model": (422, b'{"text": "x"}', "model must be given"),
    "unknown model": (404, b'{"text": "x", "model": "big"}', "there are small, other"),
    "no tokens": (422, b'{"text": "", "model": "small"}', "no tokens"),
    "no character": (422, rb'{"text": "\ud800", "model": "small"}', "surrogate"),
    "long text": (
        413,
        json.dumps({"text": "x" * (MAX_CHARACTERS + 1), "model": "small"}).encode(),
        "up to 120,000",
    ),
    "large request": (413, b" " * (13 * MAX_CHARACTERS + 10_000), "larger than"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_get_a_reason(port, name):
    status, body, words = BAD[name]
    answer, content = ask(port, "POST", body=body)
    assert answer == status
    assert words in json.loads(content)["error"]


def test_a_request_without_end_is_cut_off(port):
    sent = 0

    def endless():
        nonlocal sent
        while True:
            sent += 50_000
            yield b" " * 50_000

    try:
        status, content = ask(port, "POST", body=endless())
        assert status == 413
        assert "larger than" in json.loads(content)["error"]
    except ConnectionError:  # closed while more was being sent
        pass
    assert sent < 100_000_000  # what buffers between the two may hold


def test_other_paths_methods_and_types(port):
    for status, answer in (
        (404, ask(port, path="/nothing")),
        (405, ask(port, "GET")),
        (405, ask(port, "POST", path="/")),
        (415, post(port, TEXT, {"Content-Type": "text/plain"})),
    ):
        assert answer[0] == status
        assert json.loads(answer[1])["error"]


def test_pages_of_other_sites_are_kept_out(port):
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "[", ""):
        status, content = ask(port, path="/", headers={"Host": host})
        assert status == 403
        assert "does not answer to the name" in json.loads(content)["error"]
    for origin in ("https://evil.example", "null", f"http://127.0.0.1:{port + 1}"):
        status, content = post(port, TEXT, JSON | {"Origin": origin})
        assert status == 403
        assert "may not use" in json.loads(content)["error"]
    assert post(port, TEXT, JSON | {"Origin": f"http://127.0.0.1:{port}"})[0] == 200
    for name in ("localhost", "127.0.0.1", "[::1]"):
        assert ask(port, path="/api/models", headers={"Host": f"{name}:{port}"})[0] == 200


def test_any_name_will_do_where_none_is_demanded(models):
    with running(create_app(models, hosts=None)) as port:
        assert ask(port, path="/api/models", headers={"Host": "workstation"})[0] == 200


def test_headers(port):
    connection = http.client.HTTPConnection("127.0.0.1", port)
    for path in ("/", "/api/models", "/nothing"):
        connection.request("GET", path)
        response = connection.getresponse()
        response.read()
        headers = {name.lower(): value for name, value in response.getheaders()}
        assert headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert not any(name.startswith("access-control") for name in headers)


def test_a_long_text_is_read_from_its_beginning(port, models):
    text = "0123456789" * (MAX_TOKENS // 10 + 20)
    reading = events(port, text)[-1]["reading"]
    assert (reading["tokens"], reading["total"]) == (MAX_TOKENS, len(text))
    expected = reading_of(models[0], text[:MAX_TOKENS]).positions[[1, 3]]
    positions = np.frombuffer(base64.b64decode(reading["positions"]), "<f4")
    np.testing.assert_array_equal(positions, expected.ravel())


def test_a_port_in_use_is_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"--port {port} is in use on 127\.0\.0\.1"):
            listen(port=port)
    with pytest.raises(ConfigError, match="--port is 70000"):
        listen(port=70_000)
    with pytest.raises(ConfigError, match=r"--host 203\.0\.113\.1 --port 0 cannot"):
        listen("203.0.113.1", 0)


def test_models_that_do_not_go_together(models):
    with pytest.raises(ConfigError, match="at least one"):
        create_app([])
    with pytest.raises(ConfigError, match="2 models are named 'small'"):
        create_app([models[0], models[0]])


@pytest.mark.parametrize("package", ["plotly", "starlette", "uvicorn"])
def test_a_missing_package_is_named_first(models, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    for start in (lambda: listen(port=70_000), lambda: create_app(models)):
        with pytest.raises(MissingPackageError, match=rf"{package}.*repo-jax\[serve\]"):
            start()


def test_ctrl_c_ends_it(models, capfd):
    """serve returns, without a traceback, although a client is connected."""

    def interrupt():
        seen = ""
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)", seen)):
            time.sleep(0.05)
            seen += capfd.readouterr().out
        connected.append(http.client.HTTPConnection("127.0.0.1", int(found[1])))
        connected[0].request("GET", "/api/models")
        assert connected[0].getresponse().status == 200
        os.kill(os.getpid(), signal.SIGINT)

    connected = []
    thread = threading.Thread(target=interrupt)
    thread.start()
    serve(models, listen(port=0), host="127.0.0.1")
    thread.join()
    assert capfd.readouterr().err == ""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", connected[0].port))
