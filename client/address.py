"""Addresses of volumes, and of files in them, as users type them.

Owns the grammar of design section 3: an address that is a path names an embedded volume, ``atoll://…`` one of a
service (``atolls://…`` by TLS), and ``ADDRESS:/path`` a file in it. Pure functions on text; what a path under a live mount
means is found out in client.mounts. Must not know commands, mounts or stores.
"""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass
from typing import Final

from chunkstore.errors import AtollError
from metasvc.api.server import Server, parse_servers
from metasvc.model import PATH_MAX_BYTES

SERVICE_SCHEME: Final = "atoll://"
ENCRYPTED_SCHEME: Final = "atolls://"
"""The same by TLS."""
SERVICE_SCHEMES: Final = (SERVICE_SCHEME, ENCRYPTED_SCHEME)
_SERVICE_ADDRESS: Final = re.compile(
    r"(?P<scheme>atolls?://)(?P<servers>[^/]+)/(?P<tenant>[^/:]+)/(?P<volume>[^/:]+)/?"
)
_SERVICE_PLACE: Final = re.compile(
    r"(?P<scheme>atolls?://)(?P<servers>[^/]+)(?:/(?P<tenant>[^/:]+)(?:/(?P<volume>[^/:]+))?)?/?"
)
META_DB: Final = "meta.db"
OBJECTS: Final = "objects"


class AddressInvalid(AtollError):
    """Say that a text cannot be an address, or a path in a volume."""

    errno = errno.EINVAL
    code = "bad-address"


@dataclass(frozen=True, slots=True)
class EmbeddedAddress:
    """The directory of an embedded volume: absolute, free of symbolic links, so that equal volumes have equal addresses."""

    directory: str

    @property
    def meta_db(self) -> str:
        """Return the path of the SQLite file."""
        return os.path.join(self.directory, META_DB)

    @property
    def objects(self) -> str:
        """Return the directory that is the default bucket."""
        return os.path.join(self.directory, OBJECTS)

    def __str__(self) -> str:
        """Return the address as mounts show it (fsname) and users may type it."""
        return self.directory


@dataclass(frozen=True, slots=True)
class ServiceAddress:
    """A volume of a service."""

    servers: tuple[Server, ...]
    """Its processes, or some of them: any of them knows which one owns the volume. At least one."""
    tenant: str
    volume: str
    is_encrypted: bool = False
    """They are reached by TLS."""

    @property
    def name(self) -> str:
        """Return what the service calls the volume."""
        return f"{self.tenant}/{self.volume}"

    def __str__(self) -> str:
        """Return the address as mounts show it (fsname) and users type it."""
        return f"{_scheme(self)}{','.join(map(str, self.servers))}/{self.tenant}/{self.volume}"


Address = EmbeddedAddress | ServiceAddress


@dataclass(frozen=True, slots=True)
class ServicePlace:
    """A service, or something in it: a tenant, a volume, a directory of one."""

    servers: tuple[Server, ...]
    tenant: str = ""
    volume: str = ""
    path: bytes = b"/"
    is_encrypted: bool = False

    def __str__(self) -> str:
        """Return it as users type it."""
        parts = "/".join(part for part in (",".join(map(str, self.servers)), self.tenant, self.volume) if part)
        return f"{_scheme(self)}{parts}{'' if self.path == b'/' else ':' + shown(self.path)}"


@dataclass(frozen=True, slots=True)
class VolumePath:
    """A file of a volume, named without a mount."""

    address: Address
    path: bytes
    """Absolute within the volume, without ``.``, ``..`` and doubled slashes."""


def _scheme(place: ServiceAddress | ServicePlace) -> str:
    return ENCRYPTED_SCHEME if place.is_encrypted else SERVICE_SCHEME


def split_path(text: str) -> tuple[str, str | None]:
    """Split ``ADDRESS:/path`` at the last ``:/`` that is not part of ``://``; the path is None where there is none."""
    position = len(text)
    while (position := text.rfind(":/", 0, position)) >= 0:
        if text[position : position + 3] != "://":
            return text[:position], text[position + 1 :]
    return text, None


def parse_address(text: str) -> Address:
    """Read the address of a volume; relative paths count from the working directory. Nothing has to exist.

    AddressInvalid for an empty text, one that no path may be, and one of a service that lacks a part.
    """
    if text.startswith(SERVICE_SCHEMES):
        return _parse_service_address(text)
    if "://" in text:
        raise AddressInvalid(
            f"{shown(text)} is no address: give the directory of an embedded volume (bucket URLs go to --bucket)"
        )
    if not text:
        raise AddressInvalid("the address is empty: give the directory of a volume")
    if "\0" in text:
        raise AddressInvalid("an address holds no NUL byte: give the directory of a volume")
    if len(os.fsencode(text)) >= PATH_MAX_BYTES:
        raise AddressInvalid(
            f"the address is over {PATH_MAX_BYTES - 1} bytes long: go nearer to it and give a relative path"
        )
    try:
        directory = os.path.realpath(text)
    except OSError as error:
        raise AddressInvalid(
            f"{shown(text)}: {error.strerror}; give the directory of a volume", errno=error.errno
        ) from error
    return EmbeddedAddress(directory)


def _parse_service_address(text: str) -> ServiceAddress:
    match = _SERVICE_ADDRESS.fullmatch(text)
    servers = None if match is None else parse_servers(match["servers"])
    if match is None or servers is None:
        raise AddressInvalid(
            f"{shown(text)} is no address of a volume: give atoll://HOST:PORT/TENANT/VOLUME, "
            "or atoll://HOST:PORT,HOST:PORT/TENANT/VOLUME for a service of several processes; atolls:// by TLS"
        )
    return ServiceAddress(servers, match["tenant"], match["volume"], match["scheme"] == ENCRYPTED_SCHEME)


def parse_service_place(text: str) -> ServicePlace:
    """Read ``atoll://HOST:PORT``, with /TENANT or /TENANT/VOLUME or /TENANT/VOLUME:/path behind it. AddressInvalid."""
    address, path = split_path(text)
    match = _SERVICE_PLACE.fullmatch(address)
    servers = None if match is None else parse_servers(match["servers"])
    if match is None or servers is None or (path is not None and match["volume"] is None):
        raise AddressInvalid(
            f"{shown(text)} is no address of a service: give atoll://HOST:PORT, atoll://HOST:PORT/TENANT "
            "or atoll://HOST:PORT/TENANT/VOLUME; atolls:// by TLS"
        )
    where = b"/" if path is None else normalize(os.fsencode(path))
    is_encrypted = match["scheme"] == ENCRYPTED_SCHEME
    return ServicePlace(servers, match["tenant"] or "", match["volume"] or "", where, is_encrypted)


def parse_volume_path(text: str) -> VolumePath | None:
    """Read ``ADDRESS:/path``; None for a text that has no such form (then it is a path of the local file system)."""
    address, path = split_path(text)
    if path is None:
        return None
    return VolumePath(parse_address(address), normalize(os.fsencode(path)))


def normalize(path: bytes) -> bytes:
    """Return an absolute path of a volume without ``.``, ``..`` and doubled slashes; ``..`` at the root is the root.

    ``..`` is removed by the text, as a shell's ``cd -L`` does: no symbolic link is followed. AddressInvalid for a path with
    a NUL byte or over 4095 bytes.
    """
    if b"\0" in path:
        raise AddressInvalid("a path holds no NUL byte: correct the path after ADDRESS:")
    if len(path) >= PATH_MAX_BYTES:
        raise AddressInvalid(
            f"the path in the volume is over {PATH_MAX_BYTES - 1} bytes long: mount the volume and go there step by step",
            errno=errno.ENAMETOOLONG,
        )
    names: list[bytes] = []
    for name in path.split(b"/"):
        if name == b"..":
            if names:
                names.pop()
        elif name not in (b"", b"."):
            names.append(name)
    return b"/" + b"/".join(names)


def components(path: bytes) -> list[bytes]:
    """Return the names of a normalized path; none for the root."""
    return [name for name in path.split(b"/") if name]


def shown(text: str | bytes) -> str:
    """Return a path as it may stand in a one-line message: bytes that are no text, and line breaks, are escaped."""
    raw = os.fsencode(text) if isinstance(text, str) else text
    decoded = raw.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in decoded)
