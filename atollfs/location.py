"""Where a file is: URLs, and the options that say which volume is meant and how it is opened.

    atoll://HOST:PORT/TENANT/VOLUME/path    a file of a service's volume; atolls:// by TLS
    atoll:///path, /path, path              a file of the volume that the option `address` names

Owns this grammar. Pure: nothing is opened here. Must not know fsspec.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from client.address import Address, AddressInvalid, normalize, parse_address

SCHEME: Final = "atoll"
ENCRYPTED_SCHEME: Final = "atolls"
"""The same by TLS."""
_PREFIXES: Final = (f"{SCHEME}://", f"{ENCRYPTED_SCHEME}://")
_SERVICE_URL: Final = re.compile(r"(?P<address>atolls?://[^/]+/[^/]+/[^/]+)(?P<path>/.*)?", re.DOTALL)


def split_url(text: str) -> tuple[str | None, str]:
    """Return the address that a URL or path names, if it names one, and its path in the volume.

    The path is absolute, without `.`, `..` (removed by the text, no link is followed), doubled and trailing slashes. Names
    that are no UTF-8 are spelled with surrogate escapes, as `os.fsdecode` does. OSError: EINVAL for what is no such URL or
    holds a NUL byte, ENAMETOOLONG over 4,095 bytes.
    """
    address: str | None = None
    path = text
    if text.startswith(_PREFIXES):
        path = text[text.index("://") + 3 :]
        if path and not path.startswith("/"):
            match = _SERVICE_URL.fullmatch(text)
            try:
                if match is None:
                    raise AddressInvalid(f"{text!r} is no URL of a file: give atoll://HOST:PORT/TENANT/VOLUME/path")
                address = str(parse_address(match["address"]))
            except AddressInvalid as error:
                raise OSError(error.errno, error.message) from error
            path = match["path"] or "/"
    return address, normal(path)


def normal(path: str) -> str:
    """Return a path of a volume as `split_url` does; relative ones count from the root."""
    try:
        return os.fsdecode(normalize(os.fsencode(path)))
    except AddressInvalid as error:
        raise OSError(error.errno, error.message, path) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeOptions:
    """Which volume, and how it is opened. Equal options share one open volume in a process."""

    address: Address
    token: str | None = None
    """For a service; None: from `token_file`, or from ATOLL_TOKEN."""
    token_file: str | None = None
    cache_dir: Path | None = None
    """For the caches of all volumes; None: the directory that `atoll mount` takes."""
    cache_limit_bytes: int | None = None
    """None: 80 % of the file system of the cache. A tenth of it is always left free."""
    meta_timeout_s: float
    """How long operations wait for a service that is away."""
    read_only: bool = False
