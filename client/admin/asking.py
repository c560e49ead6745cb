"""What an operation gets: the volume, who asks, the parameters, and somebody to tell how far it is.

Owns reading parameters: they come from a socket or from the command line, and are checked here alike, before anything is done.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from client.address import normalize
from client.control.endpoint import Peer
from client.control.messages import ControlError, Items, JsonObject, Progress, name_of
from client.control.server import Report
from client.volume import OpenVolume
from metasvc.model import Caller

ITEMS_AT_ONCE: Final = 500
"""Rows of a result in one message: well below the limit of a message for rows of paths of 4 KiB."""


class Params:
    """Read the parameters of one request; each once, by name and type. ControlError for what is wrong."""

    def __init__(self, raw: JsonObject) -> None:
        self._raw = dict(raw)

    def _take(self, name: str, kinds: tuple[type, ...], wanted: str) -> Any:
        value = self._raw.pop(name, None)
        # bool is an int; it is meant only where it is asked for.
        if value is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            self._refuse(name, wanted)
        return value

    def _refuse(self, name: str, wanted: str) -> NoReturn:
        raise ControlError(f"parameter {name} of the request is to be {wanted}")

    def flag(self, name: str) -> bool:
        """Return a truth value; absent is false."""
        return bool(self._take(name, (bool,), "true or false"))

    def integer(self, name: str, *, least: int = 0) -> int | None:
        """Return a whole number of at least ``least`` below 2^63, or None."""
        value = self._take(name, (int,), "a whole number")
        if value is not None and not least <= value < 1 << 63:
            self._refuse(name, f"a whole number from {least} on")
        return None if value is None else int(value)

    def number(self, name: str) -> float | None:
        """Return a number that is not negative, or None."""
        value = self._take(name, (int, float), "a number")
        if value is not None and not 0 <= value < 1e15:
            self._refuse(name, "a number that is not negative")
        return None if value is None else float(value)

    def name(self, name: str) -> bytes:
        """Return a file name (one component); it must be there."""
        value = self._take(name, (str,), "a file name")
        found = b"" if value is None else name_of(value)
        if not found or b"/" in found or b"\0" in found or found in (b".", b".."):
            self._refuse(name, "a file name")
        return found

    def target(self, name: str) -> Target:
        """Return a path in the volume; absent is the root."""
        value = self._take(name, (dict,), "a path")
        if value is None:
            return Target(b"/", in_mount=False, follow=True)
        inner = Params(value)
        path = inner._take("path", (str,), "a path")
        if path is None:
            self._refuse(name, "a path")
        target = Target(normalize(name_of(path)), in_mount=inner.flag("in_mount"), follow=inner.flag("follow"))
        inner.done()
        return target

    def integers(self, name: str) -> list[int]:
        """Return a list of whole numbers; absent is empty."""
        value = self._take(name, (list,), "a list of whole numbers")
        if value is None:
            return []
        if not all(type(entry) is int and 0 <= entry < 1 << 63 for entry in value):
            self._refuse(name, "a list of whole numbers")
        return list(value)

    def done(self) -> None:
        """Refuse what nobody asked for: a misspelt parameter must not be ignored."""
        if self._raw:
            raise ControlError(f"the request has the unknown parameter {next(iter(self._raw))!r}: use the same atoll")


@dataclass(frozen=True, slots=True)
class Target:
    """A path in the volume, as a request gives it."""

    path: bytes
    """Absolute and normalized."""
    in_mount: bool
    """Counted from what the mount shows as its root (``--subdir``), not from the volume's."""
    follow: bool
    """Whether a symbolic link at the end stands for what it points to."""

    def as_json(self) -> JsonObject:
        """Return what Params.target() reads."""
        path = self.path.decode("utf-8", "surrogateescape")
        return {"path": path, "in_mount": self.in_mount, "follow": self.follow}


@dataclass(frozen=True, slots=True)
class Asked:
    """One request to an operation."""

    volume: OpenVolume
    peer: Peer
    params: Params
    report: Report

    def caller(self) -> Caller:
        """Return the credentials of who asks, for one call that changes something."""
        return self.volume.caller(self.peer.uid, self.peer.gid)

    def progress(self, text: str, done: int = 0, *, total: int | None = None, unit: str = "") -> None:
        """Show how far the operation is."""
        self.report.progress(Progress(text, done, total, unit))

    async def items(self, key: str, rows: Iterable[Any]) -> int:
        """Hand over rows of the result's list ``key``; how many."""
        batch: list[Any] = []
        total = 0
        for row in rows:
            batch.append(row)
            if len(batch) == ITEMS_AT_ONCE:
                await self.report.items(Items(key, batch))
                total += len(batch)
                batch = []
        if batch:
            await self.report.items(Items(key, batch))
        return total + len(batch)
