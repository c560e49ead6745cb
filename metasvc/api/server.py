"""Where a process of the metadata service answers, as text and as a value.

Owns the grammar ``HOST:PORT``, which stands in addresses of volumes, in the ownership of a volume, and in what a client is told
who asked the wrong process. Must not know connections.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final, NamedTuple

__all__ = ["OWNER_SCHEME", "Server", "is_loopback", "owner_of", "owner_text", "parse_server", "parse_servers"]

OWNER_SCHEME: Final = "atoll://"
"""The owner's address in a store begins so where clients can be sent there."""
_SERVER: Final = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(?P<port>[0-9]{1,5})")


class Server(NamedTuple):
    """One process of a service."""

    host: str
    """A name or an IP address, IPv6 in brackets."""
    port: int

    def __str__(self) -> str:
        """Return it as users type it."""
        return f"{self.host}:{self.port}"


def parse_server(text: str) -> Server | None:
    """Read ``HOST:PORT``; None for what is none, port 0 included."""
    match = _SERVER.fullmatch(text)
    if match is None or not 0 < int(match["port"]) < 1 << 16:
        return None
    return Server(match["host"], int(match["port"]))


def parse_servers(text: str) -> tuple[Server, ...] | None:
    """Read ``HOST:PORT[,HOST:PORT…]``, each server once; None for what is none."""
    found = [parse_server(part) for part in text.split(",")]
    servers = tuple(dict.fromkeys(server for server in found if server is not None))
    return servers if None not in found else None


def is_loopback(host: str) -> bool:
    """Return whether a host names this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def owner_text(server: Server) -> str:
    """Return what stands in a store as the address of an owner that clients can be sent to."""
    return f"{OWNER_SCHEME}{server}"


def owner_of(text: str) -> Server | None:
    """Inverse of owner_text(); None for an owner that no client can ask, such as a mount of an embedded volume."""
    return parse_server(text.removeprefix(OWNER_SCHEME)) if text.startswith(OWNER_SCHEME) else None
