"""The volumes that this process owns, and the sessions of their clients.

Owns opening a volume when it is first asked for, the life of sessions, what happens after a restart, and how processes on one
store share its volumes. Must not know messages or streams.

Several processes. Whoever is asked for a volume opens it, unless another process owns it: then the client is told which one.
Every process looks for volumes that nobody owns, and so learns how many the others have. One that has fewer than another by two
or more asks that one for half of what it has too many: those first that no client uses. A volume changes hands as at the
end of a process: its clients are sent on, what they asked for is committed or is asked for again, the ownership is given up.
For `GIVEN_S` the former owner opens it for nobody, so that a client that is quicker does not bring it back. Fences do not
depend on any of this: whoever owns a volume by the store's word may write it, and nobody else.

A session lives from Hello until goodbye, or until its client was not heard of for `expiry_s`. It does not need a connection:
clients come back after breaks and restarts. A restarted service finds the sessions in the store and holds all changes back
until their clients have said what they have open, `RETURN_S` at most: else a file that somebody has open could be removed for
good by somebody who was quicker. Sessions that have not returned by then still may, until they expire.

When an engine fails (fenced, store gone) its volume is dropped with all its connections; who asks next opens it anew.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

from chunkstore.errors import AtollError
from metasvc.api.server import Server, owner_of, owner_text
from metasvc.engine import Engine, EngineAdmin
from metasvc.engine.accounts import USED_BYTES, USED_INODES
from metasvc.engine.engine import DEFAULT_MEMORY_BYTES
from metasvc.engine.memory_budget import MemoryBudget
from metasvc.errors import FsError, NotOwner, VolumeIncomplete, VolumeMissing
from metasvc.model import Ino, SessionId, TenantUse, VolumeFormat
from metasvc.server.access import VolumeAccess
from metasvc.server.deleted import DeletedVolumes
from metasvc.server.keys import BucketKeys
from metasvc.server.metrics import ServiceMetrics
from metasvc.server.session import ServedSession
from metasvc.server.tenant_space import TenantSpace
from metasvc.store import Store, VolumeStore
from metasvc.store.tables import REPLIES

EMBEDDED_BUCKET: Final = "file:objects"
"""The bucket URL of a volume whose objects lie beside its metadata."""
EXPIRY_S: Final = 60.0
"""A session that is not heard of for so long ends: its unlinked files go, its slice ids are retired."""
RETURN_S: Final = 10.0
"""So long a restarted service waits for the clients of before until it changes anything."""
_LOOK_S: Final = 1.0
LOOK_S: Final = 5.0
"""So often a process looks for volumes that nobody owns: their owner's process has ended, or they are new."""
_LOOK_EACH_S: Final = 0.01
GIVEN_S: Final = 5.0
"""So long a volume that was handed over is left to whom it was handed."""
_UNEVEN: Final = 2
"""A process asks one that owns so many volumes more."""
_HANDED_OVER_AT_ONCE: Final = 16

if TYPE_CHECKING:
    from metasvc.jobs.backups import Backups
    from metasvc.jobs.schedule import JobState

T = TypeVar("T")

Work = Callable[["Volume"], Coroutine[None, None, None]]
"""What is to be done for a volume while it is open."""

AskForSome = Callable[[Server, int], Awaitable[Sequence[str]]]
"""Ask a process for volumes, saying how many this one owns; the names (TENANT/NAME) of those that it gave up."""

log = logging.getLogger(__name__)


class SessionEnded(AtollError):
    """The session that a client wants to go on with is no more, or was never its own."""

    code = "session-ended"


class Volume:
    """One open volume."""

    def __init__(
        self,
        store: VolumeStore,
        engine: Engine,
        *,
        expiry_s: float,
        objects_url: str,
        space: TenantSpace | None = None,
        metrics: ServiceMetrics | None = None,
        keys: BucketKeys | None = None,
    ) -> None:
        """Take over what is open."""
        self._space = space
        self._objects_url = objects_url
        self.engine = engine
        self.admin = EngineAdmin(engine)
        self.name = f"{engine.format.tenant}/{engine.format.name}"
        self.sessions: dict[SessionId, ServedSession] = {}
        self.access = VolumeAccess(keys, lambda: self.format)
        self.expiry_s = expiry_s
        self.expired_total = 0
        self.jobs: Callable[[], Mapping[str, JobState]] = dict
        """What the jobs of the volume did, by name."""
        self.backups: Backups | None = None
        """If backups are made of it."""
        self._metrics = metrics
        self._store = store
        self._absent: set[SessionId] = set()
        self._all_returned = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._ends: set[asyncio.Task[Any]] = set()

    @classmethod
    async def open(
        cls,
        store: VolumeStore,
        *,
        address: str,
        memory: MemoryBudget,
        expiry_s: float,
        return_s: float,
        objects_url: str = "",
        work: Work | None = None,
        space: TenantSpace | None = None,
        metrics: ServiceMetrics | None = None,
        keys: BucketKeys | None = None,
    ) -> Volume:
        """Own a volume, and do its work. NotOwner while another process owns it."""
        engine = await Engine.open(store, address=address, memory=memory, keep_sessions=True)
        volume = cls(store, engine, expiry_s=expiry_s, objects_url=objects_url, space=space, metrics=metrics, keys=keys)
        if metrics is not None:
            engine.committer.observe = metrics.observe_commit
            engine.committer.may_block = lambda: metrics.running <= 1
        try:
            if space is not None:
                await space.admit(engine)
            await volume._take_up_sessions()
        except BaseException:
            await engine.close()
            raise
        if volume._absent:
            volume._start(volume._wait_for_return(return_s), name="return of sessions")
        volume._start(volume._expire(), name="expiry of sessions")
        if work is not None:
            volume._start(work(volume), name="jobs")
        return volume

    @property
    def tenant_use(self) -> TenantUse | None:
        """Return what the volumes of its tenant hold, if that is known."""
        return None if self._space is None else self._space.uses.get(self.engine.format.tenant)

    @property
    def format(self) -> VolumeFormat:
        """Return the format as clients need it: the bucket of a volume that was made embedded has a full URL."""
        form = self.engine.format
        return replace(form, bucket_url=self._objects_url) if form.bucket_url == EMBEDDED_BUCKET else form

    def gauges(self) -> dict[str, float]:
        """Return what there is now, by the names of metasvc.server.metrics without their prefix."""
        rows = self.engine.rows
        sessions = list(self.sessions.values())
        return {
            "sessions": len(sessions),
            "sessions_connected": sum(session.outlet is not None for session in sessions),
            "sessions_expired": self.expired_total,
            "requests_outstanding": sum(session.outstanding for session in sessions),
            "memory_bytes": rows.held_bytes,
            "memory_limit_bytes": rows.allowance_bytes,
            "loads": rows.loads_total,
            "used_bytes": self.engine.counter(USED_BYTES),
            "used_inodes": self.engine.counter(USED_INODES),
            "leases": len(self.engine.leases),
            "lease_recalls": self.engine.leases.recalls_total,
            "lease_recalls_expired": self.engine.leases.expired_total,
            "owner_epoch": self.engine.owner.ownership.epoch,
            **({} if self.backups is None else self.backups.gauges()),
        }

    def job_counters(self) -> dict[str, int]:
        """Return what the jobs did, as numbers with names."""
        found: dict[str, int] = {}
        for name, state in self.jobs().items():
            found |= {
                f"job_{name}_runs_total": state.runs,
                f"job_{name}_failures_total": state.failures,
                f"job_{name}_done_total": state.done,
            }
        return found

    def _start(self, work: Coroutine[None, None, None], *, name: str) -> None:
        self._tasks.append(asyncio.create_task(work, name=f"{name}, volume {self.name}"))

    async def _take_up_sessions(self) -> None:
        for row in list(self.engine.sessions()):
            if not row.secret:
                # It lived in the process that owned the volume, and ended with it.
                await self.engine.end_session(row.session_id)
                continue
            session_id = row.session_id
            stored = await self.engine.run(lambda tx, number=session_id: tx.get(REPLIES, number))
            self.sessions[session_id] = ServedSession(
                self.engine, session_id, secret=row.secret, stored=stored, metrics=self._metrics, access=self.access
            )
            self._absent.add(session_id)

    async def _wait_for_return(self, return_s: float) -> None:
        log.info(
            "volume %s: changes wait up to %.0f s for %d sessions to return", self.name, return_s, len(self._absent)
        )
        with self.engine.sessions_awaited(), suppress(TimeoutError):
            async with asyncio.timeout(return_s):
                await self._all_returned.wait()
        if not self._absent:
            self.engine.leases.all_connected_anew()
        else:
            log.warning("volume %s: sessions %s have not returned", self.name, sorted(self._absent))

    async def close(self) -> None:
        """Commit, release the ownership and close. Sessions stay in the store: their clients go on with the next owner."""
        if self._space is not None:
            self._space.leave(self.engine)
        tasks = [*self._tasks, *self._ends]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            await self.engine.close()
        finally:
            await self._store.close()

    # -- sessions ---------------------------------------------------------------------------------------------------------

    async def begin(self, *, host: str, pid: int, mountpoint: str) -> ServedSession:
        """Begin a session. Goes on if the caller is cancelled: it expires then."""
        return await asyncio.shield(self._owned(self._begin(host, pid, mountpoint), name="begin of a session"))

    async def _begin(self, host: str, pid: int, mountpoint: str) -> ServedSession:
        secret = secrets.token_bytes(16)
        session_id = await self.engine.begin_session(host=host, pid=pid, mountpoint=mountpoint, secret=secret)
        session = self.sessions[session_id] = ServedSession(
            self.engine, session_id, secret=secret, metrics=self._metrics, access=self.access
        )
        return session

    def find(self, session_id: SessionId, secret: bytes) -> ServedSession:
        """Return the session that a client wants to go on with. SessionEnded."""
        session = self.sessions.get(session_id)
        if session is None or session.is_ending or not secrets.compare_digest(session.secret, secret):
            raise SessionEnded(f"session {session_id} of volume {self.name} has ended: begin another")
        session.heard_s = time.monotonic()
        return session

    async def resume(
        self,
        session: ServedSession,
        opens: Mapping[Ino, int],
        promised: Mapping[Ino, int],
        *,
        confirmed: int,
        repeated: Collection[int],
    ) -> None:
        """Go on with a session on a new connection. Call with `attaching` held and nothing of it under way."""
        session.heard_s = time.monotonic()
        await session.resume(opens, promised, confirmed=confirmed, repeated=repeated)
        self._returned(session.session_id)

    async def end(self, session: ServedSession) -> None:
        """End a session; what of it is under way ends first. Nothing for one that has ended.

        Goes on if the caller is cancelled. One that could not be ended is ended by the next look for late sessions.
        """
        if self.sessions.get(session.session_id) is not session:
            return
        session.is_ending = True
        session.heard_s = -math.inf
        await asyncio.shield(self._owned(self._end(session), name=f"end of session {session.session_id}"))

    async def _end(self, session: ServedSession) -> None:
        await session.quiet()
        self._returned(session.session_id)
        await self.engine.end_session(session.session_id)
        self.engine.leases.forget(session.session_id)
        self.sessions.pop(session.session_id, None)

    def _owned(self, work: Coroutine[None, None, T], *, name: str) -> asyncio.Task[T]:
        """Start a task that goes on when nobody waits for it, until it ends or the volume is closed."""
        task = asyncio.create_task(work, name=f"{name}, volume {self.name}")
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)
        return task

    def _returned(self, session_id: SessionId) -> None:
        self._absent.discard(session_id)
        if not self._absent:
            self._all_returned.set()

    async def _expire(self) -> None:
        looked_s = time.monotonic()
        while True:
            await asyncio.sleep(_LOOK_S)
            now_s = time.monotonic()
            # Where this process itself stood still, nobody could be heard.
            stood_s, looked_s = max(0.0, now_s - looked_s - 2 * _LOOK_S), now_s
            for session in self.sessions.values():
                session.heard_s += stood_s
            for session in list(self.sessions.values()):
                # Looked at again for each: the end of the one before takes its time.
                if session.heard_s >= time.monotonic() - self.expiry_s or session.attaching.locked():
                    continue
                log.warning(
                    "volume %s: session %d was not heard of for %.0f s and ends",
                    self.name,
                    session.session_id,
                    self.expiry_s,
                )
                self.expired_total += 1
                if session.outlet is not None:
                    session.outlet.fail(SessionEnded("nothing was heard of the client for too long"))
                try:
                    await self.end(session)
                except AtollError as error:
                    log.warning("volume %s: session %d did not end: %s", self.name, session.session_id, error)


class Volumes:
    """All volumes of one store that this process serves."""

    def __init__(
        self,
        store: Store,
        *,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
        expiry_s: float = EXPIRY_S,
        return_s: float = RETURN_S,
        objects_url: str = "",
        work: Work | None = None,
        keys: BucketKeys | None = None,
    ) -> None:
        """``objects_url`` is where the default bucket lies. Nothing is opened before `serve_as`.

        ``work`` is done for each volume while it is open. Their rows at hand share ``memory_bytes``.
        """
        self._objects_url = objects_url
        self._work = work
        self._keys = keys
        self.deleted = DeletedVolumes(store, keys)
        self.metrics = ServiceMetrics(lambda: self, lambda: self.space.uses)
        self.store = store
        self.expiry_s = expiry_s
        self._return_s = return_s
        self._server: asyncio.Future[Server] = asyncio.get_running_loop().create_future()
        self._memory = MemoryBudget(memory_bytes)
        self.space = TenantSpace(store)
        self._open: dict[tuple[str, str], Volume] = {}
        self._opening: dict[tuple[str, str], asyncio.Lock] = {}
        self._watches: dict[Volume, asyncio.Task[None]] = {}
        self._given: dict[tuple[str, str], tuple[Server, float]] = {}
        """To whom volumes were handed over, and until when they are left to it."""
        self._giving_up: set[asyncio.Task[Any]] = set()
        self._is_closing = False

    def serve_as(self, server: Server) -> None:
        """Say where clients reach this process, once: what other processes tell of the owner."""
        self._server.set_result(server)

    @property
    def address(self) -> str:
        """What other processes, and commands, are told of who has a volume. Call behind `serve_as`."""
        return owner_text(self._server.result())

    @property
    def keeps_keys(self) -> bool:
        """Return whether keys of buckets can be kept."""
        return self._keys is not None and self._keys.has_master

    def __iter__(self) -> Iterator[Volume]:
        """Return those that are open."""
        return iter(list(self._open.values()))

    async def get(self, tenant: str, name: str) -> Volume:
        """Return a volume, opened if it is not. VolumeMissing, NotOwner, StoreError."""
        key = tenant, name
        await asyncio.shield(self._server)
        async with self._opening.setdefault(key, asyncio.Lock()):
            found = self._open.get(key)
            if found is not None and found.engine.failure is None:
                return found
            if self._is_closing:
                raise AtollError("the metadata service is ending", retryable=True)
            given_to, until_s = self._given.get(key, (None, 0.0))
            if given_to is not None and time.monotonic() < until_s:
                raise NotOwner(owner_text(given_to), 0.0)
            self._given.pop(key, None)
            try:
                store = await self.store.open_volume(tenant, name)
            except VolumeMissing:
                # Names that nobody has must not pile up.
                self._opening.pop(key, None)
                raise
            try:
                volume = await Volume.open(
                    store,
                    address=self.address,
                    memory=self._memory,
                    expiry_s=self.expiry_s,
                    return_s=self._return_s,
                    objects_url=self._objects_url,
                    work=self._work,
                    space=self.space,
                    metrics=self.metrics,
                    keys=self._keys,
                )
            except BaseException:
                await store.close()
                raise
            self._open[key] = volume
            watch = asyncio.create_task(self._watch(key, volume), name=f"failure of volume {volume.name}")
            self._watches[volume] = watch
            watch.add_done_callback(lambda _: self._watches.pop(volume, None))
            log.info("volume %s is open, epoch %d", volume.name, volume.engine.owner.ownership.epoch)
            return volume

    async def keep_open(self, ask_for_some: AskForSome) -> None:
        """Open every volume that nobody owns, again and again, so that its work is done although no client comes.

        ``ask_for_some`` asks another process to hand over volumes.
        """
        server = await asyncio.shield(self._server)
        told: dict[tuple[str, str], str] = {}
        while True:
            owners: Counter[Server] = Counter()
            volumes = 0
            try:
                for form in await self.store.list_volumes():
                    volumes += 1
                    if (owner := await self._open_unowned((form.tenant, form.name), told)) is not None:
                        owners[owner] += 1
                await self._even_out(server, owners, ask_for_some)
            except AtollError as error:
                log.warning("volumes that nobody owns are looked for again later: %s", error)
            # By turns with other processes rather than all at once; and a thousand volumes are not asked for every time.
            await asyncio.sleep(random.uniform(0.5, 1.5) * max(LOOK_S, volumes * _LOOK_EACH_S))

    async def _open_unowned(self, key: tuple[str, str], told: dict[tuple[str, str], str]) -> Server | None:
        """Open a volume unless another process owns it; return that process, if clients can be sent there."""
        found = self._open.get(key)
        if found is not None and found.engine.failure is None:
            return None
        try:
            await self.get(*key)
        except NotOwner as error:
            told.pop(key, None)
            return owner_of(error.owner)
        except (VolumeMissing, VolumeIncomplete):
            told.pop(key, None)
        except AtollError as error:
            if told.get(key) != str(error):
                told[key] = str(error)
                log.warning("volume %s/%s cannot be opened: %s", *key, error)
        return None

    async def _even_out(self, server: Server, owners: Counter[Server], ask_for_some: AskForSome) -> None:
        owners.pop(server, None)  # it was restarted, and what it owned before has not run out
        if not owners:
            return
        busiest, count = owners.most_common(1)[0]
        owned = sum(volume.engine.failure is None for volume in self)
        if count - owned < _UNEVEN:
            return
        for name in await ask_for_some(busiest, owned):
            tenant, _, volume = name.partition("/")
            await self._open_unowned((tenant, volume), {})

    async def hand_over(self, server: Server, owned: int) -> list[str]:
        """Give up some volumes for another process that owns so many, if that is fewer by two or more; their names.

        Those first that no client uses. Their clients are sent there.
        """
        mine = [(key, volume) for key, volume in self._open.items() if volume.engine.failure is None]
        mine.sort(key=lambda each: sum(session.outlet is not None for session in each[1].sessions.values()))
        too_many = min(_HANDED_OVER_AT_ONCE, (len(mine) - owned) // _UNEVEN)
        given = []
        for key, volume in mine[: max(0, too_many)]:
            if await self._finished(self._give(key, volume, server)):
                given.append(volume.name)
        return given

    async def _finished(self, work: Coroutine[None, None, T]) -> T:
        """Do something to its end, also if who asked for it goes: a volume that is closed by half would be owned for ever."""
        task = asyncio.create_task(work, name="a volume is given up")
        self._giving_up.add(task)
        task.add_done_callback(self._giving_up.discard)
        return await asyncio.shield(task)

    async def _give(self, key: tuple[str, str], volume: Volume, server: Server) -> bool:
        async with self._opening[key]:
            if self._open.get(key) is not volume or volume.engine.failure is not None or self._is_closing:
                return False
            del self._open[key]
            if (watch := self._watches.pop(volume, None)) is not None:
                watch.cancel()
            self._given[key] = server, time.monotonic() + GIVEN_S
            await _close_for(volume, NotOwner(owner_text(server), 0.0))
        log.info("volume %s was handed over to %s", volume.name, server)
        return True

    async def delete(self, tenant: str, name: str) -> None:
        """Delete a volume that this process owns, with all its rows. FsError EBUSY while clients use it.

        Where it signed URLs the volume is remembered, so that its objects are deleted by such (metasvc.server.deleted).
        NotOwner if another process was quicker to take it when this one had given it up: ask there.
        """
        await self._finished(self._delete((tenant, name), await self.get(tenant, name)))

    async def _delete(self, key: tuple[str, str], volume: Volume) -> None:
        async with self._opening[key]:
            if self._open.get(key) is not volume:
                raise AtollError("the volume changes hands: try again", retryable=True)
            used_by = sum(session.outlet is not None for session in volume.sessions.values())
            if used_by:
                raise FsError(16, f"{used_by} clients use volume {volume.name}: unmount them, or revoke their tokens")
            may_sign = await volume.access.can_sign()
            del self._open[key]
            if (watch := self._watches.pop(volume, None)) is not None:
                watch.cancel()
            await _close_for(volume, VolumeMissing(f"volume {volume.name} was deleted"))
            if may_sign:
                await self.deleted.remember(volume.format)
            await self.store.delete_volume(*key)
            await self.space.forget(key[0], volume.format.uuid)
            if self._keys is not None and not may_sign:
                await self._keys.forget(volume.format)

    async def _watch(self, key: tuple[str, str], volume: Volume) -> None:
        await volume.engine.failed.wait()
        failure = volume.engine.failure
        assert failure is not None
        log.error("volume %s was lost: %s", volume.name, failure)
        async with self._opening[key]:
            if self._open.get(key) is volume:
                del self._open[key]
        await _close_for(volume, failure)

    async def close(self) -> None:
        """Close all volumes, those included that are being opened; none is opened afterwards."""
        self._is_closing = True
        watches = list(self._watches.values())
        for watch in watches:
            watch.cancel()
        await asyncio.gather(*watches, *self._giving_up, return_exceptions=True)
        for key, opening in list(self._opening.items()):
            async with opening:
                volume = self._open.pop(key, None)
                if volume is None:
                    continue
                try:
                    await volume.close()
                except AtollError as error:
                    log.error("volume %s did not close: %s", volume.name, error)


async def _close_for(volume: Volume, reason: AtollError) -> None:
    """Send the clients of a volume away and close it."""
    for session in list(volume.sessions.values()):
        if session.outlet is not None:
            session.outlet.fail(reason)
    try:
        await volume.close()
    except AtollError as error:
        if volume.engine.failure is None:
            log.error("volume %s did not close: %s", volume.name, error)
