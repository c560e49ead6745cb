"""The owner of one volume: runs rules on rows in memory, commits in groups, answers when durable.

What it owns: the ownership (Owner), rows (Rows), the committer, which sessions have which inodes open, and
promised room. The rules of POSIX are in the modules beside this one; this one knows how they are run.

An operation: run the rule on a Tx; if rows are missing load them (the only await) and run it again from the
start; else put its changes into memory and into the open batch in the same stretch, then wait until that
batch is durable. A reply that saw rows not yet durable waits for them too, errors included (EEXIST for a name
whose creation could still be lost would be a lie). Rules never await, so operations are serial.

Failure: when a commit fails for good or the ownership is lost, the engine is *failed*: every call raises what
happened. Nothing unacknowledged was answered. The process opens the volume again, or ends.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager, contextmanager, suppress
from types import TracebackType
from typing import Any, Self, cast

from chunkstore.errors import AtollError
from chunkstore.geometry import SliceId
from metasvc.engine import content
from metasvc.engine.committer import Committer
from metasvc.engine.format import NEXT_INO, NEXT_SLICE
from metasvc.engine.leases import Leases
from metasvc.engine.memory import ABSENT, NeedRows, Rows
from metasvc.engine.memory_budget import MemoryBudget
from metasvc.engine.owner import OWNER_TTL_S, Owner, boottime_s
from metasvc.engine.reservations import Reservations
from metasvc.engine.tx import Allowance, Rule, Tx, refuse
from metasvc.errors import FsError, StoreError, TenantFull, VolumeIncomplete
from metasvc.model import Counter, Ino, Inode, Replies, Session, SessionId, SliceRange, VolumeFormat
from metasvc.store import VolumeStore
from metasvc.store.tables import COUNTER, INODE, REPLIES, SESSION, SLICE_RANGE, SUSTAINED, Key, Row, Table

INO_STRIDE = 4096
SLICE_STRIDE = 65_536
"""Numbers are taken from their counter in strides: a commit per stride, and a restart skips the rest."""
NEXT_SESSION = "next_session"
MAX_RUNS = 200
"""Times a rule may ask for more rows; each run of a rule asks for at least one that was missing."""
DEFAULT_MEMORY_BYTES = 64 * 1024 * 1024
"""What the rows of a volume may take that no service shares among several."""
LOAD_AT_ONCE = 1000
Changes = Mapping[Table, Mapping[Any, Row | None]]
"""Of an operation: by table and key the row as it is to be, None if it goes."""
END_S = 30.0
"""So long the end of an engine, and of a session in its process, waits for a store that takes nothing: a full disk, say."""
MAX_UNUSED_IDS = 1 << 20
"""Slice ids that a session may have without committing them: 8 MiB of memory here, at 4 MiB each 4 TiB of files."""


class Hold:
    """The right to change something while the changes of all others are held back."""


class Engine:
    """One open volume. An async context manager: leaving it commits what is open and gives the volume up."""

    def __init__(
        self,
        store: VolumeStore,
        owner: Owner,
        *,
        memory: MemoryBudget,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.store = store
        self.owner = owner
        self.clock_ns = clock_ns
        self.format: VolumeFormat = store.format
        self.rows = Rows(store, budget=memory)
        self.committer = Committer(store, owner, self.rows, on_failure=self._fail)
        self.reservations = Reservations()
        self.leases = Leases()
        self.failure: AtollError | None = None
        self.failed = asyncio.Event()
        """Set when the engine has failed; see ``failure``."""
        self.operations_total = 0
        self.restarts_total = 0
        self.watch: Callable[[Changes, Collection[Ino]], None] | None = None
        """Told of the changes of each operation, and its new inodes, in the stretch in which they come into force, before."""
        self._opens: dict[Ino, dict[SessionId, int]] = {}
        self._sustained: dict[Ino, set[SessionId]] = {}
        """The sessions for which nameless inodes are kept."""
        self._slice_ranges: dict[SessionId, list[range]] = {}
        self._unused: dict[SessionId, set[int]] = {}
        """Slice ids that were handed out here and never committed."""
        self._handed_out_before: list[range] = []
        """Slice ids of earlier owners: whether they were committed only the store knows."""
        self._next_ino = 0
        self._next_slice = 0
        self._renewal: asyncio.Task[None] | None = None
        self.allowance = Allowance()
        """Of the tenant's quota: whoever has more volumes of the tenant in sight sets it."""
        self.more_room: Callable[[TenantFull], Awaitable[bool]] | None = None
        """Makes the allowance larger, if that is possible; whether it is enough now for what was asked for."""
        self.held_back: set[asyncio.Task[Any]] = set()
        """Tasks whose operation waits for a hold to end, or leases: nothing of it has been done, so it may be cancelled."""
        self._holding = asyncio.Lock()
        self._held_by: Hold | None = None
        self._unheld = asyncio.Event()
        self._unheld.set()
        self._all_returned = asyncio.Event()
        self._all_returned.set()

    @classmethod
    async def open(
        cls,
        store: VolumeStore,
        *,
        address: str,
        memory: MemoryBudget | None = None,
        ttl_s: float = OWNER_TTL_S,
        clock_ns: Callable[[], int] = time.time_ns,
        clock_s: Callable[[], float] = boottime_s,
        keep_sessions: bool = False,
    ) -> Engine:
        """Acquire a volume, load what stays in memory, and end the sessions of earlier owners.

        With ``keep_sessions`` they stay, with what they sustain and their slice ids: the caller has their clients go on
        (resume_session), or ends them. ``memory`` bounds the rows at hand, 64 MiB of its own if not given.
        NotOwner while another process owns the volume; VolumeIncomplete if it was not loaded whole.
        """
        if store.format.loading:
            raise VolumeIncomplete(
                f"volume {store.format.tenant}/{store.format.name} was not loaded whole: wait for `atoll load`, or run it again"
            )
        owner = await Owner.acquire(store, address=address, ttl_s=ttl_s, clock_s=clock_s)
        engine = cls(store, owner, memory=memory or MemoryBudget(DEFAULT_MEMORY_BYTES), clock_ns=clock_ns)
        try:
            await engine.rows.load_resident()
            engine._next_ino = engine.counter(NEXT_INO)
            engine._next_slice = engine.counter(NEXT_SLICE)
            engine._renewal = asyncio.create_task(engine._renew(), name="metasvc-owner")
            await engine._load_sessions()
            await engine._end_leftovers()
            if any(session.secret for session in engine.sessions()):
                engine.leases.follow_another_owner()
            if not keep_sessions:
                for session in engine.sessions():
                    await engine.end_session(session.session_id)
        except BaseException:
            await engine.close()
            raise
        return engine

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Commit what is open and release the ownership. Does not close the store.

        StoreError if the store does not take what is open within `END_S`: it is lost. Nobody was told that it is there.
        """
        try:
            if self.failure is None:
                async with asyncio.timeout(END_S):
                    await self.committer.flush()
        except TimeoutError:
            self._fail(
                StoreError(f"the store took no changes for {END_S:.0f} s: those that no program was told of are lost")
            )
            with suppress(StoreError):
                # From now on the committer is refused, too. Where even this fails, the end of the process frees the volume.
                await self.owner.release()
            assert self.failure is not None
            raise self.failure from None
        finally:
            if self._renewal is not None:
                self._renewal.cancel()
                await asyncio.gather(self._renewal, return_exceptions=True)
            if self.failure is None:
                await self.owner.release()

    async def _renew(self) -> None:
        try:
            await self.owner.renew_forever()
        except AtollError as exc:
            self._fail(exc)

    async def _load_sessions(self) -> None:
        for session in self.sessions():
            self._slice_ranges[session.session_id] = []
        async for row in self._scan(SLICE_RANGE):
            ids = range(row[1], row[1] + row[2])
            self._slice_ranges.setdefault(row[0], []).append(ids)
            self._handed_out_before.append(ids)
        async for row in self._scan(SUSTAINED):
            self._sustained.setdefault(row[1], set()).add(row[0])

    async def _end_leftovers(self) -> None:
        """End what belongs to sessions that have no row: an operation may have been under way when its session ended."""
        alive = {session.session_id for session in self.sessions()}
        for ino, holders in list(self._sustained.items()):
            for session_id in list(holders - alive):
                await self.run(self._release_rule, session_id, ino, by=session_id)
        for table in (SLICE_RANGE, REPLIES):
            keys = [table.key_of(row) async for row in self._scan(table) if row[0] not in alive]
            for key in keys:
                await self.run(lambda tx, key=key, table=table: tx.delete(table, key if table.grouped else key[0]))
        for session_id in self._slice_ranges.keys() - alive:
            del self._slice_ranges[session_id]

    async def _scan(self, table: Table) -> AsyncIterator[Row]:
        after: Key | None = None
        while page := await self.store.scan(table, after=after, limit=1000):
            for row in page:
                yield row
            after = table.key_of(page[-1])

    def _fail(self, error: AtollError) -> None:
        if self.failure is None:
            self.failure = error
            self.failed.set()

    def _check(self) -> None:
        if self.failure is not None:
            raise self.failure
        self.owner.check()

    def counter(self, name: str) -> int:
        """Return a counter of the volume."""
        row: Counter | None = self.rows.resident_get(COUNTER, name)
        return row.value if row else 0

    # -- running rules --------------------------------------------------------------------------------

    async def run(
        self,
        rule: Rule,
        *args: Any,
        then: Callable[[Any], None] | None = None,
        record: Callable[[Any, Tx], Replies] | None = None,
        hold: Hold | None = None,
        of_session: bool = False,
        by: SessionId | None = None,
    ) -> Any:
        """Run a rule as one operation; its result once durable. See the module's text.

        ``then`` runs in the same stretch in which the changes come into force. ``record`` returns a row that becomes durable
        with the changes, if there are any. ``hold`` is what who holds back the changes of all others got for that;
        ``of_session``: it belongs to the return of a session, for which others wait. ``by``: the session that asks for it; the
        leases of others on what it changes are called back before it comes into force.
        """
        for attempt in range(MAX_RUNS):
            self._check()
            tx = Tx(self.rows, self, self.clock_ns())
            try:
                result = rule(tx, *args)
            except NeedRows as need:
                self.restarts_total += 1
                if attempt == 0:
                    self.rows.make_room()
                await self.rows.fetch(need.keys, need.groups)
                continue
            except TenantFull as full:
                if self.more_room is None or not await self.more_room(full):
                    raise
                continue
            except FsError:
                if tx.read_batch > self.rows.durable_batch:
                    await self.committer.wait(tx.read_batch)
                raise
            batch = tx.read_batch
            changes = tx.finish()
            if changes:
                if self._held_by is not None and self._held_by is not hold:
                    await self._held_back(self._unheld.wait())
                    continue
                if not (of_session or self._all_returned.is_set()):
                    await self._held_back(self._all_returned.wait())
                    continue
                recall = self.leases.call_back(changes, self._inode_before, by=by)
                if recall is not None:
                    await self._held_back(recall.answered())
                    continue
                if record is not None:
                    replies = record(result, tx)
                    changes[REPLIES] = {replies.session_id: replies}
                if self.watch is not None:
                    self.watch(changes, tx.fresh)
                batch = self.committer.add(changes, tx.fresh)
                for (holder, ino), row in changes.get(SUSTAINED, {}).items():
                    self._note_sustained(holder, ino, is_kept=row is not None)
            self.operations_total += 1
            if then is not None:
                then(result)
            if batch > self.rows.durable_batch:
                await self.committer.wait(batch)
            return result
        raise StoreError(f"a metadata operation asked for rows {MAX_RUNS} times; the memory limit is too small")

    def _inode_before(self, ino: Ino) -> Inode | None:
        """Return an inode as it is before a change that a rule has made of it; None for a new one."""
        inode = self.rows.get(INODE, ino)
        return None if inode is ABSENT else cast("Inode | None", inode)

    async def _held_back(self, end: Coroutine[Any, Any, object]) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.held_back.add(task)
        try:
            await end
        finally:
            self.held_back.discard(task)

    async def settled(self) -> None:
        """Wait until all changes in force are durable: for replies made of many rows."""
        self._check()
        await self.committer.flush()

    @asynccontextmanager
    async def changes_held(self) -> AsyncIterator[Hold]:
        """Let operations that change something wait until the block ends, but for those that bring its hold. Reads go on.

        One block at a time, and none while sessions are awaited.
        """
        async with self._holding:
            await self._all_returned.wait()
            hold = self._held_by = Hold()
            self._unheld.clear()
            try:
                yield hold
            finally:
                self._held_by = None
                self._unheld.set()

    @property
    def is_held(self) -> bool:
        """Return whether changes are held back now."""
        return self._held_by is not None

    @contextmanager
    def sessions_awaited(self) -> Iterator[None]:
        """Let operations that change something wait until the block ends, but for what belongs to sessions that return."""
        self._all_returned.clear()
        try:
            yield
        finally:
            self._all_returned.set()

    async def sessions_returned(self) -> None:
        """Wait until nobody waits for sessions any more."""
        await self._all_returned.wait()

    # -- what rules ask (tx.Surroundings) --------------------------------------------------------------

    def new_ino(self, tx: Tx) -> Ino:
        """Return an inode number never used before; what a failed operation took is skipped."""
        ino = self._next_ino
        self._next_ino += 1
        if ino >= tx.counter(NEXT_INO):
            tx.count(NEXT_INO, INO_STRIDE)
        return Ino(ino)

    def sessions_holding(self, ino: Ino) -> list[SessionId]:
        """Return the sessions that have an inode open."""
        return list(self._opens.get(ino, ()))

    def reserved_bytes(self, quota: Ino) -> int:
        """Return what is promised to writers: see Reservations."""
        return self.reservations.reserved_bytes(quota)

    def granted_bytes(self, ino: Ino) -> int:
        """Return what a file may grow without asking."""
        return self.reservations.granted_bytes(ino)

    # -- sessions ---------------------------------------------------------------------------------------

    async def begin_session(self, *, host: str, pid: int, mountpoint: str, secret: bytes = b"") -> SessionId:
        """Register a session, durably, so that what it leaves behind can be cleaned up."""

        def begin(tx: Tx) -> SessionId:
            tx.count(NEXT_SESSION, 1)
            session_id = SessionId(tx.counter(NEXT_SESSION))
            tx.put(SESSION, Session(session_id, host, pid, mountpoint, tx.now_ns, secret))
            return session_id

        # Who holds changes back is not interested in sessions.
        session_id: SessionId = await self.run(begin, hold=self._held_by, of_session=True)
        self._slice_ranges[session_id] = []
        return session_id

    async def end_session(self, session_id: SessionId) -> None:
        """End a session: its opens, what it sustained, its slice ids, which nobody may commit from now on.

        One that was cancelled on the way is ended by another call.
        """
        self._slice_ranges.pop(session_id, None)
        self._unused.pop(session_id, None)
        await self._let_go(session_id, [ino for ino, holders in self._opens.items() if session_id in holders])
        sustained = await self.run(lambda tx: list(tx.group(SUSTAINED, session_id)))
        for ino in sustained:
            await self.run(self._release_rule, session_id, ino, by=session_id)

        def end(tx: Tx) -> None:
            for first in tx.group(SLICE_RANGE, session_id):
                tx.delete(SLICE_RANGE, (session_id, first))
            tx.delete(REPLIES, session_id)
            tx.delete(SESSION, session_id)

        await self.run(end)

    async def resume_session(
        self, session_id: SessionId, opens: Mapping[Ino, int], promised: Mapping[Ino, int] | None = None
    ) -> None:
        """Go on with a session whose client says how often it has which inodes open: that is true, whatever was believed.

        ``promised``: up to where it may grow them without asking, by an earlier owner's word. Call while no operation of the
        session runs. What it sustained and has not open any more is let go.
        """
        believed = {ino for ino, holders in self._opens.items() if session_id in holders}
        sustained = {ino for ino, holders in self._sustained.items() if session_id in holders}
        inos = list(opens)
        for first in range(0, len(inos), LOAD_AT_ONCE):
            # Many at a time; the rules below find them in memory, as far as it reaches.
            await self.run(
                lambda tx, part=inos[first : first + LOAD_AT_ONCE]: tx.require([(INODE, ino) for ino in part])
            )
        for ino, count in opens.items():
            self._opens.setdefault(ino, {})[session_id] = count
        for ino in opens:
            await self.run(self._sustain_rule, session_id, ino, of_session=True)
        for ino, end in (promised or {}).items():
            await self.run(self.reservations.restore, ino, end)
        await self._let_go(session_id, sorted((believed | sustained) - opens.keys()))

    async def _let_go(self, session_id: SessionId, inos: Sequence[Ino]) -> None:
        """Forget that a session has inodes open, however often."""
        for ino in inos:
            holders = self._opens.get(ino)
            if holders is not None and holders.pop(session_id, None) is not None and not holders:
                del self._opens[ino]
                self.reservations.release(ino)
        for ino in inos:
            if session_id in self._sustained.get(ino, ()):
                await self.run(self._release_rule, session_id, ino, of_session=True, by=session_id)

    def _note_sustained(self, session_id: SessionId, ino: Ino, *, is_kept: bool) -> None:
        holders = self._sustained.setdefault(ino, set())
        (holders.add if is_kept else holders.discard)(session_id)
        if not holders:
            del self._sustained[ino]

    def _sustain_rule(self, tx: Tx, session_id: SessionId, ino: Ino) -> None:
        inode: Inode | None = tx.get(INODE, ino)
        if inode is not None:
            content.sustain(tx, session_id, inode)

    def _release_rule(self, tx: Tx, session_id: SessionId, ino: Ino) -> None:
        others = bool(self._sustained.get(ino, set()) - {session_id})
        content.release(tx, session_id, ino, last=not self._opens.get(ino) and not others)

    def opened(self, session_id: SessionId, ino: Ino) -> None:
        """Count an open. Synchronous: runs in the stretch of the operation that opened."""
        holders = self._opens.setdefault(ino, {})
        holders[session_id] = holders.get(session_id, 0) + 1

    async def release(self, session_id: SessionId, ino: Ino) -> None:
        """Undo one open of a session; the last one ends promises and sustaining."""
        holders = self._opens.get(ino)
        if holders is None or session_id not in holders:
            return
        holders[session_id] -= 1
        if holders[session_id]:
            return
        del holders[session_id]
        if not holders:
            del self._opens[ino]
            self.reservations.release(ino)
        if session_id in self._sustained.get(ino, ()):
            await self.run(self._release_rule, session_id, ino, by=session_id)

    async def allocate_slices(self, session_id: SessionId, count: int) -> range:
        """Take slice ids for a session; durable before they are handed out, so never handed out again."""

        def take(tx: Tx) -> None:
            # Read as a row, so that a stride taken a moment ago by another is waited for.
            row: Counter | None = tx.get(COUNTER, NEXT_SLICE)
            have = row.value if row else 0
            if first + count > have:
                tx.count(NEXT_SLICE, max(SLICE_STRIDE, first + count - have))
            for ids in self._slice_ranges.get(session_id, ()):
                if first in ids:
                    tx.put(SLICE_RANGE, SliceRange(session_id, ids.start, len(ids)))
                    return
            refuse(errno.ESTALE, "the session has ended")

        ranges = self._slice_ranges.get(session_id)
        if ranges is None:
            raise FsError(errno.ESTALE, "the session has ended")
        if len(self._unused.get(session_id, ())) + count > MAX_UNUSED_IDS:
            raise FsError(errno.EINVAL, "the session has more slice ids than it commits")
        first = self._next_slice
        self._next_slice += count
        # In memory before it is durable: the ids are pending, though nobody has them yet. Neighbours make one run.
        start = ranges.pop().start if ranges and ranges[-1].stop == first else first
        ranges.append(range(start, first + count))
        self._unused.setdefault(session_id, set()).update(range(first, first + count))
        await self.run(take)
        return range(first, first + count)

    def is_pending(self, slice_id: SliceId) -> bool:
        """Return whether a live session holds this slice id and may still commit it."""
        return any(self.may_commit(session_id, slice_id) for session_id in self._slice_ranges)

    def may_commit(self, session_id: SessionId, slice_id: SliceId) -> bool:
        """Return whether this slice id was handed out to this session, which lives."""
        return any(slice_id in ids for ids in reversed(self._slice_ranges.get(session_id, ())))

    def is_unused(self, session_id: SessionId, slice_id: SliceId) -> bool:
        """Return whether this slice id was handed out to this session and surely never committed."""
        return slice_id in self._unused.get(session_id, ())

    def was_handed_out_before(self, slice_id: SliceId) -> bool:
        """Return whether an earlier owner handed this slice id out."""
        return any(slice_id in ids for ids in self._handed_out_before)

    def used(self, session_id: SessionId, slice_ids: Iterable[SliceId]) -> None:
        """Take note of a commit. Synchronous: runs in its stretch."""
        self._unused.get(session_id, set()).difference_update(slice_ids)

    async def put_format(self, volume_format: VolumeFormat) -> None:
        """Replace the volume's format, durably."""
        self._check()
        await self.store.put_format(self.owner.ownership, volume_format)
        self.format = volume_format

    def sessions(self) -> Sequence[Session]:
        """Return all sessions."""
        return cast("list[Session]", self.rows.resident(SESSION))
