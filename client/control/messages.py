"""The language of the control socket: JSON documents, one a line.

Owns the shape of the messages and their limits; pure functions on bytes. Both sides treat what they read as foreign:
whatever is not one of these is refused with ControlError.

::

    command -> holder   {"version": 1, "request": "gc", "params": {...}}                   exactly one
    holder -> command   {"version": 1, "progress": {"text", "done", "total", "unit"}}      any number, one in 5 s
                        {"version": 1, "items": {"problems": [{...}, ...]}}                any number: parts of a result
                        {"version": 1, "result": {...}}                                    one, the last; or
                        {"version": 1, "error": {"code", "errno", "message", "retryable"}} one, the last

A connection carries one request. A command that hangs up withdraws its request. Names of files are bytes; in JSON they are
text with lone surrogates in place of bytes that are not UTF-8 (PEP 383).
"""

from __future__ import annotations

import errno
import json
import os
from dataclasses import dataclass
from typing import Any, Final

from chunkstore.errors import AtollError

VERSION: Final = 1
MAX_REQUEST_BYTES: Final = 64 << 10
MAX_REPLY_BYTES: Final = 4 << 20
"""One line. Long results come in parts, so that neither side ever holds a line of many megabytes."""
HEARTBEAT_S: Final = 5.0
SILENCE_S: Final = 30.0
"""A command gives up on a holder that says nothing for this long."""

JsonObject = dict[str, Any]


class ControlError(AtollError):
    """Say that a message on the control socket is malformed, too long or of another version."""

    errno = errno.EPROTO
    code = "control"


class RemoteError(AtollError):
    """Carry an error that the holder answered, with its own errno and code."""

    def __init__(self, message: str, *, code: str, errno: int, retryable: bool) -> None:
        super().__init__(message, errno=errno, retryable=retryable)
        self.code = code


@dataclass(frozen=True, slots=True)
class Request:
    """What a command asks."""

    name: str
    params: JsonObject


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a request is. ``done`` and ``total`` count ``unit``s; a total of None is not known."""

    text: str
    done: int = 0
    total: int | None = None
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Items:
    """Rows that belong to the list of this name in the result."""

    key: str
    rows: list[Any]


@dataclass(frozen=True, slots=True)
class Result:
    """The answer, but for lists that came as Items."""

    value: JsonObject


Reply = Progress | Items | Result | RemoteError


def text_of(name: bytes) -> str:
    """Return a file name or path as JSON carries it; inverse of name_of()."""
    return name.decode("utf-8", "surrogateescape")


def name_of(text: str) -> bytes:
    """Return the bytes of a file name or path that JSON carried. ControlError for surrogates that stand for no byte."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise ControlError("a name holds surrogates that stand for no byte") from None


def _line(document: JsonObject, limit: int) -> bytes:
    # ASCII only: lone surrogates, which stand for bytes of names, have no other form that all can read.
    line = json.dumps({"version": VERSION, **document}, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"
    if len(line) > limit:
        raise ControlError(f"a control message of {len(line)} bytes is over the limit of {limit}")
    return line


def encode_request(request: Request) -> bytes:
    """Return the line of a request; ControlError beyond 64 KiB."""
    return _line({"request": request.name, "params": request.params}, MAX_REQUEST_BYTES)


def encode_progress(progress: Progress) -> bytes:
    """Return the line of a progress message."""
    document = {"text": progress.text, "done": progress.done, "total": progress.total, "unit": progress.unit}
    return _line({"progress": document}, MAX_REPLY_BYTES)


def encode_items(items: Items) -> bytes:
    """Return the line of a part of a result; ControlError beyond 4 MiB."""
    return _line({"items": {items.key: items.rows}}, MAX_REPLY_BYTES)


def encode_result(value: JsonObject) -> bytes:
    """Return the line of a result; ControlError beyond 4 MiB."""
    return _line({"result": value}, MAX_REPLY_BYTES)


def encode_error(error: AtollError) -> bytes:
    """Return the line of an error; its message is cut to 8,192 characters."""
    document = {
        "code": error.code,
        "errno": error.errno,
        "message": error.message[:8192],
        "retryable": error.retryable,
    }
    return _line({"error": document}, MAX_REPLY_BYTES)


def _document(line: bytes, limit: int) -> JsonObject:
    if len(line) > limit:
        raise ControlError(f"a control message of {len(line)} bytes is over the limit of {limit}")
    if not line.endswith(b"\n"):
        raise ControlError("a control message ends within its line")
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:  # a line of [[[[… nests too deep for json
        raise ControlError("a control message is no JSON") from error
    if not isinstance(document, dict):
        raise ControlError("a control message is no JSON object")
    version = document.get("version")
    if version != VERSION or isinstance(version, bool):
        raise ControlError(
            f"the other side speaks version {version!r} of the control protocol, this one {VERSION}: use the same atoll"
        )
    return document


def decode_request(line: bytes) -> Request:
    """Read a request. ControlError says what is wrong with it."""
    document = _document(line, MAX_REQUEST_BYTES)
    name, params = document.get("request"), document.get("params")
    if not isinstance(name, str) or not isinstance(params, dict) or len(document) != 3:
        raise ControlError('a request is {"version", "request", "params"}')
    return Request(name, params)


def decode_reply(line: bytes) -> Reply:
    """Read a reply. ControlError says what is wrong with it."""
    document = _document(line, MAX_REPLY_BYTES)
    for kind, value in document.items():
        if kind == "version":
            continue
        if not isinstance(value, dict):
            break
        if kind == "progress":
            return _progress(value)
        if kind == "items" and len(value) == 1:
            ((key, rows),) = value.items()
            if isinstance(rows, list):
                return Items(key, rows)
        if kind == "result":
            return Result(value)
        if kind == "error":
            return _error(value)
    raise ControlError("a reply is one of progress, items, result, error")


def _progress(value: JsonObject) -> Progress:
    text, done, total, unit = (value.get(key) for key in ("text", "done", "total", "unit"))
    if isinstance(text, str) and isinstance(done, int) and isinstance(total, int | None) and isinstance(unit, str):
        return Progress(text, done, total, unit)
    raise ControlError("a progress message is {text, done, total, unit}")


def _error(value: JsonObject) -> RemoteError:
    code, number, message, retryable = (value.get(key) for key in ("code", "errno", "message", "retryable"))
    if isinstance(code, str) and isinstance(number, int) and isinstance(message, str) and isinstance(retryable, bool):
        return RemoteError(message, code=code, errno=number, retryable=retryable)
    raise ControlError("an error is {code, errno, message, retryable}")


def internal_error(error: BaseException) -> AtollError:
    """Return the one-line error that stands for an unexpected exception; who calls this has logged it."""
    if isinstance(error, OSError) and error.errno is not None:
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        return AtollError(f"{where}{error.strerror}", errno=error.errno)
    return AtollError(f"unexpected {type(error).__name__}: {error}; see the log of the mount")
