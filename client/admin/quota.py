"""``quota set|get|list|remove``: limits of directory trees, and of the volume at its root."""

from __future__ import annotations

from client.address import shown
from client.admin.asking import Asked
from client.admin.paths import find
from client.control.messages import JsonObject, text_of
from metasvc.errors import FsError
from metasvc.model import ROOT_INO, Quota, StatFs


def _json(quota: Quota, path: bytes | None) -> JsonObject:
    return {
        "path": None if path is None else text_of(path),
        "inode": quota.ino,
        "capacity_bytes": quota.max_bytes,
        "used_bytes": quota.used_bytes,
        "max_inodes": quota.max_inodes,
        "used_inodes": quota.used_inodes,
    }


def _volume_quota(statfs: StatFs) -> Quota:
    return Quota(ROOT_INO, statfs.total_bytes, statfs.total_inodes, statfs.used_bytes, statfs.used_inodes)


async def set_quota(asked: Asked) -> JsonObject:
    """Limit a directory, or the volume if it is the root; a limit that is not given stays, 0 lifts it. ENOTDIR."""
    target = asked.params.target("target")
    capacity_bytes = asked.params.integer("capacity_bytes")
    max_inodes = asked.params.integer("max_inodes")
    asked.params.done()
    found = await find(asked.volume, target)
    admin = asked.volume.admin
    if found.inode.ino == ROOT_INO:
        await admin.configure(capacity_bytes=capacity_bytes, max_inodes=max_inodes, trash_days=None)
        return _json(_volume_quota(await admin.statfs(ROOT_INO)), b"/")
    try:
        quota = await admin.quota_set(found.inode.ino, max_bytes=capacity_bytes, max_inodes=max_inodes)
    except FsError as error:
        raise FsError(error.errno, f"{shown(found.path)}: quotas are set on directories") from error
    return _json(quota, found.path)


async def get_quota(asked: Asked) -> JsonObject:
    """Return the quota of a directory, or of the volume if it is the root. ENOENT if it has none."""
    target = asked.params.target("target")
    asked.params.done()
    found = await find(asked.volume, target)
    admin = asked.volume.admin
    if found.inode.ino == ROOT_INO:
        return _json(_volume_quota(await admin.statfs(ROOT_INO)), b"/")
    for quota in await admin.quotas():
        if quota.ino == found.inode.ino:
            return _json(quota, found.path)
    raise _none_here(found.path)


def _none_here(path: bytes) -> FsError:
    where = shown(path)
    return FsError(2, f"{where} has no quota of its own: set one with `atoll quota set`, or look at `atoll quota list`")


async def list_quotas(asked: Asked) -> JsonObject:
    """Return the quotas of all directories, the volume's limits first."""
    asked.params.done()
    admin = asked.volume.admin
    rows = [_json(_volume_quota(await admin.statfs(ROOT_INO)), b"/")]
    for quota in await admin.quotas():
        paths = await admin.paths_of(quota.ino, limit=1)
        rows.append(_json(quota, paths[0] if paths else None))
    await asked.items("quotas", rows)
    return {"quotas": []}


async def remove_quota(asked: Asked) -> JsonObject:
    """Remove the quota of a directory; on the root lift the volume's limits. ENOENT if it has none."""
    target = asked.params.target("target")
    asked.params.done()
    found = await find(asked.volume, target)
    admin = asked.volume.admin
    if found.inode.ino == ROOT_INO:
        await admin.configure(capacity_bytes=0, max_inodes=0, trash_days=None)
        return {"path": "/", "inode": ROOT_INO}
    try:
        await admin.quota_remove(found.inode.ino)
    except FsError as error:
        raise _none_here(found.path) from error
    return {"path": text_of(found.path), "inode": found.inode.ino}
