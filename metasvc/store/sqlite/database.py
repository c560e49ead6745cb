"""The database file: make it, recognise it, bring its schema up to date, connect to it.

Owns the pragmas of connections and the two numbers in the file's header: ``application_id`` says that AtollFS wrote the
file, ``user_version`` is the number of the last migration. Knows no volume.

Never open() the database file or its ``-shm`` here or anywhere in a process that may have it connected: closing any
descriptor of a file drops all POSIX locks of the process on it, and SQLite's locks are such. (The one open() below
is of a new file that nobody knows.)
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
from collections.abc import Iterator
from typing import Final, TypeVar
from urllib.parse import quote

from metasvc.errors import SchemaTooNew, StoreError, VolumeMissing
from metasvc.store.sqlite.foreign_errors import BUSY_TIMEOUT_S, no_database, translated
from metasvc.store.sqlite.log_room import LogRoom
from migrations import apply, load_migrations

__all__ = [
    "APPLICATION_ID",
    "WriterConnection",
    "connect_reader",
    "connect_writer",
    "prepare",
    "transaction",
    "unlocked_only",
]

APPLICATION_ID: Final = 0x41746F6C
"""``Atol`` in ASCII, at offset 68 of the file."""

# STRICT tables need 3.37, JSON is built in from 3.38 (2022) on. Debian 12 has 3.40.1.
_MIN_SQLITE: Final = (3, 38, 0)

# Of the log per create with pages of 4, 8, 16 KiB: 21.9, 42.3, 83.0 KiB one by one, 0.6, 1.0, 1.7 KiB in batches of 100;
# a commit takes 285, 338, 425 us and 0.7 to 0.9 ms then. Only 4 KiB contents in batches of 100 like 16 KiB as much as 4.
_PAGE_BYTES: Final = 4096
# 1 to 64 MiB made no difference to the 25 us of CPU that a create in random directories costs (a million files, batches of
# 100): a page that is missing is a read from the kernel's cache. A reader's cache is dropped at every commit anyway.
_WRITER_CACHE_KIB: Final = 8 * 1024
_READER_CACHE_KIB: Final = 1024
# The commit that finds more than this in the log writes it into the database file and waits for that: 12 to 34 ms, most
# of it fsync, whether it is 500 or 8,000 pages. The fewer the better: a create in random directories writes 33, 17, 12 KB
# altogether with 1,000, 4,000, 8,000 pages (batches of 100). The price is 32 MiB of disk, and 20 ms to read the log after
# a crash. A thread that empties the log beside the commits was tried: no better in P99, and the log grew without bound.
_CHECKPOINT_PAGES: Final = 8000
_LOG_FULL_BYTES: Final = 32 + _CHECKPOINT_PAGES * (24 + _PAGE_BYTES)
# Truncate a log that something (a long read in another process) made grow beyond this.
_LOG_LIMIT_BYTES: Final = 2 * _LOG_FULL_BYTES
_WAIT: Final = f"PRAGMA busy_timeout = {BUSY_TIMEOUT_S * 1000:.0f}"
# Statements kept prepared for each connection: 12 tables with about 10 shapes of SELECT each, and what else there is.
_PREPARED: Final = 256

C = TypeVar("C", bound=sqlite3.Connection)


def prepare(path: str, *, create: bool) -> None:
    """Make sure that there is a database with the newest schema. Blocks.

    With ``create`` a missing file is made, atomically and durably, its directory entry included, and readable by its owner
    only, for it holds names and small files of users. Raises VolumeMissing if there is none and ``create`` is false,
    StoreError for a file that something else wrote, SchemaTooNew for one of a newer AtollFS; nothing is changed then.
    """
    if sqlite3.sqlite_version_info < _MIN_SQLITE:
        raise StoreError(f"SQLite {sqlite3.sqlite_version} is too old: install 3.38 or newer")
    with translated(path):
        if not os.path.lexists(path):
            if not create:
                raise VolumeMissing(f"there is no volume at {path}: make one with atoll format, or check the address")
            _create(path)
        elif not os.path.isfile(path):
            raise no_database(path)
        _update(path)
        # Even if the file was there: whoever made it may have crashed just before this.
        _sync_directory(os.path.dirname(path))


class WriterConnection(sqlite3.Connection):
    """A connection for commits, with what keeps room in the log for them."""

    log: LogRoom


def connect_writer(path: str) -> WriterConnection:
    """Connect for commits: every commit is on disk when it returns. One at a time in a process."""
    connection = _connect(path, WriterConnection)
    connection.log = LogRoom(path, limit_bytes=_LOG_FULL_BYTES)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(f"PRAGMA cache_size = -{_WRITER_CACHE_KIB}")
    connection.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
    connection.execute(f"PRAGMA journal_size_limit = {_LOG_LIMIT_BYTES}")
    return connection


def connect_reader(path: str) -> sqlite3.Connection:
    """Connect for loads and scans; statements that would write fail."""
    connection = _connect(path, sqlite3.Connection)
    connection.execute(f"PRAGMA cache_size = -{_READER_CACHE_KIB}")
    connection.execute("PRAGMA query_only = ON")
    return connection


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Run the block as one transaction that holds the write lock from its start; durable when it ends without an error."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        # A full disk and some others roll back by themselves.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def unlocked_only(connection: sqlite3.Connection) -> Iterator[None]:
    """Let statements of the block fail with SQLITE_BUSY at once where they would wait for the lock of somebody else."""
    connection.execute("PRAGMA busy_timeout = 0")
    try:
        yield
    finally:
        connection.execute(_WAIT)


def _connect(path: str, factory: type[C]) -> C:
    # isolation_level None: transactions begin where the code says BEGIN.
    # mode=rw: a file that somebody removed must not come back as an empty one.
    uri = f"file:{quote(os.fsencode(path))}?mode=rw"
    connection: C = sqlite3.connect(
        uri,
        uri=True,
        timeout=BUSY_TIMEOUT_S,
        isolation_level=None,
        cached_statements=_PREPARED,
        factory=factory,
        # Used by one thread at a time, not by one: ConnectionThreads.call_here.
        check_same_thread=False,
    )
    connection.execute("PRAGMA foreign_keys = OFF")
    # Debian builds SQLite with secure_delete: removed contents would be overwritten with zeros in the log.
    connection.execute("PRAGMA secure_delete = OFF")
    connection.execute("PRAGMA trusted_schema = OFF")
    return connection


def _create(path: str) -> None:
    """Make an empty database of ours under another name, then give it its own; nothing if another was quicker."""
    draft = f"{path}.{os.getpid()}-{secrets.token_hex(8)}.new"
    try:
        os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        with contextlib.closing(_connect(draft, sqlite3.Connection)) as connection:
            connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
            connection.execute("PRAGMA synchronous = FULL")
            (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
            if mode != "wal":
                raise StoreError(f"{path} cannot have a log: put it on a local file system, not on a network one")
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        # Closed, hence the log is in the file and removed. link() fails if the name exists, rename() would replace it.
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        for suffix in ("", "-wal", "-shm", "-journal"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(draft + suffix)


def _update(path: str) -> None:
    """Check whose file it is and run the migrations that it lacks, in one transaction."""
    migrations = load_migrations("sqlite")
    with contextlib.closing(_connect(path, sqlite3.Connection)) as connection:
        connection.execute("PRAGMA synchronous = FULL")
        if _version(connection, path, newest=len(migrations)) == len(migrations):
            return
        with transaction(connection):
            # Again, now that nobody else can write: another process may have been quicker.
            for migration in migrations[_version(connection, path, newest=len(migrations)) :]:
                apply(connection, migration)
                connection.execute(f"PRAGMA user_version = {migration.number}")


def _version(connection: sqlite3.Connection, path: str, *, newest: int) -> int:
    """Return the number of the last migration. Raises what prepare() says."""
    # It is in the file from its first moment on, so these two reads need not be one.
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    if application_id != APPLICATION_ID:
        raise no_database(path)
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > newest:
        raise SchemaTooNew(f"{path} has schema version {version}, this AtollFS knows up to {newest}: upgrade AtollFS")
    return int(version)


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
