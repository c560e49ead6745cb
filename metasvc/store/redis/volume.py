"""One volume in Redis: metasvc.store.VolumeStore.

What is known of an ownership's commits is one value, ``_settled``: under which attempt they go, and whether the outcome of the
last one is known. Interleavings:

- A commit is one trip while all goes well. Before it is sent its outcome counts as unknown, and as known again when the server
  has answered; so a commit whose connection broke, whose deadline passed, or whose caller was cancelled leaves it unknown.
- While it is unknown, the next commit of this ownership settles first (ownership.settle), and so does last_batch() always. From
  then on what was sent before is applied or void, for good: a script that a dead connection left behind cannot be applied
  after last_batch() has said that it was not.
- Two settle at once, or a settle that was thought lost arrives late: ``attempt`` is another than this handle thinks. Nothing
  is applied then; the commit finds out, settles, and is sent again.
- An ownership that was taken by another handle is unknown here at first, which is one more trip, no more.

``_seen`` is the highest batch that this handle has committed or was told of as owner. Reads go to a server that has it, or
wait for one: in a fail-over the connections for reads may lead to the old server for longer than those for changes. A handle
that owns nothing has seen nothing, and reads whatever a server has. An owner whose server has lost what was seen is fenced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any, Final, TypeVar

from metasvc.api.volume_format import check_same_volume, dump_format
from metasvc.errors import Fenced, StoreError, StoreRefused
from metasvc.model import Dentry, Inode, VolumeFormat
from metasvc.store import Loaded, Ownership
from metasvc.store.redis import ownership as owning
from metasvc.store.redis.connections import CHANGE_DEADLINE_S, READ_DEADLINE_S, Lane
from metasvc.store.redis.keys import VolumeKeys
from metasvc.store.redis.link import Link
from metasvc.store.redis.rows import Changes, Load, Scan, ScanDir
from metasvc.store.tables import Batch, Key, Row, Table

__all__ = ["RedisVolume"]

_CONTENDED: Final = "{at}: another process with the same ownership commits at the same time"
_RENEW_SHARE: Final = 0.6
"""Of the lease, which its owner counts from before it asked: a renewal that comes back later leaves no time for the next one,
which is sent a third of the lease after it."""
_ATTEMPTS: Final = 8
"""So often a commit settles because the attempt was another one; each time somebody else has settled in between."""

T = TypeVar("T")


class RedisVolume:
    """A handle of one volume. Changes and reads have lanes of their own.

    Ownership goes by the volume's hash and the server's clock. Renewals, releases, acquisitions and last_batch() are done again
    when the connection breaks; to acquire twice with one nonce is to have a later epoch.
    """

    def __init__(self, keys: VolumeKeys, volume_format: VolumeFormat, *, changes: Lane, reads: Lane) -> None:
        self._keys = keys
        self._format = volume_format
        self._changes = changes
        self._reads = reads
        self._closed = False
        self._settled: tuple[str, int, int] | None = None
        """Nonce, epoch and attempt of the ownership whose last commit has a known outcome. None: unknown."""
        self._seen = b""
        """In decimal, as scripts take it; empty: nothing."""

    @property
    def format(self) -> VolumeFormat:
        return self._format

    async def acquire(self, *, nonce: str, address: str, ttl_s: float) -> Ownership:
        async def work(link: Link) -> Ownership:
            return await owning.acquire(link, self._keys, nonce, address, ttl_s)

        taken = await self._change(work, again=True)
        self._settled = (taken.nonce, taken.epoch, 0)
        self._seen = b"%d" % taken.last_batch
        return taken

    async def renew(self, ownership: Ownership, *, ttl_s: float) -> None:
        async def work(link: Link) -> None:
            await owning.renew(link, self._keys, ownership, ttl_s)

        await self._change(work, again=True, deadline_s=min(CHANGE_DEADLINE_S, ttl_s * _RENEW_SHARE))

    async def release(self, ownership: Ownership) -> None:
        async def work(link: Link) -> None:
            await owning.release(link, self._keys, ownership)

        await self._change(work, again=True)

    async def commit(self, ownership: Ownership, number: int, batch: Batch, *, here: bool = False) -> None:
        """Commit; ``here`` changes nothing. One trip; one more if the outcome of the commit before is unknown."""
        self._check_open()
        changes = Changes(self._keys, batch)
        for _ in range(_ATTEMPTS):
            if self._settled is None or self._settled[:2] != (ownership.nonce, ownership.epoch):
                await self._settle(ownership)
            if await self._commit(ownership, number, changes):
                return
        raise StoreError(_CONTENDED.format(at=self._changes.at))

    async def _commit(self, ownership: Ownership, number: int, changes: Changes) -> bool:
        """Send a commit under the attempt that is known; False if that is not the stored one."""
        settled, self._settled = self._settled, None
        assert settled is not None
        attempt = settled[2]

        async def work(link: Link) -> bool:
            return await owning.commit(link, self._keys, ownership, attempt, number, changes)

        is_done = await self._change(work)
        if is_done:
            self._settled = settled
            self._seen = b"%d" % number
        return is_done

    async def last_batch(self, ownership: Ownership) -> int:
        """Return the number of the last batch, for good: no commit sent before is applied afterwards. Fenced."""
        self._check_open()
        return await self._settle(ownership)

    async def _settle(self, ownership: Ownership) -> int:
        async def work(link: Link) -> owning.Settled:
            return await owning.settle(link, self._keys, ownership)

        settled = await self._change(work, again=True)
        if settled.last_batch < int(self._seen or 0):
            raise Fenced(
                f"{self._changes.at} lacks batch {self._seen.decode()}, which it had: another server took over, or it lost data"
            )
        self._settled = (ownership.nonce, ownership.epoch, settled.attempt)
        self._seen = b"%d" % settled.last_batch
        return settled.last_batch

    async def load(self, keys: dict[Table, list[Key]], groups: dict[Table, list[int]]) -> Loaded:
        """Load; one trip, and one more for each 2048 rows of a group beyond the first ones, which are as they are then."""
        self._check_open()
        with _fitting():
            asked = Load(self._keys, keys, groups)
        while not asked.is_done:
            asked.take(await self._read(asked))
        return asked.loaded()

    async def scan_dir(self, parent: int, *, after: bytes | None, limit: int) -> list[tuple[Dentry, Inode | None]]:
        with _fitting():
            page = ScanDir(self._keys, parent, after, limit)
        return page.entries(await self._read(page))

    async def scan(self, table: Table, *, after: Key | None, limit: int) -> list[Row]:
        with _fitting():
            page = Scan(self._keys, table, after, limit)
        return page.rows(await self._read(page))

    async def put_format(self, ownership: Ownership, volume_format: VolumeFormat) -> None:
        self._check_open()
        check_same_volume(self._format, volume_format)
        text = dump_format(volume_format)
        for _ in range(_ATTEMPTS):
            # Like a commit: one that comes late must not undo the next one.
            await self._settle(ownership)
            settled, self._settled = self._settled, None
            assert settled is not None
            work = partial(owning.replace_format, keys=self._keys, ownership=ownership, attempt=settled[2], text=text)
            if await self._change(work):
                self._settled = settled
                self._format = volume_format
                return
        raise StoreError(_CONTENDED.format(at=self._changes.at))

    async def close(self) -> None:
        """Answer nothing any more. The ownership lasts until it is released or expires."""
        self._closed = True

    async def _change(
        self, work: Callable[[Link], Awaitable[T]], *, again: bool = False, deadline_s: float | None = None
    ) -> T:
        self._check_open()
        deadline_s = CHANGE_DEADLINE_S if deadline_s is None else deadline_s
        return await self._changes.call(work, tag=self._keys.tag, deadline_s=deadline_s, again=again)

    async def _read(self, asked: Load | Scan | ScanDir) -> Any:
        """Run the script of a read. One trip."""
        self._check_open()
        # Copies: a load that goes on changes its own.
        keys, arguments = list(asked.keys), [self._seen, *asked.arguments]

        async def work(link: Link) -> Any:
            return await asked.script.run(link, keys, arguments)

        return await self._reads.call(work, tag=self._keys.tag, deadline_s=READ_DEADLINE_S, again=True)

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError("the volume's handle is closed")


@contextlib.contextmanager
def _fitting() -> Iterator[None]:
    """Refuse keys that no row can have."""
    try:
        yield
    except OverflowError as exc:
        raise StoreRefused("a key of more than 64 bits was asked for: this is a bug, please report it") from exc
