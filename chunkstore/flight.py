"""The blocks of one unsealed slice, from the moment when their bytes are final until the slice is sealed.

Owns their way: with durability `object` a block is written to the draft of the image and encoded at the same time, and put
into the bucket from the encoded copy; its raw buffer goes as soon as the draft has it. With `local` it is written to the draft
and hashed. What the bucket does not take is put aside in the draft; what that does not take either keeps its memory, is
*stuck*, and is sent again by the next seal. A slice that is sealed within its first block never gets a draft: its image is
made from memory, later or not at all.

Interleavings. The work on a block is a task of the store: it never raises, its error stays with the block. The fields of a
block are changed by its task only, and by `send` when there is none. `raw` is dropped only after the draft has the bytes, or
the bucket has and nobody wants them; so raw, draft or bucket can answer a reader at any time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from chunkstore.access import BlockAccess
from chunkstore.background import Executors, TaskSet
from chunkstore.block import block_digest, frame_digests
from chunkstore.budget import WriteMemory
from chunkstore.errors import AtollError, CacheFull, ObjectCorrupt
from chunkstore.geometry import Buffer, SliceId
from chunkstore.images.cache import ImageCache
from chunkstore.images.disk import Disk
from chunkstore.images.draft import Draft
from chunkstore.images.staging import Staging
from chunkstore.model import ChunkStoreConfig, Durability
from chunkstore.reading import SliceReader
from chunkstore.uploading import StagedUploads, Uploader

log = logging.getLogger(__name__)

# Hashing so little on the event loop (16 us) costs less than the hop to a thread.
HASH_HERE_BYTES: Final = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteServices:
    """Hold what all writers of a store share."""

    config: ChunkStoreConfig
    access: BlockAccess
    memory: WriteMemory
    uploader: Uploader
    cache: ImageCache
    staging: Staging
    staged: StagedUploads
    reader: SliceReader
    executors: Executors
    disk: Disk
    tasks: TaskSet
    has_room: Callable[[int], bool]
    """Whether so many bytes more may be staged."""


class Block:
    """Hold a block. `raw` None: only the draft has it, or the bucket."""

    __slots__ = (
        "charge_bytes",
        "digest",
        "error",
        "frame_digests",
        "in_draft",
        "index",
        "is_stuck",
        "is_tried",
        "is_uploaded",
        "length",
        "raw",
        "task",
    )

    def __init__(self, index: int, length: int, *, raw: Buffer | None, charge_bytes: int) -> None:
        """Take the buffer and what it is charged to memory; None if the draft has the bytes."""
        self.index = index
        self.length = length
        self.raw = raw
        self.charge_bytes = charge_bytes
        self.in_draft = raw is None
        self.is_tried = False
        """A put was begun, so there may be an object."""
        self.is_uploaded = False
        self.is_stuck = False
        self.digest = b""
        self.frame_digests: tuple[bytes, ...] = ()
        self.error: AtollError | OSError | None = None
        self.task: asyncio.Task[None] | None = None

    @property
    def is_under_way(self) -> bool:
        """Return whether its task has not ended."""
        return self.task is not None and not self.task.done()


class Flight:
    """Bring the blocks of one slice to the draft and to the bucket."""

    def __init__(self, slice_id: SliceId, services: WriteServices) -> None:
        """Start without blocks."""
        self._slice_id = slice_id
        self._services = services
        self._memory = services.memory
        self._block_bytes = services.config.block_bytes
        self.draft = Draft(slice_id, cache=services.cache, executors=services.executors, disk=services.disk)
        self.blocks: list[Block] = []
        self.is_local = services.config.durability is Durability.LOCAL
        """Becomes False for good when the cache disk takes no more: then this slice goes to the bucket."""
        self.is_frozen = False
        self._is_single = False
        self.is_discarded = False

    def freeze(self, *, is_single: bool) -> None:
        """Note that seal has begun; `is_single`: no block was full before, and nothing is in the draft.

        Then the one block that comes has no need of a draft, and its memory is kept until the slice is sealed.
        """
        if not self.is_frozen:
            self.is_frozen = True
            self._is_single = is_single

    def add(self, length: int, *, raw: Buffer | None, charge_bytes: int) -> None:
        """Take the next block: private bytes with their charge, or None if they are in the draft. Starts the work on it."""
        block = Block(len(self.blocks), length, raw=raw, charge_bytes=charge_bytes)
        self.blocks.append(block)
        self._send(block)

    async def finish(self, is_finished: Callable[[Block], bool]) -> None:
        """Wait until the work on all blocks has ended, and raise the first error of one that is not finished.

        What had ended unfinished before, by an error or because it was only to be hashed, is sent once more.
        """
        for block in self.blocks:
            if not block.is_under_way and not is_finished(block):
                self._send(block)
        for block in self.blocks:
            if block.is_under_way and block.task is not None:
                await asyncio.wait([block.task])
        if self.is_discarded:
            raise AtollError(f"slice {self._slice_id} was discarded while it was being sealed")
        for block in self.blocks:
            if not is_finished(block):
                raise block.error or AtollError(f"slice {self._slice_id}: block {block.index} was not stored")

    def release(self) -> None:
        """Let go of all memory, when the slice is sealed or discarded and no work is under way."""
        for block in self.blocks:
            assert not block.is_under_way
            if block.is_stuck:
                block.is_stuck = False
                self._memory.unstick(block.charge_bytes)
            self._drop(block)

    def give_up_local(self) -> None:
        """Send this slice to the bucket before it is acknowledged."""
        if self.is_local:
            self.is_local = False
            log.warning("slice %d: the cache disk takes no more: it goes to the bucket at once", self._slice_id)

    def _send(self, block: Block) -> None:
        if block.is_stuck:
            block.is_stuck = False
            self._memory.unstick(block.charge_bytes)
        block.error = None
        name = f"block {block.index} of new slice {self._slice_id}"
        block.task = self._services.tasks.start(self._process(block), name=name)

    async def _process(self, block: Block) -> None:
        """Bring a block as far as the durability wants. Errors stay with it, bugs and refused memory among them."""
        try:
            if self.is_discarded:
                return
            if self.is_local and await self._put_aside(block):
                await self._hash(block)
                return
            self.give_up_local()
            await self._upload(block)
        except Exception as error:
            if isinstance(error, AtollError | OSError):
                block.error = error
            else:
                log.exception("slice %d: block %d could not be stored", self._slice_id, block.index)
                block.error = AtollError(f"slice {self._slice_id}: block {block.index} could not be stored: {error!r}")
            if not self.is_discarded:
                await self._put_aside(block)
        finally:
            self._settle(block)

    async def _put_aside(self, block: Block) -> bool:
        """Write a block to the draft if it is not there; False if that fails."""
        if not block.in_draft and block.raw is not None:
            block.in_draft = await self.draft.write(block.index * self._block_bytes, block.raw)
        return block.in_draft

    async def _hash(self, block: Block) -> None:
        raw = block.raw if block.raw is not None else await self._read_back(block)
        if len(raw) <= HASH_HERE_BYTES:
            digests = frame_digests(raw)
        else:
            digests = await self._services.executors.codec(frame_digests, raw)
        block.frame_digests = tuple(digests)
        block.digest = block_digest(digests, block.length)

    async def _upload(self, block: Block) -> None:
        raw = block.raw if block.raw is not None else await self._read_back(block)
        uploader = self._services.uploader
        if block.in_draft or (self._is_single and not self.draft.exists):
            encoded = await uploader.encode(raw)
        else:
            encoding = self._services.executors.start_codec(uploader.encode_now, raw)
            await self._put_aside(block)
            encoded = await asyncio.shield(encoding)
        if block.digest not in (b"", encoded.digest):
            raise ObjectCorrupt(
                f"slice {self._slice_id}: block {block.index} was altered on the cache disk before its upload"
            )
        block.digest, block.frame_digests = encoded.digest, encoded.frame_digests
        if block.in_draft:
            # From here on only the encoded copy takes memory.
            block.raw = None
        del raw
        if self.is_discarded:
            return
        block.is_tried = True
        await uploader.put(self._slice_id, block.index, encoded.payload)
        block.is_uploaded = True

    async def _read_back(self, block: Block) -> Buffer:
        """Return the bytes of a block that only the draft has, charged to memory."""
        if not block.charge_bytes:
            await self._memory.take(block.length)
            block.charge_bytes = block.length
        start = block.index * self._block_bytes
        raw = await self.draft.read(start, start + block.length)
        if not block.digest:
            # Nothing but the disk vouches for these bytes: what it failed to write back it may have read wrong just now.
            await self.draft.sync()
        if len(raw) != block.length:
            raise ObjectCorrupt(f"slice {self._slice_id}: block {block.index} was cut short on the cache disk")
        return raw

    def _settle(self, block: Block) -> None:
        """Give back the memory that a block does not need any more, at the end of the work on it."""
        is_wanted_later = self._is_single and not self.draft.exists
        if block.in_draft or self.is_discarded or (block.is_uploaded and not is_wanted_later):
            self._drop(block)
        elif block.error is not None:
            block.is_stuck = True
            error = block.error if isinstance(block.error, AtollError) else CacheFull(str(block.error))
            self._memory.stick(block.charge_bytes, error)

    def _drop(self, block: Block) -> None:
        block.raw = None
        self._memory.release(block.charge_bytes)
        block.charge_bytes = 0
