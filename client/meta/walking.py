"""Listing the directories that a walk of a tree comes to next, before it asks for them.

Owns, for one session: which directories were listed lately, where a walk is, and first pages that nobody wanted yet. Must not
know messages.

A walk that lists one directory after the other pays a round trip for each: 20 us for each of ten entries, where reading them
costs 5. Here the pages of those that come next (children, else the siblings behind, in the order in which the walk takes them)
are asked for together, as soon as two steps in a row went from a directory to one below it, or beside.

A page is handed out once, no later than `NEIGHBOURS_S` after it was asked for, and only if this session changed nothing
meanwhile: what another machine changes shows as late as client.meta.recent says. How many are asked for ahead grows with each
that is used; after some that were not, the walk goes on alone for a while, so one that rests between (or changes what it walks
over, as rm -r does) costs few pages in vain.

Interleavings. A page is a task from when it is asked for, so who wants it waits for the same answer; what fails is asked for
again by who wants it. State is changed without an await in between.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from itertools import islice
from typing import Any, Final, NamedTuple

from chunkstore.errors import AtollError
from client.meta.recent import NEIGHBOURS_S
from metasvc.model import DirPage, Ino

STEPS: Final = 2
FIRST_AHEAD: Final = 8
MOST_AHEAD: Final = 64
FIRST_REST: Final = 4
LONGEST_REST: Final = 256
"""Steps without looking ahead after pages came in vain: doubled each time, until one is used."""
PAGE_AHEAD: Final = 1000
"""Entries of a first page that nobody wants yet: more than one that somebody waits for has, as they come while the program goes
through the directory before. 5,000 names in five directories, by turns: 10.2 us a name, else 10.8."""
ENTRIES_AHEAD: Final = 2000
"""So many entries at most are asked for at once: 20 ms of a walk, 10 of the service."""
ENTRIES_BESIDE: Final = 200
"""So many are asked for together with a page that somebody waits for: all replies to one message come together."""
_BRANCHES_KEPT: Final = 256
_LARGEST: Final = 4096
"""Subdirectories of a directory that are remembered."""
_DEPTH_MAX: Final = 16
_VISITED_KEPT: Final = 8192

ReadFirst = Callable[[Ino, int], Coroutine[Any, Any, DirPage]]
"""Ask for the first so many entries of a directory."""


class _Branches(NamedTuple):
    """The subdirectories of a directory in the order of its listing, and how many entries each has."""

    inos: list[Ino]
    sizes: list[int]


class _Place(NamedTuple):
    """Where a directory stands among those of its parent."""

    parent: Ino
    position: int


class _Ahead(NamedTuple):
    """A page that was asked for before it was wanted."""

    page: asyncio.Task[DirPage]
    asked_s: float
    asked_at: int


class Walk:
    """The walk of one session through a tree, if it is one."""

    def __init__(
        self, read_first: ReadFirst, changes: Callable[[], int], *, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        """Take what asks for a page, and what grows with each change that this session makes."""
        self._read_first = read_first
        self._changes = changes
        self._now_s = now_s
        self._branches: OrderedDict[Ino, _Branches] = OrderedDict()
        self._places: dict[Ino, _Place] = {}
        self._visited: dict[Ino, None] = {}
        self._pages: dict[Ino, _Ahead] = {}
        self._last: Ino | None = None
        self._last_changes = -1
        self._steps = 0
        self._order = 1
        self._most = FIRST_AHEAD
        self._rest = 0

    async def first_page(self, ino: Ino, limit: int) -> DirPage:
        """Return the first entries of a directory: at least `limit`, if there are so many. Errors of asking."""
        self._arrive(ino)
        ahead = self._take(ino, limit)
        page: DirPage | None = None
        if ahead is None:
            self._look_ahead(ino, ENTRIES_BESIDE)
        else:
            try:
                page = await asyncio.shield(ahead)
            except AtollError:
                pass
        if page is None:
            page = await self._read_first(ino, limit if self._steps < STEPS else max(limit, PAGE_AHEAD))
            self._note(ino, page)
        self._look_ahead(ino, ENTRIES_AHEAD)
        return page

    # -- where it is ------------------------------------------------------------------------------------------------------

    def _arrive(self, ino: Ino) -> None:
        last, self._last = self._last, ino
        changes, self._last_changes = self._last_changes, self._changes()
        place = self._places.get(ino)
        if last == ino:
            return
        if place is None or last is None or changes != self._last_changes or ino in self._visited:
            self._steps = min(0, self._steps)
            self._visited.clear()
        else:
            self._steps += 1
            self._order = self._order_of(last, place)
        if len(self._visited) >= _VISITED_KEPT:
            self._visited.clear()
        self._visited[ino] = None

    def _order_of(self, last: Ino, place: _Place) -> int:
        """Return in which order siblings are taken: from the last directory, or the one above it that is a sibling."""
        for _ in range(_DEPTH_MAX):
            before = self._places.get(last)
            if before is None:
                break
            if before.parent == place.parent:
                return 1 if place.position > before.position else -1
            last = before.parent
        return self._order

    def _note(self, ino: Ino, page: DirPage) -> None:
        """Remember the subdirectories that a listing has shown."""
        old = self._branches.pop(ino, None)
        if old is not None:
            self._forget(old)
        found = [entry.inode for entry in page.entries if entry.inode.is_dir][:_LARGEST]
        if not found:
            return
        self._branches[ino] = _Branches([inode.ino for inode in found], [inode.size_bytes for inode in found])
        self._places.update((inode.ino, _Place(ino, position)) for position, inode in enumerate(found))
        if len(self._branches) > _BRANCHES_KEPT:
            self._forget(self._branches.popitem(last=False)[1])

    def _forget(self, branches: _Branches) -> None:
        for child in branches.inos:
            self._places.pop(child, None)

    def _next(self, ino: Ino) -> Iterator[tuple[Ino, int]]:
        """Name the directories that come after one, with their sizes, as far as listings have shown them."""
        yield from self._below(ino)
        step = self._order
        for _ in range(_DEPTH_MAX):
            place = self._places.get(ino)
            above = None if place is None else self._branches.get(place.parent)
            if place is None or above is None:
                return
            behind = slice(place.position + 1, None) if step > 0 else slice(None, place.position)
            for sibling, size in zip(above.inos[behind][::step], above.sizes[behind][::step], strict=True):
                yield sibling, size
                yield from self._below(sibling)
            ino = place.parent

    def _below(self, ino: Ino, depth: int = 0) -> Iterator[tuple[Ino, int]]:
        branches = self._branches.get(ino)
        if branches is not None and depth < _DEPTH_MAX:
            for child, size in zip(branches.inos[:: self._order], branches.sizes[:: self._order], strict=True):
                yield child, size
                yield from self._below(child, depth + 1)

    # -- pages ------------------------------------------------------------------------------------------------------------

    def _is_good(self, ahead: _Ahead) -> bool:
        return ahead.asked_at == self._changes() and self._now_s() - ahead.asked_s <= NEIGHBOURS_S

    def _take(self, ino: Ino, limit: int) -> asyncio.Task[DirPage] | None:
        """Return the page of a directory if it was asked for a moment ago."""
        ahead = self._pages.pop(ino, None)
        if ahead is None:
            return None
        if limit > PAGE_AHEAD or not self._is_good(ahead):
            self._in_vain()
            return None
        self._most = min(MOST_AHEAD, self._most + 1)
        self._rest = 0
        return ahead.page

    def _in_vain(self) -> None:
        self._rest = min(LONGEST_REST, max(FIRST_REST, 2 * self._rest))
        self._steps = -self._rest
        self._most = FIRST_AHEAD

    def _look_ahead(self, ino: Ino, most_entries: int) -> None:
        """Ask for what comes after a directory, unless enough of it was asked for."""
        if self._steps < STEPS:
            return
        old = [other for other, ahead in self._pages.items() if not self._is_good(ahead)]
        for other in old:
            del self._pages[other]
        if old:
            self._in_vain()
            return
        upcoming = ((other, size) for other, size in self._next(ino) if other not in self._visited)
        entries = 0
        wanted: list[Ino] = []
        for position, (other, size) in enumerate(islice(upcoming, self._most)):
            if other in self._pages:
                if not wanted and position >= self._most // 2:
                    return  # enough of what comes next: many at a time are one message
                continue
            entries += 1 + min(size, PAGE_AHEAD)
            if entries > most_entries:
                break
            wanted.append(other)
        now_s, changes = self._now_s(), self._changes()
        for other in wanted:
            page = asyncio.get_running_loop().create_task(self._read_first(other, PAGE_AHEAD), name="directory ahead")
            page.add_done_callback(partial(self._came, other))
            self._pages[other] = _Ahead(page, now_s, changes)

    def _came(self, ino: Ino, page: asyncio.Task[DirPage]) -> None:
        """Remember what a page shows, before anybody wants it: a walk may go further down from there."""
        if not page.cancelled() and page.exception() is None:
            self._note(ino, page.result())
