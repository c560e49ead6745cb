"""What a test leaves open, closed at its end on its own event loop: stores that hold connections, as a rule."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

_pending: list[Callable[[], Awaitable[None]]] = []


def close_at_end(close: Callable[[], Awaitable[None]]) -> None:
    """Have ``await close()`` run when the test that is running has ended, the last one first."""
    _pending.append(close)


async def close_all() -> None:
    """Close what tests left; called by tests/conftest.py."""
    while _pending:
        await _pending.pop()()
