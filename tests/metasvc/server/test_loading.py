"""Dumps and loads through a service: from any store into any other, over a real connection."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from client.meta.admin import RemoteAdmin, create_volume, list_volumes
from client.meta.endpoint import ServiceRefused, ServiceUnavailable
from client.meta.loading import load_volume
from metasvc.api import atoll_pb2 as pb
from metasvc.engine import first_rows
from metasvc.errors import FsError, StoreError, VolumeExists, VolumeMissing
from metasvc.model import ROOT_INO, Caller, VolumeFormat
from metasvc.store import Store
from tests.closing import close_at_end
from tests.metasvc.engine.test_dump import bytes_of, stream
from tests.metasvc.engine.test_load import Slow, under_way
from tests.metasvc.engine.volumes import volume_format
from tests.metasvc.server.served import Cutter, Served, connected, served
from tests.metasvc.store.kinds import KINDS, new_store_of
from tests.servers.fixtures import Servers

ROOT = Caller()
NAME = "acme/data"


class Stores:
    """Makes stores of any kind."""

    def __init__(self, directory: Path, servers: Servers) -> None:
        self._directory = directory
        self._servers = servers
        self._numbers = itertools.count()

    async def new(self, kind: str) -> Store:
        place = self._directory / str(next(self._numbers))
        place.mkdir()
        store = await new_store_of(kind, place, self._servers)
        close_at_end(store.close)
        return store


@pytest.fixture
def stores(tmp_path: Path, servers: Servers) -> Stores:
    return Stores(tmp_path, servers)


def form() -> VolumeFormat:
    return volume_format(tenant="acme", name="data", bucket_url="file:///bucket")


async def a_dump(store: Store, count: int = 300) -> bytes:
    """Make a volume of a service with some files, and dump it through the service."""
    await store.create_volume(form(), first_rows(form()))
    async with served(store, name=NAME) as service, connected(service) as client:
        for number in range(count):
            made = await client.meta.create(ROOT, ROOT_INO, b"%d" % number, mode=0o600, exclusive=True)
            await client.meta.release(made.inode.ino)
        return b"".join(await bytes_of(client.admin.dump()))


async def load_at(service: Served, data: AsyncIterator[bytes], **options: str) -> tuple[VolumeFormat, int]:
    bucket_url = options.get("bucket_url")
    return await load_volume(service.endpoint(), NAME, data, bucket_url=bucket_url, told=lambda *_: None)


async def names_at(service: Served) -> set[bytes]:
    async with connected(service) as client:
        assert [problem async for problem in client.admin.check(repair=False)] == []
        page = await client.meta.readdir(ROOT_INO, after=None, limit=1000)
        return {entry.name for entry in page.entries}


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", KINDS)
async def test_a_volume_goes_from_any_store_to_any_other(stores: Stores, source: str, target: str) -> None:
    data = await a_dump(await stores.new(source))
    async with served(await stores.new(target), name=NAME) as service:
        told: list[tuple[int, int]] = []
        loaded, rows = await load_volume(
            service.endpoint(), NAME, stream([data]), bucket_url=None, told=lambda *state: told.append(state)
        )
        assert (loaded.uuid, loaded.bucket_url) == (form().uuid, "file:///bucket")
        assert rows > 600
        assert told[-1] == (rows, len(data))
        assert await names_at(service) == {b"%d" % number for number in range(300)}
        assert [each.name for each in await list_volumes(service.endpoint(), tenant="acme")] == ["data"]
        assert list(await service.store.tenants()) == ["acme"]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_client_that_goes_in_the_middle_leaves_nothing(stores: Stores, kind: str) -> None:
    data, store = await a_dump(await stores.new("memory")), await stores.new(kind)
    async with served(store, name=NAME) as service, Cutter(service.port) as cutter:
        task = asyncio.create_task(
            load_volume(
                service.endpoint(port=cutter.port), NAME, aiter(Slow(data)), bucket_url=None, told=lambda *_: None
            )
        )
        await under_way(store)
        with pytest.raises(VolumeMissing, match="not loaded whole"):
            await RemoteAdmin(service.endpoint(), NAME, timeout_s=5).status()
        cutter.cut()
        with pytest.raises(ServiceUnavailable):
            await task
        async with asyncio.timeout(20):
            while await store.list_volumes():
                await asyncio.sleep(0.01)
        await load_at(service, stream([data]))
        assert len(await names_at(service)) == 300


@pytest.mark.parametrize("kind", KINDS)
async def test_a_service_that_ends_in_the_middle_leaves_nothing_that_can_be_opened(stores: Stores, kind: str) -> None:
    data, store = await a_dump(await stores.new("memory")), await stores.new(kind)
    async with served(store, name=NAME) as service:
        task = asyncio.create_task(load_at(service, aiter(Slow(data))))
        await under_way(store)
        await service.stop()
        with pytest.raises(ServiceUnavailable):
            await task
        await service.start()
        with pytest.raises(VolumeMissing):
            await RemoteAdmin(service.endpoint(), NAME, timeout_s=5).status()
        await load_at(service, stream([data]))
        assert len(await names_at(service)) == 300


async def test_what_is_wrong_with_a_dump_is_told(stores: Stores) -> None:
    store = await stores.new("memory")
    data = await a_dump(await stores.new("memory"))
    async with served(store, name=NAME) as service:
        for wrong, match in (
            (b"no dump at all", "no dump of AtollFS"),
            (data[:-1], "cut off"),
            (data[:-20] + bytes(20), "not what was written"),
        ):
            with pytest.raises(StoreError, match=match):
                await load_at(service, stream([wrong]))
            assert list(await store.list_volumes()) == []
        with pytest.raises(FsError, match="say with --bucket"):
            await load_at(service, stream([data]), bucket_url="file:objects")
        await load_at(service, stream([data]), bucket_url="file:///other")
        (found,) = await store.list_volumes()
        assert found.bucket_url == "file:///other"
        with pytest.raises(VolumeExists):
            await load_at(service, stream([data]))
        with pytest.raises(VolumeExists):
            await create_volume(service.endpoint(), form(), uid=0, gid=0, mode=0o755)


async def test_a_source_that_fails_ends_the_load(stores: Stores) -> None:
    data, store = await a_dump(await stores.new("memory")), await stores.new("memory")

    async def failing() -> AsyncIterator[bytes]:
        yield data[:100]
        raise OSError(5, "injected: the disk of the dump")

    async with served(store, name=NAME) as service:
        with pytest.raises(OSError, match="injected"):
            await load_at(service, failing())
        async with asyncio.timeout(20):
            while await store.list_volumes():
                await asyncio.sleep(0.01)


async def test_messages_that_break_the_protocol_end_a_load(stores: Stores) -> None:
    store = await stores.new("memory")
    async with served(store, name=NAME) as service:
        with pytest.raises(ServiceRefused):
            answers = service.endpoint().answers(pb.Opening.LOAD, b"\xff\xff", volume=NAME)
            await anext(answers)
        with pytest.raises(ServiceRefused, match="no name"):
            await load_volume(service.endpoint(), "acme/a b", stream([b""]), bucket_url=None, told=lambda *_: None)
        assert list(await store.list_volumes()) == []


async def test_a_dump_that_nobody_takes_ends_when_its_reader_goes(stores: Stores) -> None:
    store = await stores.new("memory")
    await store.create_volume(form(), first_rows(form()))
    async with served(store, name=NAME) as service:
        engine = (await service.volume()).engine
        parts = RemoteAdmin(service.endpoint(), NAME, timeout_s=5).dump()
        assert (await anext(parts)).data
        await parts.aclose()
        async with asyncio.timeout(20):
            while engine.committer.taps:
                await asyncio.sleep(0.01)
