"""When a commit may stop the event loop: only where nobody needs it, and while commits are quick."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from metasvc.engine import Engine, EngineSession
from metasvc.engine import committer as committing
from metasvc.model import ROOT_INO, Caller
from metasvc.store.memory import MemoryStore
from tests.metasvc.engine.volumes import format_volume

CALLER = Caller()


async def test_commits_stop_the_loop_only_while_they_are_quick_and_nobody_needs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = await format_volume(MemoryStore())
    commit, heres, slow_s = store.commit, [], 0.0

    async def noted(*args: Any, here: bool = False) -> None:
        heres.append(here)
        if slow_s:
            await asyncio.sleep(slow_s)
        await commit(*args, here=here)

    monkeypatch.setattr(store, "commit", noted)
    monkeypatch.setattr(committing, "BLOCK_S", 0.05)
    async with await Engine.open(store, address="test") as engine:
        session = await EngineSession.begin(engine, host="h", pid=1)
        count = 0

        async def make(many: int) -> list[bool]:
            nonlocal count
            del heres[:]
            for _ in range(many):
                count += 1
                await session.mknod(CALLER, ROOT_INO, b"%d" % count, mode=0o100644)
            return list(heres)

        assert not any(await make(40)), "nobody has said that it may"
        is_alone = True
        engine.committer.may_block = lambda: is_alone
        assert all(await make(10))
        is_alone = False
        assert not any(await make(10))
        is_alone, slow_s = True, 0.06
        assert await make(2) == [True, False]
        slow_s = 0.0
        found = await make(20)
        assert not any(found[:15])
        assert all(found[16:])
