"""Files that were opened by lease, without asking: the service is told of those that stay open.

Owns which opens of this session the service does not know of yet, or is being told of. Must not know what a lease says.

Why. A program that reads small files opens, reads and closes one in less time than a trip takes; telling the service of each
would cost it as much as the open. So one is told of when it has been open for `REGISTER_S`, and before the lease of its
directory is given back: until then nobody can remove the file.

Interleavings. `opened` and `release` are called in stretches; `register` starts a task for each open that the service is to
know of. A release that comes while it is being told waits for that: else the service would hear of it first. When a connection
has broken everything is said in the next Hello, of what was being told too; the answer that still comes counts the open a
second time, which is released. If the service knows the file no more (it was cut off from this machine for longer than
the lease, and the file is gone) the open goes on without it: what was read ahead can be read.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, Final

from chunkstore.background import TaskSet
from chunkstore.errors import AtollError
from metasvc.model import Ino

REGISTER_S: Final = 0.02

log = logging.getLogger(__name__)


class LocalOpens:
    """The opens of one session of which the service is not told, or is just being told."""

    def __init__(
        self,
        tell: Callable[[Ino], Coroutine[Any, Any, object]],
        give_back: Callable[[Ino], None],
        adopt: Callable[[Ino, int], None],
    ) -> None:
        """``tell`` opens a file at the service, ``give_back`` releases it there, ``adopt`` names it in the next Hello."""
        self._tell = tell
        self._give_back = give_back
        self._adopt = adopt
        self._local: Counter[Ino] = Counter()
        self._telling: Counter[Ino] = Counter()
        self._released: Counter[Ino] = Counter()
        """Of those that are being told: how many were released meanwhile."""
        self._lost: Counter[Ino] = Counter()
        """Open here, and unknown to the service for good."""
        self._timer: asyncio.TimerHandle | None = None
        self._tasks = TaskSet()
        self._running: set[asyncio.Task[None]] = set()
        self.total = 0

    @property
    def is_telling(self) -> bool:
        """Return whether the service is being told of an open."""
        return bool(self._running)

    def local(self) -> list[Ino]:
        """Return the files with opens of which the service was not told."""
        return list(self._local)

    def opened(self, ino: Ino) -> None:
        """Count an open that the service does not know of."""
        self.total += 1
        self._local[ino] += 1
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(REGISTER_S, self._register_old)

    def release(self, ino: Ino) -> bool:
        """Undo one open, if there is one of which the service does not know; return whether there was."""
        for opens in (self._local, self._lost):
            if opens[ino] > 0:
                _take(opens, ino)
                return True
        if self._telling[ino] > self._released[ino]:
            self._released[ino] += 1
            return True
        return False

    def register(self, inos: list[Ino] | None = None) -> list[asyncio.Task[None]]:
        """Tell the service of opens, of all by default; return the tasks that do, of those under way too."""
        for ino in list(self._local) if inos is None else inos:
            for _ in range(self._local.pop(ino, 0)):
                self._telling[ino] += 1
                task = self._tasks.start(self._register(ino), name=f"inode {ino} stays open")
                self._running.add(task)
                task.add_done_callback(self._running.discard)
        return list(self._running)

    def _register_old(self) -> None:
        # Those that were opened a moment ago are told of a little early: one message for all.
        self._timer = None
        self.register()

    async def _register(self, ino: Ino) -> None:
        is_known = False
        try:
            await self._tell(ino)
            is_known = True
        except AtollError as error:
            log.debug("inode %d is open and not known to the service any more: %s", ino, error)
        finally:
            if self._telling[ino] > 0:
                _take(self._telling, ino)
                if self._released[ino] > 0:
                    _take(self._released, ino)
                    if is_known:
                        self._give_back(ino)
                elif not is_known:
                    self._lost[ino] += 1
            elif is_known:
                self._give_back(ino)

    def adopt_all(self) -> None:
        """Let the next Hello say all of it: what the service was told on a stream that has broken may not have arrived."""
        for opens, released in ((self._local, Counter[Ino]()), (self._telling, self._released)):
            for ino, count in opens.items():
                if count > released[ino]:
                    self._adopt(ino, count - released[ino])
            opens.clear()
        self._released.clear()

    async def close(self) -> None:
        """Stop telling."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        await self._tasks.close()


def _take(opens: Counter[Ino], ino: Ino) -> None:
    opens[ino] -= 1
    if opens[ino] <= 0:
        del opens[ino]
