"""The seam to the databases: rows in, batches out, ownership in the commit.

A store knows tables and rows (metasvc.store.tables) and no rule of POSIX. The contract suite in
tests/metasvc/store runs on every implementation; whatever passes it can carry a volume.

Concurrency: at most one commit is in flight on a VolumeStore at a time (the engine's committer sees to
that); loads and scans may run beside it and beside each other. A load that began after a commit of this process returned
sees that commit; one that overlaps it sees each row either before or after, never in between. Loads of other processes,
which own nothing, see the volume between two batches, and may see it as it was a moment ago (SQLite: 0.2 s).
A batch and its rows are not changed after they were given to commit(), which may keep them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from metasvc.model import Dentry, Inode, VolumeFormat
from metasvc.store.tables import Batch, Key, Row, Table

__all__ = ["Batch", "Key", "Loaded", "Ownership", "Row", "Store", "Table", "VolumeStore"]


@dataclass(frozen=True, slots=True)
class Ownership:
    """The right to change a volume, until it expires or another takes over with a higher epoch."""

    nonce: str
    """Chosen at random by the owner; a restarted process is another owner."""
    epoch: int
    last_batch: int
    """Number of the last batch committed by anybody."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """Answer of VolumeStore.load()."""

    rows: dict[Table, list[Row]]
    """Rows found, of the keys and of the groups, in no order; what is absent is not listed."""


class VolumeStore(Protocol):
    """The rows of one volume. Errors: StoreError, Fenced, NotOwner."""

    @property
    def format(self) -> VolumeFormat:
        """What the volume was formatted with, as stored."""
        ...

    async def acquire(self, *, nonce: str, address: str, ttl_s: float) -> Ownership:
        """Take the ownership, with the next epoch.

        The change is durable before this returns, so every later commit of an earlier owner is fenced.
        Raises NotOwner(address, expires_in_s) while another owner's row has not expired (by the store's clock).
        A store that can see whether the owner's process lives goes by that instead: at once if it is dead, not
        while it lives, though the row expired (SQLite). Acquiring again with the own nonce counts as a new epoch.
        """
        ...

    async def renew(self, ownership: Ownership, *, ttl_s: float) -> None:
        """Extend the expiry. Raises Fenced if nonce and epoch are not the stored ones."""
        ...

    async def release(self, ownership: Ownership) -> None:
        """Let the next owner acquire at once. Does nothing if the ownership is not the stored one."""
        ...

    async def commit(self, ownership: Ownership, number: int, batch: Batch, *, here: bool = False) -> None:
        """Apply a batch atomically and durably, if nonce and epoch match and last_batch == number - 1.

        ``here``: nobody needs the event loop meanwhile; it may stand still if that is quicker.

        Sets last_batch to number. Raises Fenced if they do not match; nothing is applied then. After a
        StoreError the batch is applied wholly or not at all: ask last_batch() which.
        """
        ...

    async def last_batch(self, ownership: Ownership) -> int:
        """Return the number of the last batch. Raises Fenced if the ownership is not the stored one."""
        ...

    async def load(self, keys: dict[Table, list[Key]], groups: dict[Table, list[int]]) -> Loaded:
        """Read rows by key, and all rows of groups of grouped tables. One trip.

        A row that is asked for twice, by key and by group, may be listed twice.
        """
        ...

    async def scan_dir(self, parent: int, *, after: bytes | None, limit: int) -> list[tuple[Dentry, Inode | None]]:
        """Return dentries of a directory by name > after, with their inodes (None if the row is missing)."""
        ...

    async def scan(self, table: Table, *, after: Key | None, limit: int) -> list[Row]:
        """Return rows of a table with key > after in order of the key; fewer than ``limit`` only at the end.

        For walks of fsck, gc, dump, trash, the audit of counters.
        """
        ...

    async def put_format(self, ownership: Ownership, volume_format: VolumeFormat) -> None:
        """Replace the stored format (capacity, trash days …). Raises Fenced; ValueError for another tenant, name or uuid.

        Other handles show it when they are opened the next time.
        """
        ...

    async def close(self) -> None:
        """Free what the handle holds; later calls raise StoreError. May be called twice.

        The ownership is not released by this, but a store that sees whether owners live takes its owner for dead.
        """
        ...


class Store(Protocol):
    """One database with the volumes of many tenants."""

    async def create_volume(self, volume_format: VolumeFormat, rows: Batch) -> None:
        """Create a volume with its first rows (root inode, counters). Raises VolumeExists."""
        ...

    async def open_volume(self, tenant: str, name: str) -> VolumeStore:
        """Open a volume. Raises VolumeMissing."""
        ...

    async def list_volumes(self) -> Sequence[VolumeFormat]:
        """Return the formats of all volumes, by tenant and name."""
        ...

    async def delete_volume(self, tenant: str, name: str) -> None:
        """Delete a volume with all its rows. Raises VolumeMissing, NotOwner if somebody owns it.

        Its name is free at once and its owners are fenced; handles that are still open find some or no rows.
        """
        ...

    async def setting(self, name: str) -> bytes | None:
        """Return what is kept under a name for all processes that use the database; None if there is nothing."""
        ...

    async def create_setting(self, name: str, value: bytes) -> bool:
        """Keep a value under a name, durably, unless there is one; whether it is this one now."""
        ...

    async def settings(self, prefix: str) -> dict[str, bytes]:
        """Return what is kept under names that begin so, in order of the names. Cost: on Redis that of all names."""
        ...

    async def replace_setting(self, name: str, value: bytes, *, expected: bytes) -> bool:
        """Keep another value under a name, durably, if ``expected`` is there; whether it was.

        After a StoreError nobody knows: read what is there.
        """
        ...

    async def delete_setting(self, name: str) -> bool:
        """Forget, durably, what is kept under a name; whether there was something. After a StoreError nobody knows."""
        ...

    async def add_tenant(self, name: str, *, created_ns: int) -> bool:
        """Make a tenant, durably; False if there is one of that name."""
        ...

    async def remove_tenant(self, name: str) -> bool:
        """Forget a tenant, durably; whether there was one. Its volumes are not looked at."""
        ...

    async def tenants(self) -> Sequence[str]:
        """Return the names of all tenants that were made, in order."""
        ...

    async def close(self) -> None:
        """Close the connection to the database."""
        ...
