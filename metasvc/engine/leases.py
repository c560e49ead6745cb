"""Leases on directories: by one a client answers for itself that a name is absent.

Owns, for one volume: which session has the lease on which directory and until when, and which leases were called back and not
given back yet. Must not know messages: a session that takes leases says how it is told of recalls (`listen`).

Why. Who makes or renames a file looks the new name up first, and a program that unpacks a tree does so with every name: two of
the six trips of a file. A cache that is only so old would break the promise that what one client closed the next one opens.

What it says. The session that made a directory gets the lease with the reply: it knows every name there, none, and from then
on the names that it adds itself. Each change that it makes there extends the lease by `TERM_S`. The first name that anybody
else adds ends it for good: a lease is given with a new directory only, so sessions that work in one directory pay for one
recall. Names that go need no recall: the holder asks about names that it has heard of.

Invariants:

1. One session at most has the lease on a directory.
2. Who adds a name to a directory on which another session has the lease is answered when the holder has given it back, or when
   it has run out. (What others read meanwhile may show the name: replies to reads do not wait.)
3. The holder believes in a lease for `HELD_S` from before it sent the request that extended it, on a clock that runs on while
   the machine sleeps; here it counts `TERM_S` from when the change came into force, hence to a later moment.
4. An owner does not know what the last one gave. So for `TERM_S` after it took over whoever adds a name is answered no sooner.

Interleavings. All is done in stretches without an await, the recall in the stretch in which the name comes into force, so no
extension comes between. The recall may overtake the reply to a request that extended the lease before it: recalls to a session
are numbered, a reply says how many there were when it was made, and the client takes no lease from one that says too few. A
client that connects anew has dropped what it held. The end of a session ends no lease: its client may not know yet. One who
waits may be cancelled; a holder that is gone, or cannot be told, delays him by `TERM_S` at most.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple

from metasvc.engine.owner import boottime_s
from metasvc.model import Ino, SessionId
from metasvc.store.tables import DENTRY, Row, Table

TERM_S: Final = 1.0
HELD_S: Final = 0.9
"""For how long a client believes in a lease: less than `TERM_S`, for clocks that do not run alike."""
MAX_LEASES: Final = 16_384
"""Of a volume: 3 MiB. A directory more is not leased while none has run out."""


class _Lease(NamedTuple):
    holder: SessionId
    until_s: float


class _Holder:
    """A session that takes leases."""

    __slots__ = ("recalls", "tell", "waiting")

    def __init__(self, tell: Callable[[Ino, int], None]) -> None:
        self.tell = tell
        self.recalls = 0
        self.waiting: dict[int, asyncio.Future[None]] = {}
        """By the numbers of the recalls that were not answered."""


class Leases:
    """The leases on directories of one volume. Used on one event loop."""

    def __init__(self, *, now_s: Callable[[], float] = boottime_s) -> None:
        self._now_s = now_s
        self._leases: OrderedDict[Ino, _Lease] = OrderedDict()
        """By when they were extended last."""
        self._holders: dict[SessionId, _Holder] = {}
        self._unknown_until_s = 0.0
        self.recalls_total = 0
        self.expired_total = 0
        """Recalls that were not answered before the lease ran out."""

    def __len__(self) -> int:
        return len(self._leases)

    def follow_another_owner(self) -> None:
        """Heed, for as long as they last, the leases that an earlier owner may have given. Call after taking over."""
        self._unknown_until_s = self._now_s() + TERM_S

    # -- holders ------------------------------------------------------------------------------------------------------------

    def listen(self, session_id: SessionId, tell: Callable[[Ino, int], None]) -> None:
        """Give leases to a session from now on. It has none now, whatever it had.

        ``tell`` is called with a directory and the number of the recall; it must not block, and may do nothing if the client
        cannot be reached.
        """
        former = self._holders.get(session_id)
        holder = self._holders[session_id] = _Holder(tell)
        if former is not None:
            holder.recalls = former.recalls
            _give_back(former, former.recalls)

    def forget(self, session_id: SessionId) -> None:
        """Give no more leases to a session that has ended. Those that it has run out by themselves."""
        self._holders.pop(session_id, None)

    def recalls(self, session_id: SessionId) -> int:
        """Return how many leases were called back from a session so far."""
        holder = self._holders.get(session_id)
        return 0 if holder is None else holder.recalls

    def extend(self, session_id: SessionId, *, made: Iterable[Ino], changed: Iterable[Ino]) -> list[Ino]:
        """Return the directories on which a session has the lease from now on, of those that a change of its has touched.

        Call in the stretch in which the change comes into force.
        """
        if session_id not in self._holders:
            return []
        leases = self._leases
        lease = _Lease(session_id, self._now_s() + TERM_S)
        extended = [ino for ino in changed if (have := leases.get(ino)) is not None and have.holder == session_id]
        for ino in extended:
            leases[ino] = lease
            leases.move_to_end(ino)
        for ino in made:
            if self._has_room():
                leases[ino] = lease
                extended.append(ino)
        return extended

    def _has_room(self) -> bool:
        if len(self._leases) >= MAX_LEASES:
            oldest = next(iter(self._leases))
            if self._leases[oldest].until_s > self._now_s():
                return False
            del self._leases[oldest]
        return True

    def given_back(self, session_id: SessionId, number: int) -> None:
        """Take note that a session holds nothing any more of what was called back up to this recall."""
        holder = self._holders.get(session_id)
        if holder is not None and holder.waiting:
            _give_back(holder, number)

    # -- those who add names --------------------------------------------------------------------------------------------------

    def add(self, changes: Mapping[Table, Mapping[Any, Row | None]], *, by: SessionId | None) -> Recall | None:
        """Call back what others hold on the directories in which a change adds names; what to wait for, if anything.

        Call in the stretch in which the change comes into force. Cost: 1 us for a name if there is nothing to do.
        """
        dentries = changes.get(DENTRY)
        if not dentries:
            return None
        now_s = self._now_s()
        is_added = False
        recall = Recall(self, self._now_s)
        for (parent, _), row in dentries.items():
            if row is None:
                continue
            is_added = True
            lease = self._leases.get(parent)
            if lease is None or lease.holder == by:
                continue
            del self._leases[parent]
            if lease.until_s > now_s:
                self._call_back(parent, lease, recall)
        if is_added and self._unknown_until_s > now_s:
            recall.until_s = max(recall.until_s, self._unknown_until_s)
            recall.is_blind = True
        return recall if recall.until_s else None

    def _call_back(self, ino: Ino, lease: _Lease, recall: Recall) -> None:
        self.recalls_total += 1
        recall.until_s = max(recall.until_s, lease.until_s)
        holder = self._holders.get(lease.holder)
        if holder is None:
            recall.is_blind = True
            return
        holder.recalls += 1
        answer = holder.waiting[holder.recalls] = asyncio.get_running_loop().create_future()
        recall.answers.append(answer)
        number = holder.recalls
        answer.add_done_callback(lambda _: holder.waiting.pop(number, None))
        holder.tell(ino, number)


class Recall:
    """Leases that were called back by one change."""

    __slots__ = ("_leases", "_now_s", "answers", "is_blind", "until_s")

    def __init__(self, leases: Leases, now_s: Callable[[], float]) -> None:
        self._leases = leases
        self._now_s = now_s
        self.answers: list[asyncio.Future[None]] = []
        self.until_s = 0.0
        """When the last of them has run out."""
        self.is_blind = False
        """Somebody may hold a lease who cannot be asked."""

    async def answered(self) -> None:
        """Wait until they were given back, or have run out. May be cancelled."""
        try:
            while (left_s := self.until_s - self._now_s()) > 0:
                waited = [answer for answer in self.answers if not answer.done()]
                if waited:
                    await asyncio.wait(waited, timeout=left_s)
                elif self.is_blind:
                    await asyncio.sleep(left_s)
                else:
                    return
        finally:
            for answer in self.answers:
                if not answer.done():
                    self._leases.expired_total += 1
                    answer.cancel()


def _give_back(holder: _Holder, number: int) -> None:
    for each in [each for each in holder.waiting if each <= number]:
        answer = holder.waiting.pop(each)
        if not answer.done():
            answer.set_result(None)
