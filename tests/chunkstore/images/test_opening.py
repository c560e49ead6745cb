"""Opening an image for many at once, on a disk that fails."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from typing import Any

import pytest

from tests.chunkstore.stores import Workshop, content, settled, written


@pytest.mark.timeout(20)
async def test_whoever_comes_while_an_opening_fails_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop = Workshop(tmp_path)
    async with workshop.opened() as store:
        info = await written(store, 1, content(5_000_000))
        await settled(store)
        store.forget(info.slice_id)
        await settled(store)
        cache = store._cache

        async def failing(*_: Any) -> None:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            raise OSError(errno.EIO, "this disk is broken")

        async def open_after(turns: int) -> object:
            for _ in range(turns):
                await asyncio.sleep(0)
            return await cache._open(info, may_create=True)

        with monkeypatch.context() as patched:
            patched.setattr(cache._executors, "disk", failing)
            # One of them comes in each turn of the loop, so also in the one between the failure and what follows from it.
            assert await asyncio.gather(*map(open_after, range(20))) == [None] * 20
