"""Backups as objects: their keys, their manifests, reading and removing them (docs/format.md).

    backups/manifests/{uuid}/{name}              JSON, put last: the backup exists
    backups/parts/{uuid}/{name}/{number, 8 digits}

Manifests lie apart from parts, so that one listing finds every backup of every volume in the bucket, which is all that is left
to somebody who lost the store. Names begin with the time, in UTC.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from chunkstore.buckets import MAX_DELETE_KEYS, ObjectInfo, ObjectStore
from chunkstore.errors import FormatUnsupported, ObjectMissing
from chunkstore.geometry import MIB
from metasvc.api.dump_stream import DumpDamaged

VERSION: Final = 1
PART_BYTES: Final = 4 * MIB
_GETS_AT_ONCE: Final = 16
_READ_AHEAD: Final = 4
_LAST_PART: Final = 99_999_999
_MANIFESTS: Final = "backups/manifests/"
_PARTS: Final = "backups/parts/"
_NAME: Final = re.compile(r"\d{8}t\d{6}z-[0-9a-f]{8}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What makes parts a backup."""

    name: str
    uuid: str
    tenant: str
    volume: str
    made_ns: int
    """When its dump began: nothing that was garbage by then is in it."""
    finished_ns: int
    last_batch: int
    """Of its owner; the backup is the volume as it was after it."""
    rows: int
    inodes: int
    parts: int
    size_bytes: int
    window_s: int
    """So long after it was made all objects that it names are kept."""

    @property
    def kept_until_ns(self) -> int:
        """When objects that it names may begin to go, unless it is the newest backup then."""
        return self.made_ns + self.window_s * 1_000_000_000

    def packed(self) -> bytes:
        """Return the bytes of the object."""
        return json.dumps({"version": VERSION, **asdict(self)}, sort_keys=True, indent=1).encode("ascii") + b"\n"

    @classmethod
    def parse(cls, raw: bytes | memoryview, *, key: str) -> Manifest:
        """Inverse of packed(). DumpDamaged, FormatUnsupported; both name the key."""
        try:
            found: Any = json.loads(bytes(raw))
            version = found["version"]
            if isinstance(version, int) and version > VERSION:
                raise FormatUnsupported(
                    f"backup {key} has version {version}, this AtollFS knows up to {VERSION}: upgrade AtollFS"
                )
            values = {each.name: found[each.name] for each in fields(cls)}
            wrong = [name for name, value in values.items() if not isinstance(value, _TYPES[name])]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DumpDamaged(f"{key} is no manifest of a backup ({error!r}): remove that object") from error
        if wrong or key != _MANIFESTS + f"{values['uuid']}/{values['name']}":
            raise DumpDamaged(f"{key} is no manifest of that backup: remove that object")
        return cls(**values)


_TYPES: Final = {each.name: int if str(each.type) == "int" else str for each in fields(Manifest)}


def new_name(now_ns: int) -> str:
    """Return the name of a backup that begins now."""
    begun = time.strftime("%Y%m%dt%H%M%Sz", time.gmtime(now_ns // 1_000_000_000))
    return f"{begun}-{secrets.token_hex(4)}"


class Shelf:
    """The backups of one volume in its bucket."""

    def __init__(self, bucket: ObjectStore, uuid: str) -> None:
        """Take an open bucket, which stays its owner's."""
        self._bucket = bucket
        self._uuid = uuid

    async def manifests(self, known: Iterable[Manifest] = ()) -> list[Manifest]:
        """Return the backups that there are, oldest first. DumpDamaged, FormatUnsupported, and errors of the bucket.

        A request for the listing, and one for each backup that is not ``known``: a manifest never changes.
        """
        read = {f"{_MANIFESTS}{each.uuid}/{each.name}": each for each in known}
        return await _manifests(self._bucket, f"{_MANIFESTS}{self._uuid}/", refused=None, read=read)

    async def put_part(self, name: str, number: int, data: bytes) -> None:
        """Store a part."""
        await self._bucket.put(self._part(name, number), data)

    async def put_manifest(self, manifest: Manifest) -> None:
        """Let a backup exist. If it fails it may exist none the less, also later."""
        await self._bucket.put(f"{_MANIFESTS}{self._uuid}/{manifest.name}", manifest.packed())

    async def remove(self, name: str) -> None:
        """Remove a backup: its manifest first, so that what is left of it by a crash is no backup."""
        await self._bucket.delete([f"{_MANIFESTS}{self._uuid}/{name}"])
        await self.remove_parts(name)

    async def remove_parts(self, name: str) -> None:
        """Remove the parts of what is no backup, or no more."""
        keys: list[str] = []
        async for info in self._bucket.list(f"{_PARTS}{self._uuid}/{name}/"):
            keys.append(info.key)
            if len(keys) == MAX_DELETE_KEYS:
                await self._bucket.delete(keys)
                keys = []
        if keys:
            await self._bucket.delete(keys)

    async def partial(self) -> list[tuple[str, int]]:
        """Return what has parts and no manifest, each with the time of its first part, ns. A request for each name."""
        found: list[tuple[str, int]] = []
        prefix = f"{_PARTS}{self._uuid}/"
        after: str | None = None
        while (info := await _first(self._bucket.list(prefix, start_after=after))) is not None:
            name = info.key.removeprefix(prefix).partition("/")[0]
            after = max(info.key, self._part(name, _LAST_PART))
            if _NAME.fullmatch(name):
                found.append((name, info.mtime_ns))
        # Behind the parts: the manifest of one that was finished meanwhile is seen.
        prefix = f"{_MANIFESTS}{self._uuid}/"
        there = {info.key.removeprefix(prefix) async for info in self._bucket.list(prefix)}
        return [(name, mtime_ns) for name, mtime_ns in found if name not in there]

    def _part(self, name: str, number: int) -> str:
        return part_key(self._uuid, name, number)


def prefixes_of(uuid: str) -> tuple[str, str]:
    """Return below which prefixes the backups of a volume lie, in the order in which they are removed."""
    return f"{_MANIFESTS}{uuid}/", f"{_PARTS}{uuid}/"


def part_key(uuid: str, name: str, number: int) -> str:
    """Return the key of a part."""
    return f"{_PARTS}{uuid}/{name}/{number:08d}"


async def all_manifests(bucket: ObjectStore, *, refused: Callable[[str], None]) -> list[Manifest]:
    """Return all backups in a bucket, of all volumes, oldest first. ``refused`` is told of each that cannot be read."""
    return await _manifests(bucket, _MANIFESTS, refused=refused)


async def read_backup(bucket: ObjectStore, manifest: Manifest) -> AsyncGenerator[bytes, None]:
    """Yield the bytes of the dump, in order; a few parts are fetched ahead. DumpDamaged if a part is missing.

    That the bytes are those that were written finds out who unpacks them.
    """
    coming: deque[asyncio.Task[bytes | memoryview]] = deque()
    number = 0
    try:
        while coming or number < manifest.parts:
            while number < manifest.parts and len(coming) < _READ_AHEAD:
                coming.append(asyncio.create_task(_get_part(bucket, manifest, number)))
                number += 1
            yield bytes(await coming.popleft())
    finally:
        for task in coming:
            task.cancel()
        await asyncio.gather(*coming, return_exceptions=True)


async def _get_part(bucket: ObjectStore, manifest: Manifest, number: int) -> bytes | memoryview:
    try:
        return await bucket.get(part_key(manifest.uuid, manifest.name, number))
    except ObjectMissing as error:
        raise DumpDamaged(f"backup {manifest.name} lacks part {number}: restore another with --backup NAME") from error


async def _manifests(
    bucket: ObjectStore,
    prefix: str,
    *,
    refused: Callable[[str], None] | None,
    read: Mapping[str, Manifest] | None = None,
) -> list[Manifest]:
    read = read or {}
    keys = [info.key async for info in bucket.list(prefix)]
    found = [read[key] for key in keys if key in read]
    keys = [key for key in keys if key not in read]
    for start in range(0, len(keys), _GETS_AT_ONCE):
        some = keys[start : start + _GETS_AT_ONCE]
        found += await _read_manifests(bucket, some, refused)
    return sorted(found, key=lambda manifest: (manifest.made_ns, manifest.name))


async def _read_manifests(
    bucket: ObjectStore, keys: Sequence[str], refused: Callable[[str], None] | None
) -> list[Manifest]:
    answers = await asyncio.gather(*(bucket.get(key) for key in keys), return_exceptions=True)
    found: list[Manifest] = []
    for key, answer in zip(keys, answers, strict=True):
        if isinstance(answer, ObjectMissing):
            continue  # removed since it was listed
        if isinstance(answer, BaseException):
            raise answer
        try:
            found.append(Manifest.parse(answer, key=key))
        except (DumpDamaged, FormatUnsupported) as error:
            if refused is None:
                raise
            refused(str(error))
    return found


async def _first(infos: AsyncIterator[ObjectInfo]) -> ObjectInfo | None:
    return await anext(infos, None)
