"""Ranges of slice ids are durable before anybody gets one."""

from __future__ import annotations

import asyncio
from typing import Any

from metasvc.engine.engine import SLICE_STRIDE
from metasvc.store.memory import MemoryStore
from tests.metasvc.engine.volumes import format_volume, opened


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
