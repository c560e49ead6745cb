"""The quota of a tenant holds for all its volumes together, whoever owns them, and whatever becomes of their owners."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from metasvc.engine import Engine, EngineAdmin, EngineSession, first_rows
from metasvc.engine.accounts import USED_BYTES, USED_INODES
from metasvc.errors import Fenced, FsError, StoreError, TenantFull
from metasvc.model import ROOT_INO, SPACE_UNIT_BYTES, TenantUse
from metasvc.server.tenant_space import Limits, TenantSpace, limits_name, read_shares
from metasvc.store.memory import MemoryStore
from tests.metasvc.engine.volumes import ROOT, Opened, volume_format

TENANT = "local"


class Doubtful(MemoryStore):
    """A store whose settings take their time, and sometimes are not changed, or changed without a word."""

    def __init__(self, rand: random.Random) -> None:
        super().__init__()
        self.rand = rand
        self.fails = 0.0

    async def _doubt(self) -> None:
        await asyncio.sleep(self.rand.choice((0, 0, 0.001)))
        if self.rand.random() < self.fails:
            raise StoreError("the connection was lost")

    async def setting(self, name: str) -> bytes | None:
        await asyncio.sleep(self.rand.choice((0, 0, 0.001)))
        return await super().setting(name)

    async def create_setting(self, name: str, value: bytes) -> bool:
        await self._doubt()
        done = await super().create_setting(name, value)
        await self._doubt()
        return done

    async def replace_setting(self, name: str, value: bytes, *, expected: bytes) -> bool:
        await self._doubt()
        done = await super().replace_setting(name, value, expected=expected)
        await self._doubt()
        return done


async def limit(store: MemoryStore, limits: Limits) -> None:
    name = limits_name(TENANT)
    await MemoryStore.delete_setting(store, name)
    await MemoryStore.create_setting(store, name, json.dumps(limits._asdict()).encode())


@dataclass
class Owned:
    """A volume, and the process that owns it."""

    store: MemoryStore
    name: str
    engine: Engine = field(init=False)
    space: TenantSpace = field(init=False)
    opened: Opened = field(init=False)
    session: EngineSession = field(init=False)

    async def make(self) -> None:
        form = volume_format(name=self.name, uuid=f"uuid of {self.name}")
        await self.store.create_volume(form, first_rows(form))
        await self.own()

    async def own(self) -> None:
        """Become the owner, as another process."""
        self.engine = await Engine.open(await self.store.open_volume(TENANT, self.name), address=self.name)
        self.space = TenantSpace(self.store)
        while True:
            with contextlib.suppress(StoreError):
                await self.space.admit(self.engine)
                break
        self.session = await EngineSession.begin(self.engine, host="test", pid=1)
        self.opened = Opened(self.engine, self.session, EngineAdmin(self.engine))

    async def end(self) -> None:
        self.space.leave(self.engine)
        with contextlib.suppress(Fenced):
            await self.session.__aexit__(None, None, None)
        await self.engine.close()

    async def look(self) -> None:
        with contextlib.suppress(StoreError):
            await self.space._look(TENANT, [self.engine])

    async def write(self, name: bytes, units: int) -> None:
        """Make a file of so many units of space."""
        meta = self.session
        made = await meta.mknod(ROOT, ROOT_INO, name, mode=0o100644)
        try:
            await self.opened.write(made.ino, 0, b"x" * (units * SPACE_UNIT_BYTES))
        except (FsError, StoreError):
            await meta.unlink(ROOT, ROOT_INO, name)
            raise

    @property
    def used_bytes(self) -> int:
        return self.engine.counter(USED_BYTES)

    @property
    def used_inodes(self) -> int:
        return self.engine.counter(USED_INODES)


@contextlib.asynccontextmanager
async def volumes(store: MemoryStore, count: int) -> AsyncIterator[list[Owned]]:
    owned = [Owned(store, f"v{number}") for number in range(count)]
    for each in owned:
        await each.make()
    try:
        yield owned
    finally:
        for each in owned:
            await each.end()


async def test_volumes_hold_together_what_the_tenant_may_hold() -> None:
    store = MemoryStore()
    await limit(store, Limits(max_bytes=10 * SPACE_UNIT_BYTES))
    async with volumes(store, 2) as (one, other):
        await one.write(b"six", 6)
        with pytest.raises(FsError):
            await other.write(b"four", 4)  # some is taken ahead
        await one.look()
        # The root directories, the file, and in the trash the one that was given up.
        assert one.space.uses == {TENANT: TenantUse(6 * SPACE_UNIT_BYTES, 4, 10 * SPACE_UNIT_BYTES, 0)}
        await asyncio.sleep(0.6)  # nobody asks again for so long
        await other.write(b"four", 4)
        for each in (one, other):
            with pytest.raises(FsError) as refused:
                await each.write(b"more", 1)
            assert refused.value.errno == errno.EDQUOT
        await one.session.unlink(ROOT, ROOT_INO, b"six")
        await one.look()
        await asyncio.sleep(0.6)
        await other.write(b"more", 5)


async def test_inodes_are_limited_too() -> None:
    store = MemoryStore()
    async with volumes(store, 2) as (one, other):
        await limit(store, Limits(max_inodes=one.used_inodes + other.used_inodes + 3))
        await one.look()
        await other.look()
        for name in (b"a", b"b"):
            await one.write(name, 1)
        await other.write(b"c", 1)
        for each in (one, other):
            with pytest.raises(FsError) as refused:
                await each.write(b"d", 1)
            assert refused.value.errno == errno.EDQUOT


async def test_what_was_there_before_the_quota_stays_and_nothing_is_added() -> None:
    store = MemoryStore()
    async with volumes(store, 2) as (one, other):
        await one.write(b"eight", 8)
        await limit(store, Limits(max_bytes=5 * SPACE_UNIT_BYTES))
        await one.look()
        await other.look()
        for each in (one, other):
            with pytest.raises(FsError):
                await each.write(b"more", 1)
        assert one.used_bytes == 8 * SPACE_UNIT_BYTES
        await limit(store, Limits())
        await other.look()
        await other.write(b"more", 100)


async def test_room_is_promised_within_the_quota() -> None:
    """EDQUOT comes from the reservation, so from write(2), and not first from close(2)."""
    store = MemoryStore()
    await limit(store, Limits(max_bytes=100 * SPACE_UNIT_BYTES))
    async with volumes(store, 2) as (one, other):
        made = await one.session.create(ROOT, ROOT_INO, b"big", mode=0o644, exclusive=True)
        assert made.promised_end == 0
        end = await one.session.reserve(made.inode.ino, end=60 * SPACE_UNIT_BYTES)
        assert 60 * SPACE_UNIT_BYTES <= end <= 100 * SPACE_UNIT_BYTES
        mine = await other.session.create(ROOT, ROOT_INO, b"big", mode=0o644, exclusive=True)
        with pytest.raises(FsError) as refused:
            await other.session.reserve(mine.inode.ino, end=50 * SPACE_UNIT_BYTES)
        assert refused.value.errno == errno.EDQUOT
        await one.session.release(made.inode.ino)
        await one.look()
        await asyncio.sleep(0.6)
        await other.session.reserve(mine.inode.ino, end=90 * SPACE_UNIT_BYTES)


async def test_statfs_tells_what_is_left() -> None:
    store = MemoryStore()
    await limit(store, Limits(max_bytes=100 * SPACE_UNIT_BYTES, max_inodes=50))
    async with volumes(store, 2) as (one, other):
        await one.write(b"ten", 10)
        await other.look()
        found = await other.session.statfs(ROOT_INO)
        left = found.total_bytes - found.used_bytes
        assert 60 * SPACE_UNIT_BYTES <= left <= 90 * SPACE_UNIT_BYTES
        assert 30 <= found.total_inodes - found.used_inodes <= 48


async def test_the_share_of_a_volume_that_was_deleted_is_given_back() -> None:
    store = MemoryStore()
    await limit(store, Limits(max_bytes=10 * SPACE_UNIT_BYTES))
    async with volumes(store, 2) as (one, other):
        await one.write(b"ten", 10)
        await one.end()
        # As if the process had ended between deleting the volume and giving back its share.
        await store.delete_volume(TENANT, one.name)
        await other.write(b"ten", 10)
        assert set(await read_shares(store, TENANT)) == {other.engine.format.uuid}
        await one.make()


async def test_an_owner_that_was_succeeded_changes_no_share() -> None:
    store = MemoryStore(clock=lambda: next(times))
    times = iter(range(0, 10_000_000, 100))
    await limit(store, Limits(max_bytes=100 * SPACE_UNIT_BYTES))
    async with volumes(store, 1) as (former,):
        successor = Owned(store, former.name)
        await successor.own()
        await successor.write(b"x", 50)
        before = await read_shares(store, TENANT)
        with pytest.raises(StoreError, match="another owner"):
            await former.space._take(former.engine, _wanting(SPACE_UNIT_BYTES))
        await former.look()
        assert await read_shares(store, TENANT) == before
        await successor.end()


def _wanting(bytes_more: int) -> TenantFull:
    return TenantFull(bytes_more=bytes_more, inodes_more=0)


async def test_the_quota_holds_through_lost_answers_and_changes_of_owners(seed: int) -> None:
    """Random work on three volumes in as many processes, whose settings get lost at times: never more is used than may be."""
    rand = random.Random(seed)
    store = Doubtful(rand)
    most = Limits(max_bytes=100 * SPACE_UNIT_BYTES, max_inodes=80)
    await limit(store, most)
    refused = written = 0
    async with volumes(store, 3) as owned:
        store.fails = 0.1

        async def work(each: Owned) -> None:
            nonlocal refused, written
            names: list[bytes] = []
            for number in range(150):
                name = b"%d" % number
                try:
                    if names and rand.random() < 0.4:
                        await each.session.unlink(ROOT, ROOT_INO, names.pop(rand.randrange(len(names))))
                    else:
                        await each.write(name, rand.randrange(1, 6))
                        names.append(name)
                        written += 1
                except StoreError:
                    pass
                except FsError as error:
                    if error.errno != errno.EDQUOT:
                        raise
                    refused += 1
                assert sum(one.used_bytes for one in owned) <= most.max_bytes
                assert sum(one.used_inodes for one in owned) <= most.max_inodes
                what = rand.random()
                if what < 0.1:
                    await each.look()
                elif what < 0.13:
                    await each.end()
                    await each.own()

        await asyncio.gather(*map(work, owned))
        assert written > 20
        assert refused > 0
        store.fails = 0.0
        for each in owned:
            await each.look()
        shares = await read_shares(store, TENANT)
        assert sum(share.max_bytes for share in shares.values()) <= most.max_bytes
        for each in owned:
            assert shares[each.engine.format.uuid].used_bytes == each.used_bytes
            assert each.engine.allowance.max_bytes == shares[each.engine.format.uuid].max_bytes
