"""Ranges of slice ids are durable before anybody gets one."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from chunkstore.geometry import SliceId
from metasvc.engine import Engine, EngineAdmin, EngineSession
from metasvc.engine.engine import SLICE_STRIDE
from metasvc.errors import FsError
from metasvc.model import ROOT_INO, Commit, SetAttr, SliceKind, SliceRef, WrittenSlice
from metasvc.store.memory import MemoryStore
from tests.metasvc.engine.volumes import ROOT, format_volume, opened


async def test_ids_of_a_stride_that_another_took_wait_for_its_commit() -> None:
    volume_store = await format_volume(MemoryStore())
    gate = asyncio.Event()
    gate.set()
    commit = volume_store.commit

    async def gated(*args: Any) -> None:
        await gate.wait()
        await commit(*args)

    # Of this one store only, which nobody else sees.
    volume_store.commit = gated  # type: ignore[method-assign, assignment]
    async with opened(volume_store) as volume:
        await volume.meta.allocate_slices(SLICE_STRIDE)
        gate.clear()
        first = asyncio.ensure_future(volume.meta.allocate_slices(1))
        second = asyncio.ensure_future(volume.meta.allocate_slices(1))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not first.done()
        assert not second.done(), "its id lies in the stride that a crash now would hand out again"
        gate.set()
        ids = {*await first, *await second}
        assert len(ids) == 2


def blocks(slice_id: int, length: int, offset: int = 0) -> WrittenSlice:
    """Return a slice with objects."""
    sliced = SliceId(slice_id)
    return WrittenSlice(sliced, length, SliceKind.BLOCKS, bytes(16), (SliceRef(offset, sliced, 0, length),))


@pytest.mark.parametrize("append", [False, True])
async def test_a_commit_that_is_brought_again_is_applied_once(*, append: bool) -> None:
    async with opened(await format_volume(MemoryStore())) as volume:
        ino = (await volume.meta.create(ROOT, ROOT_INO, b"f", mode=0o600, exclusive=True)).inode.ino
        ids = await volume.meta.allocate_slices(3)
        change = Commit((blocks(ids[0], 1000),), 1000, 0, append=append)
        assert (await volume.meta.commit(ROOT, ino, change)).size_bytes == 1000
        # Whoever got no answer brings it again, with what was written since.
        more = Commit(
            (*change.slices, blocks(ids[1], 50, 1000 if not append else 0)),
            1050 if not append else 50,
            0,
            append=append,
        )
        assert (await volume.meta.commit(ROOT, ino, more)).size_bytes == 1050
        assert (await volume.meta.commit(ROOT, ino, change)).size_bytes == 1050
        found = await volume.meta.read_map(ino, start=0, end=2000)
        assert [(ref.offset, ref.slice_id, ref.length) for ref in found.refs] == [(0, ids[0], 1000), (1000, ids[1], 50)]
        assert await volume.admin.garbage(before_ns=1 << 62, limit=10) == []
        await volume.meta.release(ino)


@pytest.mark.parametrize("how", ["overwritten", "truncated", "truncated, objects deleted"])
async def test_a_commit_that_is_brought_again_after_its_slices_were_replaced_brings_nothing_back(how: str) -> None:
    async with opened(await format_volume(MemoryStore())) as volume:
        ino = (await volume.meta.create(ROOT, ROOT_INO, b"f", mode=0o600, exclusive=True)).inode.ino
        ids = await volume.meta.allocate_slices(2)
        change = Commit((blocks(ids[0], 1000),), 1000, 0)
        inode = await volume.meta.commit(ROOT, ino, change)
        if how == "overwritten":
            await volume.meta.commit(ROOT, ino, Commit((blocks(ids[1], 1000),), 1000, 0))
        else:
            inode = await volume.meta.setattr(ROOT, ino, SetAttr(size_bytes=0))
        if how.endswith("deleted"):
            await volume.admin.garbage_deleted([SliceId(ids[0])])
        await volume.meta.commit(ROOT, ino, Commit(change.slices, 1000, inode.size_epoch))
        found = await volume.meta.read_map(ino, start=0, end=2000)
        assert ids[0] not in {ref.slice_id for ref in found.refs}
        gone = [row.slice_id for row in await volume.admin.garbage(before_ns=1 << 62, limit=10)]
        assert gone == ([] if how.endswith("deleted") else [ids[0]])
        await volume.meta.release(ino)


@pytest.mark.parametrize("was_committed", [False, True])
async def test_after_a_restart_a_slice_is_committed_once_and_only_by_its_session(*, was_committed: bool) -> None:
    store = await format_volume(MemoryStore())
    async with await Engine.open(store, address="first") as engine:
        session = EngineSession(engine, await engine.begin_session(host="h", pid=1, mountpoint="", secret=b"s"))
        ids = await session.allocate_slices(300)
        ino = (await session.create(ROOT, ROOT_INO, b"f", mode=0o600, exclusive=True)).inode.ino
        change = Commit((blocks(ids[0], 1000),), 1000, 0)
        if was_committed:
            await session.commit(ROOT, ino, change)
    async with await Engine.open(store, address="second", keep_sessions=True) as engine:
        again = EngineSession(engine, session.session_id)
        await engine.resume_session(session.session_id, {ino: 1})
        other = await EngineSession.begin(engine, host="h", pid=2)
        with pytest.raises(FsError):
            await other.commit(ROOT, ino, change)
        assert (await again.commit(ROOT, ino, change)).size_bytes == 1000
        found = await again.read_map(ino, start=0, end=1000)
        assert [ref.slice_id for ref in found.refs] == [ids[0]]
        assert engine.is_pending(SliceId(ids[299]))
        await engine.end_session(session.session_id)
        assert not engine.is_pending(SliceId(ids[299]))
        with pytest.raises(FsError):
            await again.commit(ROOT, ino, Commit((blocks(ids[1], 5),), 5, 0))
        await engine.end_session(other.session_id)
        admin = EngineAdmin(engine)
        assert [problem async for problem in admin.check(repair=False)] == []


async def test_a_nameless_file_that_a_second_session_opens_is_kept_for_it_and_goes_with_it() -> None:
    store = await format_volume(MemoryStore())
    async with await Engine.open(store, address="test") as engine:
        one = await EngineSession.begin(engine, host="h", pid=1)
        other = await EngineSession.begin(engine, host="h", pid=2)
        ino = (await one.create(ROOT, ROOT_INO, b"f", mode=0o600, exclusive=True)).inode.ino
        await other.unlink(ROOT, ROOT_INO, b"f")
        with pytest.raises(FsError, match="No such file"):
            await other.open(ino)
        # As one that had it open before its last session ended.
        await other.open(ino, again=True)
        await one.release(ino)
        assert (await other.getattr(ino)).nlink == 0
        await other.release(ino)
        with pytest.raises(FsError):
            await other.getattr(ino)
        for session in (one, other):
            await engine.end_session(session.session_id)
        assert [problem async for problem in EngineAdmin(engine).check(repair=False)] == []
