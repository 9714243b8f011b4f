"""Serving the page on this machine: loopback unless told otherwise, nothing from elsewhere, one dashboard a port."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dash import Dash
from flask import Response, abort, request
from werkzeug.serving import BaseWSGIServer, make_server

LOCAL = ("127.0.0.1", "localhost", "[::1]", "::1")
POLICY = (  # what the browser may load at all: from here, nothing from elsewhere
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; font-src 'self' data:; object-src 'none'; base-uri 'none'; frame-ancestors 'none'; form-action 'none'"
)


class PortTaken(Exception):
    """Somebody else listens there."""


@contextmanager
def serving(app: Dash, host: str = "127.0.0.1", port: int = 8050) -> Iterator[BaseWSGIServer]:
    """A server for the app; call `serve_forever()` on it. Port 0 takes a free one (`server.port`).

    Raises PortTaken when something listens there already, OSError when the address is not one of this machine's.
    """
    _protect(app, host)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for every question of every page helps nobody
    with _listening(host, port) as listener:
        server = make_server(host, listener.getsockname()[1], app.server, threaded=True, fd=listener.fileno())
        try:
            yield server
        finally:
            server.server_close()


def address(server: BaseWSGIServer) -> str:
    host = f"[{server.host}]" if ":" in server.host else server.host
    return f"http://{host}:{server.port}/"


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just given up is free
    try:
        listener.bind((host, port))
        listener.listen(64)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PortTaken(
                f"port {port} of {host} is taken, perhaps by another dashboard: open http://{host}:{port}/ to see, or give "
                f"--port {port + 1} (or --port 0 for any that is free)"
            ) from error
        raise
    return listener


def _protect(app: Dash, host: str) -> None:
    """Headers for every answer; and on loopback only questions that were asked of this machine by its own names.

    A page on the internet can have its own name point to 127.0.0.1 and read what is served there (DNS rebinding); its
    questions carry that name.
    """

    @app.server.before_request
    def _ours() -> Any:
        if host in LOCAL and request.host.rsplit(":", 1)[0] not in LOCAL:
            abort(403, "ask for 127.0.0.1 or localhost")

    @app.server.after_request
    def _guarded(response: Response) -> Response:
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response
