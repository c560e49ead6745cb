"""URLs for administrators: of which objects, and what they do.

Owns the operation `sign_objects` of an AdminRequest. Every URL does one thing with one object, or lists one page, for `LIFE_S`;
all lie below the prefixes of the volume: its blocks, and its backups. So a tenant's administrator checks and cleans volumes on
a machine without keys, and reaches no other volume of a bucket that several share. Who may ask is the caller's part.
"""

from __future__ import annotations

import errno as E
from collections.abc import Callable
from typing import Final

from chunkstore.signing import S3Signer
from metasvc.api import atoll_pb2 as pb
from metasvc.errors import FsError
from metasvc.jobs.backups.shelf import prefixes_of

__all__ = ["LIFE_S", "OPERATION", "VERBS", "sign_objects"]

OPERATION: Final = "sign_objects"
"""The field of AdminRequest."""
LIFE_S: Final = 300
"""They are used at once; clocks may differ by less than this."""
MAX_KEYS: Final = 256
"""Of one request: 5 ms."""
_MAX_KEY_BYTES: Final = 1024

VERBS: Final = {
    pb.SignObjects.LIST: "list",
    pb.SignObjects.HEAD: "look at",
    pb.SignObjects.GET: "read",
    pb.SignObjects.DELETE: "delete",
}
"""What stands in the audit log."""


def sign_objects(asked: pb.SignObjects, uuid: str, signer: S3Signer) -> pb.AdminReply:
    """Sign what an administrator of the volume asks for. FsError EINVAL for what is none of its objects."""
    prefixes = (f"{uuid}/", *prefixes_of(uuid))
    reply = pb.AdminReply()
    reply.urls.life_s = LIFE_S
    if asked.verb == pb.SignObjects.LIST:
        reply.urls.urls.append(_listing(asked, prefixes, signer))
        return reply
    sign = _signs(asked.verb, signer)
    if not 0 < len(asked.keys) <= MAX_KEYS or asked.start_after:
        raise FsError(E.EINVAL, f"URLs are signed for 1 to {MAX_KEYS} objects")
    for key in asked.keys:
        _check(key, prefixes)
    reply.urls.urls.extend(sign(key) for key in asked.keys)
    return reply


def _signs(verb: pb.SignObjects.Verb.ValueType, signer: S3Signer) -> Callable[[str], str]:
    match verb:
        case pb.SignObjects.HEAD:
            return lambda key: signer.head(key, life_s=LIFE_S)
        case pb.SignObjects.GET:
            return lambda key: signer.get(key, life_s=LIFE_S)
        case pb.SignObjects.DELETE:
            return lambda key: signer.delete(key, life_s=LIFE_S)
    raise FsError(E.EINVAL, "this service does not know what is to be signed: upgrade it")


def _listing(asked: pb.SignObjects, prefixes: tuple[str, ...], signer: S3Signer) -> str:
    if len(asked.keys) != 1:
        raise FsError(E.EINVAL, "one prefix is listed at a time")
    [prefix] = asked.keys
    if not prefix.endswith("/"):
        raise FsError(E.EINVAL, f"{prefix[:200]!r} is no prefix: it ends in a slash")
    if prefix not in prefixes:
        _check(prefix.removesuffix("/"), prefixes)
    behind = asked.start_after
    if behind and (
        not behind.startswith(prefix)
        or len(behind.encode()) > _MAX_KEY_BYTES
        or any(segment in (".", "..") for segment in behind.split("/"))
    ):
        raise FsError(E.EINVAL, f"{behind[:200]!r} is no key of {prefix[:200]}")
    return signer.listing(prefix, start_after=behind, life_s=LIFE_S)


def _check(key: str, prefixes: tuple[str, ...]) -> None:
    """Refuse a key that is not of an object of the volume."""
    if (
        not any(key.startswith(prefix) for prefix in prefixes)
        or len(key.encode()) > _MAX_KEY_BYTES
        or any(segment in ("", ".", "..") for segment in key.split("/"))
    ):
        raise FsError(E.EINVAL, f"{key[:200]!r} is no object of this volume")
