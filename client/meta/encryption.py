"""Whether connections to a service are encrypted, and which certificates are believed.

Owns the settings ``ATOLL_TLS_CA`` (a file of authorities besides the system's) and ``ATOLL_INSECURE`` (plain text to other
machines is allowed). The scheme of the address decides: ``atolls://`` is TLS with every process of the service, also those that
a client is sent to; ``atoll://`` is plain text, which carries the token readably and therefore stays on this machine unless the
user says that the network is trusted. Must not know what is sent.
"""

from __future__ import annotations

import errno
import os
import ssl
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from chunkstore.errors import AtollError
from client.meta.endpoint import Endpoint
from metasvc.api.server import Server

__all__ = ["CA_VARIABLE", "INSECURE_VARIABLE", "CaInvalid", "Trust", "allows_plain", "endpoint_at"]

CA_VARIABLE: Final = "ATOLL_TLS_CA"
INSECURE_VARIABLE: Final = "ATOLL_INSECURE"


class CaInvalid(AtollError):
    """Say why a file of authorities cannot be used."""

    code = "bad-ca"
    errno = errno.EINVAL


class ServiceAt(Protocol):
    """An address, as far as it says how its service is reached."""

    @property
    def servers(self) -> tuple[Server, ...]:
        """Return its processes."""
        ...

    @property
    def is_encrypted(self) -> bool:
        """Return whether they are reached by TLS."""
        ...


class Trust:
    """The authorities that are believed: the system's, and those in a file, which may be replaced at any time."""

    def __init__(self, ca_file: str | None) -> None:
        """Read them. CaInvalid."""
        self._ca_file = ca_file
        self._read_as: tuple[int, ...] = ()
        self._context = self._read()

    def context(self) -> ssl.SSLContext:
        """Return what the next connection is made with. A file that is being replaced counts as it was before."""
        if self._ca_file is not None:
            try:
                if self._read_as != _version(self._ca_file):
                    self._context = self._read()
            except (OSError, CaInvalid):
                pass
        return self._context

    def _read(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        if self._ca_file is not None:
            try:
                version = _version(self._ca_file)
                context.load_verify_locations(cafile=self._ca_file)
            except (OSError, ValueError) as error:
                # ssl.SSLError is an OSError, too.
                is_absent = isinstance(error, OSError) and not isinstance(error, ssl.SSLError)
                reason = os.strerror(error.errno or 0) if is_absent else "no certificates in it"  # type: ignore[union-attr]
                raise CaInvalid(
                    f"{self._ca_file!r}: {reason}; give the authority's certificate in PEM with --tls-ca or {CA_VARIABLE}"
                ) from error
            self._read_as = version
        return context


def _version(path: str) -> tuple[int, ...]:
    found = os.stat(path)
    return found.st_ino, found.st_mtime_ns, found.st_size


def trust_of(env: Mapping[str, str]) -> Trust:
    """Return the authorities that an environment names. CaInvalid."""
    return Trust(env.get(CA_VARIABLE) or None)


def allows_plain(env: Mapping[str, str]) -> bool:
    """Return whether plain text may go to other machines."""
    return env.get(INSECURE_VARIABLE, "") not in ("", "0")


def endpoint_at(
    place: ServiceAt, token: str, *, env: Mapping[str, str], reread: Callable[[], str] | None = None
) -> Endpoint:
    """Return the service at an address. CaInvalid."""
    trust = trust_of(env) if place.is_encrypted else None
    return Endpoint(place.servers, token, reread=reread, trust=trust, is_plain_allowed=allows_plain(env))
