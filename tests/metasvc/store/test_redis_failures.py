"""What the Redis store does and says when the server, its memory, its settings or the address are not as they should be.

Every failure is a real one.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ResponseError

from chunkstore.geometry import SliceId
from metasvc.errors import Fenced, NotOwner, SchemaTooNew, StoreError, StoreRefused, VolumeExists, VolumeMissing
from metasvc.model import ROOT_INO, Counter, Dentry, Ino, Slice, Xattr
from metasvc.store.open import open_store, without_password
from metasvc.store.redis import catalog
from metasvc.store.redis import ownership as owning
from metasvc.store.redis import server as server_module
from metasvc.store.redis.address import Address
from metasvc.store.redis.connections import Lane, Routes, connect
from metasvc.store.redis.foreign_errors import Unavailable, translate
from metasvc.store.redis.keys import SCHEMA_VERSION, VolumeKeys, shape_of
from metasvc.store.redis.link import Link
from metasvc.store.redis.rows import Changes, Scan, ScanDir
from metasvc.store.tables import COUNTER, DENTRY, INODE, SLICE, TABLES, XATTR, Batch, Row
from tests.metasvc.store.contract import NOTHING, acquire, all_rows
from tests.metasvc.store.redis_guide import rights_of_the_guide
from tests.metasvc.store.redis_world import RedisWorld
from tests.metasvc.store.rows_of import INT64_MAX, batch_of, example_row, volume_format
from tests.servers.ports import HOST, free_ports
from tests.servers.redis import PASSWORD, Redis, RedisAt
from tests.servers.redis_proxy import Fault, RedisProxy


@pytest.fixture
def world(redis: RedisAt) -> RedisWorld:
    return RedisWorld(redis)


@pytest.fixture
def own_world(own_redis: Redis) -> RedisWorld:
    return RedisWorld(own_redis)


# -- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "at", "connections", "prefix"),
    [
        ("redis://u:secret@db.example:6380/3", "Redis at db.example:6380 database 3", 8, "atoll"),
        ("redis://db.example", "Redis at db.example:6379", 8, "atoll"),
        ("rediss://:secret@[::1]:6380/0?connections=20", "Redis at [::1]:6380", 20, "atoll"),
        ("redis://a:1,b:2,c/?prefix=one", "Redis at a:1,b:2,c:6379", 8, "one"),
        ("rediss://a?ssl_ca_certs=/etc/ca.pem", "Redis at a:6379", 8, "atoll"),
    ],
)
def test_an_address_is_shown_without_user_and_password(url: str, at: str, connections: int, prefix: str) -> None:
    address = Address.parse(url)
    assert (address.at, address.connections, address.prefix) == (at, connections, prefix)
    assert "secret" not in repr(address)


@pytest.mark.parametrize(
    "url",
    [
        "redis://u:sec/ret@host/0",
        "redis://u:secret@host:port/0",
        "redis://u:secret@host:99999/0",
        "redis://u:secret@[::1/0",
        "redis://u:secret@/0",
        "redis://u:secret@host/names",
        "redis://u:secret@host/-1",
        "redis://u:secret@host/0?connections=many",
        "redis://u:secret@host/0?connections=1",
        "redis://u:secret@host/0?connections",
        "redis://u:secret@host/0?prefix=",
        "redis://u:secret@host/0?prefix={a}",
        "redis://u:secret@host/0?ssl_ca_certs=/etc/ca.pem",
        "redis://u:secret@host/0?other=1",
        "redis://u:secret@host/0#secret",
        "rediss+x://u:secret@host/0",
    ],
)
async def test_what_is_no_url_of_a_server_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(StoreError) as refusal:
        await open_store(url)
    assert "sec" not in str(refusal.value)
    assert refusal.value.__cause__ is None
    assert "sec" not in without_password(url).replace("#secret", "") or "sec/ret" in url


async def test_a_password_with_any_characters_works_and_a_wrong_one_is_told_without_it(own_world: RedisWorld) -> None:
    async with own_world.running():
        await own_world.process()
    url = own_world.url
    wrong = url.replace(url[url.index("atoll:") + 6 : url.index("@")], "wr%40ng")
    with pytest.raises(StoreError, match=r"refused user or password.*ACL") as refusal:
        await open_store(wrong)
    assert "wr@ng" not in str(refusal.value)
    assert PASSWORD not in str(refusal.value)
    with pytest.raises(StoreError, match=r"refused user or password"):
        await open_store(f"redis://{url.partition('@')[2]}")


async def test_a_server_that_is_not_there_says_so() -> None:
    with pytest.raises(
        Unavailable, match=f"the connection to Redis at {HOST}:.* was lost: see whether the server runs"
    ):
        await open_store(f"redis://u:secret@{HOST}:{free_ports(1)[0]}")


async def test_a_server_that_was_not_prepared_says_how_to(world: RedisWorld) -> None:
    with pytest.raises(VolumeMissing, match=r"run `atoll serve --init"):
        await open_store(world.url)
    assert await world.keys() == set()
    await (await open_store(world.url, create=True)).close()
    await (await open_store(world.url)).close()


async def test_of_several_servers_the_first_one_that_answers_is_used(world: RedisWorld) -> None:
    at = f"{world.server.host}:{world.server.port}"
    url = world.url.replace(at, f"{HOST}:{free_ports(1)[0]},{at}")
    store = await open_store(url, create=True)
    assert list(await store.list_volumes()) == []
    await store.close()


async def test_rediss_encrypts_and_checks_whose_the_server_is(tmp_path: Path) -> None:
    certificate, key = tmp_path / "server.pem", tmp_path / "server.key"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *subject, "-keyout", key, "-out", certificate],
        check=True,
        capture_output=True,
    )
    [port] = free_ports(1)
    files = {"tls_cert_file": str(certificate), "tls_key_file": str(key), "tls_ca_cert_file": str(certificate)}
    with Redis(tls_port=str(port), tls_auth_clients="no", **files) as server:
        url = server.url(port=port).replace("redis://", "rediss://")
        store = await open_store(f"{url}?ssl_ca_certs={certificate}", create=True)
        await store.add_tenant("tenant", created_ns=1)
        assert await store.tenants() == ["tenant"]
        await store.close()
        with pytest.raises(StoreError, match=r"(?i)certificate"):
            await open_store(url)
        with pytest.raises(StoreError):
            await open_store(server.url(port=port))


# -- what is in the server --------------------------------------------------------------------------------------------


async def test_a_newer_schema_is_refused_and_left_alone(world: RedisWorld) -> None:
    async with world.running():
        await world.volume()
        await world.command("SET", f"{world.prefix}:{{catalog}}:schema", SCHEMA_VERSION + 1)
        before = {key: await world.command("DUMP", key) for key in await world.keys()}
        for create in (False, True):
            with pytest.raises(SchemaTooNew, match=rf"schema version {SCHEMA_VERSION + 1}.*upgrade AtollFS"):
                await open_store(world.url, create=create)
        assert {key: await world.command("DUMP", key) for key in await world.keys()} == before


@pytest.mark.parametrize("value", ["", "x", "-1", "1.5"])
async def test_a_schema_that_is_none_is_refused(world: RedisWorld, value: str) -> None:
    await world.command("SET", f"{world.prefix}:{{catalog}}:schema", value)
    with pytest.raises(StoreError, match=r"something else under .*:schema"):
        await open_store(world.url, create=True)


async def test_names_without_a_schema_are_not_taken_for_a_new_store(world: RedisWorld) -> None:
    async with world.running():
        await world.volume()
        await world.command("DEL", f"{world.prefix}:{{catalog}}:schema")
        with pytest.raises(StoreError, match=r"no version of the schema: restore it"):
            await open_store(world.url, create=True)


async def test_keys_are_those_that_are_documented_and_none_expires(world: RedisWorld) -> None:
    """The names, types and fields of metasvc.store.redis.keys, as a server has them."""
    async with world.running():
        store = await world.process()
        await store.add_tenant("tenant", created_ns=1)
        await store.create_setting("a", b"b")
        volume = await world.volume()
        owner = await acquire(volume)
        rows: dict[Any, list[Row]] = {table: [example_row(table, number) for number in range(5)] for table in TABLES}
        await volume.commit(owner, 1, Batch(rows, {}))
        start = (await world.volume_key()).removesuffix("volume")
        catalog = f"{world.prefix}:{{catalog}}:"
        expected = {
            f"{catalog}schema": b"string",
            f"{catalog}last_volume": b"string",
            f"{catalog}volumes": b"zset",
            f"{catalog}tenants": b"zset",
            f"{catalog}settings": b"hash",
            f"{start}volume": b"hash",
        }
        expected |= {f"{start}{table.name}": b"zset" for table in TABLES}
        found = {key: await world.command("TYPE", key) for key in await world.keys()}
        buckets = {key: kind for key, kind in found.items() if key.decode("latin-1") not in expected}
        assert {key.decode(): kind for key, kind in found.items() if key not in buckets} == expected
        for key, kind in buckets.items():
            name = key.removeprefix(start.encode()).partition(b":")[0].decode()
            (table,) = [table for table in TABLES if table.name == name]
            assert kind == (b"zset" if table.grouped or table is COUNTER else b"hash")
        assert {await world.command("TTL", key) for key in found} == {-1}
        fields = (await world.command("HGETALL", f"{start}volume"))[::2]
        assert set(fields) == {b"format", b"epoch", b"attempt", b"last_batch", b"nonce", b"address", b"expires"}


async def test_buckets_without_rows_are_in_no_index(world: RedisWorld) -> None:
    async with world.running():
        volume = await world.volume()
        owner = await acquire(volume)
        before = await world.keys()
        rows: dict[Any, list[Row]] = {
            table: [example_row(table, 97 * number) for number in range(40)] for table in TABLES
        }
        await volume.commit(owner, 1, Batch(rows, {}))
        assert len(await world.keys()) > len(before) + 2 * len(TABLES)
        await volume.commit(
            owner, 2, Batch({}, {table: [table.key_of(row) for row in rows[table]] for table in TABLES})
        )
        assert await world.keys() == before


# -- rows of wrong types ----------------------------------------------------------------------------------------------


def _wide_batch(number: int) -> Batch:
    rows: dict[Any, list[Row]] = {
        table: [example_row(table, n) for n in range(number, number + 200, 9)] for table in TABLES
    }
    return Batch(rows, {})


@pytest.mark.parametrize("table", TABLES, ids=repr)
@pytest.mark.parametrize("what", ["index", "bucket"])
async def test_a_script_that_meets_a_key_of_another_type_changes_nothing(
    world: RedisWorld, table: Any, what: str
) -> None:
    async with world.running():
        volume = await world.volume()
        owner = await acquire(volume)
        await volume.commit(owner, 1, NOTHING)
        index = (await world.volume_key()).removesuffix("volume") + table.name
        rows = _wide_batch(3).puts[table]
        last = max(shape_of[table].bucket(table.key_of(row)) for row in rows)
        key = index.encode() + (b":" + last if what == "bucket" else b"")
        await world.command("SET", key, "something else")
        before = {key: await world.command("DUMP", key) for key in await world.keys()}
        with pytest.raises(StoreRefused, match=r"are not as AtollFS made them"):
            await volume.commit(owner, 2, _wide_batch(3))
        assert {key: await world.command("DUMP", key) for key in await world.keys()} == before
        assert await volume.last_batch(owner) == 1
        with pytest.raises(StoreRefused, match=r"something else under a key"):
            if what == "index":
                await volume.scan(table, after=None, limit=1000)
            else:
                await volume.load({table: [table.key_of(row) for row in rows]}, {})
        await world.command("DEL", key)
        await volume.commit(owner, 2, _wide_batch(3))
        assert (await all_rows(volume)) == {table: sorted(rows) for table, rows in _wide_batch(3).puts.items()}


async def test_a_key_that_no_row_can_have_is_refused(world: RedisWorld) -> None:
    async with world.running():
        volume = await world.volume()
        for call in (
            volume.load({INODE: [(INT64_MAX + 1,)]}, {}),
            volume.load({}, {XATTR: [INT64_MAX + 1]}),
            volume.scan(INODE, after=(INT64_MAX + 1,), limit=1),
            volume.scan_dir(INT64_MAX + 1, after=None, limit=1),
        ):
            with pytest.raises(StoreRefused, match=r"more than 64 bits"):
                await call


async def test_bytes_that_are_no_row_are_told(world: RedisWorld) -> None:
    async with world.running():
        volume = await world.volume()
        owner = await acquire(volume)
        await volume.commit(owner, 1, batch_of(example_row(INODE, 1), Dentry(ROOT_INO, b"n", Ino(1), 0)))
        start = (await world.volume_key()).removesuffix("volume")
        (inodes,) = [key for key in await world.keys() if key.startswith(f"{start}inode:".encode())]
        (names,) = [key for key in await world.keys() if key.startswith(f"{start}dentry:".encode())]
        await world.command("HSET", inodes, "1", b"\xff\xff")
        with pytest.raises(StoreRefused, match=r"not as AtollFS packed it: restore"):
            await volume.load({INODE: [(1,)]}, {})
        with pytest.raises(StoreRefused, match=r"not as AtollFS packed it: restore"):
            await volume.scan_dir(1, after=None, limit=10)
        await world.command("ZADD", names, 0, b"n")
        with pytest.raises(StoreRefused, match=r"not as AtollFS packed it: restore"):
            await volume.scan(DENTRY, after=None, limit=10)


@pytest.mark.parametrize(
    "change", ["an argument less", "an argument more", "a key less", "a key more", "a wrong number"]
)
async def test_a_commit_whose_arguments_do_not_add_up_changes_nothing(world: RedisWorld, change: str) -> None:
    """No such commit is ever sent: the script looks all the same."""
    async with world.running():
        volume = await world.volume()
        owner = await acquire(volume)
        await volume.commit(owner, 1, NOTHING)
        key = (await world.volume_key()).encode()
        changes = Changes(VolumeKeys(world.prefix, int(key.split(b"{")[1].split(b"}")[0])), _wide_batch(0))
        keys = [key, *changes.keys]
        arguments = [b"first", b"1", b"0", b"1", b"2", *changes.arguments]
        match change:
            case "an argument less":
                del arguments[-1]
            case "an argument more":
                arguments.append(b"")
            case "a key less":
                del keys[-1]
            case "a key more":
                keys.append(key + b":more")
            case _:
                arguments[7] = b"x"
        before = {key: await world.command("DUMP", key) for key in await world.keys()}
        with pytest.raises(ResponseError):
            await world.command("EVAL", owning._COMMIT._source, len(keys), *keys, *arguments)
        assert {key: await world.command("DUMP", key) for key in await world.keys()} == before
        await volume.commit(owner, 2, _wide_batch(0))


@pytest.mark.parametrize(
    "row",
    [
        Slice(SliceId(INT64_MAX + 1), 0, 1, 0, b""),
        Slice(SliceId(5), INT64_MAX + 1, 1, 0, b""),
        Slice(SliceId(5), 0, 1, 0, "text"),  # type: ignore[arg-type]
        Slice(SliceId(5), 0, 1, 0, None),  # type: ignore[arg-type]
        Slice(SliceId(5), "x", 1, 0, b""),  # type: ignore[arg-type]
        Dentry(ROOT_INO, b"m", Ino(INT64_MAX + 1), 0),
        Dentry(ROOT_INO, b"m", Ino(1), -INT64_MAX - 2),
        Counter("\udcff", 1),
        Counter(b"bytes", 1),  # type: ignore[arg-type]
    ],
    ids=repr,
)
async def test_a_batch_with_a_row_that_does_not_fit_is_not_applied_at_all(world: RedisWorld, row: Any) -> None:
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


# -- large batches and groups -----------------------------------------------------------------------------------------


async def test_a_batch_of_many_rows_in_one_bucket_and_in_many_is_applied_whole(world: RedisWorld) -> None:
    async with world.running():
        volume = await world.volume()
        owner = await acquire(volume)
        names = [Dentry(ROOT_INO, b"%06d" % n, Ino(n), 0o100000) for n in range(20_000)]
        others = [Dentry(Ino(n), b"n", Ino(n), 0o100000) for n in range(16, 9_016)]
        inodes = [example_row(INODE, n) for n in range(20_000)]
        await volume.commit(owner, 1, batch_of(*names, *others, *inodes))
        assert (await all_rows(volume))[DENTRY] == sorted([*names, *others])
        assert (await volume.load({}, {DENTRY: [1]})).rows[DENTRY] == names
        found = await volume.scan_dir(1, after=b"004999", limit=3)
        assert [inode for _, inode in found] == inodes[5000:5003]
        gone: dict[Any, list[Any]] = {DENTRY: [(1, name.name) for name in names], INODE: [(n,) for n in range(19_999)]}
        await volume.commit(owner, 2, Batch({}, gone))
        assert (await all_rows(volume))[DENTRY] == others
        assert await volume.scan(INODE, after=None, limit=5) == [inodes[-1]]


async def test_a_batch_of_many_bytes_is_applied_and_one_of_too_many_refused(
    world: RedisWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world.running():
        volume = await world.volume()
        owner = await acquire(volume)
        big = [Slice(SliceId(n), 1, 1, 0, bytes([n]) * (16 << 20)) for n in range(4)]
        await volume.commit(owner, 1, batch_of(*big))
        assert (await volume.load({SLICE: [(3,)]}, {})).rows[SLICE] == [big[3]]
        monkeypatch.setattr("metasvc.store.redis.rows._MAX_BYTES", 60 << 20)
        with pytest.raises(StoreRefused, match=r"more than 60 MiB is too large"):
            await volume.commit(owner, 2, batch_of(*big))
        await volume.commit(owner, 2, Batch({}, {SLICE: [(n,) for n in range(4)]}))
        assert await volume.scan(SLICE, after=None, limit=9) == []


# -- memory, disk, rights ---------------------------------------------------------------------------------------------


async def test_a_server_without_memory_refuses_a_batch_whole_and_takes_it_when_there_is_some(
    own_world: RedisWorld,
) -> None:
    async with own_world.running():
        volume, other = await own_world.volume(), await own_world.volume()
        await own_world.volume(name="gone")
        owner = await acquire(volume)
        await volume.commit(owner, 1, _wide_batch(0))
        used = int(_info(await own_world.command("INFO", "memory"))["used_memory"])
        await own_world.command("CONFIG", "SET", "maxmemory", used // 2)
        before = await all_rows(volume)
        # Its first row is deleted, which the server would do; puts would fail behind it.
        batch = Batch(_wide_batch(1).puts, {COUNTER: [("000000",)]})
        for attempt in (batch, Batch({}, {COUNTER: [("000000",)]})):
            with pytest.raises(StoreError, match=r"has no memory left: raise maxmemory") as failure:
                await volume.commit(owner, 2, attempt)
            assert not isinstance(failure.value, StoreRefused | Unavailable)
        assert await all_rows(volume) == before
        assert await all_rows(other) == before
        # The volume stays with its owner, and may change hands.
        assert await volume.last_batch(owner) == 1
        await volume.renew(owner, ttl_s=30)
        await volume.release(owner)
        owner = await acquire(volume, nonce="second")
        with pytest.raises(StoreError, match=r"has no memory left"):
            await volume.put_format(owner, volume_format(capacity_bytes=1))
        store = await own_world.process()
        with pytest.raises(StoreError, match=r"has no memory left"):
            await store.create_volume(volume_format(name="new"), NOTHING)
        await store.delete_volume("tenant", "gone")
        await own_world.command("CONFIG", "SET", "maxmemory", 0)
        await volume.commit(owner, 2, batch)


def _info(text: bytes) -> dict[str, str]:
    return dict(line.split(":", 1) for line in text.decode().splitlines() if ":" in line)


async def test_a_server_that_cannot_save_refuses_a_batch_whole_and_answers_reads(own_redis: Redis) -> None:
    own_redis.stop()
    own_redis.start(save="3600 1", appendonly="no")
    world = RedisWorld(own_redis)
    async with world.running():
        volume = await world.volume()
        owner = await acquire(volume)
        await volume.commit(owner, 1, batch_of(Counter("n", 1)))
        # A directory where its file should be.
        (own_redis.directory / "dump.rdb").mkdir()
        (own_redis.directory / "dump.rdb" / "full").touch()
        await world.command("BGSAVE")
        async with asyncio.timeout(30):
            while _info(await world.command("INFO", "persistence"))["rdb_last_bgsave_status"] != "err":
                await asyncio.sleep(0.01)
        with pytest.raises(StoreError, match=r"takes no changes, because it cannot save"):
            await volume.commit(owner, 2, batch_of(Counter("n", 2)))
        assert await volume.scan(COUNTER, after=None, limit=9) == [Counter("n", 1)]
        await world.command("CONFIG", "SET", "stop-writes-on-bgsave-error", "no")
        assert await volume.last_batch(owner) == 1
        await volume.commit(owner, 2, batch_of(Counter("n", 2)))


@pytest.mark.parametrize("forbidden", ["hset", "hdel", "zadd", "zrem", "zremrangebylex", "exists"])
async def test_a_user_who_lost_a_right_changes_nothing(own_world: RedisWorld, forbidden: str) -> None:
    async with own_world.running():
        volume = await own_world.volume()
        owner = await acquire(volume)
        await volume.commit(owner, 1, _wide_batch(0))
        before = {key: await own_world.command("DUMP", key) for key in await own_world.keys()}
        server = own_world.server
        administrator = RedisAt(server.host, server.port, user="default", password="administrator")
        await asyncio.to_thread(administrator.command, "ACL", "SETUSER", server.user, f"-{forbidden}")
        deletes = {table: [table.key_of(row) for row in rows[::2]] for table, rows in _wide_batch(0).puts.items()}
        with pytest.raises(StoreError, match=r"too few rights"):
            await volume.commit(owner, 2, Batch(_wide_batch(1000).puts, deletes))
        await asyncio.to_thread(administrator.command, "ACL", "SETUSER", server.user, "+@all")
        assert {key: await own_world.command("DUMP", key) for key in await own_world.keys()} == before
        await volume.commit(owner, 2, Batch(_wide_batch(1000).puts, deletes))


async def test_the_rights_that_the_guide_names_are_enough(own_world: RedisWorld) -> None:
    server = own_world.server
    administrator = RedisAt(server.host, server.port, user="default", password="administrator")
    await asyncio.to_thread(
        administrator.command,
        "ACL",
        "SETUSER",
        server.user,
        "resetkeys",
        "-@all",
        *rights_of_the_guide(own_world.prefix),
    )
    store = await open_store(own_world.url, create=True)
    await store.add_tenant("tenant", created_ns=1)
    await store.create_setting("a", b"b")
    await store.create_volume(volume_format(), batch_of(Counter("n", 1)))
    volume = await store.open_volume("tenant", "volume")
    owner = await acquire(volume)
    await volume.renew(owner, ttl_s=30)
    await volume.commit(owner, 1, _wide_batch(0))
    assert (await all_rows(volume))[INODE] == _wide_batch(0).puts[INODE]
    await volume.scan_dir(1, after=None, limit=10)
    await volume.put_format(owner, volume_format(capacity_bytes=1))
    await volume.release(owner)
    await store.delete_volume("tenant", "volume")
    assert list(await store.list_volumes()) == []
    await store.close()


# -- settings of the server -------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what this process has warned of: servers of other tests had the same ports."""
    monkeypatch.setattr(server_module, "_told", set())


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-random", "volatile-lru", "volatile-ttl"])
async def test_a_server_that_would_evict_names_is_refused(own_world: RedisWorld, policy: str) -> None:
    await own_world.command("CONFIG", "SET", "maxmemory-policy", policy)
    await (await open_store(own_world.url, create=True)).close()  # nothing is evicted without a limit
    await own_world.command("CONFIG", "SET", "maxmemory", "1gb")
    with pytest.raises(StoreError, match=rf"maxmemory-policy {policy}\): set it to noeviction"):
        await open_store(own_world.url)
    await own_world.command("CONFIG", "SET", "maxmemory-policy", "noeviction")
    await (await open_store(own_world.url)).close()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"appendonly": "no"}, "runs with appendonly no"),
        ({"appendonly": "yes", "appendfsync": "everysec"}, "runs with appendfsync everysec"),
        ({"appendonly": "yes", "appendfsync": "no"}, "runs with appendfsync no"),
        ({"no-appendfsync-on-rewrite": "yes"}, "runs with no-appendfsync-on-rewrite yes"),
        ({"appendonly": "yes", "appendfsync": "always"}, ""),
    ],
    ids=str,
)
@pytest.mark.usefixtures("nothing_told")
async def test_a_server_that_may_lose_what_it_acknowledged_is_warned_of(
    own_world: RedisWorld, settings: dict[str, str], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in settings.items():
        await own_world.command("CONFIG", "SET", name, value)
    with caplog.at_level(logging.WARNING, logger=server_module.__name__):
        await (await open_store(own_world.url, create=True)).close()
        await (await open_store(own_world.url)).close()
    assert len(caplog.records) == bool(told)  # once for each process
    assert told in caplog.text
    assert PASSWORD not in caplog.text


@pytest.mark.usefixtures("nothing_told")
async def test_where_settings_may_not_be_asked_for_what_is_known_is_said(
    own_world: RedisWorld, caplog: pytest.LogCaptureFixture
) -> None:
    """As with services that run Redis for others: CONFIG is not there, INFO is."""
    server = own_world.server
    administrator = RedisAt(server.host, server.port, user="default", password="administrator")
    await asyncio.to_thread(administrator.command, "ACL", "SETUSER", server.user, "-config")
    with caplog.at_level(logging.WARNING, logger=server_module.__name__):
        await (await open_store(own_world.url, create=True)).close()
    assert "runs with appendfsync unknown" in caplog.text
    for name, value in (("maxmemory", "1gb"), ("maxmemory-policy", "allkeys-lfu")):
        await asyncio.to_thread(administrator.command, "CONFIG", "SET", name, value)
    with pytest.raises(StoreError, match=r"maxmemory-policy allkeys-lfu"):
        await open_store(own_world.url)
    await asyncio.to_thread(administrator.command, "ACL", "SETUSER", server.user, "-info")
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger=server_module.__name__):
        await (await open_store(own_world.url)).close()
    assert "does not say whether it evicts keys" in caplog.text
    assert "runs with appendonly unknown" in caplog.text


# -- a server that does not answer ------------------------------------------------------------------------------------


async def _ping(link: Link) -> bytes:
    answer: bytes = await link.command(b"PING")
    return answer


async def test_a_server_that_stands_still_is_given_up_and_used_again_when_it_goes_on(own_redis: Redis) -> None:
    lane = Lane(Address.parse(own_redis.url()), Routes(), limit=1)
    assert await lane.call(_ping, tag="a", deadline_s=30) == b"PONG"
    with own_redis.paused():
        with pytest.raises(Unavailable, match=r"did not answer in time"):
            await lane.call(_ping, tag="a", deadline_s=0.3)
        hanging = asyncio.create_task(lane.call(_ping, tag="a", deadline_s=1))
        await asyncio.sleep(0)
        with pytest.raises(StoreError, match=r"all 1 connections .* were busy"):
            await lane.call(_ping, tag="a", deadline_s=0.1)
        with pytest.raises(Unavailable):
            await hanging
    assert await lane.call(_ping, tag="a", deadline_s=30) == b"PONG"
    await lane.close()
    with pytest.raises(StoreError, match=r"is closed"):
        await lane.call(_ping, tag="a", deadline_s=1)


async def test_an_error_that_comes_when_nobody_waits_any_more_is_nobodys_bug(
    redis: RedisAt, caplog: pytest.LogCaptureFixture
) -> None:
    lane = Lane(Address.parse(redis.url()), Routes(), limit=1)
    goes_on = asyncio.Event()

    async def refused(link: Link) -> None:
        goes_on.set()
        await link.command(b"BLPOP", b"nothing-that-is-there", b"0.2")
        raise Fenced("a renewal that comes too late")

    call = asyncio.create_task(lane.call(refused, tag="a", deadline_s=30))
    await goes_on.wait()
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    while lane._tasks:
        await asyncio.sleep(0.01)
    gc.collect()
    assert caplog.text == ""
    await lane.close()


async def test_a_commit_whose_connection_swallows_it_ends_and_is_settled(
    world: RedisWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with RedisProxy(world.server.port) as proxy, world.running():
        world.port = proxy.port
        volume = await world.volume()
        owner = await acquire(volume)
        await volume.commit(owner, 1, NOTHING)
        monkeypatch.setattr("metasvc.store.redis.volume.CHANGE_DEADLINE_S", 1.0)
        proxy.plan(owning._COMMIT._source, Fault.SWALLOWED)
        with pytest.raises(Unavailable, match=r"did not answer in time"):
            await volume.commit(owner, 2, NOTHING)
        assert await volume.last_batch(owner) == 1
        await volume.commit(owner, 2, NOTHING)


async def test_a_server_that_is_busy_with_a_script_is_waited_for(own_world: RedisWorld) -> None:
    async with own_world.running():
        volume = await own_world.volume()
        owner = await acquire(volume)
        await volume.commit(owner, 1, batch_of(Counter("n", 1)))
        await own_world.command("CONFIG", "SET", "busy-reply-threshold", 50)
        busy = "local ends = redis.call('TIME')[1] + 2 while redis.call('TIME')[1] + 0 < ends do end"
        working = asyncio.create_task(own_world.command("EVAL", busy, 0))
        await asyncio.sleep(0.3)
        assert await volume.scan(COUNTER, after=None, limit=9) == [Counter("n", 1)]
        await volume.renew(owner, ttl_s=30)
        await working


async def test_a_store_that_is_closed_lets_a_commit_end_and_answers_nothing_afterwards(world: RedisWorld) -> None:
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


async def test_connections_that_an_administrator_ends_are_made_again(own_world: RedisWorld) -> None:
    async with own_world.running():
        volume = await own_world.volume()
        owner = await acquire(volume)
        for number in range(1, 6):
            await own_world.command("CLIENT", "KILL", "TYPE", "normal")
            assert len(await volume.scan(COUNTER, after=None, limit=99)) == number - 1
            await volume.renew(owner, ttl_s=30)
            with contextlib.suppress(StoreError):
                await volume.commit(owner, number, batch_of(Counter(f"{number}", 1)))
            if await volume.last_batch(owner) < number:
                await volume.commit(owner, number, batch_of(Counter(f"{number}", 1)))


async def test_scripts_that_the_server_forgot_are_sent_again(world: RedisWorld) -> None:
    async with world.running():
        volume = await world.volume()
        owner = await acquire(volume)
        for number in range(1, 4):
            await world.command("SCRIPT", "FLUSH", "SYNC")
            await volume.commit(owner, number, batch_of(Counter("n", number)))
            await world.command("SCRIPT", "FLUSH", "SYNC")
            assert (await volume.load({COUNTER: [("n",)]}, {})).rows[COUNTER] == [Counter("n", number)]


# -- volumes ----------------------------------------------------------------------------------------------------------


async def test_a_volume_whose_first_rows_do_not_fit_is_not_created(world: RedisWorld) -> None:
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


async def test_of_processes_that_create_one_volume_at_once_one_does_and_nothing_is_left_of_the_others(
    world: RedisWorld,
) -> None:
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
        start = (await world.volume_key()).removesuffix("volume").encode()
        assert {key for key in await world.keys() if b"{catalog}" not in key and not key.startswith(start)} == set()
        assert await world.command("ZCARD", f"{world.prefix}:{{catalog}}:doomed") == 0


async def test_a_volume_that_was_never_named_goes_with_one_that_is_deleted_when_it_is_due(world: RedisWorld) -> None:
    async with world.running():
        store = await world.process()
        await world.volume(name="kept")
        nothing_but_one = await world.keys()
        await world.command("HSET", f"{world.prefix}:{{77}}:volume", "epoch", 0, "format", "{}")
        await world.command("ZADD", f"{world.prefix}:{{77}}:counter", 0, b"\x80")
        await world.command(
            "ZADD", f"{world.prefix}:{{77}}:counter:\udc80".encode("utf-8", "surrogateescape"), 0, b"x\0y"
        )
        doomed = f"{world.prefix}:{{catalog}}:doomed"
        now_s = int((await world.command("TIME"))[0])
        await world.command("ZADD", doomed, now_s + 3000, 77)
        await world.volume()
        await store.delete_volume("tenant", "volume")
        assert any(b"{77}" in key for key in await world.keys())  # not due
        await world.command("ZADD", doomed, now_s - 1, 77)
        await world.volume()
        await store.delete_volume("tenant", "volume")
        assert await world.keys() == nothing_but_one


async def test_who_takes_too_long_to_make_a_volume_is_refused(
    world: RedisWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world.running():
        store = await world.process()
        await world.command("SET", f"{world.prefix}:{{catalog}}:last_volume", 6)
        making = store.create_volume(volume_format(), NOTHING)
        doomed = f"{world.prefix}:{{catalog}}:doomed"
        # As if half an hour had passed before it got its name.
        enter = catalog.enter

        async def late(*arguments: Any) -> Any:
            await world.command("ZADD", doomed, int((await world.command("TIME"))[0]) + 1000, 7)
            return await enter(*arguments)

        with monkeypatch.context() as changed:
            changed.setattr(catalog, "enter", late)
            with pytest.raises(StoreError, match=r"took too long: try again"):
                await making
        assert list(await store.list_volumes()) == []
        await store.create_volume(volume_format(), NOTHING)


async def test_a_deleted_volume_cannot_be_acquired(world: RedisWorld) -> None:
    async with world.running():
        volume, store = await world.volume(), await world.process()
        await store.delete_volume("tenant", "volume")
        with pytest.raises(Fenced, match=r"deleted"):
            await acquire(volume)


async def test_a_deletion_that_was_cut_short_counts_and_is_finished_by_the_next_one(world: RedisWorld) -> None:
    async with world.running():
        volume = await world.volume()
        owner = await acquire(volume)
        await volume.commit(owner, 1, _wide_batch(0))
        await world.volume(name="other")
        key = await world.volume_key()
        # The first step of it, and no more.
        await volume.release(owner)
        await world.command("EVAL", owning._DISOWN._source, 1, key)
        with pytest.raises(Fenced):
            await volume.commit(owner, 2, NOTHING)
        store = await world.process()
        assert [found.name for found in await store.list_volumes()] == ["other"]
        with pytest.raises(VolumeMissing):
            await store.open_volume("tenant", "volume")
        await store.create_volume(volume_format(), batch_of(Counter("new", 1)))
        again = await store.open_volume("tenant", "volume")
        assert await again.scan(COUNTER, after=None, limit=9) == [Counter("new", 1)]
        start = key.removesuffix("volume").encode()
        assert any(found.startswith(start) for found in await world.keys())
        await store.delete_volume("tenant", "other")
        assert not any(found.startswith(start) for found in await world.keys())


async def test_a_volume_whose_hash_is_gone_is_told_and_not_taken_for_deleted(
    world: RedisWorld, caplog: pytest.LogCaptureFixture
) -> None:
    async with world.running():
        volume = await world.volume()
        owner = await acquire(volume)
        await volume.commit(owner, 1, batch_of(Counter("n", 1)))
        await world.command("DEL", await world.volume_key())
        store = await world.process()
        with pytest.raises(StoreRefused, match=r"has the name tenant/volume and not the volume: restore"):
            await store.open_volume("tenant", "volume")
        assert list(await store.list_volumes()) == []
        assert "has the name of volume" in caplog.text
        with pytest.raises(StoreRefused, match=r"no longer in Redis"):
            await volume.scan(COUNTER, after=None, limit=9)
        with pytest.raises(Fenced, match=r"deleted"):
            await volume.commit(owner, 2, NOTHING)
        await store.delete_volume("tenant", "volume")
        with pytest.raises(VolumeMissing):
            await store.open_volume("tenant", "volume")


async def test_deleting_a_large_volume_lets_others_commit_meanwhile_and_leaves_no_key(world: RedisWorld) -> None:
    async with world.running():
        store = await world.process()
        await store.create_volume(volume_format(name="other"), NOTHING)
        before = await world.keys()
        await store.create_volume(volume_format(), NOTHING)
        volume, other = await store.open_volume("tenant", "volume"), await store.open_volume("tenant", "other")
        owner, other_owner = await acquire(volume), await acquire(other)
        await volume.commit(owner, 1, batch_of(*(Dentry(Ino(n), b"%d" % n, Ino(n), 0) for n in range(10_000))))
        await volume.release(owner)
        deleting = asyncio.create_task(store.delete_volume("tenant", "volume"))
        commits = 0
        while not deleting.done():
            commits += 1
            await other.commit(other_owner, commits, NOTHING)
        await deleting
        assert commits >= 3
        assert await world.keys() == before


async def test_an_owner_that_lost_the_server_s_last_moments_stops(own_redis: Redis) -> None:
    """Without appendfsync always a server may come back as it was a moment ago: nothing is built upon what is missing."""
    world = RedisWorld(own_redis)
    async with world.running():
        volume, reader = await world.volume(), await world.volume()
        owner = await volume.acquire(nonce="first", address="here", ttl_s=3600)
        await volume.commit(owner, 1, batch_of(Counter("n", 1)))
        own_redis.stop()
        files = {path: path.read_bytes() for path in (own_redis.directory / "appendonlydir").iterdir()}
        own_redis.start()
        await volume.last_batch(owner)
        await volume.commit(owner, 2, batch_of(Counter("n", 2)))
        own_redis.kill()
        for path in (own_redis.directory / "appendonlydir").iterdir():
            path.unlink()
        for path, data in files.items():
            path.write_bytes(data)
        own_redis.start()
        # The owner knows of batch 2: it does not read a world without it.
        reads = volume._reads  # type: ignore[attr-defined]
        with pytest.raises(Unavailable, match=r"lacks what was committed"):
            await reads.call(_stale_read(volume), tag="1", deadline_s=0.2)
        # If it was sent on a connection that had not yet seen the end, that is what it says.
        with pytest.raises((Fenced, StoreError)):
            await volume.commit(owner, 3, batch_of(Counter("n", 3)))
        for call in (volume.last_batch(owner), volume.commit(owner, 3, batch_of(Counter("n", 3)))):
            with pytest.raises(Fenced, match=r"lacks batch 2, which it had"):
                await call
        assert await reader.scan(COUNTER, after=None, limit=9) == [Counter("n", 1)]


def _stale_read(volume: Any) -> Any:
    return _read(volume, Scan(volume._keys, COUNTER, None, 9))


def _read(volume: Any, page: Scan | ScanDir) -> Any:
    """Return what a lane runs for a page: a test has a deadline of its own for it."""

    async def work(link: Link) -> Any:
        return await page.script.run(link, page.keys, [volume._seen, *page.arguments])

    return work


@pytest.mark.parametrize("table", [INODE, DENTRY, XATTR, COUNTER], ids=repr)
async def test_a_bucket_that_the_index_has_and_that_is_not_there_is_not_taken_for_empty(
    world: RedisWorld, table: Any
) -> None:
    """As while a cluster moves a volume key by key."""
    async with world.running():
        volume = await world.volume()
        owner = await acquire(volume)
        await volume.commit(owner, 1, batch_of(*_wide_batch(0).puts[table], Dentry(ROOT_INO, b"n", Ino(9), 0)))
        start = (await world.volume_key()).removesuffix("volume").encode() + table.name.encode() + b":"
        await world.command("DEL", *[key for key in await world.keys() if key.startswith(start)])
        handle: Any = volume
        pages: list[Scan | ScanDir] = [Scan(handle._keys, table, None, 1000)]
        if table is INODE:
            assert await volume.scan_dir(1, after=None, limit=0) == []
            pages.append(ScanDir(handle._keys, 1, None, 9))
        for page in pages:
            with pytest.raises(Unavailable, match=r"is moving the volume"):
                await handle._reads.call(_read(handle, page), tag=handle._keys.tag, deadline_s=0.2, again=True)


# -- the table of errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "kind", "text"),
    [
        ("LOADING said so", Unavailable, "DB is reading its data"),
        ("BUSY said so", Unavailable, "a script keeps DB busy"),
        ("READONLY said so", Unavailable, "DB is a replica: name the master"),
        ("MASTERDOWN said so", Unavailable, "DB is a replica that lost its master"),
        ("CLUSTERDOWN said so", Unavailable, "the cluster of DB is down"),
        ("TRYAGAIN said so", Unavailable, "DB is moving the volume"),
        ("OOM said so", StoreError, "DB has no memory left: raise maxmemory"),
        ("MISCONF said so", StoreError, "DB takes no changes, because it cannot save"),
        ("NOREPLICAS said so", StoreError, "DB has too few replicas"),
        ("NOAUTH said so", StoreError, "DB refused user or password"),
        ("NOPERM said so", StoreError, "the user has too few rights in DB"),
        ("WRONGTYPE said so", StoreRefused, "DB has something else under a key"),
        ("CROSSSLOT said so", StoreRefused, "keys of one volume lie in several slots"),
        ("ERR said so", StoreError, "DB could not do it: see the cause"),
    ],
)
async def test_each_error_of_the_server_becomes_one_line_with_a_remedy(
    world: RedisWorld, answer: str, kind: type[StoreError], text: str
) -> None:
    link = None
    try:
        link = await connect(Address.parse(world.url))
        with pytest.raises(Exception) as failure:
            await link.command(b"EVAL", b"return redis.error_reply(ARGV[1])", 0, answer)
    finally:
        if link is not None:
            await link.close()
    translated = translate(failure.value, "DB")
    assert type(translated) is kind
    assert str(translated).startswith(text)
    assert "said so" in str(translated)
    assert len(str(translated).splitlines()) == 1


async def test_a_refusal_names_the_owner(world: RedisWorld) -> None:
    async with world.running():
        volume, other = await world.volume(), await world.volume()
        owner = await acquire(volume, address="host-1:4711")
        with pytest.raises(NotOwner, match=r"host-1:4711"):
            await acquire(other, nonce="other")
        await volume.release(owner)
        with pytest.raises(Fenced, match=r"owned by nobody since epoch 1"):
            await volume.commit(owner, 1, NOTHING)


async def test_text_keys_and_large_values_share_a_bucket(world: RedisWorld) -> None:
    async with world.running():
        volume = await world.volume()
        owner = await acquire(volume)
        xattrs = [Xattr(Ino(n % 3), b"user.%d" % n, os.urandom(1 << (n % 17))) for n in range(90)]
        await volume.commit(owner, 1, batch_of(*xattrs))
        assert await volume.scan(XATTR, after=None, limit=1000) == sorted(xattrs)
        assert sorted((await volume.load({}, {XATTR: [1]})).rows[XATTR]) == sorted(
            row for row in xattrs if row.ino == 1
        )
