"""The audit log: who administered what, and how it ended. A line for each call that changes something, or reveals all names.

Lines go to the logger ``atoll.audit``, as the other lines of the service do, each with the id of the token (never the token),
the client's address, what was asked for, what it was about and the outcome. They are written when the call has ended: what was
refused has one, too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from metasvc.server.rights import Rights

__all__ = ["LOGGER", "audited"]

LOGGER: Final = "atoll.audit"

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
        log.info("audit: %s %s by token %s at %s: %s", action, subject, rights.token_id, peer, outcome)
