"""What a session knows by lease: nothing without one, nothing that an own change may have made untrue."""

from __future__ import annotations

import random
import stat

import pytest

from client.meta import leased as leasing
from client.meta.leased import Leased
from metasvc.model import DirPage, Entry, FileMap, Ino, Inode
from tests.client.meta.test_recent import Clock

TOP, A, B = Ino(1), Ino(10), Ino(11)
LEASE_S = 0.9


def directory(ino: Ino = A) -> Inode:
    return Inode(ino, stat.S_IFDIR | 0o755, 2, 0, 0, 0, 0, 0, 0, 0, TOP, 0, 0, 0)


def file(number: int, *, parent: Ino = A, nlink: int = 1, version: int = 1) -> Inode:
    return Inode(Ino(number), stat.S_IFREG | 0o644, nlink, 0, 0, 0, 5, 0, 0, 0, parent, 0, version, 0)


def page(*numbers: int, end: bool = True) -> DirPage:
    return DirPage([Entry(b"%d" % number, file(number)) for number in numbers], end)


def file_map(version: int = 1) -> FileMap:
    return FileMap(version, [], {}, 0, 1 << 50)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def leased(clock: Clock) -> Leased:
    """Know the directory A, made a moment ago."""
    known = Leased(now_s=clock)
    asked = known.begin(names=[(TOP, b"a")])
    known.end()
    known.made(asked, directory(), lease_s=LEASE_S)
    return known


def listed(leased: Leased, *numbers: int, end: bool = True) -> None:
    leased.take_page(leased.asked(), A, page(*numbers, end=end), after=None, is_leased=True, lease_s=LEASE_S)


def test_a_new_directory_has_no_names_but_those_that_were_added(leased: Leased) -> None:
    assert leased.is_absent(A, b"n")
    assert not leased.is_absent(B, b"n"), "nobody said so"
    leased.begin(names=[(A, b"n")])
    assert not leased.is_absent(A, b"n"), "before the request is sent, whatever becomes of it"
    assert leased.is_absent(A, b"m")
    assert not leased.is_absent(A, b"x" * 256), "what is too long has an error of its own"


def test_a_lease_counts_from_before_the_request_that_extended_it(leased: Leased, clock: Clock) -> None:
    clock.now_s += 0.5
    asked = leased.asked()
    clock.now_s += 0.3
    leased.extended(asked, [A], [A], lease_s=LEASE_S)
    clock.now_s += 0.5
    assert leased.is_absent(A, b"n")
    clock.now_s += 0.2
    assert not leased.is_absent(A, b"n")
    leased.extended(leased.asked(), [A], [A], lease_s=LEASE_S)
    assert leased.is_absent(A, b"m"), "the service has kept it: nobody else was there"
    leased.extended(asked, [A], [A], lease_s=LEASE_S)
    assert leased.is_absent(A, b"m"), "an older reply shortens nothing"


@pytest.mark.parametrize("how", ["recall", "reply", "all"])
def test_what_has_ended_does_not_come_back(leased: Leased, how: str) -> None:
    listed(leased, 20)
    leased.take_map(leased.asked(), Ino(20), file_map())
    asked = leased.asked()
    if how == "recall":
        leased.recalled(A)
    elif how == "all":
        leased.clear()
    else:
        leased.extended(asked, [], [A], lease_s=LEASE_S)
    leased.extended(asked, [A], [A], lease_s=LEASE_S)
    assert not leased.is_absent(A, b"n")
    assert leased.lookup(A, b"20") is None
    assert leased.getattr(Ino(20)) is None
    assert leased.page(A, None, 100) is None
    assert leased.open(Ino(20)) is None
    assert (leased._count, leased._map_bytes) == (0, 0)
    assert not leased._places


def test_a_directory_in_which_names_were_added_before_the_reply_that_made_it_is_not_known(clock: Clock) -> None:
    leased = Leased(now_s=clock)
    asked = leased.begin(names=[(TOP, b"a")])
    leased.begin(names=[(A, b"n")])
    leased.end()
    leased.end()
    leased.made(asked, directory(), lease_s=LEASE_S)
    assert not leased.is_absent(A, b"n")
    assert not leased.is_absent(A, b"m")


def test_nor_is_one_of_which_that_may_have_been_forgotten(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leasing, "_MAX_STRANGE", 3)
    leased = Leased(now_s=clock)
    asked = leased.asked()
    leased.begin(names=[(Ino(100 + number), b"n") for number in range(4)])
    leased.made(asked, directory(Ino(100)), lease_s=LEASE_S)
    assert not leased.is_absent(Ino(100), b"n")


def test_a_listing_says_what_is_there_and_what_is_not(leased: Leased, clock: Clock) -> None:
    listed(leased, 20, 21)
    assert leased.lookup(A, b"20") == file(20)
    assert leased.getattr(Ino(21)) == file(21)
    assert leased.is_absent(A, b"22")
    assert leased.page(A, None, 2) == page(20, 21)
    assert leased.page(A, None, 1) == page(20, end=False)
    assert leased.page(A, b"20", 1) == page(21)
    listed(leased, 21)
    assert leased.lookup(A, b"20") is None
    assert leased.is_absent(A, b"20")
    assert leased.getattr(Ino(20)) is None
    leased.take_page(leased.asked(), A, page(23, end=True), after=b"22", is_leased=False, lease_s=LEASE_S)
    assert leased.lookup(A, b"23") == file(23), "the lease is there"
    clock.now_s += LEASE_S
    assert leased.lookup(A, b"21") is None
    leased.take_page(leased.asked(), A, page(24), after=None, is_leased=False, lease_s=LEASE_S)
    leased.extended(leased.asked(), [A], [A], lease_s=LEASE_S)
    assert leased.lookup(A, b"21") == file(21)
    assert leased.lookup(A, b"24") is None, "it was not, then"


@pytest.mark.parametrize("when", ["before", "between", "across", "in the middle"])
def test_an_answer_that_an_own_change_may_have_overtaken_is_not_taken(leased: Leased, when: str) -> None:
    listed(leased, 20, 21)
    leased.take_map(leased.asked(), Ino(21), file_map())
    if when == "before":
        leased.begin(names=[(A, b"22")], inos=[Ino(21)])
        asked = leased.asked()
        leased.end()
    elif when == "between":
        asked = leased.asked()
        leased.begin(names=[(A, b"22")], inos=[Ino(21)])
        leased.end()
    elif when == "across":
        leased.begin(names=[(A, b"22")], inos=[Ino(21)])
        asked = leased.asked()
    else:
        asked = leased.asked()
        leased.begin(names=[(A, b"22")], inos=[Ino(21)])
    leased.take_page(asked, A, page(20, 21), after=None, is_leased=True, lease_s=LEASE_S)
    leased.take_inode(asked, A, b"21", file(21))
    leased.take_map(asked, Ino(21), file_map())
    leased.take_directory(asked, directory())
    assert not leased.is_absent(A, b"22")
    assert leased.lookup(A, b"22") is None
    assert leased.lookup(A, b"21") is None
    assert leased.open(Ino(21)) is None
    assert leased.page(A, None, 100) is None
    assert leased.getattr(A) is None
    assert leased.lookup(A, b"20") == file(20), "that was not touched"


def test_files_with_several_names_are_asked_for(leased: Leased) -> None:
    found = DirPage([Entry(b"one", file(20, nlink=2, parent=Ino(0))), Entry(b"two", file(21))], True)
    leased.take_page(leased.asked(), A, found, after=None, is_leased=True, lease_s=LEASE_S)
    assert leased.lookup(A, b"one") is None
    assert not leased.is_absent(A, b"one")
    assert leased.lookup(A, b"two") == file(21)
    assert leased.page(A, None, 100) is None
    assert leased.getattr(Ino(20)) is None


def test_a_directory_that_may_have_been_moved_is_asked_for(leased: Leased) -> None:
    leased.take_directory(leased.asked(), directory())
    assert leased.getattr(A) == directory()
    leased.begin(moves_in=[A])
    assert leased.getattr(A) == directory(), "a child of it may have been moved, not the directory"
    leased.end()
    leased.begin(moves_in=[Ino(77), directory().parent])
    assert leased.getattr(A) is None


def test_a_file_is_opened_by_what_is_known_of_it_and_of_no_other_version(leased: Leased) -> None:
    listed(leased, 20)
    assert leased.open(Ino(20)) is None
    leased.take_map(leased.asked(), Ino(20), file_map(version=2))
    assert leased.open(Ino(20)) is None
    leased.take_map(leased.asked(), Ino(20), file_map())
    opened = leased.open(Ino(20))
    assert opened is not None
    assert (opened.inode, opened.promised_end) == (file(20), 0)
    leased.take_map(leased.asked(), Ino(30), file_map())
    assert leased.open(Ino(30)) is None, "nobody knows where it is"


def test_nobody_opens_by_a_lease_that_ends_before_the_service_may_have_heard_of_it(
    leased: Leased, clock: Clock
) -> None:
    listed(leased, 20)
    leased.take_map(leased.asked(), Ino(20), file_map())
    clock.now_s += leased.ends_s(A) - leasing.OPEN_LEFT_S - 0.001
    assert leased.open(Ino(20)) is not None
    clock.now_s += 0.002
    assert leased.open(Ino(20)) is None
    assert leased.lookup(A, b"20") == file(20), "the lease itself holds"


def test_maps_are_asked_for_behind_the_second_file_that_is_opened_and_more_of_them_while_they_are_used(
    leased: Leased, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leasing, "MAX_MAP_BYTES", 256 * 1024)  # the maps of all files do not fit
    listed(leased, *range(100, 500))
    assert leased.maps_wanted(Ino(100)) == []
    wanted = leased.maps_wanted(Ino(101))
    assert wanted == list(range(102, 166))
    position = 101
    for _ in range(2):
        for ino in wanted:
            leased.take_map(leased.asked(), ino, file_map())
            assert leased.open(ino) is not None
        position = wanted[-1] + 1
        wanted = leased.maps_wanted(Ino(position))
    assert len(wanted) > 64
    assert wanted[0] == position + 1
    # At random, of what is never used.
    many = [len(leased.maps_wanted(Ino(number))) for number in range(100, 130)]
    assert many[-1] <= 2


def test_an_epoch_over_a_directory_in_any_order_asks_for_few_of_its_files(leased: Leased, seed: int) -> None:
    inos = list(range(100, 1100))
    listed(leased, *inos)
    random.Random(seed).shuffle(inos)
    misses = asked = 0
    for position, ino in enumerate(inos):
        if leased.open(Ino(ino)) is None:
            misses += 1
            for other in (ino, *leased.maps_wanted(Ino(ino))):
                asked += 1
                leased.take_map(leased.asked(), Ino(other), file_map())
        assert asked <= misses + 66 + 4 * position, "who opens a few asks for a few"
    assert misses < 160
    assert asked == 1000


@pytest.mark.parametrize("answer", ["made", "page", "inode", "map", "extended"])
def test_a_reply_that_is_taken_after_a_recall_gives_nothing(leased: Leased, answer: str) -> None:
    """The connection takes a reply, then a recall; who asked wakes later."""
    listed(leased, 20)
    asked = leased.begin(names=[(TOP, b"b")]) if answer == "made" else leased.asked()
    for ino in (A, B):
        leased.recalled(ino)
    if answer == "made":
        leased.end()
        leased.made(asked, directory(B), lease_s=LEASE_S)
        assert not leased.is_absent(B, b"n")
        return
    if answer == "page":
        leased.take_page(asked, A, page(20), after=None, is_leased=True, lease_s=LEASE_S)
    elif answer == "extended":
        leased.extended(asked, [A], [A], lease_s=LEASE_S)
    else:
        listed(leased, 21)
        leased.take_inode(asked, A, b"20", file(20))
        leased.take_map(asked, Ino(21), file_map())
        assert leased.open(Ino(21)) is None
    assert leased.lookup(A, b"20") is None


def test_what_is_kept_is_bounded(leased: Leased, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leasing, "MAX_NAMES", 50)
    monkeypatch.setattr(leasing, "MAX_MAP_BYTES", 10 * 600)
    for number in range(100, 130):
        listed(leased, *range(100, number))
        leased.take_map(leased.asked(), Ino(100 + number % 7), file_map())
    assert leased._map_bytes <= 10 * 600
    assert leased._count == 30
    leased.take_page(leased.asked(), B, page(*range(200, 230)), after=None, is_leased=True, lease_s=LEASE_S)
    assert leased.lookup(A, b"100") is None, "the one that was not used for longest"
    leased.take_page(leased.asked(), A, page(*range(100, 160)), after=None, is_leased=True, lease_s=LEASE_S)
    assert leased._count == 0
    assert not leased._places


def test_who_makes_and_removes_files_all_the_time_fills_no_memory(leased: Leased) -> None:
    for number in range(1000):
        listed(leased, 5000 + number)
    known = leased._directories[A]
    assert len(known.order) == len(known.positions) < 30
    assert len(leased._places) == 1


def take(leased: Leased, found: DirPage, after: bytes | None) -> None:
    leased.take_page(leased.asked(), A, found, after=after, is_leased=True, lease_s=LEASE_S)


def test_a_directory_that_was_listed_in_pages_is_listed_again_by_lease_in_any_pages(leased: Leased) -> None:
    leased.recalled(A)
    take(leased, page(20, 21, end=False), None)
    assert leased.page(A, None, 2) is None
    take(leased, page(22, 23, end=False), b"21")
    take(leased, page(24), b"23")
    assert leased.is_absent(A, b"25")
    assert leased.page(A, None, 3) == page(20, 21, 22, end=False)
    assert leased.page(A, b"22", 3) == page(23, 24)
    assert leased.page(A, b"215", 1) == page(22, end=False)
    assert leased.page(A, b"24", 1) == page()


@pytest.mark.parametrize("what", ["own change", "own change under way", "recall", "gap", "several names"])
def test_a_listing_in_pages_is_not_taken_for_whole_if(leased: Leased, what: str) -> None:
    leased.recalled(A)
    take(leased, page(20, 21, end=False), None)
    after, second, known = b"21", page(22, end=True), False
    match what:
        case "own change":
            leased.begin(names=[(A, b"205")])
            leased.end()
        case "own change under way":
            leased.begin(inos=[Ino(20)])
        case "recall":
            leased.recalled(A)
        case "gap":
            after = b"22"
        case _:
            second, known = DirPage([Entry(b"22", file(22, nlink=2))], end=True), True
    take(leased, second, after)
    assert leased.page(A, None, 100) is None
    assert leased.is_absent(A, b"205") == known
