"""One page of a listing, as S3 writes it: ListBucketResult of ListObjectsV2 (Amazon S3 API Reference).

Pure. What comes is read by expat, element by element, and nothing of it is believed: a document type, which is where entities
that grow or name files would be, is refused, and so is a page with more objects than were asked for. Bytes that are no such
page are BucketUnavailable: a proxy on the way, or half of an answer, and another try may do.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple, NoReturn
from xml.parsers import expat

from chunkstore.buckets import ObjectInfo
from chunkstore.errors import BucketUnavailable

__all__ = ["MAX_PAGE_BYTES", "Page", "parse_page"]

MAX_PAGE_BYTES: Final = 8 << 20
"""A key has at most 1,024 bytes, each of which may take six in XML; a thousand of them, and what comes with each."""
_MAX_OBJECTS: Final = 1000
_MAX_TEXT: Final = 4096
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class Page(NamedTuple):
    """Objects in the order of the bucket, their keys whole, and whether more follow."""

    objects: list[ObjectInfo]
    is_truncated: bool


def parse_page(data: bytes, *, where: str) -> Page:
    """Read one page; ``where`` is what errors are about. BucketUnavailable."""
    reader = _Reader(where)
    parser = expat.ParserCreate(namespace_separator=" ")
    parser.buffer_text = True
    parser.StartDoctypeDeclHandler = lambda *_: reader.refuse("it has a document type")
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.CharacterDataHandler = reader.text
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        reader.refuse(expat.errors.messages.get(error.code, "it is no XML"))
    if reader.is_truncated is None:
        reader.refuse("it does not say whether more follows")
    return Page(reader.objects, reader.is_truncated)


class _Reader:
    """Gather objects while elements come."""

    def __init__(self, where: str) -> None:
        self.objects: list[ObjectInfo] = []
        self.is_truncated: bool | None = None
        self._where = where
        self._open: list[str] = []
        self._text = ""
        self._fields: dict[str, str] = {}

    def refuse(self, why: str) -> NoReturn:
        raise BucketUnavailable(f"{self._where}: what came is no page of a listing: {why}: check the endpoint")

    def start(self, name: str, _: object) -> None:
        name = name.rpartition(" ")[2]
        if not self._open and name != "ListBucketResult":
            self.refuse(f"it is {name[:80]!r}")
        if len(self._open) == 1 and name == "Contents":
            self._fields = {}
        self._open.append(name)
        self._text = ""

    def text(self, data: str) -> None:
        self._text += data
        if len(self._text) > _MAX_TEXT:
            self.refuse("it has too long a text")

    def end(self, name: str) -> None:
        path = self._open[1:]
        if path == ["IsTruncated"]:
            self.is_truncated = self._text.strip() == "true"
        elif path == ["Contents"]:
            self._add()
        elif len(path) == 2 and path[0] == "Contents":
            self._fields[path[1]] = self._text
        self._open.pop()
        self._text = ""

    def _add(self) -> None:
        if len(self.objects) == _MAX_OBJECTS:
            self.refuse(f"it has more than {_MAX_OBJECTS} objects")
        found = self._fields
        try:
            size_bytes = int(found["Size"])
            info = ObjectInfo(found["Key"], size_bytes, _ns_of(found["LastModified"]), found.get("ETag") or None)
        except (KeyError, ValueError) as error:
            self.refuse(f"an object lacks size, time or key ({error})")
        self.objects.append(info)


def _ns_of(text: str) -> int:
    """Return an ISO 8601 time, in ns since 1970."""
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    # Whole microseconds: a float of seconds would lose some.
    return (moment - _EPOCH) // timedelta(microseconds=1) * 1000
