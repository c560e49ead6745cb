"""Rows of the tables as SQL, on one connection: put, delete, load, scan.

Owns the text of the statements; each is made once and prepared once per connection. Knows tables and volume ids, neither
ownership nor threads. Every function runs on a thread of ConnectionThreads and may block.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import chain
from typing import Any, Final

from metasvc.model import Dentry, Inode
from metasvc.store import Loaded
from metasvc.store.tables import DENTRY, INODE, TABLES, Batch, Key, Row, Table

__all__ = ["apply_batch", "delete_some_rows", "load_rows", "scan_directory", "scan_table"]

_MAX_KEYS: Final = 256
"""Most keys in one SELECT. Fewer statements are made and prepared if their sizes are powers of two up to this."""


def _quoted(names: Iterable[str], prefix: str = "") -> str:
    return ", ".join(f'{prefix}"{name}"' for name in names)


def _marks(count: int) -> str:
    return ", ".join("?" * count)


_PUT: Final = {
    table: f'INSERT OR REPLACE INTO "{table.name}" (volume, {_quoted(table.columns)}) VALUES ({_marks(1 + len(table.columns))})'
    for table in TABLES
}
_DELETE: Final = {
    table: f'DELETE FROM "{table.name}" WHERE volume = ? AND '
    + " AND ".join(f'"{name}" = ?' for name in table.key_columns)
    for table in TABLES
}
_SELECT: Final = {table: f'SELECT {_quoted(table.columns)} FROM "{table.name}" WHERE volume = ?' for table in TABLES}
_GROUP: Final = {table: f'{_SELECT[table]} AND "{table.key_columns[0]}" = ?' for table in TABLES if table.grouped}
_SCAN: Final = {table: f"{_SELECT[table]} ORDER BY {_quoted(table.key_columns)} LIMIT ?" for table in TABLES}
_SCAN_AFTER: Final = {
    table: f"{_SELECT[table]} AND ({_quoted(table.key_columns)}) > ({_marks(table.key_size)}) "
    f"ORDER BY {_quoted(table.key_columns)} LIMIT ?"
    for table in TABLES
}
_DELETE_SOME: Final = {
    table: f'DELETE FROM "{table.name}" WHERE volume = ?1 AND ({_quoted(table.key_columns)}) IN '
    f'(SELECT {_quoted(table.key_columns)} FROM "{table.name}" WHERE volume = ?1 LIMIT ?2)'
    for table in TABLES
}

_DENTRY_COLUMNS: Final = len(DENTRY.columns)
_SCAN_DIR: Final = (
    f"SELECT {_quoted(DENTRY.columns, 'd.')}, {_quoted(INODE.columns, 'i.')} "
    "FROM dentry d LEFT JOIN inode i ON i.volume = d.volume AND i.ino = d.ino WHERE d.volume = ? AND d.parent = ?"
)
_SCAN_DIR_FIRST: Final = f"{_SCAN_DIR} ORDER BY d.name LIMIT ?"
_SCAN_DIR_AFTER: Final = f"{_SCAN_DIR} AND d.name > ? ORDER BY d.name LIMIT ?"


@cache
def _select_keys(table: Table, count: int) -> str:
    """Return the SELECT of ``count`` keys; its parameters are the volume and then the keys' values in order."""
    first, *rest = table.key_columns
    if not rest:
        return f'{_SELECT[table]} AND "{first}" ' + ("= ?" if count == 1 else f"IN ({_marks(count)})")
    second = rest[0]
    if count == 1:
        return f'{_SELECT[table]} AND "{first}" = ? AND "{second}" = ?'
    # SQLite looks every pair up by itself if it is told the order by CROSS JOIN; an IN of pairs reads whole groups.
    keys = ", ".join(["(?, ?)"] * count)
    return (
        f"WITH wanted (volume, first, second) AS (SELECT ?, column1, column2 FROM (VALUES {keys})) "
        f'SELECT {_quoted(table.columns, "t.")} FROM wanted CROSS JOIN "{table.name}" t '
        f'ON t.volume = wanted.volume AND t."{first}" = wanted.first AND t."{second}" = wanted.second'
    )


def apply_batch(connection: sqlite3.Connection, volume_id: int, batch: Batch) -> None:
    """Put and delete the rows of a batch, in the transaction that the caller has open."""
    for table, rows in batch.puts.items():
        if rows:
            connection.executemany(_PUT[table], [(volume_id, *row) for row in rows])
    for table, keys in batch.deletes.items():
        if keys:
            connection.executemany(_DELETE[table], [(volume_id, *key) for key in keys])


def load_rows(
    connection: sqlite3.Connection, volume_id: int, keys: dict[Table, list[Key]], groups: dict[Table, list[int]]
) -> Loaded:
    """Read rows by key, and groups, in one snapshot of the database."""
    statements = list(_load_statements(volume_id, keys, groups))
    found: dict[Table, list[Row]] = {}
    # One statement is a snapshot by itself; BEGIN and COMMIT would add 3 us to its 8.
    if len(statements) > 1:
        connection.execute("BEGIN")
    try:
        for table, sql, parameters in statements:
            rows = list(map(table.row._make, connection.execute(sql, parameters).fetchall()))
            if table in found:
                found[table].extend(rows)
            else:
                found[table] = rows
    finally:
        if len(statements) > 1:
            connection.execute("COMMIT")
    return Loaded(found)


def _load_statements(
    volume_id: int, keys: dict[Table, list[Key]], groups: dict[Table, list[int]]
) -> Iterator[tuple[Table, str, Sequence[Any]]]:
    for table, wanted in keys.items():
        start, left = 0, len(wanted)
        while left:
            count = min(_MAX_KEYS, 1 << (left.bit_length() - 1))
            part = wanted[start : start + count]
            yield table, _select_keys(table, count), (volume_id, *chain.from_iterable(part))
            start, left = start + count, left - count
    for table, wanted_groups in groups.items():
        for group in wanted_groups:
            yield table, _GROUP[table], (volume_id, group)


def scan_directory(
    connection: sqlite3.Connection, volume_id: int, parent: int, after: bytes | None, limit: int
) -> list[tuple[Dentry, Inode | None]]:
    """Read dentries with name > after in order, each with its inode."""
    if after is None:
        rows = connection.execute(_SCAN_DIR_FIRST, (volume_id, parent, limit)).fetchall()
    else:
        rows = connection.execute(_SCAN_DIR_AFTER, (volume_id, parent, after, limit)).fetchall()
    cut = _DENTRY_COLUMNS
    # The first column of an inode is its number: NULL where the outer join found none.
    return [(Dentry._make(row[:cut]), None if row[cut] is None else Inode._make(row[cut:])) for row in rows]


def scan_table(
    connection: sqlite3.Connection, volume_id: int, table: Table, after: Key | None, limit: int
) -> list[Row]:
    """Read rows with key > after in order of the key."""
    if after is None:
        rows = connection.execute(_SCAN[table], (volume_id, limit)).fetchall()
    else:
        rows = connection.execute(_SCAN_AFTER[table], (volume_id, *after, limit)).fetchall()
    make: Callable[[Any], Row] = table.row._make
    return list(map(make, rows))


def delete_some_rows(connection: sqlite3.Connection, volume_id: int, limit: int) -> bool:
    """Delete up to ``limit`` rows of one table of a volume; False if no table had any left."""
    return any(connection.execute(_DELETE_SOME[table], (volume_id, limit)).rowcount for table in TABLES)
