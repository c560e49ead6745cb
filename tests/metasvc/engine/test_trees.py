"""Work on whole trees is steps; what others do between any two of them keeps its effect."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from metasvc.engine import Engine, trees
from metasvc.model import ROOT_INO, Caller, Ino, Trashed, Usage
from metasvc.store.memory import MemoryStore
from tests.metasvc.engine.volumes import ROOT, Opened, format_volume, opened

STEPS = 12


async def names(volume: Opened, ino: Ino) -> set[bytes]:
    return {entry.name for entry in (await volume.meta.readdir(ino, after=None, limit=1000)).entries}


def before_step(engine: Engine, step: int, act: Callable[[], Awaitable[Any]]) -> None:
    """Let something happen before an operation of the engine from now on, the first being 0."""
    run, count = engine.run, 0

    async def counted(rule: Any, *args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == step + 1:
            engine.run = run  # type: ignore[method-assign]
            await act()
        return await run(rule, *args, **options)

    engine.run = counted  # type: ignore[method-assign]


@pytest.mark.parametrize("step", range(STEPS))
async def test_a_directory_restored_while_it_expires_keeps_what_was_restored_in_it(step: int) -> None:
    async with opened(await format_volume(MemoryStore(), trash_days=1.0)) as volume:
        top = (await volume.meta.mkdir(ROOT, ROOT_INO, b"top", mode=0o755)).ino
        for name in (b"one", b"two"):
            await volume.meta.mknod(ROOT, top, name, mode=0o100644)
            await volume.meta.unlink(ROOT, top, name)
        await volume.meta.rmdir(ROOT, ROOT_INO, b"top")
        rows: dict[bytes, Trashed] = {row.name: row for row in await volume.admin.trash_list(after=None, limit=10)}
        restored: list[bytes] = []

        async def restore() -> None:
            if rows[b"top"].trash_id in {row.trash_id for row in await volume.admin.trash_list(after=None, limit=10)}:
                restored.extend(
                    [await volume.admin.trash_restore(ROOT, rows[name].trash_id) for name in (b"one", b"two")]
                )

        before_step(volume.engine, step, restore)
        gone = await trees.expire_tree(volume.engine, rows[b"top"].trash_id)
        assert gone is not bool(restored)
        if restored:
            assert await names(volume, top) == {b"one", b"two"}


@pytest.mark.parametrize("step", range(STEPS))
async def test_a_clone_finished_while_it_expires_is_whole_or_not_there(step: int) -> None:
    """An unfinished one expires after a day; whoever makes it may be that slow."""
    async with opened(await format_volume(MemoryStore())) as volume:
        engine = volume.engine
        source = (await volume.meta.mkdir(ROOT, ROOT_INO, b"source", mode=0o755)).ino
        below = (await volume.meta.mkdir(ROOT, source, b"below", mode=0o755)).ino
        await volume.meta.mknod(ROOT, below, b"file", mode=0o100644)
        trash_id, copy = await engine.run(trees._clone_top, Caller(), source, b"copy")
        copies = {source: copy}
        async for directory, entries in trees.walk(engine, source):
            made = await engine.run(trees._clone_entries, copies[directory.ino], entries)
            copies |= {original: child.ino for original, child in made if child.is_dir}
        total = Usage(1, 2, 0, 0)
        removed: list[int] = []
        finished: list[Ino] = []
        run = engine.run

        async def noted(rule: Any, *args: Any, **options: Any) -> Any:
            found = await run(rule, *args, **options)
            if rule is trees._remove_names:
                removed.append(step)
            return found

        async def finish() -> None:
            if not removed:
                await run(trees._clone_end, Caller(), trash_id, ROOT_INO, b"copy", total)
                finished.append(copy)

        engine.run = noted  # type: ignore[method-assign]
        before_step(engine, step, finish)
        gone = await trees.expire_tree(engine, trash_id)
        engine.run = run  # type: ignore[method-assign]
        assert gone is not bool(finished)
        if finished:
            assert await names(volume, copy) == {b"below"}
            assert await names(volume, copies[below]) == {b"file"}
