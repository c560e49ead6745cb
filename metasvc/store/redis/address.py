"""The URL of a Redis server or cluster: what is for the connection, what is for us, and what may be shown.

Owns the refusal of URLs that are none, and keeps passwords out of everything that people read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Self
from urllib.parse import parse_qsl, unquote, urlsplit

from metasvc.errors import StoreError

__all__ = ["SCHEMES", "Address", "Node"]

SCHEMES: Final = ("redis", "rediss")
DEFAULT_PORT: Final = 6379
_DEFAULT_CONNECTIONS: Final = 8
_MAX_CONNECTIONS: Final = 100
_MAX_DATABASE: Final = (1 << 31) - 1
_PREFIX: Final = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_TLS_FILES: Final = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
"""Names of the driver's, and of most tools': who signs the server's certificate; certificate and key of this client."""


class Node(NamedTuple):
    """One server process."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Address:
    """Where the keys are, and how many connections a process may have there."""

    nodes: tuple[Node, ...]
    """Of several the first one that is a master, or, of a cluster, any that answers: it names the others."""
    at: str
    """For people: no user, no password, no parameters."""
    database: int = 0
    user: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    connections: int = _DEFAULT_CONNECTIONS
    prefix: str = "atoll"
    """All keys begin with it."""
    is_tls: bool = False
    tls_files: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, url: str) -> Self:
        """Take ``redis://[user:password@]host[:port][,host:port…][/db][?parameters]``; StoreError, which does not repeat it.

        ``rediss`` encrypts. Parameters: ``connections=N``, ``prefix=NAME``, and the files of ``_TLS_FILES``.
        """
        try:
            parts = urlsplit(url)
            credentials, at, hosts = parts.netloc.rpartition("@")
            nodes = tuple(_node(text) for text in hosts.split(","))
            options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
            count = int(options.pop("connections", _DEFAULT_CONNECTIONS))
            database = int(parts.path.removeprefix("/") or "0")
        except ValueError:
            raise _not_a_url() from None
        if parts.scheme not in SCHEMES or parts.fragment or (at and not credentials):
            raise _not_a_url()
        if not 0 <= database <= _MAX_DATABASE:
            raise _not_a_url()
        if not 2 <= count <= _MAX_CONNECTIONS:
            raise StoreError(f"connections={count} of the store's URL is not between 2 and {_MAX_CONNECTIONS}")
        prefix = options.pop("prefix", "atoll")
        if _PREFIX.fullmatch(prefix) is None:
            raise StoreError("prefix= of the store's URL is not 1 to 64 letters, digits and any of . _ : -")
        is_tls = parts.scheme == "rediss"
        unknown = [name for name in options if not is_tls or name not in _TLS_FILES]
        if unknown:
            raise StoreError(f"the store's URL has the parameter {unknown[0]}, which is none of redis:// or rediss://")
        user, colon, password = credentials.partition(":")
        return cls(
            nodes,
            f"Redis at {','.join(map(str, nodes))}{f' database {database}' if database else ''}",
            database,
            unquote(user) or None,
            unquote(password) if colon else None,
            count,
            prefix,
            is_tls,
            tuple(options.items()),
        )


def _node(text: str) -> Node:
    """Return the node of ``host``, ``host:port`` or ``[host]:port``; ValueError for what is none."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^:\[\]]+))(?::([0-9]{1,5}))?", text)
    if match is None:
        raise ValueError
    port = int(match[3] or DEFAULT_PORT)
    if not 0 < port < 1 << 16:
        raise ValueError
    return Node(match[1] or match[2], port)


def _not_a_url() -> StoreError:
    return StoreError(
        "the store is no URL of Redis: give redis://user:password@host:port/db, "
        "with special characters of user and password percent-encoded"
    )
