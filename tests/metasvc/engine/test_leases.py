"""Leases on directories by themselves: who has one, what ends it, and how long others wait for that."""

from __future__ import annotations

import asyncio
import stat
from typing import Any

import pytest

from metasvc.engine import leases as leasing
from metasvc.engine.leases import SHARED_S, TERM_S, Leases, Recall
from metasvc.model import Dentry, Ino, Inode, SessionId
from metasvc.store.tables import DENTRY, INODE
from tests.client.meta.test_recent import Clock

ONE, TWO, THREE = SessionId(1), SessionId(2), SessionId(3)
TOP, A, B, FILE = Ino(1), Ino(10), Ino(11), Ino(99)


def inode(ino: Ino, parent: Ino = TOP, **changes: Any) -> Inode:
    mode = (stat.S_IFREG if ino == FILE else stat.S_IFDIR) | 0o755
    return Inode(ino, mode, 1, 0, 0, 0, 0, 0, 0, 0, parent, 0, 0, 0)._replace(**changes)


class World:
    """Leases on a clock that stands, sessions that note what they are told, and inodes."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.leases = Leases(now_s=self.clock)
        self.told: list[tuple[SessionId, Ino, int]] = []
        self.inodes = {TOP: inode(TOP), A: inode(A), B: inode(B), FILE: inode(FILE, A)}
        for session in (ONE, TWO):
            self.listen(session)

    def listen(self, session: SessionId) -> None:
        self.leases.listen(session, lambda ino, number: self.told.append((session, ino, number)))

    def name(self, *where: Ino, by: SessionId | None, gone: bool = False) -> Recall | None:
        """Add a name in some directories, or remove it."""
        dentries = {(ino, b"n"): None if gone else Dentry(ino, b"n", Ino(98), 0o100000) for ino in where}
        return self.leases.call_back({DENTRY: dentries}, self.inodes.get, by=by)

    def change(self, ino: Ino, *, by: SessionId | None, **changes: Any) -> Recall | None:
        """Change an inode."""
        return self.leases.call_back({INODE: {ino: self.inodes[ino]._replace(**changes)}}, self.inodes.get, by=by)


async def test_the_first_change_of_another_ends_a_lease() -> None:
    world = World()
    leases = world.leases
    assert leases.extend(ONE, [B], made=[A]) == [A], "B was there before"
    assert world.name(A, by=ONE) is None
    assert world.name(A, by=ONE, gone=True) is None
    assert leases.extend(ONE, [A]) == [A]
    assert leases.extend(TWO, [A]) == []
    recall = world.name(A, B, by=TWO)
    assert recall is not None
    assert world.told == [(ONE, A, 1)]
    assert leases.extend(ONE, [A]) == []
    assert world.name(A, by=ONE) is None, "it knows"
    for other in (TWO, THREE):
        later = world.name(A, by=other)
        assert later is not None, "it was not given back yet"
        cancelled = asyncio.create_task(later.answered())
        await asyncio.sleep(0)
        cancelled.cancel()
    waiting = asyncio.create_task(recall.answered())
    await asyncio.sleep(0)
    leases.given_back(ONE, 0)
    leases.given_back(TWO, 1)
    await asyncio.sleep(0)
    assert not waiting.done()
    leases.given_back(ONE, 1)
    await waiting
    assert world.name(A, by=TWO) is None
    assert (leases.recalls_total, leases.expired_total) == (1, 0)
    assert not leases._pending


async def test_many_read_one_directory_and_a_change_calls_back_all_others() -> None:
    world = World()
    assert world.leases.give(ONE, A)
    assert world.leases.give(TWO, A)
    recall = world.name(A, by=ONE)
    assert recall is not None
    assert world.told == [(TWO, A, 1)]
    assert world.leases.extend(ONE, [A]) == [A]
    assert world.leases.extend(TWO, [A]) == []
    assert not world.leases.give(TWO, A), "it is written to now"
    world.clock.now_s += SHARED_S
    assert world.leases.give(TWO, A)


async def test_a_lease_covers_attributes_and_contents_of_what_is_in_the_directory_and_its_own() -> None:
    for ino, called_back in ((FILE, [A]), (A, [A, TOP]), (B, [TOP])):
        world = World()
        world.leases.give(ONE, A)
        world.leases.give(ONE, TOP)
        assert world.change(ino, by=TWO, mtime_ns=5) is not None
        assert sorted(directory for _, directory, _ in world.told) == sorted(called_back)
    world = World()
    world.leases.give(ONE, A)
    assert world.change(A, by=TWO, child_bytes=5) is None, "what its files take is shown to nobody"
    assert world.change(FILE, by=TWO, parent=Ino(0), nlink=2) is not None, "from now on it is not covered"


async def test_a_change_that_belongs_to_no_session_calls_back_all() -> None:
    world = World()
    world.leases.extend(ONE, [], made=[A])
    world.leases.extend(TWO, [], made=[B])
    recall = world.name(A, B, by=None)
    assert recall is not None
    assert sorted(world.told) == [(ONE, A, 1), (TWO, B, 1)]
    waiting = asyncio.create_task(recall.answered())
    world.leases.given_back(ONE, 1)
    await asyncio.sleep(0.01)
    assert not waiting.done()
    world.leases.given_back(TWO, 1)
    await waiting


async def test_nobody_waits_for_a_lease_that_has_run_out_and_it_may_be_extended_until_somebody_else_changes_something() -> (
    None
):
    world = World()
    world.leases.extend(ONE, [], made=[A, B])
    world.clock.now_s += TERM_S
    assert world.leases.extend(ONE, [A]) == [A], "nobody was there meanwhile"
    world.clock.now_s += TERM_S
    assert world.name(A, by=TWO) is None
    assert world.told == [(ONE, A, 1)], "what it knew is not so any more, whenever it gets the next one"
    assert world.leases.extend(ONE, [A, B]) == [B]
    world.clock.now_s += TERM_S
    assert world.name(B, by=TWO) is None
    assert world.told[1:] == [(ONE, B, 2)]
    assert world.leases.recalls_total == 0
    assert world.name(A, B, by=THREE) is None


@pytest.mark.parametrize("ends", ["silent", "gone", "anew"])
async def test_who_changes_something_waits_for_a_holder_until_the_lease_has_run_out(
    ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leasing, "TERM_S", 0.2)
    world = World()
    world.leases = leases = Leases()
    world.listen(ONE)
    leases.extend(ONE, [], made=[A])
    if ends == "gone":
        leases.forget(ONE)
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    recall = world.name(A, by=TWO)
    assert recall is not None
    waiting = asyncio.create_task(recall.answered())
    await asyncio.sleep(0.01)
    assert not waiting.done()
    if ends == "anew":
        # Before its Hello a client has dropped everything.
        world.listen(ONE)
        await asyncio.wait_for(waiting, 0.1)
        assert world.name(A, by=TWO) is None
        leases.give(ONE, B)
        world.name(B, by=TWO)
        assert world.told[1:] == [(ONE, B, 2)], "the numbers go on"
        return
    await waiting
    assert loop.time() - began_s >= 0.19
    assert world.name(A, by=TWO) is None
    assert world.told == ([] if ends == "gone" else [(ONE, A, 1)])
    assert leases.expired_total == 1
    assert not leases._pending


async def test_after_another_owner_nothing_changes_until_its_leases_have_run_out_or_all_have_connected_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leasing, "TERM_S", 0.2)
    world = World()
    loop = asyncio.get_running_loop()
    for connects in (False, True):
        world.leases = leases = Leases()
        leases.follow_another_owner()
        began_s = loop.time()
        recall = world.name(A, by=ONE)
        assert recall is not None
        if connects:
            loop.call_later(0.05, leases.all_connected_anew)
        await recall.answered()
        assert (loop.time() - began_s >= 0.19) is not connects
        assert world.name(A, by=ONE) is None


async def test_sessions_that_do_not_listen_get_no_lease_and_the_number_of_leases_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World()
    leases = world.leases
    monkeypatch.setattr(leasing, "MAX_DIRECTORIES", 3)
    monkeypatch.setattr(leasing, "MAX_HOLDERS", 1)
    assert leases.extend(SessionId(3), [A], made=[A]) == []
    assert not leases.give(SessionId(3), A)
    made = [Ino(number) for number in range(100, 105)]
    assert leases.extend(ONE, [], made=made) == made[:3]
    assert not leases.give(TWO, made[0])
    world.clock.now_s += TERM_S / 2
    assert leases.extend(ONE, [made[0]]) == [made[0]]
    world.clock.now_s += TERM_S / 2
    assert world.told == []
    assert leases.give(ONE, A), "the oldest has run out"
    assert world.told == [(ONE, made[1], 1)], "who gets that one again must have forgotten it"
    assert leases.extend(ONE, made[:2]) == [made[0]]
    assert len(leases) == 3


async def test_who_says_goodbye_holds_nothing_and_who_is_only_ended_may() -> None:
    world = World()
    for session, ino in ((ONE, A), (TWO, B)):
        world.leases.give(session, ino)
    world.leases.drop(ONE)
    world.leases.forget(ONE)
    assert world.name(A, by=THREE) is None
    world.leases.forget(TWO)
    assert world.name(B, by=THREE) is not None
    assert world.told == []
