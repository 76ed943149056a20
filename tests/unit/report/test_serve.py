"""The server of a run in progress: on the loopback interface, for that name only, and no work where nothing changed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from typing import Any

import pytest

from goldsmith.errors import MachineError
from goldsmith.report.serve import HOST, report_server


class Source:
    """Data with a version, and how often it was made."""

    def __init__(self) -> None:
        self.version = 0
        self.made = 0

    def payload(self) -> bytes:
        self.made += 1
        return f"version {self.version}".encode()

    def stamp(self) -> int:
        return self.version


@contextmanager
def serving(source: Source) -> Iterator[int]:
    server = report_server(source.payload, title="run", port=0, stamp=source.stamp)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        assert server.server_address[0] == "127.0.0.1"
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def get(port: int, path: str, headers: dict[str, Any] | None = None) -> tuple[HTTPResponse, bytes]:
    connection = HTTPConnection(HOST, port, timeout=10)
    connection.request("GET", path, headers=headers or {})
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response, body


def test_data_is_sent_again_only_when_it_changed() -> None:
    source = Source()
    with serving(source) as port:
        page, text = get(port, "/")
        assert page.status == 200
        assert b'data-live="yes"' in text
        first, body = get(port, "/payload")
        assert body == b"version 0"
        tag = first.headers["ETag"]
        again, nothing = get(port, "/payload", {"If-None-Match": tag})
        assert (again.status, nothing) == (304, b"")
        assert source.made == 1
        source.version = 1
        changed, body = get(port, "/payload", {"If-None-Match": tag})
        assert (changed.status, body, source.made) == (200, b"version 1", 2)
        assert changed.headers["ETag"] != tag


def test_it_serves_nothing_else_and_no_other_name() -> None:
    with serving(Source()) as port:
        assert get(port, "/recipe.yaml")[0].status == 404
        assert get(port, "/../etc/passwd")[0].status == 404
        assert get(port, "/payload", {"Host": "evil.example:80"})[0].status == 403
        assert get(port, "/payload", {"Host": f"localhost:{port}"})[0].status == 200


def test_a_taken_port_is_named() -> None:
    with serving(Source()) as port, pytest.raises(MachineError, match=rf"port {port} cannot be served on"):
        report_server(bytes, title="run", port=port, stamp=lambda: 0)
