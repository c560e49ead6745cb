"""Embedded volumes in the test's own process: formatted once, copied, opened as a mount opens them but for the kernel."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from chunkstore.block import Codec
from chunkstore.slices import ChunkStore, ChunkStoreConfig, Durability, SliceInfo
from client.address import EmbeddedAddress
from client.control.messages import JsonObject
from client.volume import OpenVolume, open_volume
from metasvc.api import MetaClient
from metasvc.model import (
    ROOT_INO,
    Caller,
    Commit,
    Ino,
    SliceKind,
    SliceRef,
    WrittenSlice,
)


@dataclass(slots=True)
class Opened:
    """A volume with a session and a chunk store; it stands in for the mount where operations ask for one."""

    volume: OpenVolume
    meta: MetaClient
    chunks: ChunkStore
    subdir: bytes = b"/"
    is_ending: bool = False
    requests: int = 0

    def describe(self) -> JsonObject:
        return {"pid": os.getpid()}

    def caller(self, uid: int, gid: int) -> Caller:
        self.requests += 1
        return Caller(uid, gid, (), 0, self.requests)

    async def flush(self) -> None:
        pass

    def entry_changed(self, parent: Ino, name: bytes) -> None:
        pass

    def metrics_text(self) -> str:
        return ""

    async def create(self, name: bytes) -> Ino:
        """Make a file; it is not kept open."""
        opened = await self.meta.create(self.caller(0, 0), ROOT_INO, name, mode=0o644, exclusive=True)
        await self.meta.release(opened.inode.ino)
        return opened.inode.ino

    async def write(self, ino: Ino, offset: int, data: bytes) -> WrittenSlice:
        """Write a slice of its own and commit it."""
        slice_id = (await self.meta.allocate_slices(1))[0]
        writer = self.chunks.writer(slice_id)  # type: ignore[arg-type]
        waits = writer.append(data)
        if waits is not None:
            await waits
        sealed = await writer.seal()
        kind, content = (
            (SliceKind.INLINE, sealed.inline) if sealed.inline is not None else (SliceKind.BLOCKS, sealed.digests)
        )
        ref = SliceRef(offset, sealed.slice_id, 0, len(data))
        written = WrittenSlice(sealed.slice_id, sealed.length, kind, content, (ref,))
        epoch = (await self.meta.getattr(ino)).size_epoch
        commit = Commit(slices=(written,), end=offset + len(data), size_epoch=epoch)
        await self.meta.commit(self.caller(0, 0), ino, commit)
        return written

    async def read(self, ino: Ino) -> bytes:
        """Return the whole content, through the map that is committed now."""
        size = (await self.meta.getattr(ino)).size_bytes
        content = bytearray(size)
        start = 0
        while start < size:
            page = await self.meta.read_map(ino, start=start, end=size)
            for ref in page.refs:
                row = page.slices[ref.slice_id]
                first, last = ref.slice_offset, ref.slice_offset + ref.length
                if row.kind == SliceKind.INLINE:
                    piece: bytes = row.data[first:last]
                else:
                    piece = bytes(await self.chunks.read(SliceInfo(row.slice_id, row.length, row.data), first, last))
                content[ref.offset : ref.end] = piece
            start = page.end
        return bytes(content)

    def objects(self) -> list[str]:
        """Return the names of the objects in the bucket."""
        assert isinstance(self.volume.address, EmbeddedAddress)
        top = Path(self.volume.address.objects)
        return sorted(path.name for path in top.rglob("*") if path.is_file())


@asynccontextmanager
async def opened(
    directory: Path, cache_dir: Path, *, durability: Durability = Durability.OBJECT
) -> AsyncIterator[Opened]:
    """Open the volume in a directory."""
    async with open_volume(EmbeddedAddress(str(directory)), owner="a test", env={}) as volume:
        config = ChunkStoreConfig(
            volume_uuid=volume.format.uuid,
            cache_dir=cache_dir,
            codec=Codec.parse(volume.format.compression),
            block_bytes=volume.format.block_bytes,
            inline_limit_bytes=volume.format.inline_limit_bytes,
            durability=durability,
        )
        async with (
            volume.session(mountpoint="/nowhere") as meta,
            ChunkStore(config, bucket=await volume.bucket()) as chunks,
        ):
            found = Opened(volume, meta, chunks)
            volume.mounting = found
            yield found
