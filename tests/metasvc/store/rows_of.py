"""Rows for tests: strategies and examples for any table, made from the types of its columns."""

from __future__ import annotations

import typing
from typing import Any, Final

from hypothesis import strategies as st

from metasvc.model import VolumeFormat
from metasvc.store.tables import TABLES, Batch, Key, Row, Table

INT64_MIN: Final = -(1 << 63)
INT64_MAX: Final = (1 << 63) - 1

Model = dict[Table, dict[Key, Row]]
"""What a store should hold."""


def volume_format(*, tenant: str = "tenant", name: str = "volume", **changes: Any) -> VolumeFormat:
    """Return a format, each field changed by keyword."""
    values: dict[str, Any] = {
        "uuid": f"uuid-of-{tenant}-{name}",
        "tenant": tenant,
        "name": name,
        "bucket_url": "file:objects",
        "block_bytes": 4 << 20,
        "compression": "zstd:1",
        "inline_limit_bytes": 32768,
        "capacity_bytes": 0,
        "max_inodes": 0,
        "trash_days": 0.5,
        "created_ns": 1_700_000_000_123_456_789,
    }
    return VolumeFormat(**(values | changes))


def column_types(table: Table) -> list[type]:
    """Return int, bytes or str for each column."""
    hints = typing.get_type_hints(table.row)
    return [getattr(hints[column], "__supertype__", hints[column]) for column in table.columns]


def example_row(table: Table, number: int) -> Row:
    """Return a row; different numbers give different keys, in order of the number within a group of 10."""
    values: list[Any] = []
    for position, kind in enumerate(column_types(table)):
        plain = number // 10 if table.grouped and position == 0 else number + 1000 * position
        values.append({int: plain, bytes: b"%06d" % plain, str: f"{plain:06d}"}[kind])
    row: Row = table.row._make(values)
    return row


def batch_of(*rows: Row, deletes: dict[Table, list[Key]] | None = None) -> Batch:
    """Return a batch that puts rows, each into the table of its type."""
    puts: dict[Table, list[Row]] = {}
    for row in rows:
        puts.setdefault(table_of(row), []).append(row)
    return Batch(puts, deletes or {})


def table_of(row: Row) -> Table:
    """Return the table of a row."""
    return next(table for table in TABLES if table.row is type(row))


def apply_to(model: Model, batch: Batch) -> None:
    """Do to a model what a commit does to a store."""
    for table, rows in batch.puts.items():
        for row in rows:
            model[table][table.key_of(row)] = row
    for table, keys in batch.deletes.items():
        for key in keys:
            model[table].pop(key, None)


# Few keys, so that rows are replaced, deleted and found; values of all sizes.
_KEYS: Final[dict[type, st.SearchStrategy[Any]]] = {
    int: st.sampled_from([INT64_MIN, -1, 0, 1, 2, 3, 256, INT64_MAX]),
    bytes: st.sampled_from([b"", b"\0", b"a", b"a\0", b"a\0b", b"ab", b"b", b"\x7f", b"\x80", b"\xff", b"\xff" * 255]),
    str: st.sampled_from(["", "a", "used_bytes", "\u00e9", "\uffff", "\U0001f3dd"]),
}
_VALUES: Final[dict[type, st.SearchStrategy[Any]]] = {
    int: st.one_of(st.sampled_from([INT64_MIN, INT64_MAX, 0]), st.integers(INT64_MIN, INT64_MAX)),
    bytes: st.one_of(st.binary(max_size=300), st.integers(0, 20_000).map(lambda size: b"\xa5" * size)),
    str: st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40),
}


def keys_of(table: Table) -> st.SearchStrategy[Key]:
    """Return a strategy for keys that often repeat."""
    return st.tuples(*[_KEYS[kind] for kind in column_types(table)[: table.key_size]])


def rows_of(table: Table) -> st.SearchStrategy[Row]:
    """Return a strategy for rows whose keys often repeat."""
    values = [_VALUES[kind] for kind in column_types(table)[table.key_size :]]
    return st.tuples(keys_of(table), st.tuples(*values)).map(lambda parts: table.row._make(parts[0] + parts[1]))


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Draw a batch over some tables that has each key at most once."""
    puts: dict[Table, list[Row]] = {}
    deletes: dict[Table, list[Key]] = {}
    for table in draw(st.lists(st.sampled_from(TABLES), unique=True, max_size=4)):
        rows = draw(st.lists(rows_of(table), unique_by=table.key_of, max_size=6))
        taken = {table.key_of(row) for row in rows}
        if rows:
            puts[table] = rows
        keys = [key for key in draw(st.lists(keys_of(table), unique=True, max_size=4)) if key not in taken]
        if keys:
            deletes[table] = keys
    return Batch(puts, deletes)
