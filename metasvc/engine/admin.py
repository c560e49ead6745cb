"""MetaAdmin on an engine, called directly."""

from __future__ import annotations

import errno as E
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import replace

from chunkstore.geometry import SliceId
from metasvc.engine import accounts, chunkmap, content, trash, trees
from metasvc.engine.check import Check
from metasvc.engine.dump import dump
from metasvc.engine.engine import Engine
from metasvc.engine.namespace import resolve
from metasvc.engine.session import statfs
from metasvc.engine.tx import Tx
from metasvc.errors import FsError
from metasvc.model import (
    IN_TRASH,
    REF_BYTES,
    ROOT_INO,
    Caller,
    DumpPart,
    Garbage,
    Ino,
    Inode,
    Link,
    MetaStatus,
    Problem,
    Quota,
    Slice,
    SliceRef,
    StatFs,
    Trashed,
    TrashId,
    Usage,
    VolumeFormat,
    WrittenSlice,
    unpack_refs,
)
from metasvc.store.tables import CHUNK, DENTRY, GARBAGE, INODE, LINK, QUOTA, SLICE, TRASHED, Key

COMPACT_REFS = 48
"""A chunk with more refs than this is worth compacting: its map costs 20 bytes per ref in every commit."""
PATHS_DEPTH_MAX = 4096


class EngineAdmin:
    """Administration of the volume of one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._compaction_after: Key | None = None

    async def status(self) -> MetaStatus:
        engine = self._engine
        garbage = await engine.store.scan(GARBAGE, after=None, limit=10_000)
        rule_counters: tuple[int, int] = await engine.run(
            lambda tx: (tx.counter(accounts.TRASH_BYTES), tx.counter(accounts.TRASH_INODES))
        )
        return MetaStatus(
            format=engine.format,
            epoch=engine.owner.ownership.epoch,
            owner=engine.owner.address,
            sessions=list(engine.sessions()),
            statfs=await self.statfs(ROOT_INO),
            trash_bytes=rule_counters[0],
            trash_inodes=rule_counters[1],
            garbage_slices=len(garbage),
            counters={
                "operations_total": engine.operations_total,
                "restarts_total": engine.restarts_total,
                "loads_total": engine.rows.loads_total,
                "batches_total": engine.committer.batches_total,
                "changes_total": engine.committer.changes_total,
                "commit_ns_total": engine.committer.commit_ns_total,
            },
        )

    async def statfs(self, ino: Ino) -> StatFs:
        answer: StatFs = await self._engine.run(statfs, ino)
        return answer

    async def resolve(self, path: Sequence[bytes]) -> Inode:
        """Return the inode of a path from the root. ENOENT, ENOTDIR."""
        if not path:
            root: Inode = await self._engine.run(Tx.inode, ROOT_INO)
            return root
        found: list[Inode] = await self._engine.run(resolve, ROOT_INO, tuple(path))
        return found[-1]

    async def paths_of(self, ino: Ino, *, limit: int = 16) -> list[bytes]:
        if ino == ROOT_INO:
            return [b"/"]
        inode: Inode | None = await self._engine.run(lambda tx: tx.get(INODE, ino))
        if inode is None or inode.nlink == 0:
            return []
        parents = [inode.parent]
        if inode.parent == 0:
            links: list[Link] = await self._engine.run(lambda tx: list(tx.group(LINK, ino).values()))
            parents = [link.parent for link in links]
        paths: list[bytes] = []
        for parent in parents:
            above = await self._directory_path(parent)
            if above is None:
                continue
            for name in await self._names_in(parent, ino):
                paths.append(above.rstrip(b"/") + b"/" + name)
                if len(paths) == limit:
                    return paths
        return paths

    async def _directory_path(self, ino: Ino) -> bytes | None:
        names: list[bytes] = []
        for _ in range(PATHS_DEPTH_MAX):
            if ino == ROOT_INO:
                return b"/" + b"/".join(reversed(names))
            inode: Inode | None = await self._engine.run(lambda tx, ino=ino: tx.get(INODE, ino))
            if inode is None or inode.parent in (0, IN_TRASH):
                return None
            found = await self._names_in(inode.parent, ino)
            if not found:
                return None
            names.append(found[0])
            ino = inode.parent
        return None

    async def _names_in(self, parent: Ino, ino: Ino) -> list[bytes]:
        """Find an inode's names in a directory, by looking through it."""
        known = self._engine.rows.group(DENTRY, parent)
        if known is not None:
            return [name for name, row in known.items() if row is not None and row[2] == ino]
        names: list[bytes] = []
        after: bytes | None = None
        end = False
        while not end:
            page, end = await self._engine.rows.scan_dir(parent, after=after, limit=trees.PAGE)
            names += [dentry.name for dentry, _ in page if dentry.ino == ino]
            after = page[-1][0].name if page else None
        return names

    async def usage(self, ino: Ino) -> Usage:
        return await trees.usage(self._engine, ino)

    async def configure(
        self, *, capacity_bytes: int | None, max_inodes: int | None, trash_days: float | None
    ) -> VolumeFormat:
        form = self._engine.format
        await self._engine.put_format(
            replace(
                form,
                capacity_bytes=form.capacity_bytes if capacity_bytes is None else capacity_bytes,
                max_inodes=form.max_inodes if max_inodes is None else max_inodes,
                trash_days=form.trash_days if trash_days is None else trash_days,
            )
        )
        return self._engine.format

    # -- quotas ---------------------------------------------------------------------------------------

    async def quota_set(self, ino: Ino, *, max_bytes: int | None, max_inodes: int | None) -> Quota:
        engine = self._engine
        have: Quota | None = await engine.run(lambda tx: (tx.directory(ino), tx.quota(ino))[1])
        if have is None:
            # Counting and setting must see the same tree, so changes wait: 1 s per 100,000 names or so.
            async with engine.changes_held() as hold:
                used = await trees.count_for_quota(engine, ino)
                await engine.run(trees.set_quota, ino, max_bytes, max_inodes, used, hold=hold)
        else:
            await engine.run(trees.set_quota, ino, max_bytes, max_inodes, None)
        quota: Quota = await engine.run(lambda tx: tx.quota(ino))
        return quota

    async def quota_remove(self, ino: Ino) -> None:
        def rule(tx: Tx) -> None:
            if tx.quota(ino) is None:
                raise FsError(E.ENOENT, "the directory has no quota")
            tx.delete(QUOTA, ino)

        await self._engine.run(rule)

    async def quotas(self) -> list[Quota]:
        rows: list[Quota] = list(self._engine.rows.resident(QUOTA))  # type: ignore[arg-type]
        return sorted(rows)

    # -- trash ----------------------------------------------------------------------------------------

    async def trash_list(self, *, after: TrashId | None, limit: int) -> list[Trashed]:
        """Return entries by age; unfinished clones, which lie in the trash too, are not shown."""
        while page := await self._trash_page(after, limit):
            shown = [row for row in page if row.parent != IN_TRASH]
            if shown:
                return shown
            after = page[-1].trash_id
        return []

    async def _trash_page(self, after: TrashId | None, limit: int) -> list[Trashed]:
        await self._engine.settled()
        key = None if after is None else (after,)
        rows: list[Trashed] = await self._engine.store.scan(TRASHED, after=key, limit=limit)  # type: ignore[assignment]
        return rows

    async def trash_restore(self, caller: Caller, trash_id: TrashId) -> bytes:
        engine = self._engine
        row: Trashed = await engine.run(trash.get, trash_id)
        await self._restore_parents(caller, row.parent)
        inode: Inode = await engine.run(trash.restore, caller, trash_id)
        paths = await self.paths_of(inode.ino, limit=1)
        return paths[0] if paths else b""

    async def _restore_parents(self, caller: Caller, ino: Ino) -> None:
        """Restore a directory that lies in the trash, after those above it."""
        inode: Inode | None = await self._engine.run(lambda tx: tx.get(INODE, ino))
        if inode is None or inode.parent != IN_TRASH:
            return
        after: TrashId | None = None
        while page := await self.trash_list(after=after, limit=trees.PAGE):
            for row in page:
                if row.ino == ino:
                    await self._restore_parents(caller, row.parent)
                    await self._engine.run(trash.restore, caller, row.trash_id)
                    return
            after = page[-1].trash_id

    async def trash_expire(self, *, before_ns: int, limit: int) -> int:
        removed = 0
        for row in await self._trash_page(None, limit):
            if row.deleted_ns >= before_ns:
                continue  # an unfinished clone may stand before older entries
            removed += await trees.expire_tree(self._engine, row.trash_id)
        return removed

    async def clone(self, caller: Caller, source: Ino, parent: Ino, name: bytes) -> Usage:
        return await trees.clone(self._engine, caller, source, parent, name)

    # -- fsck -----------------------------------------------------------------------------------------

    async def check(self, *, repair: bool) -> AsyncIterator[Problem]:
        engine = self._engine
        await engine.settled()
        first = [problem async for problem in Check(engine).problems()]
        if not first:
            return
        # Something looked wrong, perhaps only because the volume moved meanwhile: look again while it stands.
        async with engine.changes_held() as hold:
            await engine.settled()
            found = [problem async for problem in Check(engine, hold if repair else None).problems()]
        for problem in found:
            yield problem

    # -- dump -----------------------------------------------------------------------------------------

    def dump(self) -> AsyncGenerator[DumpPart, None]:
        return dump(self._engine)

    # -- jobs that touch objects ----------------------------------------------------------------------

    async def live_slices(self, *, after: SliceId | None, limit: int) -> list[Slice]:
        await self._engine.settled()
        key = None if after is None else (after,)
        rows: list[Slice] = await self._engine.store.scan(SLICE, after=key, limit=limit)  # type: ignore[assignment]
        return rows

    async def slice_owner(self, slice_id: SliceId) -> Sequence[tuple[Ino, SliceRef]]:
        await self._engine.settled()
        found: list[tuple[Ino, SliceRef]] = []
        after: Key | None = None
        while page := await self._engine.store.scan(CHUNK, after=after, limit=trees.PAGE):
            for ino, index, packed in page:
                refs = chunkmap.in_file(unpack_refs(packed), index)
                found += [(ino, ref) for ref in refs if ref.slice_id == slice_id]
            after = CHUNK.key_of(page[-1])
        return found

    async def garbage(self, *, before_ns: int, limit: int) -> list[Garbage]:
        await self._engine.settled()
        found: list[Garbage] = []
        after: Key | None = None
        # By id, not by age: those that are old enough may lie behind any number of others.
        while len(found) < limit and (page := await self._engine.store.scan(GARBAGE, after=after, limit=trees.PAGE)):
            found += [row for row in page if row.not_before_ns <= before_ns]  # type: ignore[attr-defined,misc]
            after = GARBAGE.key_of(page[-1])
        return found[:limit]

    async def garbage_deleted(self, slice_ids: Sequence[SliceId]) -> None:
        def rule(tx: Tx) -> None:
            for slice_id in slice_ids:
                tx.delete(GARBAGE, slice_id)

        await self._engine.run(rule)

    async def is_live(self, slice_id: SliceId) -> bool:
        row: Slice | None = await self._engine.run(Tx.slice, slice_id)
        return row is not None

    async def is_pending(self, slice_id: SliceId) -> bool:
        return self._engine.is_pending(slice_id)

    async def is_garbage(self, slice_id: SliceId) -> bool:
        row: Garbage | None = await self._engine.run(lambda tx: tx.get(GARBAGE, slice_id))
        return row is not None

    async def compaction_candidates(self, *, limit: int) -> list[tuple[Ino, int]]:
        """Look through the next part of all chunks, wrapping round: a call reads at most 20,000 rows."""
        found: list[tuple[Ino, int]] = []
        for _ in range(4):
            page = await self._engine.store.scan(CHUNK, after=self._compaction_after, limit=trees.PAGE)
            found += [(ino, index) for ino, index, refs in page if len(refs) > COMPACT_REFS * REF_BYTES]
            self._compaction_after = CHUNK.key_of(page[-1]) if page else None
            if not page or len(found) >= limit:
                break
        return found

    async def replace_refs(
        self, ino: Ino, chunk: int, *, expected: Sequence[SliceRef], written: Sequence[WrittenSlice]
    ) -> bool:
        replaced: bool = await self._engine.run(content.replace_refs, ino, chunk, list(expected), tuple(written))
        return replaced
