"""``status``: what a volume is, who holds it, what is in it and what is on its way."""

from __future__ import annotations

from client.admin.asking import Asked
from client.control.messages import JsonObject
from client.staged import staged_before
from metasvc.model import VolumeFormat


def format_json(volume_format: VolumeFormat) -> JsonObject:
    """Return a volume's format as documents show it."""
    return {
        "uuid": volume_format.uuid,
        "tenant": volume_format.tenant,
        "name": volume_format.name,
        "bucket_url": volume_format.bucket_url,
        "block_size_bytes": volume_format.block_bytes,
        "compression": volume_format.compression,
        "inline_limit_bytes": volume_format.inline_limit_bytes,
        "capacity_bytes": volume_format.capacity_bytes,
        "max_inodes": volume_format.max_inodes,
        "trash_days": volume_format.trash_days,
        "created_ns": volume_format.created_ns,
        "version": volume_format.version,
    }


async def status(asked: Asked) -> JsonObject:
    """Describe the volume. One trip to the owner; asks nothing of the bucket."""
    asked.params.done()
    volume = asked.volume
    found = await volume.admin.status()
    mounting = volume.mounting
    document: JsonObject = {
        "address": str(volume.address),
        "holder": None if mounting is None else mounting.describe(),
        "epoch": found.epoch,
        "owner": found.owner,
        "format": format_json(found.format),
        "usage": {
            "used_bytes": found.statfs.used_bytes,
            "capacity_bytes": found.statfs.total_bytes,
            "used_inodes": found.statfs.used_inodes,
            "max_inodes": found.statfs.total_inodes,
        },
        "trash": {"used_bytes": found.trash_bytes, "inodes": found.trash_inodes},
        "garbage_slices": found.garbage_slices,
        "sessions": [
            {
                "session_id": session.session_id,
                "host": session.host,
                "pid": session.pid,
                "mountpoint": session.mountpoint,
                "started_ns": session.started_ns,
            }
            for session in found.sessions
        ],
        "counters": found.counters,
        "tenant": None if found.tenant is None else found.tenant._asdict(),
    }
    if mounting is not None:
        chunks = mounting.chunks
        document["cache"] = {"directory": str(chunks.cache_dir), **chunks.stats()}
        document["staging"] = {"pending_bytes": chunks.pending_bytes}
    else:
        staged = staged_before(volume.address, found.format)
        document["cache"] = None
        document["staging"] = {"pending_bytes": staged.size_bytes, "cache_dir": staged.cache_dir}
    return document
