"""Errors of the name space, below chunkstore.errors.AtollError.

::

    AtollError                      errno, code, retryable
    └── FsError                     the answer POSIX names: ENOENT, EEXIST …; never retried
        └── OutOfSpace              EDQUOT of a directory quota, ENOSPC of the volume
            └── TenantFull          EDQUOT of the tenant
    └── NotOwner                    another process owns the volume (EAGAIN)
    └── Fenced                      this process was the owner and is no more (ESTALE): it must stop
    └── StoreError                  the store failed (EIO); the engine asks again while it owns the volume
        └── StoreRefused            it will never do it: the engine stops, nothing unacknowledged is answered
    └── VolumeMissing               the address names no volume (ENOENT)
        └── VolumeIncomplete        it was not loaded whole
    └── VolumeExists, SchemaTooNew
"""

from __future__ import annotations

import errno as E
import os

from chunkstore.errors import AtollError

__all__ = [
    "Fenced",
    "FsError",
    "NotOwner",
    "OutOfSpace",
    "SchemaTooNew",
    "StoreError",
    "StoreRefused",
    "TenantFull",
    "VolumeExists",
    "VolumeIncomplete",
    "VolumeMissing",
]


_STRERROR: dict[int, str] = {}


class FsError(AtollError):
    """An operation is refused by a rule of POSIX. The errno is the whole answer."""

    code = "posix"

    def __init__(self, errno: int, detail: str = "") -> None:
        # ENOENT and ENODATA are answers of every lookup and write: 1 us here, not 4.
        text = _STRERROR.get(errno) or _STRERROR.setdefault(errno, os.strerror(errno))
        self.message = f"{text}: {detail}" if detail else text
        self.errno = errno
        Exception.__init__(self, self.message)


class OutOfSpace(FsError):
    """A quota or the volume is full: ENOSPC for the volume, EDQUOT for a directory quota."""

    code = "out-of-space"


class TenantFull(OutOfSpace):
    """More than the volume may use of its tenant's quota, as far as its owner knows: EDQUOT."""

    def __init__(self, *, bytes_more: int, inodes_more: int) -> None:
        """``…_more``: what was asked for."""
        super().__init__(E.EDQUOT, "the quota of the tenant is used up")
        self.bytes_more = bytes_more
        self.inodes_more = inodes_more


class NotOwner(AtollError):
    """Another live process owns the volume."""

    code = "not-owner"
    errno = E.EBUSY
    retryable = True

    def __init__(self, owner: str, expires_in_s: float, *, pid: int | None = None) -> None:
        super().__init__(f"the volume is owned by {owner}" + (f" (process {pid})" if pid is not None else ""))
        self.owner = owner
        self.expires_in_s = expires_in_s
        self.pid = pid


class Fenced(AtollError):
    """This process lost the ownership of the volume; nothing it holds in memory counts any more."""

    code = "fenced"
    errno = E.ESTALE


class StoreError(AtollError):
    """The store could not do what was asked; what was not acknowledged may or may not be in it."""

    code = "store-error"
    errno = E.EIO


class StoreRefused(StoreError):
    """The store will never do what was asked: to ask again is no use."""

    code = "store-refused"


class VolumeMissing(AtollError):
    """The address names no volume."""

    code = "no-volume"
    errno = E.ENOENT


class VolumeIncomplete(VolumeMissing):
    """The address names a volume that is being loaded, or was not loaded whole."""

    code = "volume-incomplete"


class VolumeExists(AtollError):
    """The address names a volume already."""

    code = "volume-exists"
    errno = E.EEXIST


class SchemaTooNew(AtollError):
    """The store was written by a newer version of AtollFS."""

    code = "schema-too-new"
    errno = E.EPROTONOSUPPORT
