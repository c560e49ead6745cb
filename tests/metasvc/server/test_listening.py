"""Taking connections: the pace, how often the event loop has a turn, and what happens without descriptors."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import resource
import socket
from collections.abc import AsyncIterator, Iterator

import pytest

from metasvc.server import listening
from metasvc.server.listening import AT_ONCE, Listener

MANY = 100


class Taken:
    """A listener on loopback, what it has taken, and in which turn of the event loop."""

    def __init__(self) -> None:
        self.listener = Listener(self._take)
        self.connections: list[socket.socket] = []
        self.port = 0

    def _take(self, connection: socket.socket) -> None:
        self.connections.append(connection)

    def close(self) -> None:
        self.listener.close()
        for connection in self.connections:
            connection.close()


@contextlib.asynccontextmanager
async def listens(host: str = "127.0.0.1") -> AsyncIterator[Taken]:
    taken = Taken()
    taken.port = await taken.listener.start(host, 0)
    try:
        yield taken
    finally:
        taken.close()


@contextlib.contextmanager
def clients(port: int, count: int, host: str = "127.0.0.1") -> Iterator[list[socket.socket]]:
    """Connect so many, which needs nobody who takes them."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection((host, port), timeout=10)) for _ in range(count)]


async def until(taken: Taken, count: int) -> None:
    async with asyncio.timeout(30):
        while len(taken.connections) < count:
            await asyncio.sleep(0.001)


async def test_a_connection_is_handed_over_with_what_is_sent_on_it() -> None:
    async with listens() as taken:
        with clients(taken.port, 1) as (client,):
            await until(taken, 1)
            client.sendall(b"hello")
            assert not taken.connections[0].getblocking()
            assert await asyncio.get_running_loop().sock_recv(taken.connections[0], 10) == b"hello"


async def test_others_have_turns_while_many_are_taken() -> None:
    async with listens() as taken:
        with clients(taken.port, MANY):
            most = before = 0
            async with asyncio.timeout(30):
                while before < MANY:
                    await asyncio.sleep(0)
                    most = max(most, len(taken.connections) - before)
                    before = len(taken.connections)
            assert 0 < most <= AT_ONCE


async def test_after_a_burst_they_come_at_their_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "BURST", 20)
    monkeypatch.setattr(listening, "PER_SECOND", 200.0)
    loop = asyncio.get_running_loop()
    async with listens() as taken:
        begun_s = loop.time()
        with clients(taken.port, MANY):
            await until(taken, MANY)
            # Those beyond the burst, and none sooner: a slow machine takes longer only.
            assert loop.time() - begun_s >= (MANY - 20) / 200.0 - 0.001
        # After a while there is a burst again, of its size and no more.
        await asyncio.sleep(0.3)
        begun_s = loop.time()
        with clients(taken.port, 40):
            await until(taken, MANY + 40)
            assert loop.time() - begun_s >= (40 - 20) / 200.0 - 0.001


async def test_without_descriptors_it_waits_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(listening, "PAUSE_S", 0.05)
    async with listens() as taken:
        with clients(taken.port, 3):
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            # The loop has what it needs; the next descriptor of this process is beyond the limit.
            with socket.socket() as probe:
                next_descriptor = probe.fileno()
            resource.setrlimit(resource.RLIMIT_NOFILE, (next_descriptor, limits[1]))
            try:
                async with asyncio.timeout(30):
                    while caplog.text.count("no connection can be taken") < 2:
                        await asyncio.sleep(0.01)
                assert "Too many open files" in caplog.text
                assert not taken.connections
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            await until(taken, 3)


async def test_after_the_end_nobody_is_taken_and_the_port_is_free() -> None:
    async with listens() as taken:
        with clients(taken.port, 1):
            taken.listener.close()
            await asyncio.sleep(0.05)
            assert not taken.connections
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", taken.port), timeout=10)
            again = Listener(lambda connection: connection.close())
            assert await again.start("127.0.0.1", taken.port) == taken.port
            again.close()


async def test_it_may_end_while_it_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "BURST", 1)
    monkeypatch.setattr(listening, "PER_SECOND", 100.0)
    async with listens() as taken:
        with clients(taken.port, 5):
            await until(taken, 1)
            count = len(taken.connections)
            taken.listener.close()
            await asyncio.sleep(0.2)
            assert len(taken.connections) == count < 5


async def test_an_address_in_use_is_refused_and_nothing_stays_open() -> None:
    async with listens() as taken:
        other = Listener(lambda connection: connection.close())
        with pytest.raises(OSError, match="in use") as raised:
            await other.start("127.0.0.1", taken.port)
        assert raised.value.errno == errno.EADDRINUSE
        with clients(taken.port, 1):
            await until(taken, 1)


@pytest.mark.parametrize("host", ["", "localhost"])
async def test_all_addresses_of_a_host_listen(host: str) -> None:
    async with listens(host) as taken:
        port = taken.port
    taken = Taken()
    try:
        # A port that was free: with 0 each address has one of its own.
        await taken.listener.start(host, port)
        addresses = ["127.0.0.1", "::1"] if host == "" else ["127.0.0.1"]
        with contextlib.ExitStack() as stack:
            for address in addresses:
                if address == "::1" and not _has_ipv6():
                    continue
                stack.enter_context(clients(port, 1, address))
            await until(taken, len(addresses) if _has_ipv6() else 1)
    finally:
        taken.close()


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as one:
            one.bind(("::1", 0))
    except OSError:
        return False
    return True
