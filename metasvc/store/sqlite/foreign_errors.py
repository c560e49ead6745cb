"""Errors of SQLite and of its driver as errors of ours: the one table.

Owns the remedy for each kind. Must not know what was being done; the texts name the database file.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from metasvc.errors import StoreError, StoreRefused

__all__ = ["BUSY_TIMEOUT_S", "FOREIGN", "no_database", "translate", "translated"]

BUSY_TIMEOUT_S: Final = 10.0
"""How long a statement waits for the write lock of another process. Ours hold it for one batch or one checkpoint."""

FOREIGN: Final = (sqlite3.Error, sqlite3.Warning, OverflowError, UnicodeError, OSError)
"""What the driver raises: OverflowError for integers beyond 64 bits, UnicodeError for text that is no Unicode."""

_BY_PRIMARY_CODE: Final[dict[int, str]] = {
    sqlite3.SQLITE_FULL: "the file system of {path} is full: free some space there, then try again",
    sqlite3.SQLITE_CORRUPT: "{path} is damaged: stop using the volume and restore the metadata from a backup or a dump",
    sqlite3.SQLITE_NOTADB: "{path} is no AtollFS metadata database: check the address",
    sqlite3.SQLITE_READONLY: "{path} cannot be written: make the file and its directory writable for this user",
    sqlite3.SQLITE_PERM: "{path} cannot be accessed: make the file and its directory writable for this user",
    sqlite3.SQLITE_CANTOPEN: "{path} cannot be opened: check that its directory exists and is writable for this user",
    sqlite3.SQLITE_BUSY: "{path} was locked by another process for {busy:.0f} s: end that process, then try again",
    sqlite3.SQLITE_LOCKED: "{path} was locked by another process for {busy:.0f} s: end that process, then try again",
    sqlite3.SQLITE_PROTOCOL: "the locks of {path} are in disorder: put it on a local file system, not on a network one",
    sqlite3.SQLITE_IOERR: "reading or writing {path} failed: check the disk and the kernel's log",
    sqlite3.SQLITE_NOMEM: "no memory was left to work on {path}: free some, then try again",
    sqlite3.SQLITE_CONSTRAINT: "a row does not fit the schema of {path}: this is a bug, please report it",
    sqlite3.SQLITE_MISMATCH: "a row does not fit the schema of {path}: this is a bug, please report it",
    sqlite3.SQLITE_TOOBIG: "a row is too big for {path}: this is a bug, please report it",
}
_FOR_GOOD: Final = frozenset(
    {
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_CONSTRAINT,
        sqlite3.SQLITE_MISMATCH,
        sqlite3.SQLITE_TOOBIG,
    }
)
"""What a second try would meet again. A full or failing disk is not among them: it may be mended."""
_OTHER: Final = "{path} could not be used: see the cause, and report it if it is not yours"


def translate(error: Exception, path: str) -> StoreError:
    """Return the StoreError for one of FOREIGN, StoreRefused where to try again is no use; raise it ``from`` the error."""
    if isinstance(error, OSError):
        return StoreError(f"{error.filename or path} could not be used: {error.strerror}; check path, owner and mode")
    kind = StoreError
    if isinstance(error, OverflowError | UnicodeError):
        kind = StoreRefused
        text = "a row does not fit the schema of {path}: this is a bug, please report it"
    else:
        # Absent for errors that the driver raises by itself. The low byte is the primary code, the rest details it.
        code = getattr(error, "sqlite_errorcode", None)
        primary = None if code is None else code & 0xFF
        text = _OTHER if primary is None else _BY_PRIMARY_CODE.get(primary, _OTHER)
        if primary in _FOR_GOOD:
            kind = StoreRefused
    detail = getattr(error, "sqlite_errorname", type(error).__name__)
    return kind(f"{text.format(path=path, busy=BUSY_TIMEOUT_S)} ({detail}: {error})")


@contextmanager
def translated(path: str) -> Iterator[None]:
    """Translate what leaves the block."""
    try:
        yield
    except FOREIGN as exc:
        raise translate(exc, path) from exc


def no_database(path: str) -> StoreError:
    """Return the error for a file that something else wrote."""
    return StoreError(_BY_PRIMARY_CODE[sqlite3.SQLITE_NOTADB].format(path=path))
