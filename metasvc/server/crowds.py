"""Bounds of what many connections take together, whoever they belong to.

Owns who waits to be let in (`Doorway`), the bytes of messages that have not come whole and how fast they come (`Unfinished`),
and log lines that would be many (`Repeated`). In each crowd it is the oldest that goes: whoever means it is let in, or has sent
the rest, within a moment, so those that are there for longest are those that stand still. Clients that go are told to come
again.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from metasvc.api import atoll_pb2 as pb
from metasvc.api.frames import Frames

__all__ = ["Doorway", "Repeated", "Unfinished"]

MOST_WAITING: Final = 4096
"""A thousand machines that come back at once are let in within a second or two."""
UNFINISHED_BYTES: Final = 128 * 1024 * 1024
SMALL_BYTES: Final = 64 * 1024
"""Of a connection that are not counted: what it has anyway."""
LARGE_BYTES: Final = 2 * 1024 * 1024
"""What comes of a message beyond this comes in pieces, one at a time in the whole service. Volumes that are loaded do not."""
PIECE_S: Final = 0.004
"""From piece to piece. They have up to 256 kB (what the event loop reads at once) and cost 0.4 ms each, so others keep nine
tenths. Without it 32 messages of 15 MiB were 0.7 s in which nobody else was served."""
PAUSE_S: Final = 1.0

log = logging.getLogger(__name__)


class Repeated:
    """Log lines of one kind, the first at once and then one in `PAUSE_S` with the number of those between."""

    def __init__(self) -> None:
        self._pause: asyncio.TimerHandle | None = None
        self._untold = 0
        self._last = ""

    def tell(self, text: str) -> None:
        """Log a line, or count it."""
        if self._pause is None:
            log.warning("%s", text)
            self._pause = asyncio.get_running_loop().call_later(PAUSE_S, self._go_on)
        else:
            self._untold += 1
            self._last = text

    def _go_on(self) -> None:
        self._pause = None
        if self._untold:
            more, self._untold = self._untold - 1, 0
            self.tell(f"{self._last} (and {more} more like it)" if more else self._last)


class Doorway:
    """Connections that have not said who they are."""

    def __init__(self, repeated: Repeated, *, most: int = MOST_WAITING) -> None:
        self._repeated = repeated
        self._most = most
        self._waiting: dict[Frames, None] = {}
        """The oldest first."""

    def enter(self, frames: Frames) -> None:
        """Let a connection wait; the oldest one goes if that is one too many."""
        self._waiting[frames] = None
        if len(self._waiting) > self._most:
            oldest = next(iter(self._waiting))
            del self._waiting[oldest]
            self._repeated.tell(
                f"client {oldest.peer}: more than {self._most} wait to be let in: its connection is closed"
            )
            oldest.end(pb.Ended.AGAIN, "too many connections wait to be let in: come again")

    def leave(self, frames: Frames) -> None:
        """Take note that a connection is let in, or gone."""
        self._waiting.pop(frames, None)


class Unfinished:
    """Messages that have not come whole."""

    def __init__(self, repeated: Repeated, *, limit_bytes: int = UNFINISHED_BYTES) -> None:
        self._repeated = repeated
        self._limit_bytes = limit_bytes
        self._held: dict[Frames, int] = {}
        """Bytes of each, that which began first at the beginning."""
        self._next: dict[Frames, None] = {}
        """Held until it is their turn."""
        self._turn: asyncio.TimerHandle | None = None
        self.total_bytes = 0

    def note(self, frames: Frames, size_bytes: int, *, is_new: bool) -> None:
        """Take note of how much of a message has come; ``is_new``: another one than before."""
        before = self._held.pop(frames, 0) if is_new else self._held.get(frames, 0)
        self.total_bytes -= before
        if size_bytes <= SMALL_BYTES:
            self._held.pop(frames, None)
            return
        self._held[frames] = size_bytes
        self.total_bytes += size_bytes
        if size_bytes > LARGE_BYTES:
            self._wait(frames)
        while self.total_bytes > self._limit_bytes:
            oldest = next(iter(self._held))
            self.total_bytes -= self._held.pop(oldest)
            self._repeated.tell(
                f"client {oldest.peer}: its message is the oldest of those that do not end, and they are too many: "
                "its connection is closed"
            )
            oldest.give_up("sends a message too slowly, where many do")

    def _wait(self, frames: Frames) -> None:
        frames.hold(is_held=True)
        self._next[frames] = None
        if self._turn is None:
            self._turn = asyncio.get_running_loop().call_later(PIECE_S, self._let_go)

    def _let_go(self) -> None:
        """Let the next connection receive a piece, after which it waits again."""
        self._turn = None
        while self._next:
            frames = next(iter(self._next))
            del self._next[frames]
            if not frames.closed.done():
                frames.hold(is_held=False)
                break
        if self._next:
            self._turn = asyncio.get_running_loop().call_later(PIECE_S, self._let_go)
