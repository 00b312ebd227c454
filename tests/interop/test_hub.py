"""The Hugging Face client against a small server of our own, in a process of its own.

The client reads HF_ENDPOINT when it is imported, hence the process.
"""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("huggingface_hub")

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """One model, `owner/small`, with the revisions `main` and `step1`."""

    files: ClassVar[dict[str, bytes]] = {}
    requests: ClassVar[list[str]] = []
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.requests.append(f"{self.command} {self.path}")
        match urlsplit(unquote(self.path)).path.strip("/").split("/"):
            case ["api", "models", "owner", "small", "revision", "main" | "step1"]:
                self.send_json({"id": "owner/small", "sha": COMMIT, "siblings": []})
            case ["api", "models", "owner", "small", "tree", commit] if commit == COMMIT:
                entry = lambda name, data: {
                    "type": "file",
                    "path": name,
                    "size": len(data),
                    "oid": hashlib.sha1(data).hexdigest(),
                }
                self.send_json([entry(name, data) for name, data in self.files.items()])
            case ["owner", "small", "resolve", commit, name] if commit == COMMIT:
                data = self.files[name]
                self.send_bytes(data, ETag=f'"{hashlib.sha1(data).hexdigest()}"')
            case ["api", "models", "owner", "small", "revision", _]:
                self.refuse(404, "RevisionNotFound")
            case ["api", "models", "owner", "gated", *_]:
                self.refuse(403, "GatedRepo")
            case ["api", "models", "owner", "ill", *_]:
                self.refuse(400, "BadRequest")
            case _:
                self.refuse(404, "RepoNotFound")

    do_HEAD = do_GET

    def send_json(self, value):
        self.send_bytes(json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def refuse(self, status, code):
        self.send_bytes(b"{}", status, **{"X-Error-Code": code, "X-Error-Message": code})

    def send_bytes(self, data, status=200, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(golden_repo):
    Hub.files = {
        "config.json": (golden_repo / "config.json").read_bytes(),
        "model.safetensors": (golden_repo / "model.safetensors").read_bytes(),
        "tokenizer.json": b"{}",
        "pytorch_model.bin": b"never",
        "modeling.py": b"never",
        "original/model.safetensors": b"never",
    }
    Hub.requests = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


LOCATE = """
import json, sys
from repo_jax.errors import ConfigError
from repo_jax.interop import hub

for hub_id, revision in json.loads(sys.argv[1]):
    try:
        print(json.dumps(["folder", str(hub.locate(hub_id, revision))]))
    except ConfigError as error:
        print(json.dumps(["error", str(error)]))
"""


def python(endpoint, cache, *arguments, **environment):
    """What a new process of Python prints that knows this hub alone."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE_"))}
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**kept, **settings, **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def locate(endpoint, cache, *requests, **environment):
    """What each (hub id, revision) gives in a new process."""
    printed = python(endpoint, cache, "-c", LOCATE, json.dumps(requests), **environment)
    return [json.loads(line) for line in printed.splitlines()]


def test_a_model_comes_from_the_hub_and_then_from_its_cache(
    hub, golden_repo, tmp_path, assert_same
):
    from repo_jax.interop import from_pretrained

    [(kind, folder)] = locate(hub, tmp_path, ("owner/small", None))
    assert kind == "folder"
    assert {path.name for path in Path(folder).rglob("*")} == {
        *("config.json", "model.safetensors", "tokenizer.json")
    }
    assert not any("never" in request or ".bin" in request for request in Hub.requests)
    model, params = from_pretrained(folder)
    wanted, wanted_params = from_pretrained(golden_repo)
    assert model.config == wanted.config
    assert_same(params, wanted_params)

    # A branch that names the same commit downloads nothing again.
    Hub.requests.clear()
    assert locate(hub, tmp_path, ("owner/small", "step1")) == [["folder", folder]]
    assert not any("resolve" in request for request in Hub.requests)

    # Without a network the cache is enough.
    Hub.requests.clear()
    offline = locate(hub, tmp_path, ("owner/small", None), HF_HUB_OFFLINE="1")
    assert offline == [["folder", folder]]
    assert not Hub.requests


def test_shards_come_from_the_hub(hub, make_model, tmp_path, assert_same):
    from repo_jax.interop import from_pretrained, save_pretrained

    model, params = make_model()
    save_pretrained(tmp_path / "many", model, params, max_shard_bytes=30_000)
    Hub.files = {path.name: path.read_bytes() for path in (tmp_path / "many").iterdir()}
    shards = sorted(name for name in Hub.files if name.endswith(".safetensors"))
    assert len(shards) > 2

    options = ("--model", "owner/small", "--revision", "step1", "--out", str(tmp_path / "one"))
    python(hub, tmp_path / "hub", "-m", "repo_jax.convert", *options)
    asked = [request.rpartition("/")[2] for request in Hub.requests if "GET /owner" in request]
    assert sorted(asked) == sorted(Hub.files)  # each once
    assert [path.name for path in (tmp_path / "one").glob("model*")] == ["model.safetensors"]
    again, loaded = from_pretrained(tmp_path / "one")
    assert again.config.kinds == model.config.kinds
    assert_same(loaded, params)


def test_mistakes_are_one_sentence(hub, tmp_path):
    requests = [
        ("owner/none", None),
        ("owner/small", "step9"),
        ("owner/gated", None),
        ("owner/ill", None),
        ("owner/a--b", None),
    ]
    results = locate(hub, tmp_path, *requests)
    messages = [message for kind, message in results if kind == "error"]
    assert len(messages) == len(requests)
    assert "owner/none is neither a folder here nor a public model on the hub" in messages[0]
    assert "owner/small on the hub has no revision 'step9'" in messages[1]
    assert "owner/gated on the hub is gated" in messages[2]
    assert messages[3].startswith("owner/ill is neither")
    assert messages[3].endswith("the hub answered 400")
    assert "owner/a--b cannot be read from the hub" in messages[4]
    assert not any("\n" in message for message in messages)


@pytest.mark.parametrize("environment", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_no_network_and_no_cache(tmp_path, environment):
    closed = "http://127.0.0.1:9"
    [(kind, message)] = locate(closed, tmp_path, ("owner/small", None), **environment)
    assert kind == "error"
    assert message == (
        "owner/small is neither a folder here nor in the hub's cache, and the hub cannot be reached"
    )
