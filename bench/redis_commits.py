"""Measure what commits cost on Redis, and what files cost in its memory: ours, against other shapes of the same rows.

`python bench/redis_commits.py`. A server of its own, which syncs each change before it answers, takes batches of creates: for
each file an inode and a name, and for each batch the directory, two counters and a session's replies. The ways take turns, so
that what the machine does meanwhile falls on all of them. Then servers without a file take files in each of several shapes.
Figures are reported and never judged.
"""

import hashlib
import os
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final

import click
import redis.asyncio
import uvloop

# Started as a file, Python looks for modules beside it; the benchmark imports its own by their full names.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from metasvc.model import ROOT_INO, Chunk, Counter, Dentry, Ino, Inode, Replies, SessionId, Slice, SliceRef, pack_refs
from metasvc.store.redis import RedisStore
from metasvc.store.redis.encoding import codec_of, ordered_int
from metasvc.store.tables import CHUNK, COUNTER, DENTRY, INODE, REPLIES, SLICE, Batch, Row
from tests.metasvc.store.rows_of import volume_format
from tests.servers.redis import Redis

SIZES: Final = (1, 10, 100, 1000)
_NOW_NS: Final = 1_790_000_000_000_000_000
_TURN: Final = 1000
_FILES: Final = 200_000
_NAME: Final = "%s-%021d.jpg"
"""30 bytes with a prefix of four."""

Way = Callable[[int, Batch], Awaitable[None]]
"""Commits the batch of a number."""


class Creates:
    """Makes batches of creates, no file twice."""

    def __init__(self) -> None:
        self._ino = 1000

    def batch(self, size: int) -> Batch:
        """Return the batch that creates `size` files."""
        inodes: list[Row] = []
        dentries: list[Row] = []
        for _ in range(size):
            self._ino += 1
            ino = Ino(self._ino)
            inodes.append(Inode(ino, 0o100644, 1, 0, 0, 0, 0, _NOW_NS, _NOW_NS, _NOW_NS + ino, ROOT_INO, 0, 0, 0))
            dentries.append(Dentry(ROOT_INO, b"file-%07d" % (ino * 7919 % 10_000_019), ino, 0o100000))
        root = Inode(ROOT_INO, 0o40755, 2, 0, 0, 0, self._ino, _NOW_NS, _NOW_NS + self._ino, _NOW_NS, ROOT_INO, 0, 0, 0)
        counters: list[Row] = [Counter("used_inodes", self._ino), Counter("next_ino", self._ino)]
        replies: list[Row] = [Replies(SessionId(1), self._ino, bytes(200))]
        return Batch({INODE: [*inodes, root], DENTRY: dentries, COUNTER: counters, REPLIES: replies}, {})


async def _ours(store: RedisStore, name: str) -> Way:
    await store.create_volume(volume_format(name=name), Batch({}, {}))
    volume = await store.open_volume("tenant", name)
    owner = await volume.acquire(nonce="bench", address="bench", ttl_s=3600)

    async def commit(number: int, batch: Batch) -> None:
        await volume.commit(owner, number, batch)

    return commit


def _transaction(client: redis.asyncio.Redis) -> Way:
    """Return the usual shape: a key for each inode, a hash for each directory, in MULTI … EXEC, without a fence."""

    async def commit(number: int, batch: Batch) -> None:
        async with client.pipeline(transaction=True) as pipe:
            for row in batch.puts[INODE]:
                pipe.set(f"plain:i:{row[0]}", codec_of[INODE].pack(row))
            for row in batch.puts[DENTRY]:
                pipe.hset(f"plain:d:{row[0]}", row[1], codec_of[DENTRY].pack(row))
            for row in batch.puts[COUNTER]:
                pipe.hset("plain:c", row[0], row[1])
            await pipe.execute()

    return commit


def _raw(client: redis.asyncio.Redis) -> Way:
    """Return the least that a batch may cost: names only, one HSET, no fence."""

    async def commit(number: int, batch: Batch) -> None:
        await client.hset("raw", mapping={row[1]: row[2] for row in batch.puts[DENTRY]})

    return commit


async def _measure(server: Redis, seconds: float) -> None:
    store = await RedisStore.open(server.url(), create=True)
    client = redis.asyncio.Redis(
        host=server.host, port=server.port, username=server.user, password=server.password, protocol=2
    )
    ways: dict[str, Way] = {
        "raw HSET of the names": _raw(client),
        "one fenced script": await _ours(store, "ours"),
        "MULTI … EXEC, no fence": _transaction(client),
    }
    creates = Creates()
    numbers = dict.fromkeys(ways, 0)
    print(f"{'batch':>6} {'way':<26} {'median ms':>10} {'p99 ms':>8} {'creates/s':>10}")
    for size in SIZES:
        took: dict[str, list[float]] = {name: [] for name in ways}
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            for name, commit in ways.items():
                numbers[name] += 1
                batch = creates.batch(size)
                began = time.perf_counter()
                await commit(numbers[name], batch)
                took[name].append(time.perf_counter() - began)
        for name, all_s in took.items():
            _report(size, name, all_s[2:])
    await _measure_reads(store)
    times = []
    for _ in range(_TURN):
        began = time.perf_counter()
        await client.ping()
        times.append(time.perf_counter() - began)
    print(f"a trip that changes nothing, by the driver: {median(times) * 1e3:.2f} ms")
    await client.aclose()
    await store.close()


def _report(size: int, name: str, all_s: list[float]) -> None:
    all_s = sorted(all_s)
    rate = size / (sum(all_s) / len(all_s))
    print(
        f"{size:>6} {name:<26} {median(all_s) * 1e3:>10.2f} {all_s[len(all_s) * 99 // 100] * 1e3:>8.2f} {rate:>10,.0f}"
    )


async def _measure_reads(store: RedisStore) -> None:
    volume = await store.open_volume("tenant", "ours")
    for count in (1, 100, 1000):
        times, scans = [], []
        for turn in range(100):
            began = time.perf_counter()
            await volume.load({INODE: [(1001 + turn + number * 7,) for number in range(count)]}, {})
            times.append(time.perf_counter() - began)
            began = time.perf_counter()
            await volume.scan_dir(ROOT_INO, after=b"file-%07d" % (turn * 50_000), limit=count)
            scans.append(time.perf_counter() - began)
        print(
            f"{count:>6} inodes loaded: {median(times) * 1e3:.2f} ms; names with inodes: {median(scans) * 1e3:.2f} ms"
        )


# -- memory -----------------------------------------------------------------------------------------------------------


def _files(count: int, *, in_directory: int) -> Iterator[tuple[Inode, Dentry, Chunk, Slice]]:
    """Yield files with one block of content, and names of 30 bytes."""
    for number in range(count):
        ino = Ino(1_000_000 + number)
        parent = Ino(100 + number // in_directory)
        at_ns = _NOW_NS + number * 1_000_003
        written_ns = at_ns + 2_000_000 + number % 977
        yield (
            Inode(ino, 0o100644, 1, 1000, 1000, 0, 150_000, at_ns, written_ns, written_ns, parent, 0, 1, 0),
            Dentry(parent, (_NAME % (hashlib.md5(b"%d" % number).hexdigest()[:4], number)).encode(), ino, 0o100000),
            Chunk(ino, 0, pack_refs([SliceRef(0, 5_000_000 + number, 0, 150_000)])),  # type: ignore[arg-type]
            Slice(5_000_000 + number, 150_000, 1, 1, os.urandom(16)),  # type: ignore[arg-type]
        )


async def _fill_ours(server: Redis, *, in_directory: int, with_content: bool) -> None:
    store = await RedisStore.open(server.url(), create=True)
    await store.create_volume(volume_format(), Batch({}, {}))
    volume = await store.open_volume("tenant", "volume")
    owner = await volume.acquire(nonce="bench", address="bench", ttl_s=3600)
    rows = list(_files(_FILES, in_directory=in_directory))
    for number, first in enumerate(range(0, len(rows), 500), start=1):
        inodes, dentries, chunks, slices = (list(column) for column in zip(*rows[first : first + 500], strict=True))
        puts: dict[Any, list[Row]] = {INODE: inodes, DENTRY: dentries}
        if with_content:
            puts |= {CHUNK: chunks, SLICE: slices}
        await volume.commit(owner, number, Batch(puts, {}))
    await store.close()


async def _fill_plain(server: Redis, *, in_directory: int) -> None:
    """A key for each inode, a hash of names for each directory, and a sorted set for their order."""
    client = redis.asyncio.Redis(
        host=server.host, port=server.port, username=server.user, password=server.password, protocol=2
    )
    rows = list(_files(_FILES, in_directory=in_directory))
    for first in range(0, len(rows), 500):
        async with client.pipeline(transaction=False) as pipe:
            for inode, dentry, _, _ in rows[first : first + 500]:
                pipe.set(f"atoll:{{1}}:inode:{inode.ino}", codec_of[INODE].pack(inode))
                pipe.hset(f"atoll:{{1}}:dentry:{dentry.parent}", dentry.name, ordered_int(dentry.ino))
                pipe.zadd(f"atoll:{{1}}:order:{dentry.parent}", {dentry.name: 0})
            await pipe.execute()
    await client.aclose()


async def _fill_shape(server: Redis, *, shape: str) -> None:
    """Inodes only, in one of the shapes that were thought of."""
    client = redis.asyncio.Redis(
        host=server.host, port=server.port, username=server.user, password=server.password, protocol=2
    )
    kind, _, size = shape.partition(" ")
    rows = [inode for inode, *_ in _files(_FILES, in_directory=1000)]
    for first in range(0, len(rows), 500):
        async with client.pipeline(transaction=False) as pipe:
            for row in rows[first : first + 500]:
                ino, packed = row.ino, codec_of[INODE].pack(row)
                if kind == "string":
                    pipe.set(f"atoll:{{1}}:inode:{ino}", packed)
                elif kind == "hash":
                    pipe.hset(f"atoll:{{1}}:inode:{ino // int(size)}", str(ino % int(size)), packed)
                else:
                    pipe.zadd(f"atoll:{{1}}:inode:{ino // int(size)}", {ordered_int(ino % int(size)) + packed: 0})
            await pipe.execute()
    if kind == "hash":
        # What it costs to replace a row in a full bucket.
        server.command("CONFIG", "RESETSTAT")
        async with client.pipeline(transaction=False) as pipe:
            for row in rows[:50_000]:
                pipe.hset(
                    f"atoll:{{1}}:inode:{row.ino // int(size)}", str(row.ino % int(size)), codec_of[INODE].pack(row)
                )
            await pipe.execute()
        stats = server.command("INFO", "commandstats").decode().partition("cmdstat_hset:")[2]
        print(f"{shape}, HSET of one row: {stats.partition('usec_per_call=')[2].partition(',')[0]} us")
    await client.aclose()


def _memory(title: str, fill: Callable[[Redis], Coroutine[Any, Any, None]]) -> None:
    with Redis(appendonly="no") as server:
        before = _used(server)
        uvloop.run(fill(server))
        server.command("SCRIPT", "FLUSH", "SYNC")
        used = _used(server) - before
        print(f"{title:<66} {used / _FILES:>6.0f} bytes a file")


def _used(server: Redis) -> int:
    """Return used_memory without what clients hold."""
    info = server.command("INFO", "memory").decode()
    fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    return int(fields["used_memory_dataset"]) + int(fields["used_memory_overhead"]) - int(fields["mem_clients_normal"])


@click.command()
@click.option("--seconds", type=float, default=6.0, show_default=True, help="For each size of batch.")
@click.option("--memory/--no-memory", default=True, show_default=True, help="Measure memory, too.")
def main(seconds: float, memory: bool) -> None:  # noqa: FBT001
    """Measure commits and memory."""
    with Redis() as server:
        print("Redis", server.command("INFO", "server").decode().partition("redis_version:")[2].split()[0])
        uvloop.run(_measure(server, seconds))
    if not memory:
        return
    for shape in ("string", "hash 16", "hash 32", "hash 64", "hash 128", "zset 64", "zset 1000000000"):
        _memory(f"inodes only: {shape}", partial(_fill_shape, shape=shape))
    for in_directory in (50, 100, 1000, _FILES):
        where = f"{in_directory:,} names in a directory"
        _memory(f"ours, {where}", partial(_fill_ours, in_directory=in_directory, with_content=False))
        _memory(
            f"ours with chunk and slice, {where}", partial(_fill_ours, in_directory=in_directory, with_content=True)
        )
        _memory(f"a key for each inode, names twice, {where}", partial(_fill_plain, in_directory=in_directory))


if __name__ == "__main__":
    main()
