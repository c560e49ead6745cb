"""What this session knows of directories by lease, so that it needs no trip: names, attributes, and contents of files.

Owns what the service has said of directories on which it gave a lease (metasvc/engine/leases.py has what that means). Must not
know messages.

Invariant: while the lease on a directory holds, what is kept of it here is so. Hence:

- Own changes end no lease, so they are taken note of twice: before the request is sent (`begin`) all that it may change is
  forgotten, and an answer is taken in (`take_page`, `take_map`) only if no own change was under way from when it was asked for
  until it came (`Asked`). A name that an own change may have added or removed is asked for from then on.
- All names of a directory are known if it was listed to its end and nothing was changed meanwhile, or from its making on. The
  set begins with the reply that made it; if a name was added there before that reply came (another program of this machine
  found the directory by a lookup), there is none.
- A file with several names may be changed where nobody with a lease on this directory is asked: it is not kept.

A lease is believed in for as long as the service says, from before the request was sent that extended it, and not at all after
its recall. What is known of a directory whose lease has run out is kept: the service extends the lease unless somebody else has
changed the directory (`is_worth_extending`).

Which directories are kept is a matter of use, and bounded in names and in bytes of maps.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from operator import attrgetter
from typing import Final, NamedTuple

from metasvc.model import NAME_MAX_BYTES, DirPage, Entry, FileMap, Ino, Inode, OpenFile

_NAME: Final = attrgetter("name")
MAX_NAMES: Final = 20_000
"""Of all directories together: 16 MiB."""
MAX_MAP_BYTES: Final = 16 * 1024 * 1024
_MAP_COST_BYTES: Final = 600
_LEAST_EXTENDED: Final = 16
"""A directory of fewer names is listed anew for what its lease costs to extend."""
_MAX_STRANGE: Final = 4096
_MAPS_FIRST: Final = 64
_MAPS_MOST: Final = 256
OPEN_LEFT_S: Final = 0.3
"""Nobody opens by a lease that ends sooner: the service is told of an open 20 ms later, and may hear it late."""
_MAPS_LEAST: Final = 2
_CREDIT_FOR_A_HIT: Final = 2
_MAPS_FOR_AN_OPEN: Final = 4
_LOOKED_AT_MOST: Final = 1024
"""So many files behind the one that is opened are looked at, 0.1 us each."""
_MISSES: Final = 2
_MAP_FILE_BYTES: Final = 1024 * 1024
"""Maps of files up to this length are asked for before they are opened."""


def _boottime_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Asked(NamedTuple):
    """When a request was begun, and what was known then."""

    at_s: float
    recalls: int
    changes: int
    is_changing: bool
    forgotten: int


class _Directory:
    """What is known of one directory."""

    __slots__ = (
        "asked_ahead",
        "credit",
        "entries",
        "inode",
        "is_listed",
        "is_whole",
        "misses",
        "names",
        "opened",
        "order",
        "positions",
        "until_s",
    )

    def __init__(self, until_s: float) -> None:
        self.until_s = until_s
        self.names: dict[bytes, Inode | None] = {}
        """None: it may be there, ask."""
        self.is_whole = False
        """What is not in `names` is absent."""
        self.inode: Inode | None = None
        """Its own attributes."""
        self.entries: list[Entry] | None = None
        """What a listing has shown from the first name on, if nothing was changed since it began."""
        self.is_listed = False
        """Those are all."""
        self.order: list[Ino] = []
        """Small files in the order in which they were listed."""
        self.positions: dict[Ino, int] = {}
        self.misses = 0
        """Opens that had to be asked for."""
        self.opened = 0
        """All opens, for reading, of files whose maps may be asked for."""
        self.credit = _MAPS_FIRST
        """For so many files maps may be asked for before they are opened, by whoever opens in order."""
        self.asked_ahead = 0
        """For so many they were."""


class Leased:
    """What one session knows of directories on which it has leases."""

    def __init__(self, *, now_s: Callable[[], float] = _boottime_s) -> None:
        """Know nothing. ``now_s``: seconds of a clock that runs on while the machine sleeps."""
        self._now_s = now_s
        self._directories: OrderedDict[Ino, _Directory] = OrderedDict()
        """The one used last at the end."""
        self._places: dict[Ino, tuple[Ino, bytes]] = {}
        """Where what is kept with its attributes stands."""
        self._maps: OrderedDict[Ino, FileMap] = OrderedDict()
        self._map_bytes = 0
        self._count = 0
        self._recalls = 0
        """Directories that were called back, or forgotten, so far."""
        self._changes = 0
        """Own changes that were begun or answered so far."""
        self._changing = 0
        """Own changes under way."""
        self._strange: dict[Ino, None] = {}
        """Other directories in which names were added, or that were called back: the last of them."""
        self._forgotten = 0
        """How many of those were forgotten."""
        self._recalled_at: dict[Ino, int] = {}
        """Of the directories that were called back last: which recall it was. What was asked before it is not taken."""
        self._oldest_recall = 0
        """What was asked before this one is not taken, of whatever directory."""

    # -- what is known ------------------------------------------------------------------------------------------------------

    def _live(self, ino: Ino) -> _Directory | None:
        directory = self._directories.get(ino)
        return None if directory is None or directory.until_s <= self._now_s() else directory

    def is_absent(self, parent: Ino, name: bytes) -> bool:
        """Return whether a directory surely has no entry of that name."""
        directory = self._live(parent)
        return (
            directory is not None
            and directory.is_whole
            and name not in directory.names
            and len(name) <= NAME_MAX_BYTES
            and name not in (b".", b"..")
        )

    def lookup(self, parent: Ino, name: bytes) -> Inode | None:
        """Return what a name stands for, if that is known."""
        directory = self._live(parent)
        return None if directory is None else directory.names.get(name)

    def getattr(self, ino: Ino) -> Inode | None:
        """Return attributes, if they are known."""
        directory = self._live(ino)
        if directory is not None and directory.inode is not None:
            return directory.inode
        place = self._places.get(ino)
        return None if place is None else self.lookup(*place)

    def page(self, ino: Ino, after: bytes | None, limit: int) -> DirPage | None:
        """Return so many entries of a directory behind a name (None: from the first), if all are known."""
        directory = self._live(ino)
        entries = directory.entries if directory is not None and directory.is_listed else None
        if entries is None:
            return None
        first = 0 if after is None else bisect_right(entries, after, key=_NAME)
        return DirPage(entries[first : first + limit], first + limit >= len(entries))

    def open(self, ino: Ino) -> OpenFile | None:
        """Return what opening a file for reading would answer, if that is known."""
        directory, inode, found = self._known(ino)
        if directory is None or inode is None or found is None or directory.until_s - self._now_s() < OPEN_LEFT_S:
            return None
        self._maps.move_to_end(ino)
        directory.opened += 1
        directory.credit = min(_MAPS_MOST, directory.credit + _CREDIT_FOR_A_HIT)
        return OpenFile(inode, found, 0)

    def map(self, ino: Ino) -> FileMap | None:
        """Return the map of a file, if it is known."""
        return self._known(ino)[2]

    def _known(self, ino: Ino) -> tuple[_Directory | None, Inode | None, FileMap | None]:
        place = self._places.get(ino)
        directory = None if place is None else self._live(place[0])
        found = None if directory is None else self._maps.get(ino)
        if place is None or directory is None or found is None:
            return None, None, None
        inode = directory.names.get(place[1])
        if inode is None or inode.map_version != found.map_version:
            return None, None, None
        return directory, inode, found

    def maps_wanted(self, ino: Ino) -> list[Ino]:
        """Return the files, behind one that has to be asked for, whose maps are worth asking for as well: most often none.

        Each one that is used earns two: who opens in order gets all. Who opens in another order gets at least four for each
        open, where those of the whole directory fit: an epoch over 1,000 files asks 110 times. Elsewhere few.
        """
        place = self._places.get(ino)
        directory = None if place is None else self._live(place[0])
        if directory is None:
            return []
        directory.misses += 1
        position = directory.positions.get(ino)
        if position is None or directory.misses < _MISSES:
            return []
        directory.opened += 1
        most = max(_MAPS_LEAST, directory.credit)
        if self._all_maps_fit(directory):
            most = max(
                most, min(_MAPS_MOST, _MAPS_FIRST + _MAPS_FOR_AN_OPEN * directory.opened - directory.asked_ahead)
            )
        wanted: list[Ino] = []
        order = directory.order
        for step in range(1, min(len(order), _LOOKED_AT_MOST)):
            other = order[(position + step) % len(order)]
            if other not in self._maps and other in self._places:
                wanted.append(other)
                if len(wanted) >= most:
                    break
        directory.credit = max(0, directory.credit - len(wanted))
        directory.asked_ahead += len(wanted)
        return wanted

    def _all_maps_fit(self, directory: _Directory) -> bool:
        """Return whether the maps of all files of a directory may be held at once, if they are like those that are known."""
        mean_bytes = self._map_bytes / len(self._maps) if self._maps else _MAP_COST_BYTES
        return len(directory.order) * mean_bytes <= MAX_MAP_BYTES / 2

    def directory_of(self, ino: Ino) -> Ino | None:
        """Return the directory by whose lease an inode is known."""
        place = self._places.get(ino)
        return None if place is None else place[0]

    def is_worth_extending(self, ino: Ino) -> bool:
        """Return whether enough is known of a directory, but that its lease has run out or soon will."""
        directory = self._directories.get(ino)
        return directory is not None and len(directory.names) >= _LEAST_EXTENDED

    def ends_s(self, ino: Ino) -> float:
        """Return for how long a lease holds yet, at most; 0 for none."""
        directory = self._directories.get(ino)
        return 0.0 if directory is None else max(0.0, directory.until_s - self._now_s())

    # -- own changes --------------------------------------------------------------------------------------------------------

    def begin(
        self,
        *,
        names: Iterable[tuple[Ino, bytes]] = (),
        inos: Iterable[Ino] = (),
        moves_in: Collection[Ino] = (),
    ) -> Asked:
        """Forget what a request may change: names that it adds or removes, inodes. Call before it is sent; `end` it.

        ``moves_in``: directories of which a child that is a directory may be moved, or go. While its lease holds, the
        parent that is known of a directory is the one that it has.
        """
        asked = self.asked()
        self._changes += 1
        self._changing += 1
        if moves_in:
            for each in self._directories.values():
                if each.inode is not None and each.inode.parent in moves_in:
                    each.inode = None
        for parent, name in names:
            self._forget_inode(parent)
            directory = self._directories.get(parent)
            if directory is None:
                self._add_strange(parent)
            else:
                self._forget_name(directory, name)
        for ino in inos:
            self._forget_inode(ino)
        self._trim()
        return asked

    def end(self) -> None:
        """Take note that a request was answered, or will never be waited for again."""
        self._changes += 1
        self._changing -= 1

    def _add_strange(self, ino: Ino) -> None:
        self._strange[ino] = None
        if len(self._strange) > _MAX_STRANGE:
            del self._strange[next(iter(self._strange))]
            self._forgotten += 1

    def _forget_name(self, directory: _Directory, name: bytes) -> None:
        """Forget what a name stands for, as it may be changed."""
        directory.entries = None
        directory.is_listed = False
        self._ask_for(directory, name)

    def _ask_for(self, directory: _Directory, name: bytes) -> None:
        known = directory.names.get(name)
        if known is not None:
            self._forget_place(known.ino)
        elif name not in directory.names:
            self._count += 1
        directory.names[name] = None

    def _forget_inode(self, ino: Ino) -> None:
        place = self._places.get(ino)
        if place is not None:
            self._forget_name(self._directories[place[0]], place[1])
        directory = self._directories.get(ino)
        if directory is not None:
            directory.inode = None

    def _forget_place(self, ino: Ino) -> None:
        self._places.pop(ino, None)
        found = self._maps.pop(ino, None)
        if found is not None:
            self._map_bytes -= _cost_of(found)

    # -- what the service says ------------------------------------------------------------------------------------------------

    def asked(self) -> Asked:
        """Return what has to be known when the answer to a request comes. Call before it is sent."""
        return Asked(self._now_s(), self._recalls, self._changes, self._changing > 0, self._forgotten)

    def _is_current(self, asked: Asked, ino: Ino) -> bool:
        """Return whether an answer about a directory, or what is in it, says what is so since it was asked for."""
        recalled = max(self._oldest_recall, self._recalled_at.get(ino, 0))
        return asked.changes == self._changes and recalled <= asked.recalls and not asked.is_changing

    def extended(self, asked: Asked, leased: Collection[int], inos: Iterable[Ino], *, lease_s: float) -> None:
        """Take the leases, for so long, that came with a reply to a request which named, or changed, some directories.

        Those that did not come are forgotten.
        """
        for ino in inos:
            directory = self._directories.get(ino)
            if directory is None:
                continue
            if ino in leased:
                directory.until_s = max(directory.until_s, asked.at_s + lease_s)
            else:
                self.recalled(ino)

    def made(self, asked: Asked, inode: Inode, *, lease_s: float) -> None:
        """Take the lease on a directory that a request has made: nobody has a name in it."""
        if inode.ino in self._strange or asked.forgotten != self._forgotten or inode.ino in self._directories:
            return
        directory = self._directories[inode.ino] = _Directory(asked.at_s + lease_s)
        directory.is_whole = True
        self._count += 1
        self._trim()

    def take_page(
        self, asked: Asked, ino: Ino, page: DirPage, *, after: bytes | None, is_leased: bool, lease_s: float
    ) -> None:
        """Take entries of a directory behind a name (None: from the first); with them came the lease, or it was there."""
        if not self._is_current(asked, ino):
            return
        directory = self._directories.get(ino)
        if is_leased:
            if directory is None:
                directory = self._directories[ino] = _Directory(0.0)
                self._count += 1
            directory.until_s = max(directory.until_s, asked.at_s + lease_s)
        elif directory is None or directory.until_s <= self._now_s():
            return
        self._directories.move_to_end(ino)
        if after is None:
            directory.entries, directory.is_listed = [], False
        for name, inode in page.entries:
            self._take_entry(ino, directory, name, inode)
        self._list(directory, page, after)
        self._trim()

    def _list(self, directory: _Directory, page: DirPage, after: bytes | None) -> None:
        """Go on with a listing, if the page is the next one of it."""
        entries = directory.entries
        if entries is None or directory.is_listed or (entries[-1].name if entries else None) != after:
            return
        entries += page.entries
        if not page.end:
            return
        if len(directory.names) > len(entries):
            for name in directory.names.keys() - {entry.name for entry in entries}:
                self._ask_for(directory, name)
                del directory.names[name]
                self._count -= 1
        directory.is_whole = True
        directory.is_listed = None not in directory.names.values()

    def _take_entry(self, ino: Ino, directory: _Directory, name: bytes, inode: Inode) -> None:
        if inode.parent != ino or (not inode.is_dir and inode.nlink != 1):
            self._ask_for(directory, name)
            return
        former = directory.names.get(name)
        if former is not None and former.ino != inode.ino:
            self._forget_place(former.ino)
        elif former is None and name not in directory.names:
            self._count += 1
        directory.names[name] = inode
        self._places[inode.ino] = ino, name
        if inode.is_file and inode.size_bytes <= _MAP_FILE_BYTES and inode.ino not in directory.positions:
            directory.positions[inode.ino] = len(directory.order)
            directory.order.append(inode.ino)
            if len(directory.order) > 2 * len(directory.names) + _LEAST_EXTENDED:
                # Most of them are gone: who makes and removes files all the time.
                directory.order = [other for other in directory.order if other in self._places]
                directory.positions = {other: position for position, other in enumerate(directory.order)}

    def take_inode(self, asked: Asked, parent: Ino, name: bytes, inode: Inode) -> None:
        """Take what a lookup has answered."""
        directory = self._directories.get(parent)
        if directory is not None and directory.until_s > self._now_s() and self._is_current(asked, parent):
            self._take_entry(parent, directory, name, inode)
            self._trim()

    def take_directory(self, asked: Asked, inode: Inode) -> None:
        """Take a directory's own attributes; not of one that was removed: it goes for good without a word."""
        directory = self._live(inode.ino)
        if directory is not None and inode.nlink and self._is_current(asked, inode.ino):
            directory.inode = inode

    def take_map(self, asked: Asked, ino: Ino, found: FileMap) -> None:
        """Take the map of a file, whole."""
        directory = self.directory_of(ino)
        if directory is None or self._live(directory) is None or not self._is_current(asked, directory):
            return
        former = self._maps.pop(ino, None)
        if former is not None:
            self._map_bytes -= _cost_of(former)
        self._maps[ino] = found
        self._map_bytes += _cost_of(found)
        while self._map_bytes > MAX_MAP_BYTES:
            self._map_bytes -= _cost_of(self._maps.popitem(last=False)[1])

    def recalled(self, ino: Ino) -> None:
        """Forget a directory: others may change it. A reply that is on its way to whom it is for knows nothing of that."""
        self._recalls += 1
        self._recalled_at.pop(ino, None)
        self._recalled_at[ino] = self._recalls
        if len(self._recalled_at) > _MAX_STRANGE:
            self._oldest_recall = self._recalled_at.pop(next(iter(self._recalled_at)))
        self._add_strange(ino)
        self._drop(ino)

    def _drop(self, ino: Ino) -> None:
        directory = self._directories.pop(ino, None)
        if directory is not None:
            self._count -= 1 + len(directory.names)
            for inode in directory.names.values():
                if inode is not None:
                    self._forget_place(inode.ino)

    def clear(self) -> None:
        """Forget everything."""
        self._recalls += 1
        self._oldest_recall = self._recalls
        self._forgotten += 1
        self._directories.clear()
        self._places.clear()
        self._maps.clear()
        self._count = self._map_bytes = 0

    def _trim(self) -> None:
        while self._count > MAX_NAMES:
            self._drop(next(iter(self._directories)))


def _cost_of(found: FileMap) -> int:
    return _MAP_COST_BYTES + sum(200 + len(row.data) for row in found.slices.values())
