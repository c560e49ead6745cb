"""``info``: what one path is made of: attributes, names, quota, and where its bytes are."""

from __future__ import annotations

from collections import Counter as Tally
from typing import Final

from chunkstore.geometry import CHUNK_BYTES, SliceId, block_count, block_key
from client.admin.asking import Asked
from client.admin.paths import find
from client.admin.trash import type_name
from client.control.messages import JsonObject, text_of
from metasvc.model import MAP_PAGE_CHUNKS, Inode, Slice, SliceKind

SLICES_SHOWN: Final = 1000
PATHS_SHOWN: Final = 16


async def info(asked: Asked) -> JsonObject:
    """Describe a path. A directory's tree is added up; of a file's slices the first 1,000 are listed."""
    target = asked.params.target("target")
    asked.params.done()
    volume = asked.volume
    if volume.mounting is not None:
        await volume.mounting.flush()
    found = await find(volume, target)
    inode = found.inode
    document: JsonObject = {
        "path": text_of(found.path),
        "inode": inode.ino,
        "type": type_name(inode.mode),
        "mode": f"{inode.mode & 0o7777:04o}",
        "uid": inode.uid,
        "gid": inode.gid,
        "link_count": inode.nlink,
        "size_bytes": inode.size_bytes,
        "atime_ns": inode.atime_ns,
        "mtime_ns": inode.mtime_ns,
        "ctime_ns": inode.ctime_ns,
        "paths": [text_of(path) for path in await volume.admin.paths_of(inode.ino, limit=PATHS_SHOWN)],
    }
    if inode.is_dir:
        await _add_tree(asked, inode, document)
    elif inode.is_symlink:
        document["target"] = text_of(await volume.meta.readlink(inode.ino))
    elif inode.is_file:
        await _add_content(asked, inode, document)
    return document


async def _add_tree(asked: Asked, inode: Inode, document: JsonObject) -> None:
    admin = asked.volume.admin
    asked.progress("adding up the tree")
    usage = await admin.usage(inode.ino)
    document["entries"] = inode.size_bytes
    document["size_bytes"] = usage.size_bytes
    document["usage"] = {
        "files": usage.files,
        "directories": usage.directories,
        "size_bytes": usage.size_bytes,
        "space_bytes": usage.space_bytes,
    }
    document["quota"] = None
    for quota in await admin.quotas():
        if quota.ino == inode.ino:
            document["quota"] = {
                "capacity_bytes": quota.max_bytes,
                "used_bytes": quota.used_bytes,
                "max_inodes": quota.max_inodes,
                "used_inodes": quota.used_inodes,
            }


async def _add_content(asked: Asked, inode: Inode, document: JsonObject) -> None:
    volume = asked.volume
    mounting = volume.mounting
    rows: list[JsonObject] = []
    pieces: Tally[SliceId] = Tally()
    kinds: Tally[str] = Tally()
    seen: dict[SliceId, str] = {}
    start = 0
    while start < inode.size_bytes:
        page = await volume.meta.read_map(inode.ino, start=start, end=start + MAP_PAGE_CHUNKS * CHUNK_BYTES)
        for ref in page.refs:
            pieces[ref.slice_id] += 1
            row = page.slices[ref.slice_id]
            if ref.slice_id not in seen:
                staged = mounting is not None and mounting.chunks.is_staged(ref.slice_id)
                where = "inline" if row.kind == SliceKind.INLINE else "local" if staged else "object"
                seen[ref.slice_id] = where
                kinds[where] += 1
                if len(rows) < SLICES_SHOWN:
                    rows.append(_slice_json(asked, row, where, offset=ref.offset))
        start = page.end
    weakest = "local" if kinds["local"] else "object" if kinds["object"] else "inline"
    document |= {
        "space_bytes": inode.space_bytes,
        "chunks": -(-inode.size_bytes // CHUNK_BYTES),
        "slice_count": len(seen),
        "map_entries": sum(pieces.values()),
        "durability": weakest,
    }
    await asked.items("slices", rows)


def _slice_json(asked: Asked, row: Slice, where: str, *, offset: int) -> JsonObject:
    volume_format = asked.volume.format
    blocks = 0 if row.kind == SliceKind.INLINE else block_count(row.length, volume_format.block_bytes)
    return {
        "slice_id": row.slice_id,
        "first_offset": offset,
        "size_bytes": row.length,
        "references": row.refs,
        "where": where,
        "objects": blocks,
        "first_object": block_key(volume_format.uuid, row.slice_id, 0) if blocks else None,
    }
