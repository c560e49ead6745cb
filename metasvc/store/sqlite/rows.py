"""Rows of the tables as SQL, on one connection: put, delete, load, scan.

Owns the text of the statements; each is made once and prepared once per connection. Knows tables and volume ids, neither
ownership nor threads. Every function runs on a thread of ConnectionThreads and may block.

Many rows are read as one: a JSON array of them, in which BLOBs are lengths, and for each column of BLOBs all of them joined.
The sqlite3 module lets go of the GIL for each row and takes it back, and waits there for whatever the event loop is doing: a
thousand rows took 2.3 ms on an idle loop, and 16 ms beside one that polls, over 32 ms beside one that computes. As one row they
take 2.3, 3 and 13 ms (docs/adr/0034). SQLite writes JSON faster than the module makes rows.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import chain
from operator import itemgetter
from typing import Any, Final, get_type_hints

from metasvc.errors import StoreError
from metasvc.model import Dentry, Inode
from metasvc.store import Loaded
from metasvc.store.tables import DENTRY, INODE, TABLES, Batch, Key, Row, Table

__all__ = ["apply_batch", "delete_some_rows", "load_rows", "scan_directory", "scan_table"]

_MAX_KEYS: Final = 256
"""Most keys in one SELECT. Fewer statements are made and prepared if their sizes are powers of two up to this."""
_PACKED_FROM: Final = 8
"""From so many keys on rows are read as JSON."""


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
_BLOBS: Final = {
    table: [index for index, name in enumerate(table.columns) if get_type_hints(table.row)[name] is bytes]
    for table in TABLES
}
"""Which columns are BLOBs."""


def _packing(table: Table, prefix: str = "", more: str = "") -> str:
    """Return what makes one row of many: the JSON array of the rows, and the bytes of each column of BLOBs.

    group_concat() takes BLOBs as they are, NUL bytes and all, and its result is text by name only.
    """
    blobs = _BLOBS[table]
    names = [f'{prefix}"{name}"' for name in table.columns]
    fields = ", ".join(f"length({name})" if index in blobs else name for index, name in enumerate(names))
    joined = "".join(f", CAST(group_concat({names[index]}, '') AS BLOB)" for index in blobs)
    return f"json_group_array(json_array({fields}{more})){joined}"


def _packed(table: Table, select: str) -> str:
    return f"SELECT {_packing(table)} FROM ({select})"


def _unpacked(table: Table, found: Sequence[Any]) -> list[list[Any]]:
    """Return the rows of a packed one."""
    rows: list[list[Any]] = json.loads(found[0])
    for blob, joined in zip(_BLOBS[table], found[1:], strict=True):
        start = 0
        for row in rows:
            end = start + row[blob]
            row[blob] = joined[start:end]
            start = end
        if start != len(joined or b""):
            # Never seen. What would follow is a content cut short, and written back.
            raise StoreError(
                f"SQLite joined {start} bytes of {table.name} to {len(joined or b'')}: use another version of it"
            )
    return rows


_GROUP: Final = {
    table: _packed(table, f'{_SELECT[table]} AND "{table.key_columns[0]}" = ?') for table in TABLES if table.grouped
}
_SCAN: Final = {
    table: _packed(table, f"{_SELECT[table]} ORDER BY {_quoted(table.key_columns)} LIMIT ?") for table in TABLES
}
_SCAN_AFTER: Final = {
    table: _packed(
        table,
        f"{_SELECT[table]} AND ({_quoted(table.key_columns)}) > ({_marks(table.key_size)}) "
        f"ORDER BY {_quoted(table.key_columns)} LIMIT ?",
    )
    for table in TABLES
}
_DELETE_SOME: Final = {
    table: f'DELETE FROM "{table.name}" WHERE volume = ?1 AND ({_quoted(table.key_columns)}) IN '
    f'(SELECT {_quoted(table.key_columns)} FROM "{table.name}" WHERE volume = ?1 LIMIT ?2)'
    for table in TABLES
}

_DENTRY_COLUMNS: Final = len(DENTRY.columns)
_NAME: Final = DENTRY.columns.index("name")
# ORDER BY and LIMIT are inside, for json_group_array() takes rows as they come; that they come in order is checked.
_SCAN_DIR: Final = (
    f"SELECT {_packing(DENTRY, 'd.', ', ' + _quoted(INODE.columns, 'i.'))} FROM (SELECT * FROM dentry "
    "WHERE volume = ?1 AND parent = ?2 {after} ORDER BY name LIMIT ?3) d LEFT JOIN inode i ON i.volume = ?1 AND i.ino = d.ino"
)
_SCAN_DIR_FIRST: Final = _SCAN_DIR.replace("{after}", "")
_SCAN_DIR_AFTER: Final = _SCAN_DIR.replace("{after}", "AND name > ?4")


@cache
def _select_keys(table: Table, count: int) -> str:
    """Return the SELECT of ``count`` keys; its parameters are the volume and then the keys' values in order."""
    select = _select_rows(table, count)
    return _packed(table, select) if count >= _PACKED_FROM else select


def _select_rows(table: Table, count: int) -> str:
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
    is_own = len(statements) > 1 and not connection.in_transaction
    if is_own:
        connection.execute("BEGIN")
    try:
        for table, sql, parameters, is_packed in statements:
            found_rows = connection.execute(sql, parameters).fetchall()
            make = table.row._make
            if is_packed:
                rows = [make(row) for row in _unpacked(table, found_rows[0])]
            else:
                rows = list(map(make, found_rows))
            if table in found:
                found[table].extend(rows)
            else:
                found[table] = rows
    finally:
        if is_own:
            connection.execute("COMMIT")
    return Loaded(found)


def _load_statements(
    volume_id: int, keys: dict[Table, list[Key]], groups: dict[Table, list[int]]
) -> Iterator[tuple[Table, str, Sequence[Any], bool]]:
    for table, wanted in keys.items():
        start, left = 0, len(wanted)
        while left:
            count = min(_MAX_KEYS, 1 << (left.bit_length() - 1))
            part = wanted[start : start + count]
            yield table, _select_keys(table, count), (volume_id, *chain.from_iterable(part)), count >= _PACKED_FROM
            start, left = start + count, left - count
    for table, wanted_groups in groups.items():
        for group in wanted_groups:
            yield table, _GROUP[table], (volume_id, group), True


def scan_directory(
    connection: sqlite3.Connection, volume_id: int, parent: int, after: bytes | None, limit: int
) -> list[tuple[Dentry, Inode | None]]:
    """Read dentries with name > after in order, each with its inode."""
    if after is None:
        (found,) = connection.execute(_SCAN_DIR_FIRST, (volume_id, parent, limit)).fetchall()
    else:
        (found,) = connection.execute(_SCAN_DIR_AFTER, (volume_id, parent, limit, after)).fetchall()
    cut = _DENTRY_COLUMNS
    rows = _unpacked(DENTRY, found)
    rows.sort(key=itemgetter(_NAME))
    # The first column of an inode is its number: NULL where the outer join found none.
    return [(Dentry._make(row[:cut]), None if row[cut] is None else Inode._make(row[cut:])) for row in rows]


def scan_table(
    connection: sqlite3.Connection, volume_id: int, table: Table, after: Key | None, limit: int
) -> list[Row]:
    """Read rows with key > after in order of the key."""
    if after is None:
        (found,) = connection.execute(_SCAN[table], (volume_id, limit)).fetchall()
    else:
        (found,) = connection.execute(_SCAN_AFTER[table], (volume_id, *after, limit)).fetchall()
    make: Callable[[Any], Row] = table.row._make
    return sorted(map(make, _unpacked(table, found)), key=table.key_of)


def delete_some_rows(connection: sqlite3.Connection, volume_id: int, limit: int) -> bool:
    """Delete up to ``limit`` rows of one table of a volume; False if no table had any left."""
    return any(connection.execute(_DELETE_SOME[table], (volume_id, limit)).rowcount for table in TABLES)
