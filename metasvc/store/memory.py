"""The store in memory: the contract without a database, for tests and for volumes that end with the process.

Owns the rows of all volumes of one MemoryStore. Nothing survives the process, so "durable" means "applied".

No method awaits anything: a call runs from its start to its end in one step of the event loop, hence every call is
atomic, and a commit is applied whole. Delays, failures and deaths are added around it (tests/metasvc/store/faulty.py).
Invariant: ``_SortedRows.keys`` holds exactly the keys of ``_SortedRows.rows``, in order.
"""

from __future__ import annotations

import time
from bisect import bisect_right, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from metasvc.api.volume_format import check_same_volume, dump_format, parse_format
from metasvc.errors import Fenced, NotOwner, StoreError, VolumeExists, VolumeMissing
from metasvc.model import Dentry, Inode, VolumeFormat
from metasvc.store import Loaded, Ownership
from metasvc.store.tables import DENTRY, INODE, TABLES, Batch, Key, Row, Table

__all__ = ["MemoryStore"]


class _SortedRows:
    """Rows by one part of a key, in order of it. Adding in order and loading cost O(1), else O(n) for a short memmove."""

    __slots__ = ("keys", "rows")

    def __init__(self) -> None:
        self.keys: list[Any] = []
        self.rows: dict[Any, Any] = {}

    def put(self, key: Any, value: Any) -> None:
        if key not in self.rows:
            if not self.keys or key > self.keys[-1]:
                self.keys.append(key)
            else:
                insort(self.keys, key)
        self.rows[key] = value

    def delete(self, key: Any) -> None:
        if self.rows.pop(key, None) is not None:
            del self.keys[bisect_right(self.keys, key) - 1]

    def after(self, key: Any | None) -> Iterator[Any]:
        """Yield the values of the keys > key, all for None."""
        start = 0 if key is None else bisect_right(self.keys, key)
        for index in range(start, len(self.keys)):
            yield self.rows[self.keys[index]]


class _TableRows:
    """The rows of one table. Of a grouped table each group is a _SortedRows in a _SortedRows of groups."""

    __slots__ = ("grouped", "table", "top")

    def __init__(self, table: Table) -> None:
        self.table = table
        self.grouped = table.grouped
        self.top = _SortedRows()

    def get(self, key: Key) -> Row | None:
        value: Any = self.top.rows.get(key[0])
        if self.grouped and value is not None:
            value = value.rows.get(key[1])
        return value  # type: ignore[no-any-return]

    def put(self, row: Row) -> None:
        if not self.grouped:
            self.top.put(row[0], row)
            return
        members = self.top.rows.get(row[0])
        if members is None:
            members = _SortedRows()
            self.top.put(row[0], members)
        members.put(row[1], row)

    def delete(self, key: Key) -> None:
        if not self.grouped:
            self.top.delete(key[0])
            return
        members = self.top.rows.get(key[0])
        if members is not None:
            members.delete(key[1])
            if not members.rows:
                self.top.delete(key[0])

    def group(self, group: int, *, after: Any | None = None) -> Iterator[Row]:
        """Yield the rows of a group with member > after, in order."""
        members = self.top.rows.get(group)
        return iter(()) if members is None else members.after(after)

    def after(self, key: Key | None) -> Iterator[Row]:
        """Yield the rows with a key > key, in order."""
        if not self.grouped:
            yield from self.top.after(None if key is None else key[0])
            return
        if key is not None:
            yield from self.group(key[0], after=key[1])
        for members in self.top.after(None if key is None else key[0]):
            yield from members.after(None)


@dataclass(slots=True)
class _Volume:
    """What all handles of one volume share: the volume row and the tables."""

    format_text: str
    rows: dict[Table, _TableRows] = field(default_factory=lambda: {table: _TableRows(table) for table in TABLES})
    nonce: str | None = None
    """None = nobody owns it."""
    epoch: int = 0
    expires: float = 0.0
    """By the store's clock, in seconds."""
    address: str = ""
    last_batch: int = 0
    deleted: bool = False

    def apply(self, batch: Batch) -> None:
        for table, rows in batch.puts.items():
            put = self.rows[table].put
            for row in rows:
                put(row)
        for table, keys in batch.deletes.items():
            delete = self.rows[table].delete
            for key in keys:
                delete(key)

    def check_unowned(self, *, now: float, by: str | None = None) -> None:
        if self.nonce is not None and self.nonce != by and self.expires > now:
            raise NotOwner(self.address, self.expires - now)


class MemoryVolume:
    """A handle of one volume: metasvc.store.VolumeStore."""

    def __init__(self, volume: _Volume, *, clock: Callable[[], float]) -> None:
        self._volume = volume
        self._clock = clock
        self._format = parse_format(volume.format_text)
        self._closed = False

    @property
    def format(self) -> VolumeFormat:
        return self._format

    async def acquire(self, *, nonce: str, address: str, ttl_s: float) -> Ownership:
        volume = self._open()
        now = self._clock()
        volume.check_unowned(now=now, by=nonce)
        volume.nonce, volume.address, volume.expires = nonce, address, now + ttl_s
        volume.epoch += 1
        return Ownership(nonce=nonce, epoch=volume.epoch, last_batch=volume.last_batch)

    async def renew(self, ownership: Ownership, *, ttl_s: float) -> None:
        self._owned(ownership).expires = self._clock() + ttl_s

    async def release(self, ownership: Ownership) -> None:
        volume = self._open()
        if (volume.nonce, volume.epoch) == (ownership.nonce, ownership.epoch):
            volume.nonce, volume.expires, volume.address = None, 0.0, ""

    async def commit(self, ownership: Ownership, number: int, batch: Batch, *, here: bool = False) -> None:
        volume = self._owned(ownership)
        if volume.last_batch != number - 1:
            raise Fenced(f"batch {number} does not follow the stored batch {volume.last_batch}")
        volume.apply(batch)
        volume.last_batch = number

    async def last_batch(self, ownership: Ownership) -> int:
        return self._owned(ownership).last_batch

    async def load(self, keys: dict[Table, list[Key]], groups: dict[Table, list[int]]) -> Loaded:
        stored = self._open().rows
        found: dict[Table, list[Row]] = {}
        for table, wanted in keys.items():
            get = stored[table].get
            found[table] = [row for row in map(get, wanted) if row is not None]
        for table, wanted_groups in groups.items():
            rows = found.setdefault(table, [])
            for group in wanted_groups:
                rows.extend(stored[table].group(group))
        return Loaded(found)

    async def scan_dir(self, parent: int, *, after: bytes | None, limit: int) -> list[tuple[Dentry, Inode | None]]:
        stored = self._open().rows
        inodes: dict[int, Inode] = stored[INODE].top.rows
        dentries: Iterator[Any] = islice(stored[DENTRY].group(parent, after=after), limit)
        return [(dentry, inodes.get(dentry.ino)) for dentry in dentries]

    async def scan(self, table: Table, *, after: Key | None, limit: int) -> list[Row]:
        return list(islice(self._open().rows[table].after(after), limit))

    async def put_format(self, ownership: Ownership, volume_format: VolumeFormat) -> None:
        volume = self._owned(ownership)
        check_same_volume(self._format, volume_format)
        volume.format_text = dump_format(volume_format)
        self._format = volume_format

    async def close(self) -> None:
        self._closed = True

    def _open(self) -> _Volume:
        if self._closed:
            raise StoreError("the volume's handle is closed")
        if self._volume.deleted:
            raise StoreError("the volume was deleted")
        return self._volume

    def _owned(self, ownership: Ownership) -> _Volume:
        volume = self._open()
        if (volume.nonce, volume.epoch) != (ownership.nonce, ownership.epoch):
            raise Fenced(f"epoch {ownership.epoch} is no longer the owner's; the stored epoch is {volume.epoch}")
        return volume


class MemoryStore:
    """Volumes in memory: metasvc.store.Store. Handles opened from one MemoryStore see the same volumes."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock`` gives the seconds by which ownership expires."""
        self._clock = clock
        self._volumes: dict[tuple[str, str], _Volume] = {}
        self._settings: dict[str, bytes] = {}
        self._tenants: dict[str, int] = {}

    async def create_volume(self, volume_format: VolumeFormat, rows: Batch) -> None:
        address = (volume_format.tenant, volume_format.name)
        if address in self._volumes:
            raise VolumeExists(f"volume {'/'.join(address)} exists already; choose another name or delete it first")
        volume = _Volume(dump_format(volume_format))
        volume.apply(rows)
        self._volumes[address] = volume

    async def open_volume(self, tenant: str, name: str) -> MemoryVolume:
        return MemoryVolume(self._find(tenant, name), clock=self._clock)

    async def list_volumes(self) -> Sequence[VolumeFormat]:
        return [parse_format(self._volumes[address].format_text) for address in sorted(self._volumes)]

    async def delete_volume(self, tenant: str, name: str) -> None:
        volume = self._find(tenant, name)
        volume.check_unowned(now=self._clock())
        volume.deleted = True
        del self._volumes[tenant, name]

    async def setting(self, name: str) -> bytes | None:
        return self._settings.get(name)

    async def create_setting(self, name: str, value: bytes) -> bool:
        if name in self._settings:
            return False
        self._settings[name] = value
        return True

    async def settings(self, prefix: str) -> dict[str, bytes]:
        return {name: self._settings[name] for name in sorted(self._settings) if name.startswith(prefix)}

    async def replace_setting(self, name: str, value: bytes, *, expected: bytes) -> bool:
        if self._settings.get(name) != expected:
            return False
        self._settings[name] = value
        return True

    async def delete_setting(self, name: str) -> bool:
        return self._settings.pop(name, None) is not None

    async def add_tenant(self, name: str, *, created_ns: int) -> bool:
        if name in self._tenants:
            return False
        self._tenants[name] = created_ns
        return True

    async def remove_tenant(self, name: str) -> bool:
        return self._tenants.pop(name, None) is not None

    async def tenants(self) -> Sequence[str]:
        return sorted(self._tenants)

    async def close(self) -> None:
        """Do nothing: the volumes end with the object."""

    def _find(self, tenant: str, name: str) -> _Volume:
        try:
            return self._volumes[tenant, name]
        except KeyError:
            raise VolumeMissing(f"there is no volume {tenant}/{name}; make it with: atoll format") from None
