"""The page live: a small server that reads texts, one at a time, in order of arrival."""

import asyncio
import contextlib
import dataclasses
import errno
import functools
import gzip
import importlib.util
import json
import logging
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NoReturn
from urllib.parse import urlsplit

from repo_jax.analysis.page.build import check_names, payload, render
from repo_jax.analysis.reading import read
from repo_jax.data import Tokenizer
from repo_jax.errors import ConfigError, MissingPackageError
from repo_jax.modeling import RePoLM

_log = logging.getLogger(__name__)
_LOCAL = ("localhost", "127.0.0.1", "::1")


@dataclasses.dataclass(frozen=True)
class Served:
    """A model that the page offers.

    Attributes:
      name: for readers and links.
      model, params: as `from_pretrained` returns them.
      tokenizer: whose ids the model knows.
    """

    name: str
    model: RePoLM
    params: Any
    tokenizer: Tokenizer


def listen(host: str = "127.0.0.1", port: int = 8000) -> socket.socket:
    """Takes the port for `serve`; requests wait until that answers.

    Args:
      host: whom to listen to. This machine's own address (the default) cannot be reached from
        elsewhere; any other can, and there is no password.
      port: 0 takes a free one.

    Raises:
      ConfigError: nothing can listen there.
      MissingPackageError: a package that `serve` needs is not installed.
    """
    _check_packages()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OverflowError:
        raise ConfigError(f"--port is {port}; it must be 0 to 65535") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"--port {port} is in use on {host}; give another") from None
        raise ConfigError(
            f"--host {host} --port {port} cannot be listened on: {error.strerror}"
        ) from None


def _check_packages() -> None:
    for package in ("plotly", "starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise MissingPackageError(package, "the live page", "serve")


def serve(
    models: Sequence[Served],
    listening: socket.socket,
    *,
    host: str,
    max_characters: int = 200_000,
    max_tokens: int = 20_000,
    queue: int = 32,
) -> None:
    """Serves the page until Ctrl-C; a reading under way is finished first.

    Args:
      models: at least one, of different names.
      listening: from `listen`; closed at the end.
      host: as given to `listen`. On this machine's own address only requests that ask for it by
        that name are answered.
      max_characters, max_tokens, queue: as in `create_app`.

    Raises:
      ConfigError: the models do not go together.
      MissingPackageError: starlette, uvicorn or plotly is not installed.
    """
    hosts = _LOCAL if host in _LOCAL else None
    with listening:
        app = create_app(
            models, max_characters=max_characters, max_tokens=max_tokens, queue=queue, hosts=hosts
        )
        import uvicorn

        shown = f"[{host}]" if ":" in host else host
        port = listening.getsockname()[1]
        print(f"serving on http://{shown}:{port} (Ctrl-C ends it)", flush=True)
        if hosts is None:
            print("anyone who can reach this address can use it", flush=True)
        settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
        # uvicorn raises the signal again once all is closed.
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(settings).run(sockets=[listening])


def create_app(
    models: Sequence[Served],
    *,
    max_characters: int = 200_000,
    max_tokens: int = 20_000,
    queue: int = 32,
    hosts: Sequence[str] | None = _LOCAL,
):
    """The ASGI application.

    `GET /` is the page and `GET /api/models` what it offers. `POST /api/read` takes
    `{"text": ..., "model": ...}` and answers with lines of JSON as things happen:
    `{"state": "queued", "place": 2}`, `{"state": "running"}`, and at the end
    `{"state": "done", "reading": ...}` or `{"state": "failed", "error": ...}`. A request that
    cannot be answered gets a 4xx or 503 with `{"error": a sentence}`. Whoever hangs up leaves
    the queue.

    Args:
      models: at least one, of different names.
      max_characters: of a text; longer ones are refused.
      max_tokens: a text's tokens beyond these are not read.
      queue: how many requests may wait or run.
      hosts: names by which requests may call this server; None: any.

    Raises:
      ConfigError: the models do not go together.
      MissingPackageError: starlette, uvicorn or plotly is not installed.
    """
    _check_packages()
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.routing import Route

    if not models:
        raise ConfigError("there are no models to serve; give at least one")
    check_names([served.name for served in models])
    handlers = _Handlers(models, max_characters, max_tokens, _Turns(queue))
    app = Starlette(
        routes=[
            Route("/", handlers.page),
            Route("/api/models", handlers.models),
            Route("/api/read", handlers.read, methods=["POST"]),
        ],
        exception_handlers={
            HTTPException: _refusal,
            ClientDisconnect: _goodbye,
            Exception: _failure,
        },
    )
    return _Guard(app, hosts)


class _Turns:
    """Whose turn it is: one at a time, in order of arrival."""

    def __init__(self, most: int):
        self._most = most
        self._moved: dict[object, asyncio.Event] = {}  # by ticket, in order

    def join(self) -> object | None:
        """A ticket; None where the queue is full."""
        if len(self._moved) >= self._most:
            return None
        ticket = object()
        self._moved[ticket] = asyncio.Event()
        return ticket

    def leave(self, ticket: object) -> None:
        del self._moved[ticket]
        for moved in self._moved.values():
            moved.set()

    async def places(self, ticket: object) -> AsyncIterator[int]:
        """How many are before it, each time that changes, until none is."""
        moved = self._moved[ticket]
        while place := list(self._moved).index(ticket):
            yield place
            await moved.wait()
            moved.clear()


class _Handlers:
    """What answers each route."""

    def __init__(
        self, models: Sequence[Served], max_characters: int, max_tokens: int, turns: _Turns
    ):
        self._models = {served.name: served for served in models}
        self._max_characters = max_characters
        self._max_tokens = max_tokens
        self._turns = turns
        self._page = gzip.compress(render({"live": True}, connect="'self'").encode())

    async def page(self, request):
        from starlette.responses import Response

        if "gzip" in request.headers.get("accept-encoding", ""):
            headers = {"content-encoding": "gzip"}
            return Response(self._page, media_type="text/html", headers=headers)
        return Response(gzip.decompress(self._page), media_type="text/html")

    async def models(self, request):
        from starlette.responses import JSONResponse

        models = [
            {"name": name, "kinds": served.model.config.kinds, "heads": served.model.config.n_heads}
            for name, served in self._models.items()
        ]
        limits = {"max_characters": self._max_characters, "max_tokens": self._max_tokens}
        return JSONResponse({"models": models, **limits})

    async def read(self, request):
        from starlette.concurrency import run_in_threadpool

        text, served = self._asked(await self._body(request))
        ticket = self._turns.join()
        if ticket is None:
            _refuse(503, "too many texts wait to be read; try again in a while")
        try:
            text, total = await run_in_threadpool(self._beginning, text, served)
        except BaseException:
            self._turns.leave(ticket)
            raise
        work = functools.partial(self._result, text, total, served)
        return _streaming(self._answer(ticket, work), lambda: self._turns.leave(ticket))

    async def _body(self, request) -> bytes:
        if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
            _refuse(415, "the request must be application/json")
        # JSON may write a character as two escapes of six bytes each.
        most, body = 12 * self._max_characters + 10_000, bytearray()
        async for part in request.stream():
            body += part
            if len(body) > most:
                # Without a length there may be no end, and what comes would go on being read.
                endless = "content-length" not in request.headers
                headers = {"Connection": "close"} if endless else None
                _refuse(413, f"the request is larger than {most:,} bytes", headers)
        return bytes(body)

    def _asked(self, body: bytes) -> tuple[str, Served]:
        try:
            asked = json.loads(body)
        except (ValueError, RecursionError):
            _refuse(400, "the request is not JSON")
        if not isinstance(asked, dict):
            _refuse(422, "the request must be an object with text and model")
        for name in ("text", "model"):
            if not isinstance(asked.get(name), str):
                _refuse(422, f"{name} must be given, as a string")
        text, model = asked["text"], asked["model"]
        if model not in self._models:
            _refuse(404, f"there is no model {model[:100]!r}; there are {', '.join(self._models)}")
        if len(text) > self._max_characters:
            _refuse(
                413,
                f"the text has {len(text):,} characters; this server reads up to "
                f"{self._max_characters:,}",
            )
        try:
            text.encode()
        except UnicodeEncodeError:
            _refuse(422, "the text has half of a surrogate pair, which is no character")
        return text, self._models[model]

    def _beginning(self, text: str, served: Served) -> tuple[str, int]:
        """As much of a text as is read, and how many tokens all of it has."""
        ids, spans = served.tokenizer.encode_with_spans(text)
        if not len(ids):
            _refuse(422, "the text has no tokens; it must have at least one")
        return text[: spans[: self._max_tokens, 1].max()], len(ids)

    async def _answer(self, ticket: object, work: Callable[[], bytes]) -> AsyncIterator[bytes]:
        from starlette.concurrency import run_in_threadpool

        async for place in self._turns.places(ticket):
            yield _line({"state": "queued", "place": place})
        yield _line({"state": "running"})
        # Not abandoned when the client hangs up, so that never two run at once.
        yield await run_in_threadpool(work)

    def _result(self, text: str, total: int, served: Served) -> bytes:
        try:
            reading = read(served.model, served.params, served.tokenizer, text, name=served.name)
            shown = payload(reading, self._max_tokens) | {"total": total}
            return _line({"state": "done", "reading": shown})
        except Exception as error:
            _log.exception("%s could not read a text of %d characters", served.name, len(text))
            reason = str(error).partition("\n")[0] or type(error).__name__
            return _line({"state": "failed", "error": f"the text could not be read: {reason}"})


def _line(event: dict[str, Any]) -> bytes:
    return json.dumps(event).encode() + b"\n"


def _streaming(lines: AsyncIterator[bytes], finish: Callable[[], None]):
    """A response of lines, after which, however it ends, `finish` is called."""
    from starlette.responses import StreamingResponse

    class Response(StreamingResponse):
        async def __call__(self, scope, receive, send):
            try:
                await super().__call__(scope, receive, send)
            finally:
                finish()

    return Response(lines, media_type="application/x-ndjson")


def _refuse(status: int, sentence: str, headers: dict[str, str] | None = None) -> NoReturn:
    from starlette.exceptions import HTTPException

    raise HTTPException(status, sentence, headers)


def _refusal(request, error):
    from starlette.responses import JSONResponse

    sentences = {
        "Not Found": f"there is nothing at {request.url.path[:100]}",
        "Method Not Allowed": f"{request.method} is not answered here",
    }
    sentence = sentences.get(error.detail, error.detail)
    return JSONResponse({"error": sentence}, error.status_code, headers=error.headers)


def _goodbye(request, error):
    from starlette.responses import Response

    return Response(status_code=400)  # sent to nobody


def _failure(request, error):
    from starlette.responses import JSONResponse

    return JSONResponse({"error": "the server failed; its log says why"}, 500)


class _Guard:
    """Refuses requests that other sites' pages cause, and says what this page may do.

    A name of another site may be made to lead to this machine, so the name asked for is
    checked; a page of another site may send forms here, so the origin is.
    """

    def __init__(self, app, hosts: Sequence[str] | None):
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def guarded(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        reason = self._reason(scope)
        if reason is None:
            return await self._app(scope, receive, guarded)
        from starlette.responses import JSONResponse

        await JSONResponse({"error": reason}, 403)(scope, receive, guarded)

    def _reason(self, scope) -> str | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if self._hosts is not None and _hostname(host) not in self._hosts:
            return f"this server does not answer to the name {host[:100]!r}"
        if scope["method"] == "POST" and origin not in (None, f"http://{host}", f"https://{host}"):
            return f"pages of {origin[:100]} may not use this server"
        return None


def _hostname(host: str) -> str | None:
    """The name in a Host header, without the port."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


# The page's own policy is in the page; this adds what only a header can say.
_HEADERS = [
    (b"content-security-policy", b"frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]
