"""An object store that speaks as much of S3 as reading needs, on this machine."""

import contextlib
import http.server
import threading
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


class S3(http.server.ThreadingHTTPServer):
    """Serves the folders in `root` as buckets.

    Attributes:
      ranges: of each request for an object, (key, first byte, last byte).
      failing: HTTP statuses that answer the next requests for objects, instead of the object;
        with 200 comes the object cut short.
      gate: what each request for an object waits at, if there is one.
    """

    daemon_threads = True

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.ranges: list[tuple[str, int, int]] = []
        self.failing: list[int] = []
        self.gate: threading.Barrier | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self._object(send_body=False)

    def do_GET(self):
        query = parse_qs(urlsplit(self.path).query)
        if "list-type" in query:
            self._list(query.get("prefix", [""])[0])
        else:
            self._object(send_body=True)

    def _file(self) -> Path:
        return self.server.root / unquote(urlsplit(self.path).path).strip("/")

    def _answer(self, status: int, body: bytes = b"", **headers):
        self.send_response(status)
        self.send_header("Content-Length", headers.pop("length", len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def _list(self, prefix: str):
        bucket = self._file()
        names = sorted(str(p.relative_to(bucket)) for p in bucket.rglob("*") if p.is_file())
        contents = "".join(
            f"<Contents><Key>{escape(name)}</Key><Size>{(bucket / name).stat().st_size}</Size>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for name in names
            if name.startswith(prefix)
        )
        truncated = "<IsTruncated>false</IsTruncated>"
        body = f"<ListBucketResult>{truncated}{contents}</ListBucketResult>".encode()
        self._answer(200, body, Content_Type="application/xml")

    def _object(self, send_body: bool):
        file = self._file()
        if not file.is_file():
            self._answer(404)
            return
        size = file.stat().st_size
        first, last = 0, size - 1
        if "Range" in self.headers:
            asked = self.headers["Range"].removeprefix("bytes=").split("-")
            first, last = int(asked[0]), min(int(asked[1]), last)
        if not send_body:
            self._answer(200, length=size, Last_Modified="Thu, 01 Jan 2026 00:00:00 GMT")
            return
        self.server.ranges.append((file.name, first, last))
        if self.server.gate is not None:
            self.server.gate.wait()
        body = file.read_bytes()[first : last + 1]
        if self.server.failing:
            status = self.server.failing.pop()
            self._answer(status, body[:-1] if status == 200 else b"")
        else:
            self._answer(206, body, Content_Range=f"bytes {first}-{last}/{size}")


@contextlib.contextmanager
def serve(root: Path):
    """An `S3` that runs until the end of the block."""
    with S3(root) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
