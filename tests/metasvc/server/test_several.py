"""Several processes of a service on one store, in one process: who is asked, who answers, and how volumes change hands."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from chunkstore.errors import AtollError
from client.meta.connection import SessionConnection
from client.meta.endpoint import Endpoint, ServiceUnavailable
from client.meta.remote import RemoteMeta
from metasvc.api import atoll_pb2 as pb
from metasvc.api.server import Server, owner_of
from metasvc.engine import Engine
from metasvc.errors import NotOwner
from metasvc.model import ROOT_INO
from metasvc.server.tokens import Tokens, prepare
from metasvc.server.volumes import Volume
from metasvc.store import Store
from metasvc.store.memory import MemoryStore
from tests.metasvc.engine.volumes import ROOT, format_volume
from tests.metasvc.server.served import Served
from tests.servers.ports import free_ports


@contextlib.asynccontextmanager
async def processes(store: Store, count: int, **options: Any) -> AsyncIterator[list[Served]]:
    token = await prepare(store)
    served = [Served(store, "acme/v0", token, options) for _ in range(count)]
    try:
        for each in served:
            await each.start()
        yield served
    finally:
        for each in served:
            await each.stop()


async def store_with(volumes: int) -> MemoryStore:
    store = MemoryStore()
    for number in range(volumes):
        volume = await format_volume(store, tenant="acme", name=f"v{number}", uuid=str(uuid.UUID(int=number)))
        await volume.close()
    return store


def servers_of(served: Sequence[Served]) -> list[Server]:
    return [Server("127.0.0.1", each.port) for each in served]


async def owner_by(endpoint: Endpoint, volume: str = "acme/v0") -> Server | None:
    request = pb.AdminRequest(status=pb.Nothing()).SerializeToString()
    reply = pb.AdminReply.FromString(await endpoint.ask(pb.Opening.ADMINISTER, request, volume=volume))
    return owner_of(reply.status.owner)


async def test_who_asks_another_process_is_sent_to_the_owner() -> None:
    async with processes(await store_with(1), 3) as served:
        await served[1].volume()
        servers = servers_of(served)
        for server in servers:
            assert await owner_by(Endpoint([server], served[0].token)) == servers[1]
        assert await owner_by(Endpoint(servers, served[0].token)) == servers[1]


async def test_a_process_that_cannot_be_reached_is_passed_over() -> None:
    async with processes(await store_with(1), 1) as served:
        dead = Server("127.0.0.1", free_ports(1)[0])
        endpoint = Endpoint([dead, *servers_of(served)], served[0].token)
        assert await owner_by(endpoint) == servers_of(served)[0]
        with pytest.raises(ServiceUnavailable, match="not reachable"):
            await owner_by(Endpoint([dead], served[0].token))
        with pytest.raises(ServiceUnavailable) as both:
            await owner_by(Endpoint([dead, Server("localhost", dead.port)], served[0].token))
        assert str(dead) in str(both.value)
        assert f"localhost:{dead.port}" in str(both.value)


async def test_an_owner_that_is_dead_is_named_until_its_ownership_has_run_out_and_then_succeeded() -> None:
    store = await store_with(1)
    async with processes(store, 2) as served:
        dead = Server("127.0.0.1", free_ports(1)[0])
        volume = await store.open_volume("acme", "v0")
        await volume.acquire(nonce="dead", address=f"atoll://{dead}", ttl_s=0.5)
        endpoint = Endpoint(servers_of(served), served[0].token)
        with pytest.raises(ServiceUnavailable, match=f"owned by atoll://{dead}"):
            await owner_by(endpoint)
        async with asyncio.timeout(30):
            while True:
                with contextlib.suppress(ServiceUnavailable):
                    assert await owner_by(endpoint) in servers_of(served)
                    break
                await asyncio.sleep(0.05)


async def test_an_owner_that_no_client_can_ask_is_told_as_it_is() -> None:
    store = await store_with(1)
    async with processes(store, 1) as served:
        volume = await store.open_volume("acme", "v0")
        await volume.acquire(nonce="mount", address="the mount at /mnt", ttl_s=60)
        with pytest.raises(ServiceUnavailable, match="owned by the mount at /mnt"):
            await owner_by(Endpoint(servers_of(served), served[0].token))


async def test_processes_even_out_what_they_own_and_sessions_go_on_there() -> None:
    store = await store_with(7)
    async with processes(store, 2) as served:
        first, second = served
        servers = servers_of(served)
        assert first.volumes is not None
        assert second.volumes is not None
        for number in range(7):
            await first.volumes.get("acme", f"v{number}")
        connections = [
            SessionConnection(
                Endpoint([servers[0]], first.token),
                f"acme/v{number}",
                host="test",
                pid=number,
                mountpoint="",
                timeout_s=30,
            )
            for number in range(7)
        ]
        for connection in connections[:5]:
            await connection.open(timeout_s=10)
        before = [connection.session_id for connection in connections[:5]]

        async def ask(other: Server, owned: int) -> list[str]:
            request = pb.HandOverRequest(server=str(servers[1]), owned=owned).SerializeToString()
            token = (await Tokens.load(store)).for_this_process()
            answer = await Endpoint([other], token).ask(pb.Opening.HAND_OVER, request)
            return list(pb.HandOverReply.FromString(answer).volumes)

        keeping = asyncio.create_task(second.volumes.keep_open(ask))
        try:
            async with asyncio.timeout(60):
                while len(list(second.volumes)) < 3:
                    await asyncio.sleep(0.02)
                # Those that nobody used went first, and the client of the third is there.
                assert {volume.name for volume in second.volumes} > {"acme/v5", "acme/v6"}
                for number, connection in enumerate(connections[:5]):
                    made = await RemoteMeta(connection, remembers=False).mkdir(ROOT, ROOT_INO, b"d", mode=0o755)
                    assert made.nlink == 2
                    assert connection.session_id == before[number]
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
            for connection in connections[:5]:
                await connection.close()
        owned = [len(list(volumes)) for volumes in (first.volumes, second.volumes)]
        assert sorted(owned) == [3, 4]


async def test_nothing_is_handed_over_to_who_has_as_much_or_after_the_end_began() -> None:
    async with processes(await store_with(4), 2) as served:
        first = served[0].volumes
        assert first is not None
        for number in range(4):
            await first.get("acme", f"v{number}")
        to = servers_of(served)[1]
        assert await first.hand_over(to, 4) == []
        assert await first.hand_over(to, 3) == []
        assert await first.hand_over(to, 10) == []
        assert len(await first.hand_over(to, 2)) == 1
        assert len(await first.hand_over(to, 0)) == 1
        await served[0].stop()
        assert await first.hand_over(to, 0) == []


async def slow_to_end(_: Volume) -> None:
    """Work whose end takes a moment, as that of an upload does."""
    try:
        await asyncio.Event().wait()
    finally:
        await asyncio.sleep(0.2)


async def test_a_volume_is_given_up_whole_when_the_process_that_asked_for_it_ends_meanwhile() -> None:
    store = await store_with(1)
    async with processes(store, 1, work=slow_to_end) as (served,):
        volumes = served.volumes
        assert volumes is not None
        await volumes.get("acme", "v0")
        asking = asyncio.create_task(volumes.hand_over(Server("127.0.0.1", 1), -1))
        await asyncio.sleep(0.05)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        other = await store.open_volume("acme", "v0")
        async with asyncio.timeout(5):
            while True:
                with contextlib.suppress(NotOwner):
                    await other.acquire(nonce="other", address="other", ttl_s=60)
                    break
                await asyncio.sleep(0.02)
        assert not list(volumes)


async def test_a_volume_that_is_being_opened_at_the_end_is_given_up_too() -> None:
    store = await store_with(1)
    async with processes(store, 1) as (served,):
        volumes = served.volumes
        assert volumes is not None
        slow = asyncio.Event()
        admit = volumes.space.admit

        async def slow_admit(engine: Engine) -> None:
            await slow.wait()
            await admit(engine)

        volumes.space.admit = slow_admit  # type: ignore[method-assign]
        opening = asyncio.create_task(volumes.get("acme", "v0"))
        await asyncio.sleep(0.05)
        closing = asyncio.create_task(volumes.close())
        await asyncio.sleep(0.05)
        slow.set()
        await asyncio.gather(opening, closing, return_exceptions=True)
        await (await store.open_volume("acme", "v0")).acquire(nonce="other", address="other", ttl_s=60)
        assert not list(volumes)
        with pytest.raises(AtollError, match="ending"):
            await volumes.get("acme", "v0")
