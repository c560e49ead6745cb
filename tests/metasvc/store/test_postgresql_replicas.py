"""PostgreSQL with a standby: what an acknowledgement means then, and a fail-over."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import pytest

from metasvc.errors import StoreError
from metasvc.model import Counter
from metasvc.store import Ownership, VolumeStore
from metasvc.store.open import open_store
from metasvc.store.postgresql.foreign_errors import Unavailable
from metasvc.store.tables import COUNTER
from tests.metasvc.store.contract import NOTHING, acquire
from tests.metasvc.store.rows_of import batch_of, volume_format
from tests.servers.ports import HOST
from tests.servers.postgresql import PostgreSQL


@pytest.fixture
def standby(own_postgresql: PostgreSQL) -> Iterator[PostgreSQL]:
    """Give the server a standby that has to have each batch before it is acknowledged."""
    with own_postgresql.standby() as standby:
        own_postgresql.sql("ALTER SYSTEM SET synchronous_standby_names = 'standby'")
        own_postgresql.sql("SELECT pg_reload_conf()")
        yield standby


async def last_batch_in_the_end(volume: VolumeStore, owner: Ownership) -> int:
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(StoreError):
                return await volume.last_batch(owner)


async def test_a_batch_is_acknowledged_when_the_standby_has_it(
    own_postgresql: PostgreSQL, standby: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await open_store(own_postgresql.url(), create=True)
    await store.create_volume(volume_format(), NOTHING)
    volume = await store.open_volume("tenant", "volume")
    owner = await acquire(volume)
    await volume.commit(owner, 1, batch_of(Counter("n", 1)))
    monkeypatch.setattr("metasvc.store.postgresql.volume.CHANGE_DEADLINE_S", 1.0)
    with standby.paused():
        with pytest.raises(Unavailable, match=r"did not answer in time"):
            await volume.commit(owner, 2, batch_of(Counter("n", 2)))
        # Nobody is told anything that the standby does not have.
        with pytest.raises(StoreError):
            await volume.last_batch(owner)
        assert await volume.scan(COUNTER, after=None, limit=9) == [Counter("n", 1)]
    assert await last_batch_in_the_end(volume, owner) == 2
    assert await volume.scan(COUNTER, after=None, limit=9) == [Counter("n", 2)]
    await volume.commit(owner, 3, NOTHING)
    await store.close()


async def test_a_standby_alone_is_refused(own_postgresql: PostgreSQL, standby: PostgreSQL) -> None:
    await (await open_store(own_postgresql.url(), create=True)).close()
    with pytest.raises(StoreError, match=r"is a standby: name the primary"):
        await open_store(standby.url())


async def test_an_owner_goes_on_after_a_fail_over_with_all_that_was_acknowledged(
    own_postgresql: PostgreSQL, standby: PostgreSQL
) -> None:
    both = f"{HOST}:{own_postgresql.port},{HOST}:{standby.port}"
    url = own_postgresql.url(target_session_attrs="read-write").replace(f"{HOST}:{own_postgresql.port}", both)
    store = await open_store(url, create=True)
    await store.create_volume(volume_format(), NOTHING)
    volume = await store.open_volume("tenant", "volume")
    owner = await volume.acquire(nonce="first", address="here", ttl_s=3600)
    acknowledged = 0
    wanted = 50

    async def commit_all() -> None:
        nonlocal acknowledged
        while acknowledged < wanted:
            number = acknowledged + 1
            try:
                await volume.commit(owner, number, batch_of(Counter(f"{number:06d}", 1)))
            except StoreError:
                assert await last_batch_in_the_end(volume, owner) in (acknowledged, number)
                acknowledged = await last_batch_in_the_end(volume, owner)
            else:
                acknowledged = number

    await commit_all()
    wanted = 1 << 30
    committing = asyncio.create_task(commit_all())
    while acknowledged < 100 and not committing.done():
        await asyncio.sleep(0.001)
    await asyncio.to_thread(own_postgresql.kill)
    await asyncio.to_thread(standby.promote)
    standby.sql("ALTER SYSTEM RESET synchronous_standby_names")
    standby.sql("SELECT pg_reload_conf()")
    # It goes on with the one that is the primary now.
    wanted = acknowledged + 50
    await committing
    assert acknowledged == wanted
    rows = await volume.scan(COUNTER, after=None, limit=1_000_000)
    assert rows == [Counter(f"{number:06d}", 1) for number in range(1, wanted + 1)]
    assert int(standby.sql("SELECT last_batch FROM volume")) == wanted
    await store.close()
