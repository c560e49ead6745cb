"""The audit log: who administered what, and how it ended. A line for each call that changes something, or reveals all names.

Lines go to the logger ``atoll.audit``, as the other lines of the service do, each with the id of the token (never the token),
the client's address, what was asked for, what it was about and the outcome. They are written when the call has ended: what was
refused has one, too. A command that makes thousands of calls has one line for all of a kind, and another after a quarter of an
hour.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from metasvc.server.rights import Rights

__all__ = ["LOGGER", "Commands", "audited"]

LOGGER: Final = "atoll.audit"
_AGAIN_S: Final = 900.0
_COMMANDS: Final = 1000
"""Remembered at a time; of one that was forgotten there is one line more."""

log = logging.getLogger(LOGGER)


@contextmanager
def audited(rights: Rights, peer: str, action: str, subject: str) -> Iterator[None]:
    """Write a line when what is done in the block ends, with the error that it raised if it did."""
    outcome = "cancelled"
    try:
        yield
        outcome = "done"
    except Exception as error:
        outcome = f"failed: {error}"
        raise
    finally:
        _write(rights, peer, action, subject, outcome)


class Commands:
    """Calls of which a command makes many. Who asks names the command, and has a line every `_AGAIN_S` at the least."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told: OrderedDict[tuple[str, ...], float] = OrderedDict()

    @contextmanager
    def audited(self, rights: Rights, peer: str, action: str, subject: str, *, command: bytes) -> Iterator[None]:
        """As audited(), but only failures are written if a line of the same command is young."""
        key = rights.token_id, action, subject, command.hex()
        told_s = self._told.get(key)
        if command and told_s is not None and self._clock() - told_s < _AGAIN_S:
            try:
                yield
            except Exception as error:
                _write(rights, peer, action, subject, f"failed: {error}")
                raise
            return
        with audited(rights, peer, action, subject):
            yield
        self._told[key] = self._clock()
        self._told.move_to_end(key)
        while len(self._told) > _COMMANDS:
            self._told.popitem(last=False)


def _write(rights: Rights, peer: str, action: str, subject: str, outcome: str) -> None:
    log.info("audit: %s %s by token %s at %s: %s", action, subject, rights.token_id, peer, outcome)
