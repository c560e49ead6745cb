"""``fsck``: is all of the volume there, and does it fit together?

Owns the comparison of the metadata with the bucket; rows against rows is the owner's part (MetaAdmin.check). Three depths:
the rows; that every block of every live slice is an object of a plausible size (a listing, no reads); and with ``data``
that every byte has the digest that its writer committed.

On a mounted volume slices come and go during the walk, so what seems missing is looked at again: the slice must still be
live, must not wait for upload on this node, and the object must be absent when asked for by name.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Final

from chunkstore.block import DIGEST_BYTES, decode, header_size
from chunkstore.errors import AtollError, FormatUnsupported, ObjectCorrupt, ObjectMissing
from chunkstore.geometry import (
    SLICES_PER_PREFIX,
    BlockIndex,
    ObjectId,
    SliceId,
    block_count,
    block_key,
    block_length,
    parse_block_key,
)
from client.address import shown
from client.admin.asking import Asked
from client.admin.live import PAGE, LiveGroup, live_slice
from client.control.messages import JsonObject, text_of
from client.staged import staged_before
from metasvc.model import Slice, SliceKind

READS_AT_ONCE: Final = 4
"""Blocks being read and verified at once: at most 4 x 16 MiB twice in memory."""
OWNERS_SHOWN: Final = 50
"""For this many problems the files are looked for: each takes a walk over all chunks."""
LOOKED_AT_ONCE: Final = 1 << 14
"""Slice ids without a turn for others on the loop of a mount: about 2 ms."""
MAX_PROBLEMS: Final = 100_000


@dataclass(slots=True)
class _Findings:
    asked: Asked
    repaired: bool
    count: int = 0
    left: int = 0
    """Problems that are still there after this run."""
    owners_shown: int = 0
    checked_slices: int = 0
    checked_objects: int = 0
    verified_objects: int = 0
    staged_slices: int = 0
    _paths: dict[SliceId, list[JsonObject]] = field(default_factory=dict)
    _blocks: set[str] = field(default_factory=set)

    async def add(self, code: str, text: str, *, inode: int = 0, repairable: bool = False, **more: object) -> None:
        self.count += 1
        repaired = self.repaired and repairable
        self.left += not repaired
        if self.count > MAX_PROBLEMS:
            return
        row = {"code": code, "text": text, "inode": inode, "repairable": repairable, "repaired": repaired, **more}
        await self.asked.items("problems", [row])

    async def add_block(self, code: str, text: str, slice_id: SliceId, key: str) -> None:
        """Report a bad block with the files that it belongs to; once, though a listing and a read may both find it."""
        if key in self._blocks:
            return
        self._blocks.add(key)
        await self.add(code, text, slice_id=slice_id, object=key, files=await self._files_of(slice_id))

    async def _files_of(self, slice_id: SliceId) -> list[JsonObject]:
        if slice_id not in self._paths:
            if self.owners_shown >= OWNERS_SHOWN:
                return []
            self.owners_shown += 1
            admin = self.asked.volume.admin
            inodes = sorted({ino for ino, _ in await admin.slice_owner(slice_id)})
            self._paths[slice_id] = [
                {"inode": ino, "paths": [text_of(path) for path in await admin.paths_of(ino, limit=4)]}
                for ino in inodes[:16]
            ]
        return self._paths[slice_id]


async def fsck(asked: Asked) -> JsonObject:
    """Check the volume; see the module's text. ``repair`` puts right what can be derived from the rest."""
    repair = asked.params.flag("repair")
    data = asked.params.flag("data")
    asked.params.done()
    findings = _Findings(asked, repaired=repair)
    asked.progress("checking the metadata")
    async for problem in asked.volume.admin.check(repair=repair):
        await findings.add(problem.code, problem.text, inode=problem.ino, repairable=problem.repairable)
    await _check_objects(asked, findings)
    if data:
        await _verify_data(asked, findings)
    return {
        "problems": [],
        "problem_count": findings.count,
        "clean": findings.left == 0,
        "checked_slices": findings.checked_slices,
        "checked_objects": findings.checked_objects,
        "verified_objects": findings.verified_objects,
        "staged_slices": findings.staged_slices,
    }


def _staged(asked: Asked) -> Callable[[SliceId], bool]:
    """Return what says whether a slice waits for upload on this node."""
    if asked.volume.mounting is not None:
        return asked.volume.mounting.chunks.is_staged
    return staged_before(asked.volume.address, asked.volume.format).lengths.__contains__


# -- objects ----------------------------------------------------------------------------------------------------------------


async def _check_objects(asked: Asked, findings: _Findings) -> None:
    """Compare the bucket's listing with the live slices, group by group of 2^20 slice ids."""
    volume = asked.volume
    after = SliceId(-1)
    while page := await volume.admin.live_slices(after=after, limit=1):
        number = page[0].slice_id // SLICES_PER_PREFIX
        group = await LiveGroup.load(volume.admin, number, volume.format.block_bytes)
        after = SliceId((number + 1) * SLICES_PER_PREFIX - 1)
        if group.count:
            await _check_group(asked, findings, group)


async def _check_group(asked: Asked, findings: _Findings, group: LiveGroup) -> None:
    volume = asked.volume
    block_bytes = volume.format.block_bytes
    seen = array("I", bytes(4 * SLICES_PER_PREFIX))
    prefix = block_key(volume.format.uuid, SliceId(group.number * SLICES_PER_PREFIX), 0).rpartition("/")[0] + "/"
    listed = 0
    async for info in (await volume.bucket()).list(prefix):
        listed += 1
        if listed % 1000 == 0:
            asked.progress("listing objects", findings.checked_objects + listed, unit="objects")
        found = parse_block_key(info.key)
        if found is None or not group.names(found):
            continue
        seen[found.slice_id % SLICES_PER_PREFIX] += 1
        if not group.has_plausible_size(found, info.size_bytes) and await live_slice(volume.admin, found.slice_id):
            raw = block_length(group.length(found.slice_id), found.block_index, block_bytes)
            expected = f"{header_size(raw) + 1} to {header_size(raw) + raw}"
            text = f"object {info.key} has {info.size_bytes} bytes, a block of {raw} takes {expected}"
            await findings.add_block("object-size", text, found.slice_id, info.key)
    findings.checked_objects += listed
    is_staged = _staged(asked)
    for offset in range(SLICES_PER_PREFIX):
        if offset % LOOKED_AT_ONCE == 0:
            await asyncio.sleep(0)
        slice_id = SliceId(group.number * SLICES_PER_PREFIX + offset)
        length = group.length(slice_id)
        if not length:
            continue
        findings.checked_slices += 1
        if seen[offset] == block_count(length, block_bytes):
            continue
        if is_staged(slice_id):
            findings.staged_slices += 1
            continue
        await _look_again(asked, findings, slice_id, length)


async def _look_again(asked: Asked, findings: _Findings, slice_id: SliceId, length: int) -> None:
    """Ask for each block of a slice by name, and report those that are absent."""
    volume = asked.volume
    for index in range(block_count(length, volume.format.block_bytes)):
        key = block_key(volume.format.uuid, slice_id, index)
        try:
            await (await volume.bucket()).head(key)
        except ObjectMissing:
            if await live_slice(volume.admin, slice_id) is None:
                return
            await findings.add_block("object-missing", f"object {key} is not in the bucket", slice_id, key)


# -- bytes ------------------------------------------------------------------------------------------------------------------


async def _blocks(asked: Asked, is_staged: Callable[[SliceId], bool]) -> AsyncIterator[tuple[Slice, ObjectId]]:
    volume = asked.volume
    after: SliceId | None = None
    while page := await volume.admin.live_slices(after=after, limit=PAGE):
        after = page[-1].slice_id
        for row in page:
            if row.kind == SliceKind.BLOCKS and not is_staged(row.slice_id):
                for index in range(block_count(row.length, volume.format.block_bytes)):
                    yield row, ObjectId(volume.format.uuid, row.slice_id, BlockIndex(index))


async def _verify_data(asked: Asked, findings: _Findings) -> None:
    """Read every object and compare every byte with the digests; READS_AT_ONCE tasks share one walk."""
    blocks = _blocks(asked, _staged(asked))
    turn = asyncio.Lock()

    async def verify_some() -> None:
        while True:
            async with turn:
                try:
                    row, block = await anext(blocks)
                except StopAsyncIteration:
                    return
            await _verify_block(asked, findings, row, block)
            findings.verified_objects += 1
            asked.progress("verifying data", findings.verified_objects, total=findings.checked_objects, unit="objects")

    async with asyncio.TaskGroup() as tasks:
        for _ in range(READS_AT_ONCE):
            tasks.create_task(verify_some())


async def _verify_block(asked: Asked, findings: _Findings, row: Slice, block: ObjectId) -> None:
    volume = asked.volume
    key = block_key(*block)
    index = block.block_index
    expected = row.data[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]
    raw = block_length(row.length, index, volume.format.block_bytes)
    problem: AtollError
    try:
        payload = await (await volume.bucket()).get(key)
        await asyncio.to_thread(decode, payload, expected_digest=expected, raw_length=raw, origin=f"object {key}")
        return
    except ObjectMissing as error:
        problem = error
    except (ObjectCorrupt, FormatUnsupported) as error:
        problem = error
    if await live_slice(volume.admin, row.slice_id) is None:
        return
    await findings.add_block(problem.code, shown(str(problem)), row.slice_id, key)
