"""What is answered without asking: exactly what the service said a moment ago, and nothing that an own change has overtaken."""

from __future__ import annotations

import pytest

from client.meta.recent import (
    DIRECTORY_S,
    IN_A_ROW,
    MAX_PAGE,
    NEIGHBOURS_S,
    PAUSE_S,
    Recent,
    just_before,
)
from metasvc.model import Entry, Ino, Inode

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


def walk(recent: Recent, count: int, *, present: int | None = None) -> tuple[int, int]:
    """Look up names in order, as RemoteMeta does; how many single requests and how many pages that took."""
    singles = pages = 0
    for number in range(count):
        name = b"%06d" % number
        if (known := recent.name(PARENT, name)) is not None:
            assert known.ino == 1000 + number
            continue
        wanted = recent.wanted(PARENT)
        if wanted:
            pages += 1
            recent.page(PARENT, entries(number, wanted), asked_at=recent.changes)
        else:
            singles += 1
    return singles, pages


def test_names_in_order_come_in_pages_that_grow() -> None:
    singles, pages = walk(Recent(now_s=Clock()), 5000)
    assert singles == IN_A_ROW
    assert pages <= 5000 // MAX_PAGE + 5


def test_names_in_no_order_cost_few_pages_and_small_ones() -> None:
    recent, asked = Recent(now_s=Clock()), 0
    for number in range(1000):
        position = number * 7919 % 1_000_003
        if recent.name(PARENT, b"%06d" % position) is None and (wanted := recent.wanted(PARENT)):
            asked += wanted
            recent.page(PARENT, entries(position, wanted), asked_at=recent.changes)
    assert asked <= 2 * 1000


@pytest.mark.parametrize("event", ["change", "time", "absent"])
def test_neighbours_are_forgotten(event: str) -> None:
    clock = Clock()
    recent = Recent(now_s=clock)
    walk(recent, IN_A_ROW + 2)
    name = b"%06d" % (IN_A_ROW + 2)
    assert recent.name(PARENT, name) is not None
    if event == "change":
        recent.changed()
    elif event == "time":
        clock.now_s += NEIGHBOURS_S + 0.01
    else:
        recent.absent(PARENT)
    assert recent.name(PARENT, name) is None


def test_a_page_that_was_asked_for_before_a_change_is_not_taken() -> None:
    recent = Recent(now_s=Clock())
    wanted = [recent.wanted(PARENT) for _ in range(IN_A_ROW + 1)][-1]
    asked_at = recent.changes
    recent.changed()
    for _ in range(IN_A_ROW + 1):
        recent.wanted(PARENT)
    recent.page(PARENT, entries(0, wanted), asked_at=asked_at)
    assert recent.name(PARENT, b"000000") is None


def test_lookups_that_are_far_apart_bring_no_neighbours() -> None:
    clock = Clock()
    recent = Recent(now_s=clock)
    for _ in range(100):
        assert recent.wanted(PARENT) == 0
        clock.now_s += PAUSE_S + 0.01


def test_memory_is_bounded() -> None:
    recent = Recent(now_s=Clock())
    for number in range(10_000):
        recent.changed([inode(number + 1)])
    for number in range(10_000):
        recent.wanted(Ino(number))
    assert len(recent._directories) <= 64
    assert len(recent._rows) <= 64


@pytest.mark.parametrize("name", [b"a", b"file-000017", b"\xff", b"a\x01", "\u00e9".encode()])
def test_the_name_before_sorts_before(name: bytes) -> None:
    before = just_before(name)
    assert before is not None
    assert before < name
    assert just_before(b"a\0") is None
