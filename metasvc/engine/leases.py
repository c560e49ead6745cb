"""Leases on directories: what lets a client answer by itself what the service has told it.

Owns, for one volume: which sessions have leases on which directories and until when, and which leases were called back and not
given back yet. Must not know messages: a session that takes leases says how it is told of recalls (`listen`).

Why. A trip to the service costs 250 us and more. Who makes or renames a file looks the new name up first: two of the six trips
of unpacking a file. Who reads a dataset opens one small file after the other: one trip each. A cache that is only so old would
break the promise that what one client has closed the next one opens.

What it says. Nobody but the holder changes the directory: its names and its attributes, and the attributes and contents of the
files that have their only name there. (Not what lies in its subdirectories; but a change of a subdirectory's own attributes
is one of its parent's, too.) A session gets one with the reply that made a directory, or that lists it, and then knows all
that the reply shows. Its own changes there extend it, others' changes end it: before the change comes into force it is called
back. After that nobody gets one by listing for `SHARED_S`, so sessions that write to one directory pay for one recall.

Invariants:

1. A change comes into force when all others who have a lease on a directory that it concerns have given it back, or it has
   run out.
2. A holder believes in a lease for `HELD_S` from before it sent the request whose reply has it, on a clock that runs on while
   the machine sleeps; here it counts `TERM_S` from when the request was run, hence to a later moment.
3. A lease that has run out is kept here until somebody else changes the directory: that it is kept says that what its holder
   knew is still so, and it may be extended. When it goes its holder is told as of any other, though nobody waits for the
   answer: else it would take what it knew then for true when it gets the next one.
4. An owner does not know what the last one gave. So for `TERM_S` after it took over, or until all sessions of that time have
   connected anew, changes do not come into force.

Interleavings. All is done in stretches without an await. A change that concerns others' leases does not come into force in its
stretch: it is run again from the start when they have answered. A lease that was called back is remembered as `pending` until
then, so whoever comes meanwhile waits as well, and one who waits may be cancelled. A recall may overtake the reply that brought
the lease: the client takes nothing from a reply if there was a recall since it asked. A client that connects anew, or says
goodbye, has dropped what it held. Otherwise the end of a session ends no lease: its client may not know yet. A holder that
is gone, or cannot be told, delays others by `TERM_S`. (A client on a machine that is halted together with its clock, as a
hypervisor may do, believes for as much longer.)
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, cast

from metasvc.engine.owner import boottime_s
from metasvc.model import Ino, Inode, SessionId
from metasvc.store.tables import DENTRY, INODE, Row, Table

TERM_S: Final = 1.0
HELD_S: Final = 0.9
"""For how long a client believes in a lease: less than `TERM_S`, for clocks that do not run alike."""
SHARED_S: Final = 10.0
MAX_DIRECTORIES: Final = 16_384
"""With leases, of a volume: 5 MiB. One more is not leased while none has run out."""
MAX_HOLDERS: Final = 4096
"""Of a directory: a recall of so many is 10 ms of the event loop."""


class _Recalled:
    """A lease that was called back and not given back yet."""

    __slots__ = ("answer", "holder", "number", "until_s")

    def __init__(self, holder: SessionId, until_s: float) -> None:
        self.holder = holder
        self.number = 0
        """Of the recall, by which the holder answers; 0 if it could not be told."""
        self.until_s = until_s
        self.answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class _Holder:
    """A session that takes leases."""

    __slots__ = ("recalls", "tell", "waiting")

    def __init__(self, tell: Callable[[Ino, int], None]) -> None:
        self.tell = tell
        self.recalls = 0
        self.waiting: dict[int, tuple[Ino, _Recalled]] = {}
        """The recalls that were not answered, by their numbers."""


class Leases:
    """The leases on directories of one volume. Used on one event loop."""

    def __init__(self, *, now_s: Callable[[], float] = boottime_s) -> None:
        self._now_s = now_s
        self._leases: OrderedDict[Ino, dict[SessionId, float]] = OrderedDict()
        """Who has one, and until when; by when one on the directory was given or extended last."""
        self._shared: OrderedDict[Ino, float] = OrderedDict()
        """Directories whose leases were called back, and until when nobody gets one by listing."""
        self._pending: dict[Ino, list[_Recalled]] = {}
        """Leases that were called back: their holders may believe in them."""
        self._holders: dict[SessionId, _Holder] = {}
        self._unknown: asyncio.Future[None] | None = None
        self._unknown_until_s = 0.0
        self.recalls_total = 0
        self.expired_total = 0
        """Recalls that were not answered before the lease ran out."""

    def __len__(self) -> int:
        return len(self._leases)

    def follow_another_owner(self) -> None:
        """Heed, while they last, the leases that an earlier owner may have given. Call after taking over."""
        self._unknown = asyncio.get_running_loop().create_future()
        self._unknown_until_s = self._now_s() + TERM_S

    def all_connected_anew(self) -> None:
        """Take note that every session of the earlier owner's time has dropped what it held, or has ended for good."""
        if self._unknown is not None:
            if not self._unknown.done():
                self._unknown.set_result(None)
            self._unknown = None

    # -- holders ------------------------------------------------------------------------------------------------------------

    def listen(self, session_id: SessionId, tell: Callable[[Ino, int], None]) -> None:
        """Give leases to a session from now on. It has none now, whatever it had. Cost: 1 ms.

        ``tell`` is called with a directory and the number of the recall; it must not block, and may do nothing if the client
        cannot be reached.
        """
        self.drop(session_id)
        former = self._holders.get(session_id)
        holder = self._holders[session_id] = _Holder(tell)
        holder.recalls = 0 if former is None else former.recalls

    def drop(self, session_id: SessionId) -> None:
        """Take note that a session holds nothing any more: its client says so."""
        for ino in [ino for ino, holders in self._leases.items() if session_id in holders]:
            del self._leases[ino][session_id]
            if not self._leases[ino]:
                del self._leases[ino]
        holder = self._holders.get(session_id)
        if holder is not None:
            self.given_back(session_id, holder.recalls)

    def forget(self, session_id: SessionId) -> None:
        """Give no more leases to a session. Those that it has run out by themselves."""
        self._holders.pop(session_id, None)

    def give(self, session_id: SessionId, ino: Ino) -> bool:
        """Give a session the lease on a directory that it is about to read; return whether it has it now."""
        if session_id not in self._holders:
            return False
        now_s = self._now_s()
        until_s = self._shared.get(ino)
        if until_s is not None:
            if until_s > now_s:
                return False
            del self._shared[ino]
        return self._put(ino, session_id, now_s)

    def extend(self, session_id: SessionId, inos: Iterable[Ino], *, made: Iterable[Ino] = ()) -> list[Ino]:
        """Return those of some directories on which a session has the lease, from now on for `TERM_S`.

        ``made``: directories that it makes, on which it gets it. Call in the stretch of the change, if one is the reason.
        """
        if session_id not in self._holders:
            return []
        now_s, leases = self._now_s(), self._leases
        extended = [ino for ino in inos if session_id in leases.get(ino, ())]
        for ino in extended:
            leases[ino][session_id] = now_s + TERM_S
            leases.move_to_end(ino)
        extended += [ino for ino in made if self._put(ino, session_id, now_s)]
        return extended

    def _put(self, ino: Ino, session_id: SessionId, now_s: float) -> bool:
        leases = self._leases
        holders = leases.get(ino)
        if holders is None:
            if len(leases) >= MAX_DIRECTORIES:
                oldest = next(iter(leases))
                if max(leases[oldest].values()) > now_s:
                    return False
                for holder_id in leases.pop(oldest):
                    self._tell(holder_id, oldest)
            holders = leases[ino] = {}
        elif len(holders) >= MAX_HOLDERS and session_id not in holders:
            return False
        holders[session_id] = now_s + TERM_S
        leases.move_to_end(ino)
        return True

    def given_back(self, session_id: SessionId, number: int) -> None:
        """Take note that a session holds nothing any more of what was called back up to this recall."""
        holder = self._holders.get(session_id)
        if holder is None or not holder.waiting:
            return
        for each in [each for each in holder.waiting if each <= number]:
            ino, recalled = holder.waiting.pop(each)
            recalled.answer.set_result(None)
            pending = self._pending.get(ino, [])
            if recalled in pending:
                pending.remove(recalled)
                if not pending:
                    del self._pending[ino]

    # -- those who change something -----------------------------------------------------------------------------------------

    def call_back(
        self,
        changes: Mapping[Table, Mapping[Any, Row | None]],
        inode_before: Callable[[Ino], Inode | None],
        *,
        by: SessionId | None,
    ) -> Recall | None:
        """Call back what others hold on the directories that a change concerns; what to wait for before it comes into force.

        None if there is nothing to wait for: then the change must come into force in this stretch. Cost: 1 us for a row.
        """
        is_unknown = self._unknown is not None and self._unknown_until_s > self._now_s()
        if not self._leases and not self._pending and not is_unknown:
            return None
        concerned: set[Ino] = {parent for parent, _ in changes.get(DENTRY, ())}
        for ino, row in changes.get(INODE, {}).items():
            before, after = inode_before(ino), cast("Inode | None", row)
            if before is not None and before.is_dir:
                if after is not None and after._replace(child_bytes=before.child_bytes) == before:
                    continue  # what its files take, which nobody is shown
                concerned.add(ino)
            concerned.update(inode.parent for inode in (before, after) if inode is not None)
        if not concerned:
            return None
        now_s = self._now_s()
        recall = Recall(self._now_s)
        if is_unknown and self._unknown is not None:
            recall.add(self._unknown, self._unknown_until_s)
        for ino in concerned:
            holders = self._leases.get(ino)
            if holders is not None and (len(holders) > 1 or by not in holders):
                self._call_back(ino, holders, by, now_s)
            if ino in self._pending:
                self._await(ino, by, now_s, recall)
        return recall if recall.answers else None

    def _call_back(self, ino: Ino, holders: dict[SessionId, float], by: SessionId | None, now_s: float) -> None:
        for session_id, until_s in [each for each in holders.items() if each[0] != by]:
            del holders[session_id]
            recalled = None
            if until_s > now_s:
                self.recalls_total += 1
                recalled = _Recalled(session_id, until_s)
                self._pending.setdefault(ino, []).append(recalled)
            self._tell(session_id, ino, recalled)
        if not holders:
            del self._leases[ino]
        self._shared[ino] = now_s + SHARED_S
        self._shared.move_to_end(ino)
        while len(self._shared) > MAX_DIRECTORIES:
            self._shared.popitem(last=False)

    def _tell(self, session_id: SessionId, ino: Ino, recalled: _Recalled | None = None) -> None:
        """Tell a session that it has no lease on a directory any more. ``recalled``: somebody waits for its answer."""
        holder = self._holders.get(session_id)
        if holder is None:
            return
        holder.recalls += 1
        if recalled is not None:
            recalled.number = holder.recalls
            holder.waiting[holder.recalls] = ino, recalled
        holder.tell(ino, holder.recalls)

    def _await(self, ino: Ino, by: SessionId | None, now_s: float, recall: Recall) -> None:
        """Let a change wait for those who may still believe in a lease on a directory."""
        pending = self._pending[ino]
        for recalled in list(pending):
            if recalled.until_s <= now_s:
                self.expired_total += 1
                pending.remove(recalled)
                if (holder := self._holders.get(recalled.holder)) is not None:
                    holder.waiting.pop(recalled.number, None)
            elif recalled.holder != by:
                recall.add(recalled.answer, recalled.until_s)
        if not pending:
            del self._pending[ino]


class Recall:
    """What a change waits for."""

    __slots__ = ("_now_s", "answers")

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self.answers: list[tuple[asyncio.Future[None], float]] = []

    def add(self, answer: asyncio.Future[None], until_s: float) -> None:
        """Wait for an answer, others may do so too; no longer than until then."""
        self.answers.append((answer, until_s))

    async def answered(self) -> None:
        """Wait until all leases were given back, or have run out. May be cancelled."""
        while True:
            now_s = self._now_s()
            left = [(answer, until_s) for answer, until_s in self.answers if not answer.done() and until_s > now_s]
            if not left:
                return
            await asyncio.wait([answer for answer, _ in left], timeout=min(until_s for _, until_s in left) - now_s)
