"""The database file: make it, recognise it, bring its schema up to date, connect to it.

Owns the pragmas of connections and the two numbers in the file's header: ``application_id`` says that AtollFS wrote the
file, ``user_version`` is the number of the last migration. Knows no volume.

Never open() the database file or its ``-shm`` here or anywhere in a process that may have it connected: closing any
descriptor of a file drops all POSIX locks of the process on it, and SQLite's locks are such. (The one open() below
is of a file that did not exist.)
"""

from __future__ import annotations

import os
import sqlite3
from typing import Final
from urllib.parse import quote

from metasvc.errors import SchemaTooNew, StoreError, VolumeMissing
from metasvc.store.sqlite.foreign_errors import BUSY_TIMEOUT_S, no_database, translated
from migrations import Migration, load_migrations

__all__ = ["APPLICATION_ID", "connect_reader", "connect_writer", "prepare"]

APPLICATION_ID: Final = 0x41746F6C
"""``Atol`` in ASCII, at offset 68 of the file."""

# STRICT tables need 3.37 (2021). Debian 12 has 3.40.1.
_MIN_SQLITE: Final = (3, 37, 0)

# Of the log per create with pages of 4, 8, 16 KiB: 21.9, 42.3, 83.0 KiB one by one, 0.6, 1.0, 1.7 KiB in batches of 100;
# a commit takes 285, 338, 425 us and 0.7 to 0.9 ms then. Only 4 KiB contents in batches of 100 like 16 KiB as much as 4.
_PAGE_BYTES: Final = 4096
# Loads must not cost the writer's pages: a reader's cache is dropped at every commit, so it holds little.
_WRITER_CACHE_KIB: Final = 16 * 1024
_READER_CACHE_KIB: Final = 1024
_CHECKPOINT_PAGES: Final = 4000
_LOG_LIMIT_BYTES: Final = 64 << 20
# Statements kept prepared for each connection: 12 tables with about 10 shapes of SELECT each, and what else there is.
_PREPARED: Final = 256


def prepare(path: str, *, create: bool) -> None:
    """Make sure that there is a database with the newest schema. Blocks.

    With ``create`` a missing or empty file becomes one, durably, its directory entry included, readable by its owner only:
    it holds names and small files of users. Raises VolumeMissing if there is none and ``create`` is false, StoreError
    for a file that something else wrote, SchemaTooNew for one that a newer AtollFS wrote. Nothing is changed then.
    """
    if sqlite3.sqlite_version_info < _MIN_SQLITE:
        raise StoreError(f"SQLite {sqlite3.sqlite_version} is too old: install 3.37 or newer")
    with translated(path):
        if not os.path.exists(path):
            if not create:
                raise VolumeMissing(f"there is no volume at {path}: make one with atoll format, or check the address")
            try:
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            except FileExistsError:
                pass  # another process was quicker
        elif not os.path.isfile(path):
            raise no_database(path)
        connection = _connect(path)
        try:
            _prepare(connection, path, create=create)
        finally:
            connection.close()
        # Even if the file was there: whoever made it may have crashed just before this.
        _sync_directory(os.path.dirname(path))


def connect_writer(path: str) -> sqlite3.Connection:
    """Connect for commits: every commit is on disk when it returns. One at a time in a process."""
    connection = _connect(path)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(f"PRAGMA cache_size = -{_WRITER_CACHE_KIB}")
    connection.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
    connection.execute(f"PRAGMA journal_size_limit = {_LOG_LIMIT_BYTES}")
    return connection


def connect_reader(path: str) -> sqlite3.Connection:
    """Connect for loads and scans; statements that would write fail."""
    connection = _connect(path)
    connection.execute(f"PRAGMA cache_size = -{_READER_CACHE_KIB}")
    connection.execute("PRAGMA query_only = ON")
    return connection


def _connect(path: str) -> sqlite3.Connection:
    # isolation_level None: transactions begin where the code says BEGIN.
    # mode=rw: a file that somebody removed must not come back as an empty one.
    uri = f"file:{quote(os.fsencode(path))}?mode=rw"
    connection = sqlite3.connect(
        uri, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None, cached_statements=_PREPARED
    )
    connection.execute("PRAGMA foreign_keys = OFF")
    # Debian builds SQLite with secure_delete: removed contents would be overwritten with zeros in the log.
    connection.execute("PRAGMA secure_delete = OFF")
    connection.execute("PRAGMA trusted_schema = OFF")
    return connection


def _prepare(connection: sqlite3.Connection, path: str, *, create: bool) -> None:
    migrations = load_migrations("sqlite")
    if _is_current(connection, path, migrations, create=create):
        return
    connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
    connection.execute("PRAGMA synchronous = FULL")
    (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise StoreError(f"{path} cannot have a write-ahead log: put it on a local file system, not on a network one")
    connection.execute("BEGIN IMMEDIATE")
    try:
        # Again, now that nobody else can write: another process may have been quicker.
        if not _is_current(connection, path, migrations, create=create):
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            for migration in migrations[_version(connection) :]:
                for statement in migration.statements:
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {migration.number}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _is_current(connection: sqlite3.Connection, path: str, migrations: tuple[Migration, ...], *, create: bool) -> bool:
    """Return whether the schema is the newest. Raises what prepare() says; changes nothing."""
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    version = _version(connection)
    if application_id != APPLICATION_ID:
        (objects,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        # Nothing in it at all: a new file, or one whose making was cut short.
        if application_id or version or objects or not create:
            raise no_database(path)
        return False
    if version > len(migrations):
        raise SchemaTooNew(
            f"{path} has schema version {version}, this AtollFS knows up to {len(migrations)}: upgrade AtollFS"
        )
    return version == len(migrations)


def _version(connection: sqlite3.Connection) -> int:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    return int(version)


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
