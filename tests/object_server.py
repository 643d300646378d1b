"""An S3 server in this process (moto's), behind a door that loses replies, fails and forgets."""

from __future__ import annotations

import io
import re
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

Fault = Literal["lost", "done, then 500", "500", "409", "501", "torn", "other etag"]
"""`lost`: done, but the connection ends without a reply. `torn`: the last byte of the body is missing."""

_ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>made up</Message></Error>"
_CODES = {
    "500": ("500 Internal Server Error", "InternalError"),
    "409": ("409 Conflict", "ConditionalRequestConflict"),
    "501": ("501 Not Implemented", "NotImplemented"),
}
Start = Callable[..., Any]


@contextmanager
def serving(bucket: str, *, secret: str = "secret", attempts: int = 2) -> Iterator[ObjectServer]:
    """A server with one empty bucket, which everything that opens `s3://` meanwhile asks."""
    s3fs = pytest.importorskip("s3fs")
    server = ObjectServer()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", server.url)
            patch.setenv("AWS_ACCESS_KEY_ID", "somebody")
            patch.setenv("AWS_SECRET_ACCESS_KEY", secret)
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            patch.setenv("AWS_MAX_ATTEMPTS", str(attempts))
            s3fs.S3FileSystem.clear_instance_cache()
            s3fs.S3FileSystem().mkdir(bucket)
            yield server
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.close()


class ObjectServer:
    """Empty at first, and alone in its process, for what moto holds is global. Serves until closed; `faults`
    are dealt to the next requests that match, in order."""

    def __init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._serve, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._lock = threading.Lock()
        self._faults: list[tuple[str, re.Pattern[str], Fault]] = []
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.ignores_conditions = False
        self.requests: list[tuple[str, str]] = []
        """(method, path) of everything asked."""
        self._thread.start()
        urllib.request.urlopen(f"{self.url}/moto-api/reset", data=b"").close()
        self.requests.clear()

    def deal(self, fault: Fault, *, method: str = "PUT", path: str = "", times: int = 1) -> None:
        """The next `times` requests with `method` whose path matches `path` meet `fault`."""
        self._faults += [(method, re.compile(path), fault)] * times

    def reset(self) -> int:
        """Behave again; how many faults nobody met."""
        left = len(self._faults)
        self._faults.clear()
        self.requests.clear()
        self.ignores_conditions = False
        return left

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _serve(self, environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        fault = self._fault(method, path)
        if self.ignores_conditions:
            environ.pop("HTTP_IF_NONE_MATCH", None)
        if fault in _CODES:
            status, code = _CODES[fault]
            return _answer(start, status, _ERROR.format(code=code))
        if fault == "torn":
            size = int(environ["CONTENT_LENGTH"]) - 1
            environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(size + 1)[:size])
            environ["CONTENT_LENGTH"] = str(size)
        if fault == "other etag":
            return self._app(environ, _with_etag(start))
        body = self._app(environ, start if fault is None else lambda *_: None)
        if fault == "done, then 500":
            return _answer(start, _CODES["500"][0], _ERROR.format(code="InternalError"))
        if fault == "lost":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            start("200 OK", [])
            return []
        if fault == "torn":
            return _answer(start, "200 OK", "")
        return body

    def _fault(self, method: str, path: str) -> Fault | None:
        with self._lock:
            self.requests.append((method, path))
            for position, (its_method, its_path, fault) in enumerate(self._faults):
                if its_method == method and its_path.search(path):
                    del self._faults[position]
                    return fault
        return None


def _answer(start: Start, status: str, text: str) -> list[bytes]:
    start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(text)))])
    return [text.encode()]


def _with_etag(start: Start) -> Start:
    def started(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
        others = [(name, value) for name, value in headers if name.lower() != "etag"]
        return start(status, [*others, ("ETag", '"0123456789abcdef-7"')], *rest)

    return started
