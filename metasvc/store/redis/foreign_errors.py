"""Errors of Redis and of its driver as errors of ours: the one table.

Owns the remedy for each kind, and which of them say that the connection is of no more use. Must not know what was being done;
the texts name the server without user and password.
"""

from __future__ import annotations

from typing import Final

from redis.exceptions import AuthenticationError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from metasvc.errors import StoreError, StoreRefused

__all__ = ["FOREIGN", "Unavailable", "code_of", "is_usable_after", "translate"]

FOREIGN: Final = (RedisError, OSError, UnicodeError)
"""What the driver raises. TimeoutError, of a call past its deadline, is an OSError."""


class Unavailable(StoreError):
    """There is no server, or the connection to it broke: what was sent may have been done or not, and may be tried again."""


_LOST: Final = "the connection to {at} was lost: see whether the server runs and can be reached"
_LATE: Final = "{at} did not answer in time: see what keeps the server or the network busy"
_DENIED: Final = "{at} refused user or password: check both, and the server's ACL"
_OTHER: Final = "{at} could not do it: see the cause, and report it if it is not yours"

# By the first word of the server's answer.
_BY_CODE: Final[dict[str, tuple[type[StoreError], str]]] = {
    "LOADING": (Unavailable, "{at} is reading its data: wait, or see the server's log"),
    "BUSY": (Unavailable, "a script keeps {at} busy: see its SLOWLOG"),
    "READONLY": (Unavailable, "{at} is a replica: name the master in the store's URL"),
    "MASTERDOWN": (Unavailable, "{at} is a replica that lost its master: name the master in the store's URL"),
    "CLUSTERDOWN": (Unavailable, "the cluster of {at} is down: see CLUSTER INFO"),
    "TRYAGAIN": (Unavailable, "{at} is moving the volume to another server of the cluster"),
    "ATOLLSTALE": (Unavailable, "{at} lacks what was committed: it is a server that another one has taken over from"),
    "OOM": (
        StoreError,
        "{at} has no memory left: raise maxmemory there, or remove files; what is there is kept and can be read",
    ),
    "MISCONF": (StoreError, "{at} takes no changes, because it cannot save them: free its disk, see the server's log"),
    "NOREPLICAS": (StoreError, "{at} has too few replicas (min-replicas-to-write): see INFO replication there"),
    "NOAUTH": (StoreError, _DENIED),
    "WRONGPASS": (StoreError, _DENIED),
    "NOPERM": (
        StoreError,
        "the user has too few rights in {at}: see the guide for what it needs, or use one with +@all",
    ),
    "CROSSSLOT": (StoreRefused, "keys of one volume lie in several slots of {at}: this is a bug, please report it"),
    "WRONGTYPE": (
        StoreRefused,
        "{at} has something else under a key of AtollFS: give it a prefix or database of its own",
    ),
    "ATOLLMISFIT": (
        StoreRefused,
        "keys of {at} are not as AtollFS made them: give it a prefix or database of its own, or restore a backup",
    ),
    "ATOLLGONE": (StoreRefused, "the volume is no longer in {at}: it was deleted, or the server lost its data"),
}
_NOT_HERE: Final = "non local key"
"""In what a cluster says of a script that came to a key which has moved already."""
_UNUSABLE: Final = frozenset({"LOADING", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "ATOLLSTALE", "NOAUTH"})
"""Answers after which the connection leads to the wrong server, or a new one is worth a try."""


def code_of(error: BaseException) -> str:
    """Return the first word of the server's answer, "" if the error is none."""
    if not isinstance(error, RedisError):
        return ""
    code: str | None = getattr(error, "status_code", None)
    if code is None and isinstance(error, ResponseError):
        code = str(error).partition(" ")[0]
    return code or ""


def translate(error: BaseException, at: str) -> StoreError:
    """Return the StoreError for one of FOREIGN; raise it ``from`` the error. ``at`` names the server.

    StoreRefused where to try again is no use, Unavailable where the same call may do a moment later.
    """
    kind: type[StoreError]
    code = code_of(error)
    if code in _BY_CODE:
        kind, text = _BY_CODE[code]
    elif isinstance(error, AuthenticationError):
        kind, text = StoreError, _DENIED
    elif isinstance(error, UnicodeError):
        kind, text = StoreRefused, "a row does not fit into {at}: this is a bug, please report it"
    elif isinstance(error, TimeoutError | RedisTimeoutError):
        kind, text = Unavailable, _LATE
    elif isinstance(error, ResponseError) and _NOT_HERE in str(error):
        kind, text = _BY_CODE["TRYAGAIN"]
    elif isinstance(error, ResponseError):
        kind, text = StoreError, _OTHER
    else:
        kind, text = Unavailable, _LOST
    said = str(error) or type(error).__name__
    return kind(f"{text.format(at=at)} ({said})")


def is_usable_after(error: BaseException) -> bool:
    """Return whether a connection may be used again after an error: it has answered, and works as before."""
    return isinstance(error, ResponseError) and code_of(error) not in _UNUSABLE
