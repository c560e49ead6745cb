"""Cookies of a directory handle while names come and go."""

from __future__ import annotations

import asyncio
import stat

from hypothesis import given
from hypothesis import strategies as st

from client.vfs.directories import DOT_ENTRIES, DirectoryReader
from metasvc.model import DirPage, Entry, Ino, Inode

PAGE = 4


def inode(number: int) -> Inode:
    return Inode(Ino(number), stat.S_IFREG | 0o644, 1, 0, 0, 0, 0, 0, 0, 0, Ino(1), 0, 0, 0)


class Names:
    """A directory as the owner keeps it: sorted names, read in pages."""

    def __init__(self, names: set[bytes]) -> None:
        self.names = names
        self.trips = 0
        self.changes = 0

    def reader(self) -> DirectoryReader:
        return DirectoryReader(self.page, lambda: self.changes, page_entries=PAGE)

    async def page(self, after: bytes | None, limit: int) -> DirPage:
        self.trips += 1
        left = sorted(name for name in self.names if after is None or name > after)
        return DirPage([Entry(name, inode(2)) for name in left[:limit]], len(left) <= limit)

    def become(self, names: set[bytes]) -> None:
        self.names = names
        self.changes += 1


async def read_all(reader: DirectoryReader, *, step: int = 3) -> list[bytes]:
    """Read as a kernel does: a few entries of each answer fit, the rest is asked for again by cookie."""
    seen: list[bytes] = []
    cookie = 0
    while found := (await reader.entries(cookie))[:step]:
        seen += [entry.name for _, entry in found]
        cookie = found[-1][0]
    return seen


names = st.sets(st.integers(0, 40).map(lambda number: b"%02d" % number), max_size=30)


@given(names, st.integers(1, 9))
def test_all_names_are_read_once_in_order(there: set[bytes], step: int) -> None:
    reader = Names(there).reader()
    assert asyncio.run(read_all(reader, step=step)) == sorted(there)
    assert asyncio.run(read_all(reader, step=step)) == sorted(there), "cookie 0 begins anew"


@given(names, names, names, st.integers(0, 12))
def test_names_that_stay_are_read_exactly_once_whatever_comes_and_goes(
    stay: set[bytes], come: set[bytes], go: set[bytes], moment: int
) -> None:
    directory = Names(stay | go)

    async def scenario() -> list[bytes]:
        reader = directory.reader()
        seen: list[bytes] = []
        cookie = calls = 0
        while found := (await reader.entries(cookie))[:2]:
            seen += [entry.name for _, entry in found]
            cookie = found[-1][0]
            calls += 1
            if calls == moment:
                directory.become(stay | come)
        return seen

    seen = asyncio.run(scenario())
    assert len(seen) == len(set(seen))
    assert stay <= set(seen) <= stay | come | go


@given(names, names, st.integers(1, 12))
def test_a_name_is_not_handed_out_after_it_was_removed(there: set[bytes], go: set[bytes], moment: int) -> None:
    directory = Names(there)

    async def scenario() -> list[bytes]:
        reader = directory.reader()
        cookie = 0
        for _ in range(moment):
            found = (await reader.entries(cookie))[:2]
            if not found:
                return []
            cookie = found[-1][0]
        directory.become(there - go)
        late: list[bytes] = []
        while found := (await reader.entries(cookie))[:2]:
            late += [entry.name for _, entry in found]
            cookie = found[-1][0]
        return late

    assert not go & set(asyncio.run(scenario()))


@given(names, names, st.data())
def test_any_cookie_leads_back_to_the_names_behind_it(there: set[bytes], go: set[bytes], data: st.DataObject) -> None:
    directory = Names(there)

    async def scenario() -> None:
        reader = directory.reader()
        order = await read_all(reader)
        position = data.draw(st.integers(0, len(order)))
        directory.become(there - go)
        left = [name for name in order[position:] if name not in go]
        seen: list[bytes] = []
        cookie = position + DOT_ENTRIES
        while found := await reader.entries(cookie):
            seen += [entry.name for _, entry in found]
            cookie = found[-1][0]
        assert seen == left

    asyncio.run(scenario())


def test_a_page_is_asked_for_once_and_old_pages_keep_names_only() -> None:
    directory = Names({b"%02d" % number for number in range(20)})
    reader = directory.reader()
    assert len(asyncio.run(read_all(reader, step=1))) == 20
    assert directory.trips == 5
    assert [page.entries is None for page in reader._pages] == [True, True, True, False, False]
