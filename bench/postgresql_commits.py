"""Measure what a commit costs on PostgreSQL: one statement, against raw inserts and against a transaction of several.

`python bench/postgresql_commits.py`. A server of its own, with its durability on, takes batches of creates: for each file an
inode and a name, and for each batch the directory, two counters and a session's replies. The ways take turns, so
that what the machine does meanwhile falls on all of them. Figures are reported and never judged.
"""

import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median
from typing import Any, Final

import asyncpg
import click
import uvloop

# Started as a file, Python looks for modules beside it; the benchmark imports its own by their full names.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from metasvc.model import ROOT_INO, Counter, Dentry, Ino, Inode, Replies, SessionId
from metasvc.store.postgresql import PostgresqlStore
from metasvc.store.tables import COUNTER, DENTRY, INODE, REPLIES, Batch, Row, Table
from tests.metasvc.store.rows_of import volume_format
from tests.servers.postgresql import PostgreSQL, installed_programs

SIZES: Final = (1, 10, 100, 1000)
_NOW_NS: Final = 1_700_000_000_000_000_000
_FENCE: Final = "UPDATE volume SET last_batch = $2 WHERE id = $1 AND last_batch = $2 - 1"

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


async def _ours(store: PostgresqlStore, name: str) -> Way:
    await store.create_volume(volume_format(name=name), Batch({}, {}))
    volume = await store.open_volume("tenant", name)
    owner = await volume.acquire(nonce="bench", address="bench", ttl_s=3600)

    async def commit(number: int, batch: Batch) -> None:
        await volume.commit(owner, number, batch)

    return commit


async def _several(store: PostgresqlStore, connection: asyncpg.Connection, name: str) -> Way:
    """Return the usual shape: BEGIN, the fence, an upsert for each table (executemany), COMMIT."""
    await store.create_volume(volume_format(name=name), Batch({}, {}))
    volume_id = await connection.fetchval("SELECT id FROM volume WHERE name = $1", name)

    async def commit(number: int, batch: Batch) -> None:
        async with connection.transaction():
            await connection.execute(_FENCE, volume_id, number)
            for table, rows in batch.puts.items():
                await connection.executemany(_upsert(table), [(volume_id, *row) for row in rows])

    return commit


def _upsert(table: Table) -> str:
    columns = ", ".join(("volume", *table.columns))
    marks = ", ".join(f"${number}" for number in range(1, len(table.columns) + 2))
    others = ", ".join(f"{column} = excluded.{column}" for column in table.columns[table.key_size :])
    keys = ", ".join(("volume", *table.key_columns))
    return f"INSERT INTO {table.name} ({columns}) VALUES ({marks}) ON CONFLICT ({keys}) DO UPDATE SET {others}"


async def _raw(connection: asyncpg.Connection) -> Way:
    """Return the least that a batch may cost: names only, one INSERT that commits by itself, no fence, no conflict."""
    await connection.execute("CREATE TABLE raw (parent bigint, name bytea, ino bigint, PRIMARY KEY (parent, name))")
    sql = "INSERT INTO raw SELECT * FROM unnest($1::bigint[], $2::bytea[], $3::bigint[])"

    async def commit(number: int, batch: Batch) -> None:
        rows: list[Any] = batch.puts[DENTRY]
        await connection.execute(sql, *list(zip(*rows, strict=True))[:3])

    return commit


async def _measure(server: PostgreSQL, seconds: float) -> None:
    store = await PostgresqlStore.open(server.url(), create=True)
    connection: asyncpg.Connection = await asyncpg.connect(server.url())
    ways: dict[str, Way] = {
        "raw INSERT of the names": await _raw(connection),
        "one fenced statement": await _ours(store, "ours"),
        "BEGIN … COMMIT": await _several(store, connection, "several"),
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
            all_s = sorted(all_s[2:])
            rate = size / (sum(all_s) / len(all_s))
            print(
                f"{size:>6} {name:<26} {median(all_s) * 1e3:>10.2f} {all_s[len(all_s) * 99 // 100] * 1e3:>8.2f} {rate:>10,.0f}"
            )
    times = []
    for _ in range(1000):
        began = time.perf_counter()
        await connection.fetchval("SELECT 1")
        times.append(time.perf_counter() - began)
    print(f"a trip that commits nothing: {median(times) * 1e3:.2f} ms")
    await connection.close()
    await store.close()
    hot = "SELECT relname, n_tup_upd, n_tup_hot_upd, pg_table_size(relid) FROM pg_stat_user_tables WHERE n_tup_upd > 0"
    print("updates, those without an index entry (HOT), bytes of the table:", *server.sql(hot).split(), sep="\n  ")


@click.command()
@click.option("--seconds", type=float, default=6.0, show_default=True, help="For each size of batch.")
def main(seconds: float) -> None:
    """Measure commits."""
    programs = installed_programs()
    if programs is None:
        raise click.UsageError(
            "no PostgreSQL here: install postgresql-15, or name its programs by ATOLL_TEST_POSTGRESQL"
        )
    with PostgreSQL(programs) as server:
        print(server.sql("SELECT version()").strip())
        uvloop.run(_measure(server, seconds))


if __name__ == "__main__":
    main()
