"""``backups``: the backups of the volume, as its bucket has them."""

from __future__ import annotations

from collections.abc import Sequence

from client.admin.asking import Asked
from client.control.messages import JsonObject
from metasvc.jobs.backups import Manifest, Shelf


async def list_backups(asked: Asked) -> JsonObject:
    """Return all, oldest first. A request to the bucket for each."""
    asked.params.done()
    volume = asked.volume
    found = await Shelf(await volume.bucket(), volume.format.uuid).manifests()
    return {"backups": backups_json(found)}


def backups_json(found: Sequence[Manifest]) -> list[JsonObject]:
    """Return what a document says of backups, which come oldest first."""
    newest = {each.uuid: each.name for each in found}
    return [
        {
            "name": each.name,
            "uuid": each.uuid,
            "volume": f"{each.tenant}/{each.volume}",
            "made_ns": each.made_ns,
            "seconds": round((each.finished_ns - each.made_ns) / 1e9, 3),
            "last_batch": each.last_batch,
            "inodes": each.inodes,
            "rows": each.rows,
            "size_bytes": each.size_bytes,
            "objects_kept_until_ns": each.kept_until_ns,
            "is_newest": newest[each.uuid] == each.name,
        }
        for each in found
    ]
