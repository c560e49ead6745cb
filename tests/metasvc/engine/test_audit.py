"""The audit of counters beside operations: never a false alarm, and what is wrong is found to the byte."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter as Tally
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from chunkstore.errors import AtollError
from metasvc.engine.accounts import TRASH_BYTES, TRASH_INODES, USED_BYTES, USED_INODES
from metasvc.engine.audit import Audited, audit
from metasvc.engine.tx import Tx
from metasvc.errors import StoreError
from metasvc.model import ROOT_INO, Ino, Inode, RenameFlags, SetAttr
from metasvc.store.memory import MemoryStore
from metasvc.store.tables import INODE, QUOTA
from tests.metasvc.engine.volumes import ROOT, Opened, format_volume, opened
from tests.metasvc.store.faulty import Faults, FaultyStore
from tests.metasvc.store.kinds import KINDS, new_store_of
from tests.servers.fixtures import Servers

COUNTERS = (USED_BYTES, USED_INODES, TRASH_BYTES, TRASH_INODES)
WORKERS = 4
STEPS = 400
INODES_MAX = 150
"""Above that nothing is cloned."""
OPERATIONS = [
    *(
        "mkdir",
        "mkdir",
        "create",
        "create",
        "create",
        "write",
        "write",
        "truncate",
        "link",
        "unlink",
        "unlink",
        "rmdir",
    ),
    *("rename", "rename", "rename", "exchange", "clone", "open", "close", "restore", "expire"),
    *("quota", "unquota"),
]


class Worker:
    """Does random operations in a few directories, some of them below quotas; what is refused is refused."""

    def __init__(self, volume: Opened, seed: int) -> None:
        self.volume = volume
        self.rand = random.Random(seed)
        self.done: Tally[str] = Tally()
        self._open: list[Ino] = []

    async def work(self, steps: int) -> None:
        for _ in range(steps):
            operation = self.rand.choice(OPERATIONS)
            try:
                await self._step(operation)
                self.done[operation] += 1
            except AtollError as error:
                if error.code not in ("posix", "out-of-space"):
                    raise
        for ino in self._open:
            await self.volume.meta.release(ino)

    def _name(self) -> bytes:
        return b"%c" % self.rand.choice(b"abcd")

    async def _directory(self) -> Ino:
        """Return a random directory at most three levels down."""
        ino = ROOT_INO
        for _ in range(self.rand.randrange(4)):
            page = await self.volume.meta.readdir(ino, after=None, limit=100)
            below = [entry.inode.ino for entry in page.entries if entry.inode.is_dir]
            if not below:
                break
            ino = self.rand.choice(below)
        return ino

    async def _step(self, operation: str) -> None:
        meta, admin, rand = self.volume.meta, self.volume.admin, self.rand
        parent, name = await self._directory(), self._name()
        match operation:
            case "mkdir":
                await meta.mkdir(ROOT, parent, name, mode=0o755)
            case "create":
                made = await meta.create(ROOT, parent, name, mode=0o644, exclusive=True)
                await meta.release(made.inode.ino)
            case "unlink":
                await meta.unlink(ROOT, parent, name)
            case "rmdir":
                await meta.rmdir(ROOT, parent, name)
            case "rename" | "exchange":
                flags = RenameFlags.EXCHANGE if operation == "exchange" else RenameFlags.NONE
                await meta.rename(ROOT, parent, name, await self._directory(), self._name(), flags=flags)
            case "restore" | "expire":
                trash = await admin.trash_list(after=None, limit=20)
                if operation == "restore" and trash:
                    await admin.trash_restore(ROOT, rand.choice(trash).trash_id)
                elif trash and rand.random() < 0.3:
                    await admin.trash_expire(before_ns=time.time_ns(), limit=rand.randint(1, 5))
            case "close":
                if self._open:
                    await meta.release(self._open.pop(rand.randrange(len(self._open))))
            case _:
                await self._step_of(operation, await meta.lookup(parent, name))

    async def _step_of(self, operation: str, inode: Inode) -> None:
        meta, admin, rand = self.volume.meta, self.volume.admin, self.rand
        match operation:
            case "write":
                await self.volume.write(inode.ino, rand.choice([0, 5000, 20_000]), rand.randbytes(10))
            case "truncate":
                await meta.setattr(ROOT, inode.ino, SetAttr(size_bytes=rand.choice([0, 1, 9000])))
            case "link":
                await meta.link(ROOT, inode.ino, await self._directory(), self._name())
            case "clone" if self.volume.engine.counter(USED_INODES) < INODES_MAX:
                await admin.clone(ROOT, inode.ino, await self._directory(), self._name())
            case "open":
                await meta.open(inode.ino)
                self._open.append(inode.ino)
            case "quota":
                await admin.quota_set(inode.ino, max_bytes=1 << 40, max_inodes=None)
            case "unquota":
                await admin.quota_remove(inode.ino)


async def make_tree(volume: Opened) -> None:
    """Make some directories, one inside the other below two quotas."""
    meta = volume.meta
    for name in (b"a", b"b"):
        top = await meta.mkdir(ROOT, ROOT_INO, name, mode=0o755)
        below = await meta.mkdir(ROOT, top.ino, b"a", mode=0o755)
        await meta.mkdir(ROOT, below.ino, b"b", mode=0o755)
        for directory in (top.ino, below.ino):
            made = await meta.create(ROOT, directory, b"c", mode=0o644, exclusive=True)
            await meta.release(made.inode.ino)
            await volume.write(made.inode.ino, 5000, b"data")
        if name == b"a":
            await volume.admin.quota_set(below.ino, max_bytes=1 << 40, max_inodes=None)
        await volume.admin.quota_set(top.ino, max_bytes=1 << 40, max_inodes=None)


@asynccontextmanager
async def slow_volume(
    kind: str, tmp_path: Path, servers: Servers, seed: int, *, memory_bytes: int, trash_days: float
) -> AsyncIterator[Opened]:
    """Open a volume with a tree, whose store takes its time; fsck must find nothing at the end."""
    store = await new_store_of(kind, tmp_path, servers)
    slow = FaultyStore(store, Faults(seed=seed, max_yields=6))
    volume_store = await format_volume(slow, trash_days=trash_days)
    try:
        async with opened(volume_store, memory_bytes=memory_bytes) as volume:
            await make_tree(volume)
            yield volume
    finally:
        await volume_store.close()
        await slow.close()


async def audit_until(volume: Opened, over: asyncio.Event, rand: random.Random, *, cuts: float) -> list[Audited]:
    """Audit again and again, that share of the audits cut off somewhere."""
    audits: list[Audited] = []
    while not over.is_set():
        auditing = asyncio.create_task(audit(volume.engine, pause_s=0, page_rows=rand.randint(1, 5)))
        if rand.random() < cuts:
            for _ in range(rand.randrange(200)):
                await asyncio.sleep(0)
            auditing.cancel()
        with suppress(asyncio.CancelledError):
            audits.append(await auditing)
        assert volume.engine.watch is None
    return audits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trash_days", [0.0, 1.0])
@pytest.mark.parametrize("number", range(6))
async def test_beside_operations_there_is_never_a_false_alarm(
    kind: str, trash_days: float, number: int, tmp_path: Path, servers: Servers, seed: int
) -> None:
    seed += number
    rand = random.Random(seed)
    memory_bytes = rand.choice([60_000, 200_000, 50_000_000])
    async with slow_volume(kind, tmp_path, servers, seed, memory_bytes=memory_bytes, trash_days=trash_days) as volume:
        over = asyncio.Event()
        auditing = asyncio.create_task(audit_until(volume, over, rand, cuts=0.2))
        workers = [Worker(volume, seed * 100 + worker) for worker in range(WORKERS)]
        await asyncio.gather(*(worker.work(STEPS) for worker in workers))
        over.set()
        audits = await auditing
        assert len(audits) > 3
        assert any(audited.quotas for audited in audits)
        assert [wrong for audited in audits for wrong in audited.differences] == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", range(6))
async def test_what_was_made_wrong_is_found_to_the_byte_beside_operations(
    kind: str, number: int, tmp_path: Path, servers: Servers, seed: int
) -> None:
    seed += number
    rand = random.Random(seed)
    made_wrong: Tally[tuple[str, Ino]] = Tally()
    memory_bytes = rand.choice([60_000, 50_000_000])
    async with slow_volume(kind, tmp_path, servers, seed, memory_bytes=memory_bytes, trash_days=1.0) as volume:
        # So that it is never removed with its quota.
        kept = await volume.meta.mkdir(ROOT, ROOT_INO, b"kept", mode=0o755)
        await volume.meta.mkdir(ROOT, kept.ino, b"here", mode=0o755)
        await volume.admin.quota_set(kept.ino, max_bytes=1 << 40, max_inodes=None)

        def falsify(tx: Tx) -> tuple[str, Ino, int]:
            by = rand.choice([-8192, -1, 1, 4096])
            if rand.random() < 0.7:
                name = rand.choice(COUNTERS)
                tx.count(name, by)
                return name, Ino(0), by
            row = tx.quota(kept.ino)
            assert row is not None
            tx.put(QUOTA, row._replace(used_bytes=row.used_bytes + by))
            return USED_BYTES, kept.ino, by

        def note(done: tuple[str, Ino, int]) -> None:
            made_wrong[done[:2]] += done[2]

        over = asyncio.Event()
        auditing = asyncio.create_task(audit_until(volume, over, rand, cuts=0.0))
        working = [asyncio.create_task(Worker(volume, seed * 100 + worker).work(STEPS)) for worker in range(WORKERS)]
        while not all(task.done() for task in working):
            await volume.engine.run(falsify, then=note)
            for _ in range(rand.randrange(300)):
                await asyncio.sleep(0)
        await asyncio.gather(*working)
        over.set()
        audits = await auditing
        assert any(audited.differences for audited in audits), "some were found while operations went on"
        found: Tally[tuple[str, Ino]] = Tally()
        for audited in [*audits, await audit(volume.engine, pause_s=0, page_rows=3)]:
            for wrong in audited.differences:
                found[wrong.counter, wrong.quota] += wrong.found - wrong.expected
        assert {key: by for key, by in found.items() if by} == {key: by for key, by in made_wrong.items() if by}
        assert (await audit(volume.engine, pause_s=0)).differences == []


# -- single interleavings ---------------------------------------------------------------------------------------------


@asynccontextmanager
async def held_volume(**options: int) -> AsyncIterator[tuple[Opened, Faults, list[Inode]]]:
    """Open a volume with six files of 4 KiB, and nothing else, whose store does what the test says."""
    faults = Faults()
    async with opened(await format_volume(FaultyStore(MemoryStore(), faults)), **options) as volume:
        files = []
        for name in range(6):
            made = await volume.meta.create(ROOT, ROOT_INO, b"%d" % name, mode=0o644, exclusive=True)
            await volume.meta.release(made.inode.ino)
            files.append(await volume.write(made.inode.ino, 0, b"data"))
        yield volume, faults, files


async def test_what_changes_while_a_page_is_under_way_is_taken_as_it_is_now() -> None:
    async with held_volume() as (volume, faults, files):
        held = faults.hold("scan", when="after")
        auditing = asyncio.create_task(audit(volume.engine, pause_s=0))
        await held.reached()
        await volume.write(files[0].ino, 8192, b"more")
        await volume.meta.unlink(ROOT, ROOT_INO, b"1")
        await volume.meta.mkdir(ROOT, ROOT_INO, b"new", mode=0o755)
        held.release()
        assert (await auditing).differences == []


async def test_what_is_in_force_and_not_durable_counts() -> None:
    async with held_volume() as (volume, faults, files):
        held = faults.hold("commit")
        writing = asyncio.create_task(volume.meta.setattr(ROOT, files[0].ino, SetAttr(size_bytes=100_000)))
        removing = asyncio.create_task(volume.meta.unlink(ROOT, ROOT_INO, b"1"))
        await held.reached()
        auditing = asyncio.create_task(audit(volume.engine, pause_s=0, page_rows=2))
        for _ in range(100):
            await asyncio.sleep(0)
        held.release()
        assert (await auditing).differences == []
        await asyncio.gather(writing, removing)


@pytest.mark.parametrize("pages", range(1, 5))
async def test_what_changes_on_either_side_of_the_cursor_counts_once(pages: int) -> None:
    async with held_volume() as (volume, faults, files):
        held = faults.hold("scan", nth=pages)
        auditing = asyncio.create_task(audit(volume.engine, pause_s=0, page_rows=2))
        await held.reached()
        for file in files:
            await volume.meta.setattr(ROOT, file.ino, SetAttr(size_bytes=20_000))
        for name in (b"0", b"3"):
            await volume.meta.unlink(ROOT, ROOT_INO, name)
        await volume.meta.mkdir(ROOT, ROOT_INO, b"new", mode=0o755)
        held.release()
        assert (await auditing).differences == []


async def test_a_tree_that_arrives_behind_the_cursor_leaves_its_quotas_to_the_next_audit() -> None:
    async with held_volume() as (volume, faults, _):
        meta = volume.meta
        source = await meta.mkdir(ROOT, ROOT_INO, b"source", mode=0o755)
        made = await meta.create(ROOT, source.ino, b"file", mode=0o644, exclusive=True)
        await meta.release(made.inode.ino)
        target = await meta.mkdir(ROOT, ROOT_INO, b"target", mode=0o755)
        other = await meta.mkdir(ROOT, ROOT_INO, b"other", mode=0o755)
        for directory in (target, other):
            await volume.admin.quota_set(directory.ino, max_bytes=1 << 40, max_inodes=None)
        behind = faults.hold("scan", nth=7)
        auditing = asyncio.create_task(audit(volume.engine, pause_s=0, page_rows=2))
        await asyncio.sleep(0)
        end = faults.hold("scan_dir", nth=1)
        cloning = asyncio.create_task(volume.admin.clone(ROOT, source.ino, target.ino, b"clone"))
        await end.reached()  # the clone is there, in the trash and empty
        await behind.reached()
        end.release()
        await cloning
        behind.release()
        audited = await auditing
        assert (audited.quotas, audited.differences) == (1, [])
        audited = await audit(volume.engine, pause_s=0)
        assert (audited.quotas, audited.differences) == (2, [])


async def test_a_repair_waits_while_changes_are_held_back_and_looks_again() -> None:
    async with held_volume() as (volume, _, _):
        await volume.engine.run(lambda tx: tx.count(USED_BYTES, 4096))
        async with volume.engine.changes_held() as hold:
            auditing = asyncio.create_task(audit(volume.engine, pause_s=0))
            async with asyncio.timeout(10):
                while not volume.engine.held_back:
                    await asyncio.sleep(0)
            await volume.engine.run(lambda tx: tx.count(USED_BYTES, -4096), hold=hold)
        assert (await auditing).differences == []


async def test_an_inode_that_changes_and_nobody_knows_how_it_was_begins_the_walk_anew() -> None:
    async with held_volume() as (volume, faults, files):
        engine = volume.engine
        walks = [faults.hold("scan", nth=nth) for nth in (2, 5)]
        auditing = asyncio.create_task(audit(engine, pause_s=0, page_rows=2))
        await walks[0].reached()
        await engine.settled()
        engine.rows._flat[INODE].young.clear()  # as if memory were short
        await engine.run(lambda tx: tx.put(INODE, files[0]._replace(mode=0o100600)))
        scans = faults.calls["scan"]
        walks[0].release()
        await walks[1].reached()
        walks[1].release()
        audited = await auditing
        assert (audited.inodes, audited.differences) == (7, [])
        assert faults.calls["scan"] - scans >= 4, "the second walk came to the end"


async def test_an_audit_that_fails_leaves_nothing_and_can_be_repeated() -> None:
    async with held_volume() as (volume, faults, _):
        faults.fail("scan", nth=2)
        with pytest.raises(StoreError):
            await audit(volume.engine, pause_s=0, page_rows=2)
        assert volume.engine.watch is None
        assert (await audit(volume.engine, pause_s=0, page_rows=2)).inodes == 7


async def test_quotas_of_deep_directories_are_audited_with_little_memory() -> None:
    async with held_volume() as (volume, _, _):
        top = ino = (await volume.meta.mkdir(ROOT, ROOT_INO, b"top", mode=0o755)).ino
        await volume.admin.quota_set(top, max_bytes=1 << 40, max_inodes=None)
        for _ in range(300):
            ino = (await volume.meta.mkdir(ROOT, ino, b"d", mode=0o755)).ino
        await volume.engine.settled()
        volume.engine.rows._flat[INODE].young.clear()
        audited = await audit(volume.engine, pause_s=0, page_rows=5)
        assert (audited.inodes, audited.quotas, audited.differences) == (308, 1, [])
