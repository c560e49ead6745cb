"""The store in Redis or Valkey, one server or a cluster, for services of several processes: metasvc.store.Store.

Reading order: foreign_errors, address, encoding (keys and rows as bytes), keys (every key there is), link, server (what a
server must be), connections, scripts, rows (scripts of the tables), ownership (scripts of a volume's owner; why the fence
holds), catalog (names of volumes; what takes several steps), volume, and this file.

Concurrency: any number of processes on one server or cluster. Every change of a volume is one script on its keys, which a
server runs one after the other; all keys of a volume lie on one server. Volumes of a cluster's servers never wait for each
other.

Durability: a commit that returned is as durable as the server makes a command that it has answered: with ``appendonly yes``
and ``appendfsync always``, on its disk. Anything else is warned of when a connection is made (docs/guides/redis.md).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Self, TypeVar

from metasvc.api.volume_format import dump_format, parse_format
from metasvc.errors import StoreRefused, VolumeExists, VolumeMissing
from metasvc.model import VolumeFormat
from metasvc.store.redis import catalog as names_of
from metasvc.store.redis import ownership as owning
from metasvc.store.redis.address import Address
from metasvc.store.redis.connections import CHANGE_DEADLINE_S, READ_DEADLINE_S, Lane, Routes, connect
from metasvc.store.redis.keys import Catalog, VolumeKeys
from metasvc.store.redis.link import Link
from metasvc.store.redis.rows import Changes
from metasvc.store.redis.volume import RedisVolume
from metasvc.store.tables import TABLES, Batch, Table

__all__ = ["RedisStore"]

_REMOVED_AT_ONCE: Final = 500
"""Keys of one step while a volume is removed: a millisecond of the server's time; memory is freed by another thread."""
_REMOVE_PAUSE_S: Final = 0.002

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Found:
    """A volume as it is stored."""

    volume_id: int
    format: str
    is_deleted: bool


class RedisStore:
    """The keys of one prefix with the volumes of many tenants."""

    def __init__(self, address: Address) -> None:
        """Use open()."""
        routes = Routes()
        self._catalog = Catalog(address.prefix)
        self._prefix = address.prefix
        self._changes = Lane(address, routes, limit=address.connections // 2)
        self._reads = Lane(address, routes, limit=address.connections - address.connections // 2)

    @classmethod
    async def open(cls, url: str, *, create: bool = False) -> Self:
        """Open the server of a URL (metasvc.store.redis.address); with ``create`` prepare it if it is not.

        Raises VolumeMissing if it was not prepared and ``create`` is false, StoreError if it cannot be reached or used,
        SchemaTooNew. Cost: two connections of four to six trips, and one trip.
        """
        address = Address.parse(url)
        # Once, so that who gave a wrong address is told at once.
        await (await connect(address)).close()
        store = cls(address)
        try:
            await store._on_catalog(
                lambda link: names_of.prepare(link, store._catalog, store._changes.at, create=create), again=True
            )
        except BaseException:
            await store.close()
            raise
        return store

    async def create_volume(self, volume_format: VolumeFormat, rows: Batch) -> None:
        """Make a volume. Three trips. What was made is removed again if the name is taken."""
        tenant, name = volume_format.tenant, volume_format.name
        if await self._find(tenant, name) is not None:
            raise _exists(tenant, name)
        reserved = await self._on_catalog(lambda link: names_of.reserve(link, self._catalog))
        keys = VolumeKeys(self._prefix, reserved.volume_id)
        changes = Changes(keys, rows)
        text = dump_format(volume_format)
        await self._on_volume(keys, lambda link: owning.create(link, keys, text, reserved.now_us, changes))
        taken = await self._on_catalog(
            lambda link: names_of.enter(link, self._catalog, tenant, name, reserved.volume_id)
        )
        if taken is not None:
            # Somebody was quicker. Only this process knows the volume that has no name.
            await self._on_volume(keys, lambda link: owning.disown(link, keys), again=True)
            await self._remove(reserved.volume_id)
            raise _exists(tenant, name)

    async def open_volume(self, tenant: str, name: str) -> RedisVolume:
        """Open a volume. Two trips. StoreRefused where the server has its name and not its keys."""
        found = await self._find(tenant, name)
        if found is None:
            raise VolumeMissing(f"there is no volume {tenant}/{name}; make it with: atoll format")
        keys = VolumeKeys(self._prefix, found.volume_id)
        return RedisVolume(keys, parse_format(found.format), changes=self._changes, reads=self._reads)

    async def list_volumes(self) -> Sequence[VolumeFormat]:
        """List them, each as it is when it is read: a trip for each volume, several at once."""
        found: list[VolumeFormat] = []
        after: bytes | None = None
        while True:
            ids, after = await self._read_catalog(partial(names_of.names, catalog=self._catalog, after=after))
            for volume_id, state in zip(ids, await asyncio.gather(*map(self._state, ids)), strict=True):
                if state is None:
                    log.warning("%s has the name of volume %d and not its keys", self._reads.at, volume_id)
                elif not state.is_deleted:
                    found.append(parse_format(state.format))
            if after is None:
                return found

    async def delete_volume(self, tenant: str, name: str) -> None:
        """Delete a volume: nobody can change it first, then its name goes, then its keys, some at a time.

        If the process ends in between, what is left goes with the next volume that is deleted.
        """
        volume_id = await self._read_catalog(lambda link: names_of.find(link, self._catalog, tenant, name))
        if volume_id is None:
            raise VolumeMissing(f"there is no volume {tenant}/{name}; make it with: atoll format")
        keys = VolumeKeys(self._prefix, volume_id)
        await self._on_volume(keys, lambda link: owning.disown(link, keys), again=True)
        await self._strike(tenant, name, volume_id)
        while doomed := await self._on_catalog(lambda link: names_of.due(link, self._catalog), again=True):
            for doomed_id in doomed:
                await self._remove(doomed_id)

    async def setting(self, name: str) -> bytes | None:
        return await self._read_catalog(lambda link: names_of.setting(link, self._catalog, name))

    async def create_setting(self, name: str, value: bytes) -> bool:
        return await self._on_catalog(lambda link: names_of.create_setting(link, self._catalog, name, value))

    async def settings(self, prefix: str) -> dict[str, bytes]:
        return await self._read_catalog(lambda link: names_of.settings(link, self._catalog, prefix))

    async def replace_setting(self, name: str, value: bytes, *, expected: bytes) -> bool:
        return await self._on_catalog(lambda link: names_of.replace_setting(link, self._catalog, name, value, expected))

    async def delete_setting(self, name: str) -> bool:
        return await self._on_catalog(lambda link: names_of.delete_setting(link, self._catalog, name))

    async def add_tenant(self, name: str, *, created_ns: int) -> bool:
        return await self._on_catalog(lambda link: names_of.add_tenant(link, self._catalog, name, created_ns))

    async def remove_tenant(self, name: str) -> bool:
        return await self._on_catalog(lambda link: names_of.remove_tenant(link, self._catalog, name))

    async def tenants(self) -> Sequence[str]:
        found: list[str] = []
        after: bytes | None = None
        while True:
            some, after = await self._read_catalog(partial(names_of.tenants, catalog=self._catalog, after=after))
            found += some
            if after is None:
                return found

    async def close(self) -> None:
        """Close the connections, behind what is under way; handles answer nothing any more. May be called twice."""
        await self._reads.close()
        await self._changes.close()

    async def _find(self, tenant: str, name: str) -> _Found | None:
        """Return a volume; None if there is none. One that somebody began to delete is none: its name is struck."""
        volume_id = await self._read_catalog(lambda link: names_of.find(link, self._catalog, tenant, name))
        if volume_id is None:
            return None
        found = await self._state(volume_id)
        if found is None:
            raise StoreRefused(
                f"{self._reads.at} has the name {tenant}/{name} and not the volume: restore it from a backup, or delete it"
            )
        if found.is_deleted:
            await self._strike(tenant, name, volume_id)
            return None
        return found

    async def _strike(self, tenant: str, name: str, volume_id: int) -> None:
        await self._on_catalog(lambda link: names_of.strike(link, self._catalog, tenant, name, volume_id), again=True)

    async def _state(self, volume_id: int) -> _Found | None:
        """Return what is stored of a volume; None if there is nothing."""
        keys = VolumeKeys(self._prefix, volume_id)

        async def work(link: Link) -> Any:
            return await link.command(b"HMGET", keys.volume, b"format", b"deleted")

        text, deleted = await self._reads.call(work, tag=keys.tag, deadline_s=READ_DEADLINE_S, again=True)
        return None if text is None else _Found(volume_id, text.decode(), deleted is not None)

    async def _remove(self, volume_id: int) -> None:
        """Remove the keys of a volume that was deleted, the hash last, and forget it."""
        keys = VolumeKeys(self._prefix, volume_id)
        await self._on_volume(keys, lambda link: owning.disown(link, keys), again=True)
        for table in TABLES:
            is_more = True
            while is_more:
                is_more = await self._on_volume(keys, partial(_remove_some, keys=keys, table=table), again=True)
                await asyncio.sleep(_REMOVE_PAUSE_S if is_more else 0)
        await self._on_volume(keys, lambda link: link.command(b"UNLINK", keys.volume), again=True)
        await self._on_catalog(lambda link: names_of.settle_doom(link, self._catalog, volume_id), again=True)

    async def _on_volume(self, keys: VolumeKeys, work: Callable[[Link], Awaitable[T]], *, again: bool = False) -> T:
        return await self._changes.call(work, tag=keys.tag, deadline_s=CHANGE_DEADLINE_S, again=again)

    async def _on_catalog(self, work: Callable[[Link], Awaitable[T]], *, again: bool = False) -> T:
        return await self._changes.call(work, tag=names_of.TAG, deadline_s=CHANGE_DEADLINE_S, again=again)

    async def _read_catalog(self, work: Callable[[Link], Awaitable[T]]) -> T:
        return await self._reads.call(work, tag=names_of.TAG, deadline_s=READ_DEADLINE_S, again=True)


async def _remove_some(link: Link, keys: VolumeKeys, table: Table) -> bool:
    """Remove some buckets of a table, then their entries in the index; False if there are none."""
    index = keys.indexes[table]
    buckets = await link.command(b"ZRANGE", index, 0, _REMOVED_AT_ONCE - 1)
    if not buckets:
        return False
    await link.command(b"UNLINK", *(keys.bucket(table, bucket) for bucket in buckets))
    await link.command(b"ZREM", index, *buckets)
    return True


def _exists(tenant: str, name: str) -> VolumeExists:
    return VolumeExists(f"volume {tenant}/{name} exists already; choose another name or delete it first")
