"""The page of a run that is still training, on this machine only: it asks for newer data every few seconds."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from goldsmith.errors import MachineError
from goldsmith.report.page import page_of_payload

__all__ = ["HOST", "report_server"]

HOST = "127.0.0.1"


def report_server(
    payload: Callable[[], bytes], *, title: str, port: int, stamp: Callable[[], object]
) -> ThreadingHTTPServer:
    """A server on the loopback interface; the caller runs `serve_forever` and closes it.

    `/` is the page, `/payload` its data with an ETag, so that what has not changed is not sent again.

    Args:
        payload: makes the data from the files as they are now.
        port: 0 takes a free one.
        stamp: changes when the files do; `payload` is called again only then.

    Raises:
        MachineError: the port is taken.
    """
    latest = _Latest(payload, stamp)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # A page of another origin can make a browser resolve its own name to this address; it must not read the gold.
            if self.headers.get("Host", "").rpartition(":")[0] not in (HOST, "localhost"):
                self.send_error(403, "this server answers to 127.0.0.1 and localhost only")
                return
            path = self.path.partition("?")[0]
            if path not in ("/", "/payload"):
                self.send_error(404)
                return
            data, tag = latest.get()
            if path == "/":
                page = page_of_payload(data, title=title, is_live=True)
                self._answer(page.encode(), "text/html; charset=utf-8")
            elif self.headers.get("If-None-Match") == tag:
                self.send_response(304)
                self.send_header("ETag", tag)
                self.end_headers()
            else:
                self._answer(data, "application/gzip", tag=tag)

        def _answer(self, body: bytes, kind: str, tag: str | None = None) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-cache")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("X-Frame-Options", "DENY")
            if tag is not None:
                self.send_header("ETag", tag)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: a line every few seconds would say nothing."""

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except (OSError, OverflowError) as error:
        raise MachineError(
            f"port {port} cannot be served on ({error})", remedy="choose another --port, or 0 for a free one"
        ) from error


class _Latest:
    """The newest data, made once for each state of the files."""

    def __init__(self, payload: Callable[[], bytes], stamp: Callable[[], object]) -> None:
        self._payload, self._stamp = payload, stamp
        self._lock = threading.Lock()
        self._made_at: object = None
        self._data = b""
        self._tag = ""

    def get(self) -> tuple[bytes, str]:
        """The data and its tag."""
        with self._lock:
            now = self._stamp()
            if not self._tag or now != self._made_at:
                self._data = self._payload()
                self._tag = f'"{hashlib.sha256(self._data).hexdigest()[:32]}"'
                self._made_at = now
            return self._data, self._tag
