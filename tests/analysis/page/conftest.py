"""Two small models whose positions vary, and the live page in a thread."""

import contextlib
import dataclasses
import http.client
import json
import socket
import threading

import jax
import pytest
import uvicorn

from repo_jax.analysis import read
from repo_jax.analysis.page import server
from repo_jax.analysis.page.server import Served, create_app
from repo_jax.config import DecoderConfig, PositionConfig
from repo_jax.data import byte_tokenizer
from repo_jax.modeling import RePoLM, init_params

MAX_CHARACTERS, MAX_TOKENS, QUEUE = 120_000, 3500, 16


def served(name: str, seed: int, *kinds: str) -> Served:
    """An untrained model with f_phi large enough for z to vary."""
    config = DecoderConfig(
        vocab_size=257,
        d_model=32,
        n_layers=len(kinds),
        n_heads=2,
        d_ff=64,
        positions=PositionConfig(layers=kinds),
    )
    model = RePoLM(config)
    params = dict(init_params(model, jax.random.key(seed)))
    layers = dict(params["layers"])
    layers["repositioning"] = jax.tree.map(lambda p: 30 * p, layers["repositioning"])
    params["embedding"] = jax.tree.map(lambda p: 30 * p, params["embedding"])
    return Served(name, model, params | {"layers": layers}, byte_tokenizer())


@pytest.fixture(scope="session")
def models() -> list[Served]:
    return [
        served("small", 0, "rope", "repo", "nope", "repo"),
        served("other", 1, "repo", "rope", "repo"),
    ]


JSON = {"Content-Type": "application/json"}


def begun(port, text, model="small"):
    """A request under way: its connection and the response, of which nothing is read."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/api/read", json.dumps({"text": text, "model": model}), JSON)
    return connection, connection.getresponse()


def reading_of(model: Served, text: str):
    """What the page should show."""
    return read(model.model, model.params, model.tokenizer, text, name=model.name)


@dataclasses.dataclass
class Gate:
    """Holds back readings of texts that begin with `hold` while it is closed."""

    opened: threading.Event
    running: list[str]
    most: int = 0

    def read(self, model, params, tokenizer, text, **options):
        self.running.append(text)
        self.most = max(self.most, len(self.running))
        if text.startswith("hold"):
            assert self.opened.wait(60)
        if text.startswith("fail"):
            raise RuntimeError("out of memory\nand a long story")
        try:
            return read(model, params, tokenizer, text, **options)
        finally:
            self.running.remove(text)


@pytest.fixture
def gate(monkeypatch):
    gate = Gate(threading.Event(), [])
    monkeypatch.setattr(server, "read", gate.read)
    yield gate
    gate.opened.set()


@contextlib.contextmanager
def running(app):
    """The port on which an application answers."""
    listening = socket.create_server(("127.0.0.1", 0))
    running = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        running.should_exit = True
        thread.join()
        listening.close()


@pytest.fixture(scope="module")
def port(models):
    app = create_app(models, max_characters=MAX_CHARACTERS, max_tokens=MAX_TOKENS, queue=QUEUE)
    with running(app) as port:
        yield port
