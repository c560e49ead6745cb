"""``--metrics HOST:PORT``: the numbers of a process over HTTP, for Prometheus.

Owns one thread that listens and answers; the text is made on the event loop, where the numbers live, so a process whose loop
stands still answers 503 after a while, which is a thing worth an alarm. No encryption, no tokens: it tells names of volumes and
sizes, nothing else; listen on loopback or on a network of your own.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final

from chunkstore.errors import AtollError

PATH: Final = "/metrics"
WAIT_S: Final = 10.0
"""How long the event loop may take to answer."""
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

log = logging.getLogger(__name__)


class ListenInvalid(AtollError):
    """Say that nothing can listen there."""

    code = "bad-listen-address"
    errno = 22


def parse_listen(text: str) -> tuple[str, int]:
    """Read HOST:PORT; IPv6 in brackets. ListenInvalid."""
    host, separator, port = text.rpartition(":")
    if not separator or not host or not port.isdigit() or int(port) >= 1 << 16:
        raise ListenInvalid(f"{text!r} is no HOST:PORT: give for example 127.0.0.1:9411")
    return host.strip("[]"), int(port)


@contextmanager
def metrics_server(listen: str, render: Callable[[], str]) -> Iterator[int]:
    """Answer ``GET /metrics`` with what ``render`` returns on the running loop, until the block ends; yields the port.

    ListenInvalid where the address is taken.
    """
    loop = asyncio.get_running_loop()
    host, port = parse_listen(listen)

    async def rendered() -> str:
        return render()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.partition("?")[0] != PATH:
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            try:
                future = asyncio.run_coroutine_threadsafe(rendered(), loop)
                body = future.result(WAIT_S).encode()
            except (TimeoutError, RuntimeError):
                self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, "the event loop does not answer")
                return
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", CONTENT_TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Say nothing: it is asked every few seconds."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        address_family = 10 if ":" in host else 2

    try:
        server = Server((host, port), Handler)
    except OSError as error:
        raise ListenInvalid(f"cannot listen on {listen}: {error.strerror}; give another --metrics") from error
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        # Not shutdown() on the loop: it waits for the thread, which may wait for the loop.
        threading.Thread(target=server.shutdown, name="end of metrics", daemon=True).start()
        server.server_close()
