"""What a GET by URL costs each HTTP client of Python: CPU of this process for 4 MiB and for 64 KiB.

    python bench/http_clients.py [--requests 400]        (the clients that are installed: aiohttp, httpx, urllib3; http.client)

A server in another process answers from memory over loopback, 16 requests at a time, connections kept. obstore has no way to
be given a URL.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

AT_ONCE = 16


def serve(port: Any) -> None:
    """Answer GET /N with N bytes."""
    body = bytes(4 << 20)

    class Answering(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport
            self.buffer = b""

        def data_received(self, data: bytes) -> None:
            self.buffer += data
            while b"\r\n\r\n" in self.buffer:
                head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
                size = int(head.split()[1][1:])
                self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
                self.transport.write(memoryview(body)[:size])

    async def run() -> None:
        server = await asyncio.get_running_loop().create_server(Answering, "127.0.0.1", 0)
        port.value = server.sockets[0].getsockname()[1]
        await server.serve_forever()

    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


async def at_once(count: int, one: Callable[[], Any]) -> None:
    """Do so many, some at a time."""
    left = iter(range(count))

    async def some() -> None:
        for _ in left:
            await one()

    await asyncio.gather(*(some() for _ in range(AT_ONCE)))


async def by_aiohttp(url: str, size: int, count: int) -> None:
    """aiohttp, as chunkstore.buckets.urls uses it."""
    import aiohttp

    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), auto_decompress=False, read_bufsize=8 << 20
    ) as session:

        async def one() -> None:
            async with session.get(url) as answer:
                assert len(await answer.read()) == size

        await at_once(count, one)


async def by_httpx(url: str, size: int, count: int) -> None:
    """httpx."""
    import httpx  # type: ignore[import-not-found]

    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=AT_ONCE)) as client:

        async def one() -> None:
            assert len((await client.get(url)).content) == size

        await at_once(count, one)


async def by_urllib3(url: str, size: int, count: int) -> None:
    """urllib3 in threads."""
    import urllib3

    pool = urllib3.PoolManager(maxsize=AT_ONCE, block=True)
    with ThreadPoolExecutor(AT_ONCE) as threads:

        async def one() -> None:
            answer = await asyncio.get_running_loop().run_in_executor(threads, pool.request, "GET", url)
            assert len(answer.data) == size

        await at_once(count, one)


async def by_http_client(url: str, size: int, count: int) -> None:
    """http.client in threads, a connection each."""
    import threading

    kept = threading.local()
    host, _, path = url.removeprefix("http://").partition("/")

    def get() -> bytes:
        if not hasattr(kept, "connection"):
            kept.connection = http.client.HTTPConnection(host)
        kept.connection.request("GET", f"/{path}")
        data: bytes = kept.connection.getresponse().read()
        return data

    with ThreadPoolExecutor(AT_ONCE) as threads:

        async def one() -> None:
            assert len(await asyncio.get_running_loop().run_in_executor(threads, get)) == size

        await at_once(count, one)


def main() -> None:
    """Print a line for each client and size."""
    import uvloop

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--requests", type=int, default=400)
    arguments = parser.parse_args()
    port = multiprocessing.get_context("spawn").Value("i", 0)
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(port,), daemon=True)
    server.start()
    while not port.value:
        time.sleep(0.01)
    clients: dict[str, Any] = {
        "aiohttp": by_aiohttp,
        "httpx": by_httpx,
        "urllib3": by_urllib3,
        "http.client": by_http_client,
    }
    try:
        for size in (4 << 20, 64 << 10):
            count = arguments.requests * (1 if size > 1 << 20 else 5)
            for name, client in clients.items():
                if find_spec(name) is None:
                    continue
                found = []
                for _ in range(3):
                    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                        began_s, cpu_s = time.perf_counter(), time.process_time()
                        runner.run(client(f"http://127.0.0.1:{port.value}/{size}", size, count))
                        found.append(((time.process_time() - cpu_s) / count, (time.perf_counter() - began_s) / count))
                cpu_s, wall_s = min(found)
                print(f"{name:12} {size >> 10:5} KiB: {cpu_s * 1e6:7.0f} us of CPU, {wall_s * 1e6:7.0f} us")
    finally:
        server.kill()


if __name__ == "__main__":
    main()
