"""Leases on directories by themselves: who has one, what ends it, and how long others wait for that."""

from __future__ import annotations

import asyncio

import pytest

from metasvc.engine import leases as leasing
from metasvc.engine.leases import TERM_S, Leases
from metasvc.model import Dentry, Ino, SessionId
from metasvc.store.tables import DENTRY, Row, Table
from tests.client.meta.test_recent import Clock

ONE, TWO = SessionId(1), SessionId(2)
A, B = Ino(10), Ino(11)
Names = dict[Table, dict[tuple[Ino, bytes], Row | None]]


class World:
    """Leases on a clock that stands, and sessions that note what they are told."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.leases = Leases(now_s=self.clock)
        self.told: list[tuple[SessionId, Ino, int]] = []
        for session in (ONE, TWO):
            self.listen(session)

    def listen(self, session: SessionId) -> None:
        self.leases.listen(session, lambda ino, number: self.told.append((session, ino, number)))


def names(*where: Ino, gone: bool = False) -> Names:
    """Return the changes of an operation that adds, or removes, a name in each of some directories."""
    return {DENTRY: {(ino, b"n"): None if gone else Dentry(ino, b"n", Ino(99), 0o100000) for ino in where}}


async def test_the_first_name_of_another_ends_a_lease_for_good() -> None:
    world = World()
    leases = world.leases
    assert leases.extend(ONE, made=[A], changed=[B]) == [A], "B was there before"
    assert leases.add(names(A), by=ONE) is None
    assert leases.add(names(A, gone=True), by=TWO) is None, "who looks for it asks"
    assert leases.extend(ONE, made=[], changed=[A]) == [A]
    assert leases.extend(TWO, made=[], changed=[A]) == []
    recall = leases.add(names(A, B), by=TWO)
    assert recall is not None
    assert world.told == [(ONE, A, 1)]
    assert leases.recalls(ONE) == 1
    assert leases.extend(ONE, made=[], changed=[A]) == []
    assert leases.add(names(A), by=TWO) is None
    waiting = asyncio.create_task(recall.answered())
    await asyncio.sleep(0)
    leases.given_back(ONE, 0)
    leases.given_back(TWO, 1)
    await asyncio.sleep(0)
    assert not waiting.done()
    leases.given_back(ONE, 1)
    await waiting
    assert (leases.recalls_total, leases.expired_total) == (1, 0)


async def test_a_change_that_belongs_to_no_session_calls_back_all() -> None:
    world = World()
    world.leases.extend(ONE, made=[A], changed=[])
    world.leases.extend(TWO, made=[B], changed=[])
    recall = world.leases.add(names(A, B), by=None)
    assert recall is not None
    assert sorted(world.told) == [(ONE, A, 1), (TWO, B, 1)]
    waiting = asyncio.create_task(recall.answered())
    world.leases.given_back(ONE, 1)
    await asyncio.sleep(0.01)
    assert not waiting.done()
    world.leases.given_back(TWO, 1)
    await waiting


async def test_a_lease_that_has_run_out_is_not_called_back_and_lives_on_with_the_next_change_of_its_holder() -> None:
    world = World()
    world.leases.extend(ONE, made=[A, B], changed=[])
    world.clock.now_s += TERM_S
    assert world.leases.extend(ONE, made=[], changed=[A]) == [A], "nobody was there meanwhile"
    world.clock.now_s += TERM_S
    assert world.leases.add(names(A), by=TWO) is None
    assert world.told == []
    assert world.leases.extend(ONE, made=[], changed=[A, B]) == [B]


@pytest.mark.parametrize("ends", ["silent", "gone", "anew"])
async def test_who_adds_a_name_waits_for_a_holder_until_the_lease_has_run_out(
    ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leasing, "TERM_S", 0.2)
    told: list[int] = []
    leases = Leases()
    leases.listen(ONE, lambda _ino, number: told.append(number))
    leases.extend(ONE, made=[A], changed=[])
    if ends == "gone":
        leases.forget(ONE)
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    recall = leases.add(names(A), by=TWO)
    assert recall is not None
    waiting = asyncio.create_task(recall.answered())
    await asyncio.sleep(0.01)
    assert not waiting.done()
    if ends == "anew":
        # Before its Hello a client has dropped everything.
        leases.listen(ONE, lambda _ino, number: told.append(number))
        await asyncio.wait_for(waiting, 0.1)
        assert leases.recalls(ONE) == 1, "the numbers go on"
    else:
        await waiting
        assert loop.time() - began_s >= 0.19
    assert told == ([] if ends == "gone" else [1])
    assert leases.expired_total == (ends == "silent")


async def test_who_no_longer_waits_leaves_nothing_behind() -> None:
    world = World()
    world.leases.extend(ONE, made=[A], changed=[])
    recall = world.leases.add(names(A), by=TWO)
    assert recall is not None
    waiting = asyncio.create_task(recall.answered())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await asyncio.sleep(0)
    assert not world.leases._holders[ONE].waiting
    world.leases.given_back(ONE, 1)


async def test_after_another_owner_names_are_added_slowly_until_its_leases_have_run_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leasing, "TERM_S", 0.2)
    leases = Leases()
    leases.follow_another_owner()
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    assert leases.add(names(A, gone=True), by=ONE) is None
    recall = leases.add(names(A), by=ONE)
    assert recall is not None
    await recall.answered()
    assert loop.time() - began_s >= 0.19
    assert leases.add(names(A), by=ONE) is None


async def test_sessions_that_do_not_listen_get_no_lease_and_the_number_of_leases_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World()
    monkeypatch.setattr(leasing, "MAX_LEASES", 3)
    assert world.leases.extend(SessionId(3), made=[A], changed=[A]) == []
    made = [Ino(number) for number in range(100, 105)]
    assert world.leases.extend(ONE, made=made, changed=[]) == made[:3]
    world.clock.now_s += TERM_S / 2
    assert world.leases.extend(ONE, made=[], changed=[made[0]]) == [made[0]]
    world.clock.now_s += TERM_S / 2
    assert world.leases.extend(ONE, made=[A], changed=[]) == [A], "the oldest has run out"
    assert world.leases.extend(ONE, made=[], changed=made[:2]) == [made[0]]
    assert len(world.leases) == 3
