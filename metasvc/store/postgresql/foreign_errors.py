"""Errors of PostgreSQL and of its driver as errors of ours: the one table.

Owns the remedy for each kind, and which of them say that the connection is of no more use. Must not know what was being done;
the texts name the database without user and password.
"""

from __future__ import annotations

from typing import Final

import asyncpg

from metasvc.errors import StoreError, StoreRefused

__all__ = ["FOREIGN", "Unavailable", "is_usable_after", "translate"]

FOREIGN: Final = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, UnicodeError)
"""What the driver raises. TimeoutError, of a connection that is not made in time, is an OSError."""


class Unavailable(StoreError):
    """There is no server, or the connection to it broke: what was sent may have been done or not, and may be tried again."""


_LOST: Final = "the connection to {at} was lost: see whether the server runs and can be reached"
_LATE: Final = "{at} did not answer in time: see what keeps the server or the network busy"
_WRONG_URL: Final = "the parameters in the URL of {at} do not fit together"
_MISFIT: Final = "a row does not fit the schema of {at}: this is a bug, please report it"
_GONE: Final = "the schema of {at} is not as AtollFS made it: restore it from a backup"
_DAMAGED: Final = "{at} is damaged: stop using the volume and restore the metadata from a backup or a dump"
_OTHER: Final = "{at} could not do it: see the cause, and report it if it is not yours"

# By SQLSTATE, whole or its class (the first two characters); the longer entry counts.
_BY_STATE: Final[dict[str, tuple[type[StoreError], str]]] = {
    "08": (Unavailable, _LOST),
    "57P": (Unavailable, _LOST),
    "57P01": (Unavailable, "{at} shut down or ended the connection: see whether the server runs"),
    "57P03": (Unavailable, "{at} is starting up or shutting down: wait, or see the server's log"),
    "25006": (
        Unavailable,
        "{at} is read-only, as a standby is: name the primary, or add target_session_attrs=read-write to the URL",
    ),
    "53300": (
        Unavailable,
        "{at} has no connection left: raise max_connections there, or lower connections= in the URLs of the services",
    ),
    "40": (Unavailable, "{at} took something else first: another program changes the tables of AtollFS"),
    "0A000": (Unavailable, "the tables of {at} were changed while they were in use"),
    "53100": (StoreError, "the disk of {at} is full: free some space there, then try again"),
    "53": (StoreError, "{at} ran out of memory or another resource: see the server's log"),
    "55P03": (StoreError, "a lock in {at} was held for too long: end what holds it (pg_stat_activity), then try again"),
    "57014": (StoreError, "{at} took too long and was interrupted: see what keeps the server busy"),
    "58": (StoreError, "{at} cannot read or write its files: check its disk and the server's log"),
    "28": (StoreError, "{at} refused user or password: check both, and pg_hba.conf of the server"),
    "3D000": (StoreError, "there is no database {at}: make it with createdb, or check the address"),
    "3F000": (
        StoreError,
        "there is no schema in {at} for the tables: make it with CREATE SCHEMA, or check search_path",
    ),
    "42501": (StoreError, "the user has too few rights in {at}: make it the owner of the database or of the schema"),
    "22": (StoreRefused, _MISFIT),
    "23": (StoreRefused, _MISFIT),
    "54": (StoreRefused, "a batch is too large for {at}: this is a bug, please report it"),
    "42": (StoreRefused, _GONE),
    "XX001": (StoreRefused, _DAMAGED),
    "XX002": (StoreRefused, _DAMAGED),
}
_UNUSABLE: Final = frozenset({"08", "57", "25", "58", "XX"})
"""Classes after which the connection may be dead, or lead to the wrong server. 57014 is an answer like others."""


def translate(error: BaseException, at: str) -> StoreError:
    """Return the StoreError for one of FOREIGN; raise it ``from`` the error. ``at`` names the database.

    StoreRefused where to try again is no use, Unavailable where the same call may do a moment later.
    """
    state = getattr(error, "sqlstate", None)
    kind: type[StoreError]
    if isinstance(error, asyncpg.ClientConfigurationError):
        kind, text = StoreError, _WRONG_URL
    elif isinstance(error, UnicodeError):
        kind, text = StoreRefused, _MISFIT
    elif isinstance(error, TimeoutError):
        kind, text = Unavailable, _LATE
    elif not isinstance(error, asyncpg.PostgresError) or state is None:
        kind, text = Unavailable, _LOST
    else:
        kind, text = next(
            (found for end in (5, 3, 2) if (found := _BY_STATE.get(state[:end])) is not None), (StoreError, _OTHER)
        )
    detail = f"{state} " if state else ""
    said = str(error) or type(error).__name__
    return kind(f"{text.format(at=at)} ({detail}{said})")


def is_usable_after(error: BaseException) -> bool:
    """Return whether a connection may be used again after an error: it has answered, and works as before."""
    state = getattr(error, "sqlstate", None)
    if not isinstance(error, asyncpg.PostgresError) or state is None:
        return False
    return state == "57014" or state[:2] not in _UNUSABLE
