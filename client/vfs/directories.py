"""An open directory: its entries in pages, and cookies that stay good while names come and go.

Owns the page table of one handle. Must not know the kernel, nor what entries mean.

A cookie is a position: 1 and 2 stand behind `.` and `..`, and c + 2 behind the c-th entry that this handle ever saw. A page
that was read once keeps the *names* of its entries for as long as the handle lives, so that any cookie leads back to the
name before it and reading goes on behind that name, whatever was added or removed meanwhile: names that exist all the
time are returned exactly once. Whole entries are kept for two pages only, so that a directory of a million files costs
about 20 bytes a name. Cookie 0 begins anew.

While the entries of a page are handed out the next one is asked for already, so that whoever lists and stats names does not
wait for the owner at each page; the first page is a short one for the same reason.

A kernel believes what readdir says of names and attributes for as long as the timeouts say. So entries that were fetched
earlier are handed out only while the *stamp* is what it was when they were asked for; with another stamp (something was
changed, or too much time has passed) as many as are wanted now are fetched again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final, NamedTuple

from metasvc.model import DirPage, Entry

ReadPage = Callable[[bytes | None, int], Coroutine[Any, Any, DirPage]]
"""Ask for so many entries after a name (None: from the first)."""
Stamp = Callable[[], object]
"""Return something that is equal for as long as entries fetched earlier are still true."""

DOT_ENTRIES: Final = 2
_PAGES_KEPT: Final = 2
# A READDIR of the kernel takes 20 to 200 entries; what is fetched for a second time is not fetched by the page.
_AGAIN: Final = 128
_FIRST_PAGE: Final = 256


Positioned = tuple[int, Entry]
"""The cookie of the position behind an entry, and the entry."""


class _Page:
    """One page: its first position, its names, and for the newest pages the entries."""

    __slots__ = ("count", "entries", "first", "names", "stamp")

    def __init__(self, first: int, entries: list[Entry], stamp: object) -> None:
        self.first = first
        self.stamp = stamp
        self.count = len(entries)
        self.names = b"\0".join([entry.name for entry in entries])
        self.entries: list[Positioned] | None = list(enumerate(entries, first + DOT_ENTRIES + 1))

    @property
    def last_name(self) -> bytes:
        return self.names[self.names.rfind(b"\0") + 1 :]


class _Ahead(NamedTuple):
    """A page that was asked for before it was wanted."""

    stamp: object
    page: asyncio.Task[DirPage]


class DirectoryReader:
    """Read one open directory. Used by one call at a time (the kernel locks the position of a descriptor)."""

    def __init__(self, read_page: ReadPage, stamp: Stamp, *, page_entries: int) -> None:
        """Take what asks for pages, and their size. Nothing is read yet."""
        self._read_page = read_page
        self._stamp = stamp
        self._page_entries = page_entries
        self._pages: list[_Page] = []
        self._at_end = False
        self._ahead: _Ahead | None = None

    def close(self) -> None:
        """Stop what is under way; nothing is read any more."""
        if self._ahead is not None:
            self._ahead.page.cancel()
            self._ahead = None

    async def entries(self, cookie: int) -> list[Positioned]:
        """Return entries behind a cookie in order, `.` and `..` not among them: as many as are at hand, none at the end.

        One trip in every page.
        """
        position = max(0, cookie - DOT_ENTRIES)
        if cookie == 0:
            self.close()
            self._pages.clear()
            self._at_end = False
        number = self._number_of_page(position)
        while True:
            if number == len(self._pages) and not await self._read_next():
                return []
            page = self._pages[number]
            index = max(0, position - page.first)
            if page.entries is not None and page.stamp == self._stamp():
                return page.entries[index:] if index else page.entries
            page.entries = None
            while index < page.count:
                found = await self._read_again(number, index)
                if found:
                    return found
                index += _AGAIN
            number += 1

    def _number_of_page(self, position: int) -> int:
        """Return the number of the page that holds a position; that of the next page to be read if none does yet."""
        for number in range(len(self._pages) - 1, -1, -1):
            page = self._pages[number]
            if page.first <= position:
                return number if position < page.first + page.count else number + 1
        return 0

    async def _read_next(self) -> bool:
        if self._at_end:
            return False
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            stamp, answer = ahead.stamp, await ahead.page
        else:
            stamp = self._stamp()
            answer = await self._read_page(*self._next_page())
        self._at_end = answer.end or not answer.entries
        if answer.entries:
            last = self._pages[-1] if self._pages else None
            self._pages.append(_Page(last.first + last.count if last is not None else 0, answer.entries, stamp))
            if len(self._pages) > _PAGES_KEPT:
                self._pages[-1 - _PAGES_KEPT].entries = None
        if not self._at_end:
            page = asyncio.create_task(self._read_page(*self._next_page()), name="readdir ahead")
            page.add_done_callback(_note)
            self._ahead = _Ahead(self._stamp(), page)
        return bool(answer.entries)

    def _next_page(self) -> tuple[bytes | None, int]:
        """Return the name behind which the next page begins, and how many entries it is to have."""
        if not self._pages:
            return None, min(self._page_entries, _FIRST_PAGE)
        return self._pages[-1].last_name, self._page_entries

    async def _read_again(self, number: int, index: int) -> list[Positioned]:
        """Return some of a page read before, as it is now. Names that came since have no position and are left out."""
        page = self._pages[number]
        names = page.names.split(b"\0")
        wanted = names[index : index + _AGAIN]
        if index:
            after: bytes | None = names[index - 1]
        else:
            after = self._pages[number - 1].last_name if number else None
        there: dict[bytes, Entry] = {}
        while True:
            answer = await self._read_page(after, _AGAIN)
            there.update((entry.name, entry) for entry in answer.entries)
            if answer.end or not answer.entries or answer.entries[-1].name >= wanted[-1]:
                break
            after = answer.entries[-1].name
        return [
            (cookie, entry)
            for cookie, name in enumerate(wanted, page.first + index + DOT_ENTRIES + 1)
            if (entry := there.get(name)) is not None
        ]


def _note(page: asyncio.Task[DirPage]) -> None:
    """Look at the error of a page that nobody may want any more."""
    if not page.cancelled():
        page.exception()
