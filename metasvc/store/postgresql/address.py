"""The URL of a PostgreSQL database: what is for the driver, what is for us, and what may be shown.

Owns the refusal of URLs that are none, and keeps passwords out of everything that people read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from metasvc.errors import StoreError

__all__ = ["SCHEMES", "Address"]

SCHEMES: Final = ("postgresql", "postgres")
_CONNECTIONS: Final = "connections"
_DEFAULT_CONNECTIONS: Final = 8
"""A server takes 100 connections where nothing is said: enough for a dozen processes."""
_MAX_CONNECTIONS: Final = 100


@dataclass(frozen=True, slots=True)
class Address:
    """Where a database is, and how many connections a process may have there."""

    url: str
    """For the driver; has the password, if one is in the URL."""
    at: str
    """For people: no user, no password, no parameters."""
    connections: int

    @classmethod
    def parse(cls, url: str) -> Self:
        """Take ``postgresql://user:password@host:port/database?parameters``; StoreError, which does not repeat it.

        All parts may be missing, and have the defaults of libpq, its environment variables (PGHOST, PGPASSWORD …) and its
        password file then. ``connections=N`` is ours, others are libpq's (``sslmode=verify-full``) or settings of the
        server for the session (``search_path=atoll``).
        """
        try:
            parts = urlsplit(url)
            host = _hosts(parts.netloc.rpartition("@")[2])
            options = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
            count = int(dict(options).get(_CONNECTIONS, _DEFAULT_CONNECTIONS))
        except ValueError:
            raise _not_a_url() from None
        if parts.scheme not in SCHEMES or parts.fragment:
            raise _not_a_url()
        if not 2 <= count <= _MAX_CONNECTIONS:
            raise StoreError(f"{_CONNECTIONS}={count} of the store's URL is not between 2 and {_MAX_CONNECTIONS}")
        rest = urlencode([(name, value) for name, value in options if name != _CONNECTIONS])
        name = parts.path.lstrip("/")
        return cls(
            urlunsplit(parts._replace(query=rest)),
            f"PostgreSQL{f' at {host}' if host else ''}{f' database {name}' if name else ''}",
            count,
        )


def _hosts(text: str) -> str:
    """Return the hosts, each with its port if there is one; ValueError for a port that is none."""
    for host in text.split(","):
        port = host.rpartition("]")[2].partition(":")[2]
        if port and not 0 < int(port) < 1 << 16:
            raise ValueError
    return text


def _not_a_url() -> StoreError:
    return StoreError(
        "the store is no URL of PostgreSQL: give postgresql://user:password@host:port/database, "
        "with special characters of user and password percent-encoded"
    )
