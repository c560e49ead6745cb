"""The honest client of bench/attacks.py: what it does, and how long that took. A process that does as it is told (bench.roles).

It has a session of each volume that it is given, and works in them by turns, one operation after the other, so that what
it loses is lost to the service and not to itself. A turn: create a file and close it, stat it, look it up, rename it,
look up the new name, remove it. No leases: every operation is asked of the service. Now and then it makes a new connection for
one small call, as a client does that has just come.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, Final, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.roles import answer
from client.meta.connection import SessionConnection
from client.meta.encryption import Trust
from client.meta.endpoint import Endpoint
from client.meta.managing import RemoteManaging
from client.meta.remote import RemoteMeta
from metasvc.api.server import Server
from metasvc.model import ROOT_INO, Caller, Ino, RenameFlags

TURNS_TO_A_NEWCOMER: Final = 10
_ROOT: Final = Caller()

T = TypeVar("T")


class _Resident:
    """One session and its directory."""

    def __init__(self, connection: SessionConnection) -> None:
        self.connection = connection
        self.meta = RemoteMeta(connection)
        self.durations_us: list[int] = []
        self.busy_s = 0.0
        self.turns = 0
        self._directory = Ino(0)
        self._number = 0

    async def settle(self) -> None:
        self._directory = (await self.meta.mkdir(_ROOT, ROOT_INO, b"honest-%d" % os.getpid(), mode=0o755)).ino

    async def _timed(self, work: Awaitable[T]) -> T:
        began_s = time.perf_counter()
        result = await work
        self.durations_us.append(round((time.perf_counter() - began_s) * 1e6))
        return result

    async def turn(self) -> None:
        began_s = time.perf_counter()
        meta, place = self.meta, self._directory
        self._number += 1
        name = b"%d" % self._number
        opened = await self._timed(meta.create(_ROOT, place, name, mode=0o644, exclusive=True))
        await meta.release(opened.inode.ino)
        await self._timed(meta.getattr(opened.inode.ino))
        await self._timed(meta.lookup(place, name))
        await self._timed(meta.rename(_ROOT, place, name, place, b"new", flags=RenameFlags(0)))
        await self._timed(meta.lookup(place, b"new"))
        await self._timed(meta.unlink(_ROOT, place, b"new"))
        self.busy_s += time.perf_counter() - began_s
        self.turns += 1

    def taken(self) -> dict[str, Any]:
        """Return what it did since the last time."""
        told = {"turns": self.turns, "busy_s": self.busy_s, "durations_us": self.durations_us}
        self.durations_us, self.busy_s, self.turns = [], 0.0, 0
        return told


async def _live(arguments: dict[str, Any]) -> None:
    ca = arguments["ca"]
    endpoint = Endpoint(
        [Server("127.0.0.1", arguments["port"])], arguments["token"], trust=None if ca is None else Trust(ca)
    )
    residents = {}
    for volume in arguments["volumes"]:
        connection = SessionConnection(endpoint, volume, host="honest", pid=1, mountpoint="/honest", timeout_s=60)
        await connection.open(timeout_s=20)
        residents[volume] = _Resident(connection)
        await residents[volume].settle()
    managing = RemoteManaging(endpoint)

    async def measure(seconds: float) -> dict[str, Any]:
        newcomers_us = []
        end_s, number = time.perf_counter() + seconds, 0
        while time.perf_counter() < end_s:
            for resident in residents.values():
                await resident.turn()
            number += 1
            if number % TURNS_TO_A_NEWCOMER == 1:
                began_s = time.perf_counter()
                await managing.tenants()
                newcomers_us.append(round((time.perf_counter() - began_s) * 1e6))
        return {
            "volumes": {volume: resident.taken() for volume, resident in residents.items()},
            "newcomers_us": newcomers_us,
            "reconnections": sum(resident.connection.reconnections for resident in residents.values()),
        }

    await answer({"measure": measure})
    for resident in residents.values():
        await resident.meta.close()
        await resident.connection.close()


def main() -> None:
    """Answer until stdin ends."""
    import uvloop

    arguments = json.loads(sys.argv[1])
    if arguments["processor"] is not None:
        os.sched_setaffinity(0, {arguments["processor"]})
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_live(arguments))


if __name__ == "__main__":
    main()
