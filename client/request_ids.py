"""Which request of the kernel is being worked on: for the lines that are logged meanwhile, here or in tasks started for it.

Owns the variable only. A number says which lines belong together; the access log (`.atoll/accesslog`) shows it, too.
"""

from __future__ import annotations

from contextvars import ContextVar
from itertools import count
from typing import Final

NO_REQUEST: Final = ""
current: Final[ContextVar[str]] = ContextVar("current request", default=NO_REQUEST)
"""For example ``WRITE-1742``; empty where no request is worked on."""
_numbers = count(1)


def begin(operation: str) -> str:
    """Give the request that begins in this task its id. 0.4 us."""
    request = f"{operation}-{next(_numbers)}"
    current.set(request)
    return request
