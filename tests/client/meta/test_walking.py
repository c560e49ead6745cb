"""Directories listed ahead of a walk: those that come next, each once, and none where nobody walks."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from chunkstore.errors import AtollError
from client.meta.recent import NEIGHBOURS_S
from client.meta.remote import RemoteMeta
from client.meta.walking import ENTRIES_AHEAD, FIRST_AHEAD, MOST_AHEAD, PAGE_AHEAD, Walk
from metasvc.model import ROOT_INO, DirPage, Entry, Ino
from tests.client.meta.test_recent import Clock, inode
from tests.client.vfs.remote import ROOT, mounted

LIMIT = 256


class Tree:
    """Directories by number, and a count of what was asked of them."""

    def __init__(self, seed: int, directories: int) -> None:
        rng = random.Random(seed)
        self.children: dict[int, list[int]] = {1: []}
        for number in range(2, directories + 2):
            self.children.setdefault(rng.randrange(max(1, number - 20), number), []).append(number)
            self.children.setdefault(number, [])
        self.asked: list[int] = []
        self.size = 0
        """Of each directory, as the listing of the one above says."""
        self.limits: dict[int, int] = {}
        self.changes = 0
        self.clock = Clock()
        self.answers: asyncio.Event | None = None
        self.fails: set[int] = set()
        self.walk = Walk(self.read, lambda: self.changes, now_s=self.clock)

    async def read(self, ino: Ino, limit: int) -> DirPage:
        assert limit in (LIMIT, PAGE_AHEAD)
        self.asked.append(ino)
        self.limits[ino] = limit
        if self.answers is not None:
            await self.answers.wait()
        await asyncio.sleep(0)
        if ino in self.fails:
            self.fails.discard(ino)
            raise AtollError("the service is away")
        return self.page(ino)

    def page(self, ino: int) -> DirPage:
        entries = [
            Entry(b"%06d" % child, inode(child)._replace(size_bytes=self.size)) for child in sorted(self.children[ino])
        ]
        return DirPage(entries, end=True)

    def in_order(self, of: int = 1, step: int = 1) -> Iterator[int]:
        """Name the directories as a depth-first walk takes them."""
        yield of
        for child in sorted(self.children[of])[::step]:
            yield from self.in_order(child, step)


@pytest.mark.parametrize("step", [1, -1])
async def test_a_walk_waits_for_few_of_its_directories_and_asks_for_each_once(seed: int, step: int) -> None:
    tree = Tree(seed, 300)
    waited = 0
    for ino in tree.in_order(step=step):
        await asyncio.sleep(0)  # the program looks at what it has
        waited += ino not in tree.asked
        assert await tree.walk.first_page(Ino(ino), LIMIT) == tree.page(ino)
    assert sorted(tree.asked) == sorted(tree.children), "each once"
    assert waited < 30, "the first steps, and where the order was learned"


async def test_directories_that_are_listed_at_random_bring_few_others(seed: int) -> None:
    tree = Tree(seed, 300)
    everything = list(tree.children)
    for ino in everything:
        await tree.walk.first_page(Ino(ino), LIMIT)
    tree.asked.clear()
    for _ in range(200):
        tree.clock.now_s += NEIGHBOURS_S + 0.01
        await tree.walk.first_page(Ino(random.Random(seed).choice(everything)), LIMIT)
    assert len(tree.asked) < 200 + 2 * MOST_AHEAD


async def test_a_walk_that_stops_to_look_asks_for_less_and_less(seed: int) -> None:
    tree = Tree(seed, 400)
    order = list(tree.in_order())
    for ino in order:
        tree.clock.now_s += NEIGHBOURS_S + 0.01
        assert await tree.walk.first_page(Ino(ino), LIMIT) == tree.page(ino)
    assert len(tree.asked) < len(order) + 20 * FIRST_AHEAD


async def test_who_changes_the_tree_while_walking_gets_what_is_there_now(seed: int) -> None:
    tree = Tree(seed, 100)
    for ino in tree.in_order():
        assert await tree.walk.first_page(Ino(ino), LIMIT) == tree.page(ino)
        if not tree.children[ino]:
            tree.changes += 1
    asked = len(tree.asked)
    assert asked < 101 + 10 * FIRST_AHEAD

    tree = Tree(seed, 100)
    order = list(tree.in_order())
    for number, ino in enumerate(order):
        if number == 50:
            tree.children[order[51]].append(5000)
            tree.changes += 1
        assert await tree.walk.first_page(Ino(ino), LIMIT) == tree.page(ino)


async def test_a_page_on_its_way_is_waited_for_and_one_that_fails_is_asked_for_again(seed: int) -> None:
    tree = Tree(seed, 60)
    order = list(tree.in_order())
    for ino in order[:4]:
        await tree.walk.first_page(Ino(ino), LIMIT)
    await asyncio.sleep(0.01)
    ahead = [ino for ino in order[4:] if ino in tree.asked]
    assert ahead
    tree.clock.now_s += NEIGHBOURS_S + 0.01
    tree.answers = asyncio.Event()
    first = asyncio.ensure_future(tree.walk.first_page(Ino(order[4]), LIMIT))
    await asyncio.sleep(0.01)
    count = len(tree.asked)
    second = asyncio.ensure_future(tree.walk.first_page(Ino(order[5]), LIMIT))
    await asyncio.sleep(0.01)
    assert not first.done()
    assert not second.done()
    assert tree.asked.count(order[5]) - (order[5] in ahead) <= 1
    assert len(tree.asked) <= count + MOST_AHEAD
    tree.fails = set(tree.children)
    tree.answers.set()
    results = await asyncio.gather(first, second, return_exceptions=True)
    for ino, result in zip(order[4:6], results, strict=True):
        assert isinstance(result, AtollError) or result == tree.page(ino)
    tree.answers, tree.fails = None, set()
    assert await tree.walk.first_page(Ino(order[6]), LIMIT) == tree.page(order[6])


async def test_large_directories_are_not_all_asked_for_at_once() -> None:
    tree = Tree(0, 0)
    tree.children = {1: list(range(2, 200)), **{number: [] for number in range(2, 200)}}

    tree.size = 10_000
    for ino in (1, 2, 3, 4):
        await tree.walk.first_page(Ino(ino), LIMIT)
    await asyncio.sleep(0.01)
    assert len(tree.asked) - 4 <= ENTRIES_AHEAD // PAGE_AHEAD


async def test_the_order_is_learned_where_a_walk_comes_back_up() -> None:
    tree = Tree(0, 0)
    # As a walk with a stack takes them: 3 with what is below it before 2, and there the last child first.
    tree.children = {1: [2, 3], 2: [10, 11, 12, 13], 3: [20], **{number: [] for number in (10, 11, 12, 13, 20)}}
    tree.size = PAGE_AHEAD
    for ino in (1, 3, 20, 2):
        await tree.walk.first_page(Ino(ino), LIMIT)
    await asyncio.sleep(0.01)
    assert tree.asked == [1, 3, 20, 2, 13]
    await tree.walk.first_page(Ino(13), LIMIT)
    await asyncio.sleep(0.01)
    assert tree.asked == [1, 3, 20, 2, 13, 12]


async def test_a_walk_asks_for_whole_directories_and_none_delays_the_one_that_is_waited_for() -> None:
    tree = Tree(0, 0)
    tree.children = {1: [2, 3, 4, 5, 6], **{number: [] for number in range(2, 7)}}
    tree.size = PAGE_AHEAD
    for ino in (1, 2):
        await tree.walk.first_page(Ino(ino), LIMIT)
    assert tree.limits == {1: LIMIT, 2: LIMIT}, "no walk yet"
    tree.answers = asyncio.Event()
    third = asyncio.ensure_future(tree.walk.first_page(Ino(3), LIMIT))
    await asyncio.sleep(0.01)
    assert tree.asked == [1, 2, 3], "what is large comes in a message of its own"
    assert tree.limits[3] == PAGE_AHEAD
    tree.answers.set()
    await third
    await asyncio.sleep(0.01)
    assert tree.asked == [1, 2, 3, 4]


async def test_a_walk_over_the_wire_needs_few_messages(tmp_path: Path) -> None:
    async with mounted(tmp_path) as mount:
        connection = mount.client.connection
        meta = RemoteMeta(connection, remembers=True)
        inos = []
        for number in range(60):
            inode_ = await meta.mkdir(ROOT, ROOT_INO, b"directory%03d" % number, mode=0o755)
            await meta.mkdir(ROOT, inode_.ino, b"below", mode=0o755)
            inos.append(inode_.ino)
        sent = connection.messages_sent
        names = [entry.name for entry in (await meta.readdir(ROOT_INO, after=None, limit=LIMIT)).entries]
        assert len(names) == 60
        for ino in inos:
            found = await meta.readdir(ino, after=None, limit=LIMIT)
            assert [entry.name for entry in found.entries] == [b"below"]
            await meta.readdir(found.entries[0].inode.ino, after=None, limit=LIMIT)
        assert connection.messages_sent - sent < 30, "121 directories"
