"""The stores' schemas as numbered SQL files, one directory for each database.

``NNNN_what.sql``, numbered from 0001 without a gap. A file that was released is never changed: the next change of the
schema is the next file. Files are plain statements that end with ``;``, without BEGIN, COMMIT or PRAGMA: the driver runs
each file in one transaction and stores its number as the schema version in the same transaction, so that a file is
applied wholly or not at all, once; it would do no harm twice. There is no way back: an older AtollFS refuses a newer schema.

SQLite has no ``ALTER TABLE … ADD COLUMN IF NOT EXISTS``, which PostgreSQL has: ``apply`` gives it a meaning. A file of
PostgreSQL may have no ``;`` inside dollar quotes: it is SQLite that says where a statement ends.
"""

from __future__ import annotations

import re
import sqlite3
from dataclasses import dataclass
from importlib import resources
from typing import Final

__all__ = ["Migration", "apply", "load_migrations"]

_ADD_COLUMN: Final = re.compile(
    r"^(ALTER TABLE (\w+) ADD COLUMN )IF NOT EXISTS ((\w+) .*)", flags=re.MULTILINE | re.DOTALL
)
_FILE_NAME: Final = re.compile(r"([0-9]{4})_[a-z0-9_]+\.sql")


@dataclass(frozen=True, slots=True)
class Migration:
    """One numbered step of a schema."""

    number: int
    file_name: str
    statements: tuple[str, ...]
    """The SQL statements in order, comments included: SQLite keeps those inside CREATE TABLE with the table."""


def load_migrations(database: str) -> tuple[Migration, ...]:
    """Return the migrations of a database ("sqlite", "postgresql") in order of their numbers, read from the installed package.

    Raises ValueError if the numbers are not 1, 2, 3 … or a file is not made of complete statements.
    """
    migrations = []
    for entry in resources.files(__name__).joinpath(database).iterdir():
        if not entry.name.endswith(".sql"):
            continue
        match = _FILE_NAME.fullmatch(entry.name)
        if match is None:
            raise ValueError(f"migrations/{database}/{entry.name} is not named NNNN_what.sql")
        migrations.append(Migration(int(match[1]), entry.name, split_statements(entry.read_text("utf-8"))))
    migrations.sort(key=lambda migration: migration.number)
    if not migrations or [migration.number for migration in migrations] != list(range(1, len(migrations) + 1)):
        raise ValueError(f"the files of migrations/{database} are not numbered 0001, 0002 … without a gap")
    return tuple(migrations)


def apply(connection: sqlite3.Connection, migration: Migration) -> None:
    """Run the statements of a migration of "sqlite". Errors of sqlite3."""
    for statement in migration.statements:
        added = _ADD_COLUMN.search(statement)
        if added is None:
            connection.execute(statement)
            continue
        columns = [row[1] for row in connection.execute(f"PRAGMA table_info({added[2]})")]
        if added[4] not in columns:
            connection.execute(added[1] + added[3])


def split_statements(script: str) -> tuple[str, ...]:
    """Return the statements of a script; a ``;`` in a string, a comment or a trigger ends none. ValueError for a rest."""
    statements = []
    pending = ""
    for piece in re.split(r"(?<=;)", script):
        pending += piece
        if sqlite3.complete_statement(pending):
            statements.append(pending.strip())
            pending = ""
    if re.sub(r"--[^\n]*|\s", "", pending):
        raise ValueError(f"not a complete SQL statement: {pending.strip()[:80]!r}")
    return tuple(statements)
