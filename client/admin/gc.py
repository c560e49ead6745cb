"""``gc``: delete the objects that nothing needs.

Owns the order of its steps and the rule of what is nobody's. Three kinds go: garbage (slices that lost their last reference,
noted by the owner), trash whose time is up, and *leaked* objects, which no row knows: a writer uploaded them and died before
it committed.

Why nothing that lives is deleted: an object is taken for leaked if its slice is not live in the table of its group, which was
read before the object was listed, and is not live when asked for; then, one after the other, the id may not be pending
(handed out to a live session, which may still commit it), and the slice may still not be live. A commit makes a slice live
before its session could end, so one of the two holds at any moment for a slice that will be needed. While other sessions
live, objects younger than an hour are left alone besides.

Garbage that a protected backup may name is left (metasvc.jobs.backups), unless it is said otherwise. Leaked objects never
belonged to the volume as it is; to backups of a volume that was restored from an older one since they may, and to those alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from chunkstore.access import ObjectAccess
from chunkstore.buckets import MAX_DELETE_KEYS
from chunkstore.geometry import SLICES_PER_PREFIX, ObjectId, parse_block_key
from client.admin.asking import Asked
from client.admin.live import LiveGroup, has_block, live_slice
from client.control.messages import JsonObject
from client.volume import OpenVolume
from metasvc.jobs.backups import Shelf, held_from_ns
from metasvc.jobs.collecting import collect_garbage, delete_objects, expire_trash
from metasvc.model import Garbage

SAFETY_AGE_S: Final = 3600.0
HELD_LOOK: Final = 500


@dataclass(slots=True)
class Tally:
    """What a collection found and did."""

    expired_entries: int = 0
    garbage_held: bool = False
    """Whether some garbage is left because a backup may name it."""
    garbage_slices: int = 0
    garbage_objects: int = 0
    listed_objects: int = 0
    leaked_objects: int = 0
    leaked_bytes: int = 0
    deleted_objects: int = 0
    foreign_objects: int = 0
    """Below the volume's prefix but with a key that no block has: not ours to delete."""


async def gc(asked: Asked) -> JsonObject:
    """Collect garbage, expired trash and leaked objects. A second run right after it finds nothing leaked."""
    dry_run = asked.params.flag("dry_run")
    ignore_backups = asked.params.flag("ignore_backups")
    asked.params.done()
    volume = asked.volume
    # Refused before anything is removed, where keys are missing.
    await volume.bucket()
    tally = Tally()
    if not dry_run:
        tally.expired_entries = await expire_trash(
            volume.admin,
            trash_days=volume.format.trash_days,
            progress=lambda removed: asked.progress("expiring trash", removed, unit="entries"),
        )
    held_ns = None if ignore_backups else await _held_from_ns(volume)
    collected = await collect_garbage(
        volume.admin,
        partial(delete_slices, volume),
        block_bytes=volume.format.block_bytes,
        held_from_ns=held_ns,
        dry_run=dry_run,
        progress=lambda deleted: asked.progress("deleting garbage", deleted, unit="objects"),
    )
    tally.garbage_slices, tally.garbage_objects = collected.slices, collected.objects
    if held_ns is not None:
        now_ns = time.time_ns()
        tally.garbage_held = any(
            row.not_before_ns > held_ns for row in await volume.admin.garbage(before_ns=now_ns, limit=HELD_LOOK)
        )
    tally.deleted_objects = 0 if dry_run else collected.objects
    await _collect_leaked(asked, tally, dry_run=dry_run)
    return {
        "dry_run": dry_run,
        "expired_trash_entries": tally.expired_entries,
        "garbage_slices": tally.garbage_slices,
        "garbage_objects": tally.garbage_objects,
        "garbage_held": tally.garbage_held,
        "listed_objects": tally.listed_objects,
        "leaked_objects": tally.leaked_objects,
        "leaked_bytes": tally.leaked_bytes,
        "deleted_objects": tally.deleted_objects,
        "foreign_objects": tally.foreign_objects,
    }


async def _held_from_ns(volume: OpenVolume) -> int | None:
    """Return behind which time backups need what is garbage now; None if there are none."""
    backups = await Shelf(await volume.bucket(), volume.format.uuid).manifests()
    return held_from_ns(backups, now_ns=time.time_ns(), goes_on=True) if backups else None


async def delete_slices(volume: OpenVolume, rows: Sequence[Garbage]) -> None:
    """Delete the objects of slices, and in a mount their images."""
    if volume.mounting is not None:
        await volume.mounting.chunks.delete_many([(row.slice_id, row.length) for row in rows])
        if isinstance(await volume.block_access(), ObjectAccess):
            return
        # By URLs nothing is deleted.
    await delete_objects(await volume.bucket(), volume.format, rows)


async def _collect_leaked(asked: Asked, tally: Tally, *, dry_run: bool) -> None:
    volume = asked.volume
    bucket = await volume.bucket()
    own_session = 0 if volume.mounting is None and volume.is_sole else 1
    others = len((await volume.admin.status()).sessions) > own_session
    youngest_ns = time.time_ns() - int(SAFETY_AGE_S * 1e9) if others else None
    group: LiveGroup | None = None
    leaked: list[str] = []

    async def delete_leaked() -> None:
        if leaked and not dry_run:
            await bucket.delete(leaked)
            tally.deleted_objects += len(leaked)
        leaked.clear()

    async for info in bucket.list(f"{volume.format.uuid}/"):
        tally.listed_objects += 1
        if tally.listed_objects % 1000 == 0:
            asked.progress("listing objects", tally.listed_objects, unit="objects")
        found = parse_block_key(info.key)
        if found is None:
            tally.foreign_objects += 1
            continue
        number = found.slice_id // SLICES_PER_PREFIX
        if group is None or group.number != number:
            group = await LiveGroup.load(volume.admin, number, volume.format.block_bytes)
        if group.names(found) or (youngest_ns is not None and info.mtime_ns > youngest_ns):
            continue
        if not await _is_leaked(volume, found):
            continue
        tally.leaked_objects += 1
        tally.leaked_bytes += info.size_bytes
        leaked.append(info.key)
        if len(leaked) == MAX_DELETE_KEYS:
            await delete_leaked()
    await delete_leaked()


async def _is_leaked(volume: OpenVolume, found: ObjectId) -> bool:
    admin = volume.admin
    row = await live_slice(admin, found.slice_id)
    if row is None:
        # In this order: see the module's text.
        if await admin.is_pending(found.slice_id):
            return False
        row = await live_slice(admin, found.slice_id)
        if row is None and await admin.is_garbage(found.slice_id):
            # A backup may name it; what may be deleted of garbage was.
            return False
    if row is None:
        # What is staged was committed and removed since, or is being given up; either way its turn comes.
        return volume.mounting is None or not volume.mounting.chunks.is_staged(found.slice_id)
    return not has_block(row, found.block_index, volume.format.block_bytes)
