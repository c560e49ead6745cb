"""What the PostgreSQL store does and says when the server, its disk, its settings or the address are not as they should be.

Every failure is a real one. The test that mounts a file system of its own needs root.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from chunkstore.geometry import SliceId
from metasvc.errors import Fenced, NotOwner, StoreError, StoreRefused, VolumeExists, VolumeMissing
from metasvc.model import ROOT_INO, Counter, Dentry, Ino, Slice
from metasvc.store.open import open_store, without_password
from metasvc.store.postgresql import PostgresqlStore
from metasvc.store.postgresql.address import Address
from metasvc.store.postgresql.connections import Lane
from metasvc.store.postgresql.foreign_errors import Unavailable, translate
from metasvc.store.tables import COUNTER, INODE, SLICE, Batch
from tests.metasvc.store.contract import NOTHING, acquire, all_rows
from tests.metasvc.store.postgresql_world import PostgresqlWorld
from tests.metasvc.store.rows_of import INT64_MAX, batch_of, volume_format
from tests.servers.ports import HOST, free_ports
from tests.servers.postgresql import PASSWORD, ROLE, PostgreSQL
from tests.servers.postgresql_proxy import Fault, PostgresqlProxy


@pytest.fixture
def world(postgresql: PostgreSQL) -> PostgresqlWorld:
    return PostgresqlWorld(postgresql)


# -- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "at", "connections"),
    [
        ("postgresql://u:secret@db.example:5433/names", "PostgreSQL at db.example:5433 database names", 8),
        ("postgres://u:secret@[::1]:5433/names?connections=20", "PostgreSQL at [::1]:5433 database names", 20),
        ("postgresql://a:1,b:2/names?target_session_attrs=read-write", "PostgreSQL at a:1,b:2 database names", 8),
        ("postgresql:///names?host=/run/postgresql", "PostgreSQL database names", 8),
        ("postgresql://", "PostgreSQL", 8),
    ],
)
def test_an_address_is_shown_without_user_and_password(url: str, at: str, connections: int) -> None:
    address = Address.parse(url)
    assert (address.at, address.connections) == (at, connections)
    assert "connections" not in address.url


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:sec/ret@host/db",
        "postgresql://u:secret@host:port/db",
        "postgresql://u:secret@host:99999/db",
        "postgresql://u:secret@[::1/db",
        "postgresql://u:secret@host/db?connections=many",
        "postgresql://u:secret@host/db?connections=1",
        "postgresql://u:secret@host/db?connections",
        "postgresql://u:secret@host/db#secret",
        "postgres+ssl://u:secret@host/db",
        "pgsql://u:secret@host/db",
    ],
)
async def test_what_is_no_url_of_a_database_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(StoreError) as refusal:
        await open_store(url)
    assert "sec" not in str(refusal.value)
    assert refusal.value.__cause__ is None
    assert "sec" not in without_password(url).replace("#secret", "") or "sec/ret" in url


async def test_a_password_with_any_characters_works_and_a_wrong_one_is_told_without_it(world: PostgresqlWorld) -> None:
    async with world.running():
        await world.process()
    wrong = world.url.replace(world.url[len(f"postgresql://{ROLE}:") : world.url.index("@")], "wr%40ng")
    with pytest.raises(StoreError, match=r"refused user or password.*pg_hba.conf") as refusal:
        await open_store(wrong)
    assert "wr@ng" not in str(refusal.value)
    assert PASSWORD not in str(refusal.value)


async def test_a_database_or_schema_that_is_not_there_says_how_to_make_it(world: PostgresqlWorld) -> None:
    with pytest.raises(StoreError, match=r"there is no database .*createdb"):
        await open_store(world.server.url(database="absent"), create=True)
    with pytest.raises((StoreError, VolumeMissing), match=r"schema|prepared"):
        await open_store(world.server.url(search_path="absent"), create=True)


async def test_a_server_that_is_not_there_says_so() -> None:
    with pytest.raises(
        Unavailable, match=f"the connection to PostgreSQL at {HOST}:.* was lost: see whether the server runs"
    ):
        await open_store(f"postgresql://u:secret@{HOST}:{free_ports(1)[0]}/names")


async def test_a_user_without_rights_is_told(world: PostgresqlWorld) -> None:
    await world.make()
    await world.sql(f"ALTER SCHEMA {world.schema} OWNER TO postgres")
    await world.sql(f"GRANT USAGE ON SCHEMA {world.schema} TO {ROLE}")
    with pytest.raises(StoreError, match=r"too few rights"):
        await open_store(world.url, create=True)


async def test_a_database_of_another_encoding_is_refused(world: PostgresqlWorld) -> None:
    await world.make()
    name = f"{world.schema}_latin"
    await world.sql(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING LATIN1 LOCALE 'C' OWNER {ROLE}")
    with pytest.raises(StoreError, match=r"encoding LATIN1: make a database with createdb --template template0"):
        await open_store(world.server.url(database=name), create=True)


# -- settings of server and role --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting",
    [
        "default_transaction_isolation = 'serializable'",
        "default_transaction_isolation = 'repeatable read'",
        "default_transaction_read_only = on",
        "synchronous_commit = off",
        "plan_cache_mode = force_custom_plan",
        "statement_timeout = 1",
        "bytea_output = 'escape'",
        "timezone = 'Asia/Kathmandu'",
        "datestyle = 'German'",
        "intervalstyle = 'sql_standard'",
    ],
)
async def test_settings_of_the_role_do_not_change_what_is_promised(own_role: PostgresqlWorld, setting: str) -> None:
    world = own_role
    await world.sql(f"ALTER ROLE {ROLE} SET {setting}")
    async with world.running():
        first, second = await world.volume(), await world.volume()
        owner = await acquire(first)
        await first.commit(owner, 1, batch_of(Counter("n", 1)))
        with pytest.raises(NotOwner) as refusal:
            await acquire(second, nonce="second")
        assert 20 < refusal.value.expires_in_s <= 30
        await world.lapse()
        committing = [asyncio.create_task(first.commit(owner, 2, batch_of(Counter("n", 2))))]
        taken = await acquire(second, nonce="second")
        await asyncio.gather(*committing, return_exceptions=True)
        assert taken.last_batch in (1, 2)
        assert await second.scan(COUNTER, after=None, limit=9) == [Counter("n", taken.last_batch)]
        with pytest.raises(Fenced):
            await first.commit(owner, taken.last_batch + 1, NOTHING)
        assert isinstance(await world.process(), PostgresqlStore)


@pytest.fixture
def own_role(postgresql: PostgreSQL) -> Iterator[PostgresqlWorld]:
    """Make a world whose test may change the role's settings and limit."""
    yield PostgresqlWorld(postgresql)
    postgresql.sql(f"ALTER ROLE {ROLE} RESET ALL; ALTER ROLE {ROLE} CONNECTION LIMIT -1")


async def test_a_session_waits_for_the_disk_whatever_the_role_says(own_role: PostgresqlWorld) -> None:
    for said, shown in (("off", "on"), ("on", "on"), ("remote_apply", "remote_apply"), ("local", "local")):
        await own_role.sql(f"ALTER ROLE {ROLE} SET synchronous_commit = {said}")
        lane = Lane(Address.parse(own_role.server.url()), limit=1)
        answer = await lane.call(lambda connection: connection.fetchval("SHOW synchronous_commit"), deadline_s=30)
        assert answer == shown
        await lane.close()


async def test_a_server_that_may_lose_what_it_acknowledged_is_warned_of(
    server_programs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with PostgreSQL(server_programs, settings={"fsync": "off"}) as server:
        store = await open_store(server.url(), create=True)
        await store.close()
    assert "runs with fsync = off" in caplog.text
    assert PASSWORD not in caplog.text


async def test_where_no_more_connections_are_to_be_had_those_that_are_there_do_the_work(
    own_role: PostgresqlWorld,
) -> None:
    world = own_role
    world.connections = 10
    async with world.running():
        volume = await world.volume()
        owner = await acquire(volume)
        there = await world.number("SELECT count(*) FROM pg_stat_activity WHERE usename = $1", ROLE)
        await world.sql(f"ALTER ROLE {ROLE} CONNECTION LIMIT {there}")
        await volume.commit(owner, 1, batch_of(Counter("n", 1)))
        loads = [volume.scan(COUNTER, after=None, limit=1) for _ in range(20)]
        assert await asyncio.gather(*loads) == [[Counter("n", 1)]] * 20
        await volume.renew(owner, ttl_s=30)
        with pytest.raises(StoreError, match=r"has no connection left: raise max_connections"):
            await PostgresqlStore.open(world.url)
        await world.sql(f"ALTER ROLE {ROLE} CONNECTION LIMIT -1")
        await world.process()


# -- a server that does not answer ------------------------------------------------------------------------------------


async def test_a_server_that_stands_still_is_given_up_and_used_again_when_it_goes_on(
    own_postgresql: PostgreSQL,
) -> None:
    lane = Lane(Address.parse(own_postgresql.url()), limit=1)

    async def one(connection: asyncpg.Connection) -> int:
        return int(await connection.fetchval("SELECT 1"))

    assert await lane.call(one, deadline_s=30) == 1
    with own_postgresql.paused():
        with pytest.raises(Unavailable, match=r"did not answer in time"):
            await lane.call(one, deadline_s=0.3)
        hanging = asyncio.create_task(lane.call(one, deadline_s=1))
        await asyncio.sleep(0)
        with pytest.raises(StoreError, match=r"all 1 connections .* were busy"):
            await lane.call(one, deadline_s=0.1)
        with pytest.raises(Unavailable):
            await hanging
    assert await lane.call(one, deadline_s=30) == 1
    await lane.close()
    with pytest.raises(StoreError, match=r"is closed"):
        await lane.call(one, deadline_s=1)


async def test_a_connection_that_is_cut_between_two_steps_of_the_driver_is_one_that_was_lost(
    postgresql: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    lane = Lane(Address.parse(postgresql.url()), limit=1)
    driver: Any = asyncpg.Connection
    prepare = driver._get_statement

    async def prepare_and_lose(connection: asyncpg.Connection, *args: Any, **more: Any) -> Any:
        statement = await prepare(connection, *args, **more)
        connection.terminate()
        return statement

    monkeypatch.setattr(driver, "_get_statement", prepare_and_lose)
    with pytest.raises(Unavailable, match=r"was lost"):
        await lane.call(lambda connection: connection.fetchval("SELECT $1::int", 1), deadline_s=30)
    monkeypatch.undo()
    assert await lane.call(lambda connection: connection.fetchval("SELECT $1::int", 1), deadline_s=30) == 1

    async def mistaken(_connection: asyncpg.Connection) -> None:
        raise AttributeError("a bug of ours")

    with pytest.raises(AttributeError, match="a bug of ours"):
        await lane.call(mistaken, deadline_s=30)
    await lane.close()


async def test_an_error_that_comes_when_nobody_waits_any_more_is_nobodys_bug(
    postgresql: PostgreSQL, caplog: pytest.LogCaptureFixture
) -> None:
    lane = Lane(Address.parse(postgresql.url()), limit=1)
    goes_on = asyncio.Event()

    async def refused(connection: asyncpg.Connection) -> None:
        goes_on.set()
        await connection.execute("SELECT pg_sleep(0.2)")
        raise Fenced("a renewal that comes too late")

    call = asyncio.create_task(lane.call(refused, deadline_s=30))
    await goes_on.wait()
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    while lane._tasks:
        await asyncio.sleep(0.01)
    gc.collect()
    assert caplog.text == ""
    await lane.close()


async def test_a_commit_whose_connection_swallows_it_ends_and_is_settled(
    world: PostgresqlWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metasvc.store.postgresql.volume.CHANGE_DEADLINE_S", 1.0)
    async with PostgresqlProxy(world.server.port) as proxy, world.running():
        world.port = proxy.port
        volume = await world.volume()
        owner = await acquire(volume)
        proxy.plan("SET last_batch", Fault.SWALLOWED)
        with pytest.raises(Unavailable, match=r"did not answer in time"):
            await volume.commit(owner, 1, NOTHING)
        assert await volume.last_batch(owner) == 0
        await volume.commit(owner, 1, NOTHING)


async def test_a_row_that_somebody_holds_is_waited_for_a_while_and_told(world: PostgresqlWorld) -> None:
    async with world.running():
        volume = await world.volume()
        owner = await acquire(volume)
        holder = await world.server.administrator()
        async with holder.transaction():
            await holder.execute(f"SELECT 1 FROM {world.schema}.volume FOR UPDATE")
            with pytest.raises(StoreError, match=r"a lock in .* was held for too long: end what holds it"):
                await volume.commit(owner, 1, batch_of(Counter("n", 1)))
            assert await volume.scan(COUNTER, after=None, limit=9) == []
        await holder.close()
        assert await volume.last_batch(owner) == 0
        await volume.commit(owner, 1, batch_of(Counter("n", 1)))


async def test_a_store_that_is_closed_lets_a_commit_end_and_answers_nothing_afterwards(world: PostgresqlWorld) -> None:
    async with world.running():
        store = await world.process()
        await store.create_volume(volume_format(), NOTHING)
        volume = await store.open_volume("tenant", "volume")
        owner = await acquire(volume)
        committing = asyncio.create_task(volume.commit(owner, 1, batch_of(Counter("n", 1))))
        await asyncio.sleep(0)
        await asyncio.gather(store.close(), store.close())
        await committing
        for call in (volume.load({INODE: [(1,)]}, {}), store.list_volumes(), volume.renew(owner, ttl_s=1)):
            with pytest.raises(StoreError, match=r"is closed"):
                await call
        await store.close()
        assert await (await world.volume()).scan(COUNTER, after=None, limit=9) == [Counter("n", 1)]


async def test_connections_that_an_administrator_ends_are_made_again(world: PostgresqlWorld) -> None:
    async with world.running():
        volume = await world.volume()
        owner = await acquire(volume)
        for number in range(1, 6):
            await world.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = $1", ROLE)
            assert len(await volume.scan(COUNTER, after=None, limit=99)) == number - 1
            await volume.renew(owner, ttl_s=30)
            with contextlib.suppress(StoreError):
                await volume.commit(owner, number, batch_of(Counter(f"{number}", 1)))
            if await volume.last_batch(owner) < number:
                await volume.commit(owner, number, batch_of(Counter(f"{number}", 1)))


# -- a disk that is full ----------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(own_postgresql: PostgreSQL) -> Iterator[Path]:
    """Mount 3 MiB of memory as a tablespace of the server (needs root)."""
    place = own_postgresql.directory / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)], check=True)
    owner = own_postgresql.directory.stat()
    os.chown(place, owner.st_uid, owner.st_gid)
    own_postgresql.sql(f"CREATE TABLESPACE small LOCATION '{place}'")
    own_postgresql.sql(f"GRANT CREATE ON TABLESPACE small TO {ROLE}")
    yield place
    # The server, which ends later, has files open there.
    subprocess.run(["umount", "-l", str(place)], check=True)


def _batch(number: int) -> Batch:
    slices = [Slice(SliceId(number * 10 + n), 10_000, 1, 0, os.urandom(10_000)) for n in range(10)]
    return batch_of(*slices, Counter(f"{number}", number))


async def test_a_full_disk_refuses_a_batch_whole_and_takes_it_when_there_is_room(
    own_postgresql: PostgreSQL, small_disk: Path
) -> None:
    world = PostgresqlWorld(own_postgresql)
    async with world.running():
        await world.make()
        url = f"{world.url}&default_tablespace=small"
        store = await open_store(url, create=True)
        await store.create_volume(volume_format(), NOTHING)
        volume = await store.open_volume("tenant", "volume")
        owner = await acquire(volume)
        number = 0

        async def fill() -> None:
            nonlocal number
            while number < 100:
                await volume.commit(owner, number + 1, _batch(number))
                number += 1

        with pytest.raises(StoreError, match=r"the disk of .* is full: free some space there") as failure:
            await fill()
        assert not isinstance(failure.value, StoreRefused)
        assert number >= 1
        assert await volume.last_batch(owner) == number
        assert len(await volume.scan(SLICE, after=None, limit=1000)) == number * 10
        subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
        await volume.commit(owner, number + 1, _batch(number))
        assert len(await volume.scan(SLICE, after=None, limit=1000)) == (number + 1) * 10
        await store.close()


# -- rows and volumes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        Slice(SliceId(INT64_MAX + 1), 0, 1, 0, b""),
        Slice(SliceId(5), 0, 1, 0, "text"),  # type: ignore[arg-type]
        Slice(SliceId(5), 0, 1, 0, None),  # type: ignore[arg-type]
        Slice(SliceId(5), "x", 1, 0, b""),  # type: ignore[arg-type]
        Counter("\udcff", 1),
        Counter("a\0b", 1),
        Counter(b"bytes", 1),  # type: ignore[arg-type]
    ],
    ids=repr,
)
async def test_a_batch_with_a_row_that_does_not_fit_is_not_applied_at_all(world: PostgresqlWorld, row: Any) -> None:
    async with world.running():
        volume = await world.volume()
        owner = await acquire(volume)
        await volume.commit(owner, 1, batch_of(Counter("kept", 1)))
        with pytest.raises(StoreRefused, match=r"does not fit"):
            await volume.commit(owner, 2, batch_of(Counter("lost", 1), Dentry(ROOT_INO, b"n", Ino(2), 0), row))
        assert await volume.last_batch(owner) == 1
        assert {table: rows for table, rows in (await all_rows(volume)).items() if rows} == {
            COUNTER: [Counter("kept", 1)]
        }
        await volume.commit(owner, 2, batch_of(Counter("next", 2)))


async def test_a_volume_whose_first_rows_do_not_fit_is_not_created(world: PostgresqlWorld) -> None:
    async with world.running():
        store = await world.process()
        with pytest.raises(StoreRefused, match=r"does not fit"):
            await store.create_volume(volume_format(), batch_of(Counter("fits", 1), Counter("\udcff", 1)))
        assert list(await store.list_volumes()) == []
        await store.create_volume(volume_format(), batch_of(Counter("fits", 1)))
        with pytest.raises(VolumeExists):
            await store.create_volume(volume_format(), batch_of(Counter("other", 1)))
        volume = await store.open_volume("tenant", "volume")
        assert await volume.scan(COUNTER, after=None, limit=9) == [Counter("fits", 1)]


async def test_of_processes_that_create_one_volume_at_once_one_does(world: PostgresqlWorld) -> None:
    async with world.running():
        stores = [await world.process() for _ in range(5)]
        answers = await asyncio.gather(
            *(store.create_volume(volume_format(), batch_of(Counter(f"{n}", n))) for n, store in enumerate(stores)),
            return_exceptions=True,
        )
        assert sum(isinstance(answer, VolumeExists) for answer in answers) == 4
        volume = await stores[0].open_volume("tenant", "volume")
        assert await volume.scan(COUNTER, after=None, limit=9) == [
            Counter(f"{answers.index(None)}", answers.index(None))
        ]


async def test_a_deleted_volume_cannot_be_acquired(world: PostgresqlWorld) -> None:
    async with world.running():
        volume, store = await world.volume(), await world.process()
        await store.delete_volume("tenant", "volume")
        with pytest.raises(Fenced, match=r"deleted"):
            await acquire(volume)


async def test_deleting_a_volume_lets_others_commit_meanwhile(world: PostgresqlWorld) -> None:
    async with world.running():
        store = await world.process()
        for name in ("volume", "other"):
            await store.create_volume(volume_format(name=name), NOTHING)
        volume, other = await store.open_volume("tenant", "volume"), await store.open_volume("tenant", "other")
        owner, other_owner = await acquire(volume), await acquire(other)
        await volume.commit(owner, 1, batch_of(*(Dentry(Ino(1), b"%d" % n, Ino(n), 0) for n in range(30_000))))
        await volume.release(owner)
        deleting = asyncio.create_task(store.delete_volume("tenant", "volume"))
        commits = 0
        while not deleting.done():
            commits += 1
            await other.commit(other_owner, commits, NOTHING)
        await deleting
        assert commits >= 3
        assert await world.number(f"SELECT count(*) FROM {world.schema}.dentry") == 0
        assert await world.number(f"SELECT count(*) FROM {world.schema}.volume") == 1


async def test_rows_left_of_a_deletion_that_was_cut_short_go_with_the_next_one(world: PostgresqlWorld) -> None:
    async with world.running():
        volume = await world.volume()
        owner = await acquire(volume)
        await volume.commit(owner, 1, batch_of(*(Dentry(Ino(1), b"%d" % n, Ino(n), 0) for n in range(100))))
        await world.sql(
            f"UPDATE {world.schema}.volume SET tenant = NULL, name = NULL, owner_nonce = NULL, epoch = epoch + 1"
        )
        with pytest.raises(Fenced):
            await volume.commit(owner, 2, NOTHING)
        store, same = await world.process(), await world.process()
        assert list(await store.list_volumes()) == []
        for name in ("other", "third"):
            await store.create_volume(volume_format(name=name), batch_of(Counter("a", 1)))
        assert await world.number(f"SELECT count(*) FROM {world.schema}.dentry") == 100
        await asyncio.gather(store.delete_volume("tenant", "other"), same.delete_volume("tenant", "third"))
        for table in ("dentry", "counter", "volume"):
            assert await world.number(f"SELECT count(*) FROM {world.schema}.{table}") == 0


async def test_an_unexpected_exception_reaches_the_caller_and_the_next_call_works(world: PostgresqlWorld) -> None:
    async with world.running():
        volume = await world.volume()
        with pytest.raises(AttributeError):
            await volume.scan("inode", after=None, limit=1)  # type: ignore[arg-type]
        assert not (await volume.load({INODE: [(1,)]}, {})).rows.get(INODE)


# -- the table of errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "kind", "text"),
    [
        ("08006", Unavailable, "the connection to DB was lost"),
        ("57P01", Unavailable, "DB shut down or ended the connection"),
        ("57P02", Unavailable, "the connection to DB was lost"),
        ("57P03", Unavailable, "DB is starting up or shutting down"),
        ("25006", Unavailable, "DB is read-only, as a standby is: name the primary"),
        ("53300", Unavailable, "DB has no connection left"),
        ("40001", Unavailable, "DB took something else first"),
        ("40P01", Unavailable, "DB took something else first"),
        ("53100", StoreError, "the disk of DB is full: free some space there"),
        ("53200", StoreError, "DB ran out of memory or another resource"),
        ("55P03", StoreError, "a lock in DB was held for too long"),
        ("57014", StoreError, "DB took too long and was interrupted"),
        ("58030", StoreError, "DB cannot read or write its files"),
        ("42501", StoreError, "the user has too few rights in DB"),
        ("22P02", StoreRefused, "a row does not fit the schema of DB"),
        ("23502", StoreRefused, "a row does not fit the schema of DB"),
        ("54000", StoreRefused, "a batch is too large for DB"),
        ("42P01", StoreRefused, "the schema of DB is not as AtollFS made it"),
        ("XX001", StoreRefused, "DB is damaged"),
        ("P0001", StoreError, "DB could not do it: see the cause"),
    ],
)
async def test_each_error_of_the_server_becomes_one_line_with_a_remedy(
    postgresql: PostgreSQL, state: str, kind: type[StoreError], text: str
) -> None:
    connection = await postgresql.administrator()
    with pytest.raises(asyncpg.PostgresError) as failure:
        await connection.execute(f"DO $$ BEGIN RAISE EXCEPTION 'said\nso' USING ERRCODE = '{state}'; END $$")
    await connection.close()
    translated = translate(failure.value, "DB")
    assert type(translated) is kind
    assert str(translated).startswith(text)
    assert str(translated).endswith(f"({state} said so)")
