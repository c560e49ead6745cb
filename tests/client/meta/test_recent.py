"""What is answered without asking: exactly what the service said a moment ago, and nothing that an own change has overtaken."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from client.meta.recent import (
    DIRECTORY_S,
    IN_A_ROW,
    MAX_PAGE,
    NEIGHBOURS_S,
    Recent,
    just_before,
)
from metasvc.model import DirPage, Entry, Ino, Inode

PARENT = Ino(10)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def inode(ino: int, *, ctime_ns: int = 1) -> Inode:
    return Inode(
        ino=Ino(ino),
        mode=0o040755,
        nlink=2,
        uid=0,
        gid=0,
        rdev=0,
        size_bytes=0,
        atime_ns=0,
        mtime_ns=0,
        ctime_ns=ctime_ns,
        parent=Ino(1),
        child_bytes=0,
        map_version=0,
        size_epoch=0,
    )


def entries(first: int, count: int) -> list[Entry]:
    return [Entry(b"%06d" % number, inode(1000 + number)) for number in range(first, first + count)]


def test_a_directory_is_known_for_a_moment_after_its_change_and_never_as_it_was_before_a_later_one() -> None:
    clock = Clock()
    recent = Recent(now_s=clock)
    assert recent.directory(PARENT) is None
    recent.changed([inode(PARENT, ctime_ns=5)])
    recent.changed([inode(PARENT, ctime_ns=4)])
    known = recent.directory(PARENT)
    assert known is not None
    assert known.ctime_ns == 5
    clock.now_s += DIRECTORY_S + 0.01
    assert recent.directory(PARENT) is None
    recent.changed([inode(PARENT, ctime_ns=6)])
    recent.forget(PARENT)
    assert recent.directory(PARENT) is None


def test_a_directory_that_may_have_been_moved_or_removed_is_asked_for_and_others_are_not() -> None:
    recent = Recent(now_s=Clock())
    elsewhere = inode(20)._replace(parent=Ino(2))
    recent.changed([inode(PARENT), elsewhere])
    recent.forget_children([PARENT])
    assert recent.directory(PARENT) is not None
    recent.forget_children([Ino(1), Ino(3)])
    assert recent.directory(PARENT) is None
    assert recent.directory(Ino(20)) == elsewhere


LOOKUP_S = 0.0003


def look_up(recent: Recent, clock: Clock, positions: Iterable[int], *, size: int) -> tuple[int, int, int]:
    """Look up names of a directory as RemoteMeta does: how many single requests, pages and names of pages that took."""
    singles = pages = names = 0
    for number in positions:
        clock.now_s += LOOKUP_S
        if (known := recent.name(PARENT, b"%06d" % number)) is not None:
            assert known.ino == 1000 + number
            continue
        wanted = recent.wanted(PARENT)
        if wanted:
            first = 0 if wanted == MAX_PAGE else number
            found = entries(first, min(wanted, size - first))
            pages += 1
            names += len(found)
            recent.page(PARENT, DirPage(found, first + len(found) == size), asked=wanted, asked_at=recent.changes)
            if first <= number < first + len(found):
                continue
        singles += 1
    return singles, pages, names


def test_names_in_order_come_in_pages_that_grow() -> None:
    clock = Clock()
    singles, pages, names = look_up(Recent(now_s=clock), clock, range(900), size=900)
    assert singles == IN_A_ROW
    assert pages <= 5
    assert names <= 3 * 900


def test_names_in_order_of_a_huge_directory_come_in_pages_from_there_on() -> None:
    clock = Clock()
    singles, pages, names = look_up(Recent(now_s=clock), clock, range(500_000, 520_000), size=1_000_000)
    assert singles + pages <= 60
    assert names <= 2 * 20_000


def test_names_at_random_in_a_directory_of_some_size_come_with_it() -> None:
    clock = Clock()
    order = list(range(900))
    random.Random(1).shuffle(order)
    singles, pages, names = look_up(Recent(now_s=clock), clock, order, size=900)
    # 0.27 s of lookups, and pages are believed for 0.2.
    assert singles + pages <= 30
    assert names <= 6 * 900


def test_names_at_random_in_a_huge_directory_cost_hardly_more_than_one_by_one() -> None:
    clock, size = Clock(), 1_000_000
    source = random.Random(2)
    singles, pages, names = look_up(
        Recent(now_s=clock), clock, [source.randrange(size) for _ in range(20_000)], size=size
    )
    assert singles + pages <= 1.7 * 20_000
    # A name costs a 48th of a lookup.
    assert names <= 0.6 * 20_000 * 48


@pytest.mark.parametrize("event", ["change", "time"])
def test_neighbours_are_forgotten(event: str) -> None:
    clock = Clock()
    recent = Recent(now_s=clock)
    look_up(recent, clock, range(IN_A_ROW + 2), size=900)
    name = b"%06d" % (IN_A_ROW + 2)
    assert recent.name(PARENT, name) is not None
    if event == "change":
        recent.changed()
    else:
        clock.now_s += NEIGHBOURS_S + 0.01
    assert recent.name(PARENT, name) is None


def test_a_name_is_answered_once() -> None:
    clock = Clock()
    recent = Recent(now_s=clock)
    look_up(recent, clock, range(IN_A_ROW + 1), size=900)
    name = b"%06d" % (IN_A_ROW + 2)
    assert recent.name(PARENT, name) is not None
    assert recent.name(PARENT, name) is None


def test_a_page_that_was_asked_for_before_a_change_is_not_taken() -> None:
    recent = Recent(now_s=Clock())
    wanted = [recent.wanted(PARENT) for _ in range(IN_A_ROW + 1)][-1]
    asked_at = recent.changes
    recent.changed()
    for _ in range(IN_A_ROW + 1):
        recent.wanted(PARENT)
    recent.page(PARENT, DirPage(entries(0, wanted), end=True), asked=wanted, asked_at=asked_at)
    assert recent.name(PARENT, b"000000") is None


def test_lookups_that_are_far_apart_bring_no_neighbours() -> None:
    clock = Clock()
    recent = Recent(now_s=clock)
    for _ in range(100):
        assert recent.wanted(PARENT) == 0
        clock.now_s += NEIGHBOURS_S + 0.01


def test_who_makes_files_brings_no_neighbours() -> None:
    recent = Recent(now_s=Clock())
    for _ in range(100):
        assert recent.wanted(PARENT) == 0
        recent.absent(PARENT)
        recent.changed([inode(PARENT)])


def test_memory_is_bounded() -> None:
    recent = Recent(now_s=Clock())
    for number in range(10_000):
        recent.changed([inode(number + 1)])
    for number in range(10_000):
        recent.wanted(Ino(number))
    for number in range(200):
        parent = Ino(number + 100)
        wanted = [recent.wanted(parent) for _ in range(IN_A_ROW + 1)][-1]
        found = [Entry(b"%d" % position, inode(position + 1)) for position in range(1000)]
        recent.page(parent, DirPage(found, end=True), asked=wanted, asked_at=recent.changes)
    assert sum(len(row.known) for row in recent._rows.values()) <= 18 * 1024
    assert len(recent._directories) <= 64
    assert len(recent._rows) <= 64


@pytest.mark.parametrize("name", [b"a", b"file-000017", b"\xff", b"a\x01", "\u00e9".encode()])
def test_the_name_before_sorts_before(name: bytes) -> None:
    before = just_before(name)
    assert before is not None
    assert before < name
    assert just_before(b"a\0") is None
