"""Directories of which this session knows every name, by lease: an absent name needs no trip.

Owns the names of directories on which the service gave a lease (metasvc/engine/leases.py has what that means). Must not know
messages.

Invariant: while a lease holds, every name that the directory has is among those known here. So a name is taken note of before
the request that may add it is sent (`adding`), and never taken away: what is known too much costs a trip. A set begins empty,
with the reply that made its directory; if anything was added there before that reply came (another program of this machine
found the directory by a lookup), there is none.

A lease is believed in for as long as the service says, from before the request was sent that extended it, and not at all after
its recall. A
directory whose lease has run out is remembered: the service extends the lease unless somebody else has added a name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Final, NamedTuple

from metasvc.model import NAME_MAX_BYTES, Ino

MAX_NAMES: Final = 65_536
"""Of all directories together: 8 MiB. When there are more all are forgotten."""
_MAX_STRANGE: Final = 4096


def _boottime_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class _Directory:
    __slots__ = ("names", "until_s")

    def __init__(self, until_s: float) -> None:
        self.names: set[bytes] = set()
        self.until_s = until_s


class Asked(NamedTuple):
    """When a request was begun."""

    at_s: float
    forgotten: int


class KnownNames:
    """What one session knows of names in directories on which it has leases."""

    def __init__(self, *, now_s: Callable[[], float] = _boottime_s) -> None:
        """Know nothing. ``now_s``: seconds of a clock that runs on while the machine sleeps."""
        self._now_s = now_s
        self._directories: dict[Ino, _Directory] = {}
        self._count = 0
        self._strange: dict[Ino, None] = {}
        """Other directories in which names were added, the last of them."""
        self._forgotten = 0
        """How many of those were forgotten."""

    def is_absent(self, parent: Ino, name: bytes) -> bool:
        """Return whether a directory surely has no entry of that name."""
        directory = self._directories.get(parent)
        return (
            directory is not None
            and name not in directory.names
            and len(name) <= NAME_MAX_BYTES
            and self._now_s() < directory.until_s
        )

    def asked(self) -> Asked:
        """Return what `told` needs to know about a request. Call before it is sent."""
        return Asked(self._now_s(), self._forgotten)

    def adding(self, parent: Ino, name: bytes) -> None:
        """Take note of a name that a request may add. Call before it is sent."""
        directory = self._directories.get(parent)
        if directory is None:
            self._strange[parent] = None
            if len(self._strange) > _MAX_STRANGE:
                del self._strange[next(iter(self._strange))]
                self._forgotten += 1
        elif name not in directory.names:
            directory.names.add(name)
            self._count += 1
            if self._count > MAX_NAMES:
                self.clear()

    def told(
        self,
        asked: Asked,
        leased: Collection[int],
        *,
        lease_s: float,
        changed: Collection[Ino],
        made: Ino | None = None,
    ) -> None:
        """Take the leases that came with a reply, for so long. The request ``changed`` directories, and ``made`` one."""
        until_s = asked.at_s + lease_s
        for ino in changed:
            directory = self._directories.get(ino)
            if directory is None:
                continue
            if ino in leased:
                directory.until_s = max(directory.until_s, until_s)
            else:
                self.recalled(ino)
        if made is not None and made in leased and made not in self._strange and asked.forgotten == self._forgotten:
            self._directories[made] = _Directory(until_s)
            self._count += 1

    def recalled(self, ino: Ino) -> None:
        """Forget a directory: others may add names there."""
        directory = self._directories.pop(ino, None)
        if directory is not None:
            self._count -= 1 + len(directory.names)

    def clear(self) -> None:
        """Forget everything."""
        self._directories.clear()
        self._count = 0
