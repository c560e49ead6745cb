"""fsck of the metadata: rows against rows.

Reads every table in order of its key and compares what the engine's modules promise (their "Invariants"). It
sees the store, so it runs after all batches are durable; exact only while nothing changes (Engine.changes_held).
Memory: about 200 bytes per inode.
"""

from __future__ import annotations

import stat
from collections import Counter as Tally
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from chunkstore.geometry import CHUNK_BYTES, block_count
from metasvc.engine import accounts, trash
from metasvc.engine.engine import Engine, Hold
from metasvc.engine.tx import Tx
from metasvc.model import (
    IN_TRASH,
    ROOT_INO,
    Caller,
    Counter,
    Ino,
    Inode,
    Link,
    Problem,
    Quota,
    SliceKind,
    unpack_refs,
)
from metasvc.store.tables import (
    CHUNK,
    COUNTER,
    DENTRY,
    GARBAGE,
    INODE,
    LINK,
    QUOTA,
    SLICE,
    SUSTAINED,
    TRASHED,
    XATTR,
    Key,
    Table,
)

PAGE = 5000
DIGEST_BYTES = 16


@dataclass(slots=True)
class _Names:
    """What the dentries say of one inode."""

    count: int = 0
    parents: Tally[Ino] = field(default_factory=Tally)


@dataclass(slots=True)
class _Directory:
    """What the dentries say of one directory."""

    entries: int = 0
    subdirectories: int = 0
    child_bytes: int = 0


class Check:
    """One pass over all rows of a volume."""

    def __init__(self, engine: Engine, hold: Hold | None = None) -> None:
        """With a hold what can be is repaired; without one nothing is changed."""
        self._engine = engine
        self._hold = hold
        self._inodes: dict[Ino, Inode] = {}
        self._names: dict[Ino, _Names] = {}
        self._directories: dict[Ino, _Directory] = {}

    async def problems(self) -> AsyncIterator[Problem]:
        """Yield what does not fit; when repairing put right what can be derived from the rest."""
        async for row in self._rows(INODE):
            self._inodes[row.ino] = row
        for part in (self._dentries, self._links, self._inode_rows, self._content, self._trees, self._counters):
            async for problem in part():
                yield problem

    async def _rows(self, table: Table) -> AsyncIterator[Any]:
        after: Key | None = None
        while page := await self._engine.store.scan(table, after=after, limit=PAGE):
            for row in page:
                yield row
            after = table.key_of(page[-1])

    async def _put(self, table: Table, row: Any) -> None:
        if self._hold is not None:
            await self._engine.run(lambda tx: tx.put(table, row), hold=self._hold)

    async def _delete(self, table: Table, key: Any) -> None:
        if self._hold is not None:
            await self._engine.run(lambda tx: tx.delete(table, key), hold=self._hold)

    async def _dentries(self) -> AsyncIterator[Problem]:
        async for dentry in self._rows(DENTRY):
            parent, inode = self._inodes.get(dentry.parent), self._inodes.get(dentry.ino)
            if inode is None or parent is None or not parent.is_dir:
                code = "dentry-without-inode" if inode is None else "dentry-without-directory"
                yield Problem(code, dentry.ino, f"name {dentry.name!r} in directory {dentry.parent}", True)
                await self._delete(DENTRY, (dentry.parent, dentry.name))
                continue
            if dentry.type != stat.S_IFMT(inode.mode):
                yield Problem("dentry-type", dentry.ino, f"name {dentry.name!r} in directory {dentry.parent}", True)
                await self._put(DENTRY, dentry._replace(type=stat.S_IFMT(inode.mode)))
            names = self._names.setdefault(dentry.ino, _Names())
            names.count += 1
            names.parents[dentry.parent] += 1
            directory = self._directories.setdefault(dentry.parent, _Directory())
            directory.entries += 1
            directory.subdirectories += inode.is_dir
            directory.child_bytes += inode.space_bytes

    async def _links(self) -> AsyncIterator[Problem]:
        links: dict[Ino, dict[Ino, int]] = {}
        async for link in self._rows(LINK):
            links.setdefault(link.ino, {})[link.parent] = link.names
        several = {ino: names for ino, names in self._names.items() if names.count > 1}
        for ino in links.keys() | several.keys():
            expected = dict(several[ino].parents) if ino in several else {}
            if links.get(ino, {}) != expected:
                yield Problem("links", ino, f"its names lie in {expected}, noted are {links.get(ino, {})}", True)
                for parent in links.get(ino, {}):
                    await self._delete(LINK, (ino, parent))
                for parent, count in expected.items():
                    await self._put(LINK, Link(ino, parent, count))

    async def _inode_rows(self) -> AsyncIterator[Problem]:
        trashed = {row.ino: row async for row in self._rows(TRASHED)}
        sustained = {row.ino async for row in self._rows(SUSTAINED)}
        for ino in trashed.keys() | sustained:
            if ino not in self._inodes:
                yield Problem("trash-without-inode", ino, "an entry of the trash, or sustained", True)
                if ino in trashed:
                    await self._delete(TRASHED, trashed[ino].trash_id)
        for ino, inode in self._inodes.items():
            names = self._names.get(ino, _Names())
            right = inode
            if inode.is_dir:
                directory = self._directories.get(ino, _Directory())
                alive = bool(names.count) or ino == ROOT_INO or (ino in trashed and bool(directory.entries))
                right = right._replace(
                    size_bytes=directory.entries,
                    child_bytes=directory.child_bytes,
                    nlink=2 + directory.subdirectories if alive else inode.nlink if ino in trashed else 0,
                )
                if names.count > 1:
                    yield Problem("directory-with-names", ino, f"a directory has {names.count} names")
            elif ino not in trashed or names.count:
                right = right._replace(nlink=names.count)
            if names.count == 1 or (inode.is_dir and names.count):
                right = right._replace(parent=next(iter(names.parents)))
            elif ino == ROOT_INO:
                right = right._replace(parent=ROOT_INO)
            elif names.count:
                right = right._replace(parent=Ino(0))
            else:
                right = right._replace(parent=IN_TRASH if ino in trashed else Ino(0))
                if ino not in trashed and ino not in sustained:
                    yield Problem("inode-without-name", ino, f"{inode.size_bytes} bytes, nobody has it open", True)
                    if self._hold is not None:
                        await self._engine.run(_to_trash, right, hold=self._hold)
                    continue
            if right != inode:
                fields = [name for name in Inode._fields if getattr(right, name) != getattr(inode, name)]
                shown = ", ".join(
                    f"{name} is {getattr(inode, name)}, is to be {getattr(right, name)}" for name in fields
                )
                yield Problem("inode", ino, shown, True)
                await self._put(INODE, right)

    async def _content(self) -> AsyncIterator[Problem]:
        counts: Tally[int] = Tally()
        reach: dict[int, int] = {}
        async for chunk in self._rows(CHUNK):
            inode = self._inodes.get(chunk.ino)
            if inode is None:
                yield Problem("chunk-without-inode", chunk.ino, f"chunk {chunk.chunk_index}", True)
                await self._delete(CHUNK, (chunk.ino, chunk.chunk_index))
                continue
            last = 0
            limit = min(CHUNK_BYTES, inode.size_bytes - chunk.chunk_index * CHUNK_BYTES)
            for ref in unpack_refs(chunk.refs):
                counts[ref.slice_id] += 1
                reach[ref.slice_id] = max(reach.get(ref.slice_id, 0), ref.slice_offset + ref.length)
                if ref.offset < last or ref.length <= 0 or ref.end > limit:
                    yield Problem("chunk-map", chunk.ino, f"chunk {chunk.chunk_index}: {ref} is out of place")
                last = ref.end
        async for row in self._rows(SLICE):
            expected = counts.pop(row.slice_id, 0)
            if expected != row.refs:
                yield Problem("slice-refs", Ino(0), f"slice {row.slice_id}: {row.refs} noted, {expected} found", True)
                if expected:
                    await self._put(SLICE, row._replace(refs=expected))
            if reach.get(row.slice_id, 0) > row.length:
                yield Problem("slice-length", Ino(0), f"slice {row.slice_id} has {row.length} bytes, more are used")
            size = len(row.data)
            blocks = block_count(row.length, self._engine.format.block_bytes)
            right = row.length if row.kind == SliceKind.INLINE else DIGEST_BYTES * blocks
            if size != right:
                yield Problem("slice-data", Ino(0), f"slice {row.slice_id} carries {size} bytes, is to carry {right}")
        for slice_id in counts:
            yield Problem("slice-missing", Ino(0), f"slice {slice_id} is named by a chunk and has no row")
        async for garbage in self._rows(GARBAGE):
            if garbage.slice_id in reach:
                yield Problem("garbage-in-use", Ino(0), f"slice {garbage.slice_id} is to be deleted and in use", True)
                await self._delete(GARBAGE, garbage.slice_id)
        orphans = [row async for row in self._rows(XATTR) if row.ino not in self._inodes]
        for xattr in orphans:
            yield Problem("xattr-without-inode", xattr.ino, f"{xattr.name!r}", True)
            await self._delete(XATTR, (xattr.ino, xattr.name))

    async def _trees(self) -> AsyncIterator[Problem]:
        """Every directory leads up to the root, or to the trash."""
        ends = {ROOT_INO, Ino(0), IN_TRASH}
        safe: set[Ino] = set()
        for ino, inode in self._inodes.items():
            if not inode.is_dir:
                continue
            path: list[Ino] = []
            at = ino
            while at not in ends and at not in safe:
                if at in path:
                    yield Problem("directory-loop", ino, "its parents lead back to it")
                    break
                path.append(at)
                above = self._inodes.get(at)
                at = above.parent if above is not None else Ino(0)
            safe.update(path)

    async def _counters(self) -> AsyncIterator[Problem]:
        trashed = [self._inodes[row.ino] async for row in self._rows(TRASHED) if row.ino in self._inodes]
        expected = {
            accounts.USED_BYTES: sum(inode.space_bytes for inode in self._inodes.values()),
            accounts.USED_INODES: len(self._inodes),
            accounts.TRASH_BYTES: sum(inode.space_bytes for inode in trashed),
            accounts.TRASH_INODES: len(trashed),
        }
        stored = {row.name: row.value async for row in self._rows(COUNTER)}
        for name, value in expected.items():
            if stored.get(name, 0) != value:
                yield Problem("counter", Ino(0), f"{name} is {stored.get(name, 0)}, is to be {value}", True)
                await self._put(COUNTER, Counter(name, value))
        async for quota in self._rows(QUOTA):
            used_bytes, used_inodes = self._below(quota.ino)
            if (quota.used_bytes, quota.used_inodes) != (used_bytes, used_inodes):
                noted = f"{quota.used_bytes} bytes and {quota.used_inodes} inodes"
                text = f"quota says {noted}, found are {used_bytes} and {used_inodes}"
                yield Problem("quota", quota.ino, text, True)
                await self._put(QUOTA, Quota(quota.ino, quota.max_bytes, quota.max_inodes, used_bytes, used_inodes))

    def _below(self, top: Ino) -> tuple[int, int]:
        children: dict[Ino, list[Ino]] = {}
        for ino, inode in self._inodes.items():
            if inode.is_dir and ino != ROOT_INO:
                children.setdefault(inode.parent, []).append(ino)
        used_bytes = used_inodes = 0
        stack = [top]
        while stack:
            ino = stack.pop()
            directory = self._directories.get(ino, _Directory())
            used_bytes += directory.child_bytes
            used_inodes += directory.entries
            stack += children.get(ino, [])
        return used_bytes, used_inodes


def _to_trash(tx: Tx, inode: Inode) -> None:
    """Put a lost inode into the trash, where root can restore it (into the root directory) until it expires."""
    lost = inode._replace(nlink=0 if not inode.is_dir or not inode.size_bytes else inode.nlink, parent=IN_TRASH)
    tx.put(INODE, lost)
    trash.add(tx, Caller(), lost, ROOT_INO, b"lost-%d" % inode.ino)
