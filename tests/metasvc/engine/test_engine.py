"""The life of an engine: it ends in bounded time, whatever its store does."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from chunkstore.errors import AtollError
from metasvc.engine import Engine, EngineAdmin, EngineSession
from metasvc.errors import StoreError
from metasvc.model import ROOT_INO, Caller
from metasvc.store.memory import MemoryStore
from tests.metasvc.engine.volumes import format_volume

ROOT = Caller()
LONG_S = 1e9
"""As of embedded volumes: the ownership does not run out."""


@pytest.mark.parametrize("can_release", [True, False])
async def test_an_engine_whose_store_takes_nothing_ends_and_the_next_one_finds_what_was_told(
    can_release: bool,  # noqa: FBT001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("metasvc.engine.engine.END_S", 0.2)
    monkeypatch.setattr("metasvc.engine.session.END_S", 0.2)
    store = await format_volume(MemoryStore())
    commit, release = store.commit, store.release

    async def full(*args: Any, **options: Any) -> None:
        raise StoreError("the file system is full")

    async with asyncio.timeout(20):
        with pytest.raises(StoreError, match="took no changes"):
            async with (
                await Engine.open(store, address="test", ttl_s=LONG_S) as engine,
                await EngineSession.begin(engine, host="h", pid=1) as session,
            ):
                await session.mkdir(ROOT, ROOT_INO, b"told", mode=0o755)
                monkeypatch.setattr(store, "commit", full)
                if not can_release:
                    monkeypatch.setattr(store, "release", full)
                waiting = asyncio.create_task(session.mkdir(ROOT, ROOT_INO, b"lost", mode=0o755))
                await asyncio.sleep(0)
        # The committer has ended, too, so that who waited is told.
        with pytest.raises(AtollError):
            await waiting
        assert engine.failure is not None
    monkeypatch.setattr(store, "commit", commit)
    monkeypatch.setattr(store, "release", release)
    if not can_release:
        # As the end of the process does for an embedded volume.
        await release(engine.owner.ownership)
    async with (
        await Engine.open(store, address="test", ttl_s=LONG_S) as engine,
        await EngineSession.begin(engine, host="h", pid=2) as session,
    ):
        assert [row.pid for row in engine.sessions()] == [2]
        page = await session.readdir(ROOT_INO, after=None, limit=10)
        assert [entry.name for entry in page.entries] == [b"told"]
        assert [problem async for problem in EngineAdmin(engine).check(repair=False)] == []


async def test_an_engine_waits_for_a_store_that_takes_changes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    store = await format_volume(MemoryStore())
    commit, refusals = store.commit, 3

    async def full_for_a_while(*args: Any, **options: Any) -> None:
        nonlocal refusals
        if refusals:
            refusals -= 1
            raise StoreError("the file system is full")
        await commit(*args, **options)

    async with (
        await Engine.open(store, address="test", ttl_s=LONG_S) as engine,
        await EngineSession.begin(engine, host="h", pid=1),
    ):
        monkeypatch.setattr(store, "commit", full_for_a_while)
    assert (refusals, engine.failure) == (0, None)
    async with await Engine.open(store, address="test", ttl_s=LONG_S) as engine:
        assert list(engine.sessions()) == []


async def test_the_end_of_a_session_waits_for_who_holds_changes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metasvc.engine.session.END_S", 0.05)
    store = await format_volume(MemoryStore())
    async with await Engine.open(store, address="test", ttl_s=LONG_S) as engine:
        session = await EngineSession.begin(engine, host="h", pid=1)
        made = await session.create(ROOT, ROOT_INO, b"file", mode=0o600, exclusive=True)
        await session.unlink(ROOT, ROOT_INO, b"file")
        async with engine.changes_held():
            ending = asyncio.create_task(session.__aexit__(None, None, None))
            await asyncio.sleep(0.3)
            assert not ending.done()
        await ending
        assert list(engine.sessions()) == []
        assert not engine.sessions_holding(made.inode.ino)
        assert [problem async for problem in EngineAdmin(engine).check(repair=False)] == []
