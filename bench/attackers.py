"""The attacker of bench/attacks.py: what it tries, and what it is told. A process that does as it is told (bench.roles).

Owns the kinds of attack. An attempt is made again and again, one after the other, at a rate or as fast as it goes; a crowd is
many connections at once. What the service said to each is counted by its words. An attempt that was answered otherwise than it
must be, above all one that succeeded, is `wrong`, and told as such.

The attempts of the table (tests/metasvc/server/attacks.py) that need a session use one that stands, and tokens are made
before: what is repeated is the attack. It runs at SCHED_IDLE, so the honest client on the same processor loses nothing to it
but by the service. It never rests: where nothing is tried it spins, or its processor would sleep without an attack and wake
late, and the honest client would be faster with one.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import resource
import socket
import ssl
import struct
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.roles import answer
from chunkstore.errors import AtollError
from client.meta.admin import RemoteAdmin
from client.meta.connection import SessionConnection
from client.meta.encryption import Trust
from client.meta.endpoint import AccessRefused, Endpoint
from client.meta.remote import RemoteMeta
from metasvc.api import atoll_pb2 as pb
from metasvc.api.frames import MAGIC, MAX_OPENING_BYTES
from metasvc.api.server import Server
from metasvc.errors import FsError
from metasvc.model import ROOT_INO
from tests.metasvc.server.attacks import ATTACKS, ROOT, SECRET, THEIR_OWN, World, furnish
from tests.metasvc.server.served import Client

OVERSIZED: Final = "a message that is too large"
ATTEMPT_S: Final = 60.0
_HOSTS: Final = [f"127.0.0.{number}" for number in range(2, 252)]
"""Where the attacker comes from, by turns: one address has not enough ports."""
_AT_ONCE: Final = 200
_HEADER: Final = struct.Struct("<I")
_ENDED: Final = 1 << 31
_PIECE: Final = bytes(1 << 20)
_FLOOD_BYTES: Final = 300 << 20


class Wrong(Exception):
    """An attempt that was not refused, or not as it must be."""


@dataclass
class KeptWorld(World):
    """A world in which a session that stands is used again."""

    keeps: bool = field(default=False, kw_only=True)
    _kept: dict[tuple[str, str], Client] = field(default_factory=dict, kw_only=True)

    @contextlib.asynccontextmanager
    async def session(self, token: str, volume: str = "team/data") -> AsyncIterator[Client]:
        if not self.keeps:
            async with World.session(self, token, volume) as client:
                yield client
            return
        if (token, volume) not in self._kept:
            self._kept[token, volume] = await begin(self.endpoint(token), volume)
        yield self._kept[token, volume]

    async def close(self) -> None:
        for client in (*self._kept.values(), self.owner):
            await end(client)


async def begin(endpoint: Endpoint, volume: str, *, takes_leases: bool = True) -> Client:
    """Begin a session, as a mount does."""
    connection = SessionConnection(
        endpoint, volume, host="attacker", pid=2, mountpoint="/x", timeout_s=20, takes_leases=takes_leases
    )
    await connection.open(timeout_s=20)
    return Client(connection, RemoteMeta(connection), RemoteAdmin(endpoint, volume, timeout_s=20))


async def end(client: Client) -> None:
    await client.meta.close()
    await client.connection.close()


@dataclass
class Attacker:
    """What attempts need."""

    world: KeptWorld
    context: ssl.SSLContext | None
    hosts: Iterator[str] = field(default_factory=lambda: itertools.cycle(_HOSTS))

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(
            "127.0.0.1", self.world.port, ssl=self.context, local_addr=(next(self.hosts), 0)
        )


Attempt = Callable[[Attacker], Awaitable[str]]
"""Try once; what the service said. Wrong."""


# -- the table ------------------------------------------------------------------------------------------------------------


async def tried(world: World, name: str) -> str:
    """Make an attempt of the table; the refusal. Wrong if there was none, or another one than must be."""
    error, number, attempt = ATTACKS[name]
    try:
        async with asyncio.timeout(ATTEMPT_S):
            await attempt(world)
    except error as refused:
        if number is not None and refused.errno != number:
            raise Wrong(f"{name}: errno {refused.errno} where {number} must be: {refused}") from refused
        if SECRET.decode() in str(refused):
            raise Wrong(f"{name}: the refusal tells what nobody may know") from refused
        return f"{type(refused).__name__} {os.strerror(refused.errno) if refused.errno else ''}".strip()
    except Exception as other:
        raise Wrong(f"{name}: {other!r} where {error.__name__} must be") from other
    raise Wrong(f"{name}: was not refused")


def group_of(name: str) -> str:
    """Return the kind that an attempt of the table belongs to."""
    error, number, _ = ATTACKS[name]
    if error is FsError and number == 2 and name not in THEIR_OWN:
        return "out of a subtree"
    if error is AccessRefused:
        return "tokens that are no good here"
    if error is FsError and number == 30:
        return "read-only tokens that write"
    if error is AtollError and number == 13:
        return "users that administer"
    return "sessions, slices and messages"


def cycle(names: Sequence[str]) -> Attempt:
    turns = itertools.cycle(names)

    async def attempt(attacker: Attacker) -> str:
        return await tried(attacker.world, next(turns))

    return attempt


def table() -> dict[str, Attempt]:
    """Return the attempts of the table by kind, but for the one of 300 MiB, which is a kind of its own."""
    groups: dict[str, list[str]] = {}
    for name in ATTACKS:
        if name != OVERSIZED:
            groups.setdefault(group_of(name), []).append(name)
    return {group: cycle(names) for group, names in groups.items()}


# -- connections ----------------------------------------------------------------------------------------------------------


async def connects_and_goes(attacker: Attacker) -> str:
    """Connect, and with a certificate shake hands; say nothing and close."""
    _, writer = await attacker.connect()
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return "closed by the attacker"


_STARTS: Final = itertools.cycle(
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(506),
        MAGIC[:-1] + b"\x63",
        MAGIC + _HEADER.pack(1 << 20),
        MAGIC + _HEADER.pack(3) + b"\xff\xff\xff",
        MAGIC + _HEADER.pack(3 | _ENDED) + b"xxx",
    ]
)


async def no_opening(attacker: Attacker) -> str:
    """Begin with what is no opening of a connection; among it HTTP/2, TLS in plain text, and a length of 1 MiB."""
    start = next(_STARTS)
    reader, writer = await attacker.connect()
    try:
        writer.write(start)
        async with asyncio.timeout(ATTEMPT_S):
            return _refusal(await reader.read())
    except ConnectionError:
        return "reset"
    finally:
        writer.close()


def _refusal(told: bytes) -> str:
    """Return with which reason a connection was ended. Wrong if with none."""
    if not told.startswith(MAGIC):
        raise Wrong(f"answered {told[:40]!r}")
    at, reason = len(MAGIC), ""
    while len(told) >= at + _HEADER.size:
        (header,) = _HEADER.unpack_from(told, at)
        body = told[at + _HEADER.size : at + _HEADER.size + (header & ~_ENDED)]
        at += _HEADER.size + len(body)
        if header & _ENDED:
            reason = pb.Ended.Reason.Name(pb.Ended.FromString(body).reason)
    if reason in ("", "DONE"):
        raise Wrong(f"was not refused: {told[:40]!r}")
    return f"ended: {reason}"


async def _opened(attacker: Attacker) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect with a good token, and begin a session by hand."""
    token = await attacker.world.token("/inside")
    reader, writer = await attacker.connect()
    opening = pb.Opening(method=pb.Opening.SESSION, token=token, volume="team/data").SerializeToString()
    writer.write(MAGIC + _framed(opening) + _framed(pb.FromClient(hello=pb.Hello(protocol=1)).SerializeToString()))
    head = await reader.readexactly(len(MAGIC) + _HEADER.size)
    (length,) = _HEADER.unpack_from(head, len(MAGIC))
    if length & _ENDED:
        raise Wrong("a session with a good token was refused")
    await reader.readexactly(length)
    return reader, writer


def _framed(message: bytes) -> bytes:
    return _HEADER.pack(len(message)) + message


async def sends_300_mib(attacker: Attacker) -> str:
    """Send a message of 300 MiB in a session, as far as it is taken."""
    reader, writer = await _opened(attacker)
    try:
        writer.write(_HEADER.pack(_FLOOD_BYTES))
        for _ in range(_FLOOD_BYTES // len(_PIECE)):
            writer.write(_PIECE)
            await writer.drain()
        return _refusal(MAGIC + await reader.read())
    except ConnectionError:
        return "reset"
    finally:
        writer.transport.abort()


async def sends_damage(attacker: Attacker) -> str:
    """Send a damaged message in a session, which is abandoned thereby."""
    reader, writer = await _opened(attacker)
    try:
        writer.write(_framed(b"\xff" * 100))
        return _refusal(MAGIC + await reader.read())
    except ConnectionError:
        return "reset"
    finally:
        writer.close()


# -- what whoever has a token may do anyway ---------------------------------------------------------------------------------


async def asks(attacker: Attacker) -> str:
    """Look up a name that is there: nothing that is refused."""
    async with attacker.world.session(await attacker.world.token("/inside")) as client:
        await client.meta.getattr(attacker.world.file)
    return "answered"


async def comes_and_goes(attacker: Attacker) -> str:
    """Begin a session and end it."""
    async with World.session(attacker.world, await attacker.world.token("/inside")):
        pass
    return "let in"


async def rests(_: Attacker) -> str:
    """Do nothing, by which one sees how much the figures differ by themselves."""
    await asyncio.sleep(0.02)
    return "nothing was tried"


ATTEMPTS: Final[dict[str, Attempt]] = {
    "nothing": rests,
    **table(),
    "damaged messages": sends_damage,
    "300 MiB in one message": sends_300_mib,
    "no opening": no_opening,
    "connects and goes": connects_and_goes,
    "a getattr that is allowed": asks,
    "a session that is allowed": comes_and_goes,
}


# -- crowds ---------------------------------------------------------------------------------------------------------------


def _half_opening(_: str) -> bytes:
    return MAGIC + _HEADER.pack(MAX_OPENING_BYTES) + bytes(MAX_OPENING_BYTES - 1000)


def _half_message(token: str) -> bytes:
    opening = pb.Opening(method=pb.Opening.SESSION, token=token, volume="team/data").SerializeToString()
    hello = pb.FromClient(hello=pb.Hello(protocol=1)).SerializeToString()
    return MAGIC + _framed(opening) + _framed(hello) + _HEADER.pack(15 << 20) + bytes(14 << 20)


def _readdirs(token: str) -> bytes:
    opening = pb.Opening(method=pb.Opening.SESSION, token=token, volume="team/data").SerializeToString()
    hello = pb.FromClient(hello=pb.Hello(protocol=1)).SerializeToString()
    pages = [pb.Request(number=n, readdir=pb.ReadDir(ino=ROOT_INO, limit=5000)) for n in range(1, 257)]
    return MAGIC + _framed(opening) + _framed(hello) + _framed(pb.FromClient(requests=pages).SerializeToString())


CROWDS: Final[dict[str, Callable[[str], bytes]]] = {
    "silent": lambda _: b"",
    "silent after the first bytes": lambda _: MAGIC,
    "silent within an opening of 16 KiB": _half_opening,
    "silent within a message of 15 MiB": _half_message,
    "ask for 256 pages of a directory and read nothing": _readdirs,
}
"""What each connection says before it falls silent, with a token."""


class Crowd:
    """Connections that say something, or nothing, and then nothing more."""

    def __init__(self, attacker: Attacker) -> None:
        self._attacker = attacker
        self._sockets: list[socket.socket] = []
        self.told: Counter[str] = Counter()

    async def gather(self, said: bytes, count: int) -> float:
        """Connect so many; how long that took."""
        began_s = time.perf_counter()
        left = iter(range(count))

        async def some() -> None:
            for _ in left:
                await self._one(said)

        await asyncio.gather(*(some() for _ in range(min(_AT_ONCE, count))))
        return time.perf_counter() - began_s

    async def _one(self, said: bytes) -> None:
        loop = asyncio.get_running_loop()
        one = socket.socket()
        one.setblocking(False)
        one.bind((next(self._attacker.hosts), 0))
        self._sockets.append(one)
        try:
            await loop.sock_connect(one, ("127.0.0.1", self._attacker.world.port))
            if said:
                await loop.sock_sendall(one, said)
        except OSError as error:
            self.told[f"refused by the kernel: {error.strerror}"] += 1

    async def first_end(self) -> None:
        """Wait until the service has ended the first one, or nearly."""
        await self._read(self._sockets[0])

    async def ends(self) -> dict[str, int]:
        """Wait until the service has ended all; what it said."""
        await asyncio.gather(*map(self._read, self._sockets[1:]))
        return dict(self.told)

    async def _read(self, one: socket.socket) -> None:
        loop, told = asyncio.get_running_loop(), b""
        try:
            async with asyncio.timeout(ATTEMPT_S):
                while data := await loop.sock_recv(one, 1 << 16):
                    told = (told + data)[: 1 << 20]
        except ConnectionError:
            self.told["reset"] += 1
            return
        except TimeoutError:
            self.told["was not ended"] += 1
            return
        try:
            self.told[_refusal(told)] += 1
        except Wrong:
            self.told["closed without a word"] += 1

    def disperse(self) -> None:
        """Close what is left."""
        for one in self._sockets:
            one.close()
        self._sockets = []


# -- the process ----------------------------------------------------------------------------------------------------------


class _Campaign:
    """What is under way: at most one kind of attack."""

    def __init__(self, attacker: Attacker) -> None:
        self._attacker = attacker
        self._crowd = Crowd(attacker)
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self._told: Counter[str] = Counter()
        self._wrong: list[str] = []

    async def check(self) -> dict[str, Any]:
        """Make every attempt of the table once, and see that nothing has changed."""
        world = self._attacker.world
        told: Counter[str] = Counter()
        wrong: list[str] = []
        before = await world.state()
        await self._try([name for name in ATTACKS if name not in THEIR_OWN], told, wrong)
        if await world.state() != before:
            wrong.append("the attempts have changed the volume")
        await self._try(sorted(THEIR_OWN), told, wrong)
        return {"attempts": len(ATTACKS), "told": told, "wrong": wrong}

    async def _try(self, names: Sequence[str], told: Counter[str], wrong: list[str]) -> None:
        for name in names:
            try:
                told[await tried(self._attacker.world, name)] += 1
            except Wrong as error:
                wrong.append(str(error))

    async def start(self, kind: str, rate: float | None) -> None:
        """Make attempts from now on, so many in a second, or (None) one after the other."""
        attempt = ATTEMPTS[kind]
        self._attacker.world.keeps = True
        self._told, self._wrong, self._stopping = Counter(), [], False
        self._task = asyncio.create_task(self._repeat(attempt, rate))

    async def _repeat(self, attempt: Attempt, rate: float | None) -> None:
        due_s = time.perf_counter()
        while not self._stopping:
            try:
                self._told[await attempt(self._attacker)] += 1
            except Wrong as error:
                self._wrong.append(str(error))
            except Exception as error:  # noqa: BLE001 (told to who commands)
                self._wrong.append(repr(error))
            if rate is not None:
                # What could not be done in time is not made up for.
                due_s = max(due_s + 1 / rate, time.perf_counter() - 1 / rate)
                await asyncio.sleep(max(0.0, due_s - time.perf_counter()))

    async def stop(self) -> dict[str, Any]:
        """Make no more; what was told."""
        assert self._task is not None
        self._stopping = True
        await self._task
        return {"told": self._told, "wrong": self._wrong[:5]}

    async def gather(self, kind: str, count: int) -> float:
        token = await self._attacker.world.token()
        return await self._crowd.gather(CROWDS[kind](token), count)

    async def first_end(self) -> None:
        await self._crowd.first_end()

    async def ends(self) -> dict[str, int]:
        return await self._crowd.ends()

    async def disperse(self) -> dict[str, int]:
        self._crowd.disperse()
        told, self._crowd = dict(self._crowd.told), Crowd(self._attacker)
        return told


def _spin(loop: asyncio.AbstractEventLoop) -> None:
    loop.call_soon(_spin, loop)


async def _live(arguments: dict[str, Any]) -> None:
    ca = arguments["ca"]
    trust = None if ca is None else Trust(ca)
    port, token, key = arguments["port"], arguments["token"], bytes.fromhex(arguments["key"])
    owner = await begin(Endpoint([Server("127.0.0.1", port)], token, trust=trust), "team/data", takes_leases=False)
    world = KeptWorld(port, token, key, owner, *await furnish(owner), trust=trust)
    # Pages of the root are long, for those who do not read them.
    for first in range(0, arguments["names"], 200):
        await asyncio.gather(
            *(owner.meta.mknod(ROOT, ROOT_INO, b"%0240d" % n, mode=0o100644) for n in range(first, first + 200))
        )
    campaign = _Campaign(Attacker(world, None if trust is None else trust.context()))
    names = ("check", "start", "stop", "gather", "first_end", "ends", "disperse")
    if arguments["processor"] is not None:
        _spin(asyncio.get_running_loop())
    await answer({name: getattr(campaign, name) for name in names})
    await world.close()


def main() -> None:
    """Answer until stdin ends."""
    import uvloop

    arguments = json.loads(sys.argv[1])
    if arguments["processor"] is not None:
        os.sched_setaffinity(0, {arguments["processor"]})
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_live(arguments))


if __name__ == "__main__":
    main()
