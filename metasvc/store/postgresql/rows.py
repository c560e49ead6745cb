"""Rows of the tables as SQL: the parts of a commit, loads, scans.

Owns the text of the statements; each is made once for the tables that it concerns, and the driver prepares it once for each
connection. Knows tables and volume ids, neither ownership nor connections.

Columns, not rows, go over the wire: an array for each column, with unnest() on the way in and array_agg() on the way out, so
that any number of rows is one message of a few dozen values, which the driver packs and unpacks in C. All tables
of a commit, or of a load, are one statement: one trip and one snapshot.

Plans: every row is asked for by its key, or by a range of the key in its order, however many there are. A planner that guesses
from what the tables held when the statement was prepared, nothing as a rule, prefers to read all of a volume, and keeps to
that plan. So each connection is told (database) to plan a statement once, for all values, with nothing but the index of the
key; and a join is written as a subquery for each key, which cannot be turned around (LATERAL … OFFSET 0). Rows to delete
are found that way, too, and deleted by their place (ctid), which nobody changes meanwhile: see ownership.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import chain
from operator import itemgetter
from typing import Any, Final, get_type_hints

from metasvc.model import Dentry, Inode
from metasvc.store import Loaded
from metasvc.store.tables import DENTRY, INODE, TABLES, Batch, Key, Row, Table

__all__ = [
    "Shape",
    "changes_sql",
    "changes_values",
    "delete_some_sql",
    "load_sql",
    "load_values",
    "loaded",
    "scan_dir_sql",
    "scan_sql",
    "scanned",
    "scanned_dir",
    "shape_of",
]

Shape = tuple[tuple[Table, bool], ...]
"""Which tables a batch changes: each with True for rows to put, with False for keys to delete, in a fixed order."""

_TYPES: Final = {int: "bigint", bytes: "bytea", str: "text"}
_HINTS: Final = {table: get_type_hints(table.row) for table in TABLES}


def _type(table: Table, column: str) -> str:
    hint = _HINTS[table][column]
    return _TYPES[getattr(hint, "__supertype__", hint)]


def _unnest(table: Table, columns: Sequence[str], first: int) -> str:
    arrays = ", ".join(f"${first + index}::{_type(table, column)}[]" for index, column in enumerate(columns))
    return f"unnest({arrays}) AS k ({_list(columns)})"


def _list(columns: Sequence[str], prefix: str = "") -> str:
    return ", ".join(f'{prefix}"{column}"' for column in columns)


# -- in ---------------------------------------------------------------------------------------------------------------


def shape_of(batch: Batch) -> Shape:
    """Return what a batch changes, in order of TABLES, so that as few statements as possible are prepared."""
    puts, deletes = batch.puts, batch.deletes
    return tuple(
        (table, is_put)
        for table in TABLES
        for is_put, rows in ((True, puts.get(table)), (False, deletes.get(table)))
        if rows
    )


@cache
def changes_sql(shape: Shape, volume: str, first: int) -> str:
    """Return the WITH items that put and delete what changes_values() gives, beginning with ``, `` if there are any.

    ``volume`` is a FROM item of one row or none with the column ``id``: without a row nothing is changed. Parameters are
    numbered from ``first``.
    """
    items = []
    for number, (table, is_put) in enumerate(shape):
        columns = table.columns if is_put else table.key_columns
        unnest = _unnest(table, columns, first)
        first += len(columns)
        items.append(f", c{number} AS ({_put(table, volume, unnest) if is_put else _delete(table, volume, unnest)})")
    return "\n".join(items)


def _put(table: Table, volume: str, unnest: str) -> str:
    others = table.columns[table.key_size :]
    replace = ", ".join(f'"{column}" = excluded."{column}"' for column in others)
    return (
        f'INSERT INTO "{table.name}" (volume, {_list(table.columns)}) SELECT {volume}.id, k.* FROM {volume}, {unnest} '
        f"ON CONFLICT (volume, {_list(table.key_columns)}) DO {f'UPDATE SET {replace}' if others else 'NOTHING'}"
    )


def _delete(table: Table, volume: str, unnest: str) -> str:
    find = _each(table, ("ctid",), unnest, f"(SELECT id FROM {volume})", table.key_size)
    return f'DELETE FROM "{table.name}" WHERE ctid = ANY (ARRAY(SELECT t.ctid FROM {find}))'


def _each(table: Table, columns: Sequence[str], unnest: str, volume: str, key_size: int) -> str:
    """Return the FROM item ``t`` with columns of the rows that have the keys ``k``, looked up one by one."""
    matches = " AND ".join(f'"{column}" = k."{column}"' for column in table.key_columns[:key_size])
    select = f'SELECT {", ".join(columns)} FROM "{table.name}" WHERE volume = {volume} AND {matches} OFFSET 0'
    return f"{unnest} CROSS JOIN LATERAL ({select}) AS t"


def changes_values(shape: Shape, batch: Batch) -> Iterator[Any]:
    """Yield the parameters of changes_sql(): an array for each column."""
    for table, is_put in shape:
        yield from zip(*(batch.puts if is_put else batch.deletes)[table], strict=True)


@cache
def delete_some_sql(table: Table, *, is_first: bool) -> str:
    """Return the statement that deletes rows in order: of volume $1, at most $2, behind the key $3 … unless ``is_first``.

    It answers the key of the last one.
    """
    keys = _list(table.key_columns)
    order = ", ".join(f'"{column}" DESC' for column in table.key_columns)
    return (
        f'WITH gone AS (DELETE FROM "{table.name}" WHERE ctid = ANY (ARRAY({_in_order(table, "ctid", is_first=is_first)})) '
        f"RETURNING {keys}) SELECT {keys} FROM gone ORDER BY {order} LIMIT 1"
    )


def _in_order(table: Table, columns: str, *, is_first: bool) -> str:
    marks = ", ".join(f"${3 + index}" for index in range(table.key_size))
    keys = _list(table.key_columns)
    after = "" if is_first else f"AND ({keys}) > ({marks}) "
    return f'SELECT {columns} FROM "{table.name}" WHERE volume = $1 {after}ORDER BY {keys} LIMIT $2'


# -- out --------------------------------------------------------------------------------------------------------------


def _arrays(columns: Sequence[str], prefix: str = "") -> str:
    return ", ".join(f'array_agg({prefix}"{column}")' for column in columns)


@cache
def load_sql(by_key: tuple[Table, ...], by_group: tuple[Table, ...]) -> str:
    """Return the statement that loads rows by keys and by groups; $1 is the volume, the rest is load_values().

    It answers one row: an array for each column of each table, NULL where nothing was found.
    """
    parts: list[str] = []
    first = 2
    for table, size in chain(((table, table.key_size) for table in by_key), ((table, 1) for table in by_group)):
        unnest = _unnest(table, table.key_columns[:size], first)
        each = _each(table, ("*",), unnest, "$1", size)
        parts.append(f"(SELECT {_arrays(table.columns, 't.')} FROM {each}) AS p{len(parts)}")
        first += size
    return "SELECT * FROM " + " CROSS JOIN ".join(parts)


def load_values(keys: dict[Table, list[Key]], groups: dict[Table, list[int]]) -> Iterator[Any]:
    """Yield the parameters of load_sql() behind the volume, of dicts without empty lists."""
    for wanted in keys.values():
        yield from zip(*wanted, strict=True)
    yield from groups.values()


def loaded(tables: Sequence[Table], found: Sequence[Any]) -> Loaded:
    """Return the rows in the answer to load_sql(); ``tables`` are those by key, then those by group."""
    rows: dict[Table, list[Row]] = {}
    start = 0
    for table in tables:
        end = start + len(table.columns)
        rows.setdefault(table, []).extend(_rows(table, found[start:end]))
        start = end
    return Loaded(rows)


def _rows(table: Table, arrays: Sequence[Any]) -> Iterator[Row]:
    # The first column is of the key, hence never NULL: no array, no rows.
    return iter(()) if arrays[0] is None else map(table.row._make, zip(*arrays, strict=True))


@cache
def scan_sql(table: Table, *, is_first: bool) -> str:
    """Return the statement that reads rows in order: of volume $1, at most $2, behind the key $3 … unless ``is_first``."""
    return f"SELECT {_arrays(table.columns)} FROM ({_in_order(table, '*', is_first=is_first)}) AS p"


def scanned(table: Table, found: Sequence[Any]) -> list[Row]:
    """Return the rows in the answer to scan_sql(), in order of the key."""
    # They come in order, which nothing promises: to sort what is sorted costs next to nothing.
    return sorted(_rows(table, found), key=table.key_of)


@cache
def scan_dir_sql(*, is_first: bool) -> str:
    """Return the statement that reads dentries of volume $1, directory $2, at most $3, name > $4 unless ``is_first``."""
    return (
        f"SELECT {_arrays(DENTRY.columns, 'd.')}, {_arrays(INODE.columns, 'i.')} FROM (SELECT * FROM dentry "
        f"WHERE volume = $1 AND parent = $2 {'' if is_first else 'AND name > $4 '}ORDER BY name LIMIT $3) AS d "
        "LEFT JOIN LATERAL (SELECT * FROM inode WHERE volume = $1 AND ino = d.ino OFFSET 0) AS i ON true"
    )


_DENTRY_COLUMNS: Final = len(DENTRY.columns)


def scanned_dir(found: Sequence[Any]) -> list[tuple[Dentry, Inode | None]]:
    """Return the dentries in the answer to scan_dir_sql(), each with its inode, in order of the name."""
    if found[0] is None:
        return []
    cut = _DENTRY_COLUMNS
    rows = sorted(zip(*found, strict=True), key=itemgetter(DENTRY.columns.index("name")))
    # The first column of an inode is its number: NULL where the outer join found none.
    return [(Dentry._make(row[:cut]), None if row[cut] is None else Inode._make(row[cut:])) for row in rows]
