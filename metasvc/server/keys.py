"""The keys of buckets in the store, encrypted under the master key of the service.

Owns the master keys, the form of what is stored, and the settings ``keys/VOLUME-UUID`` of the store. Values of keys are never
part of an error or of a log line.

A stored value: one byte 1, eight bytes that name the master key, a nonce of twelve random bytes, and what AES-256-GCM makes of
a JSON object {variable: value}. Authenticated with it are tenant, uuid and the name of the setting: the value of one volume
does not decrypt as that of another. (Nonces are random: after 2^32 values under one master key it should be replaced.)

The first master key encrypts, all decrypt. To replace one: put the new one first and keep the old one, restart all processes,
`serve --rotate-keys`, then take the old one away.
"""

from __future__ import annotations

import base64
import binascii
import errno
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from chunkstore.errors import AtollError
from metasvc.api.volume_format import parse_format
from metasvc.model import VolumeFormat
from metasvc.store import Store

__all__ = ["DELETED", "BucketKeys", "KeysLocked", "MasterKeyInvalid", "MasterKeys"]

MASTER_KEY_VARIABLE: Final = "ATOLL_MASTER_KEY"
_PREFIX: Final = "keys/"
DELETED: Final = "deleted/"
"""How the settings begin that say which volumes were deleted and keep their keys (metasvc.server.deleted)."""
_VERSION: Final = b"\x01"
_ID_BYTES: Final = 8
_NONCE_BYTES: Final = 12
_KEY_BYTES: Final = 32
_MAX_FILE_BYTES: Final = 64 * 1024
_REMEDY: Final = "32 bytes in base64, as `openssl rand -base64 32` makes them"

log = logging.getLogger(__name__)


class MasterKeyInvalid(AtollError):
    """Say why what was given is no master key."""

    code = "bad-master-key"
    errno = errno.EINVAL


class KeysLocked(AtollError):
    """Say why keys of buckets cannot be read, or not kept."""

    code = "keys-locked"
    errno = errno.EACCES


class MasterKeys:
    """Encrypt with one key, decrypt with any of several."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        """Take at least one key of 32 bytes, the one that encrypts first."""
        self._ciphers = {_id_of(key): AESGCM(key) for key in keys}
        self._first = _id_of(keys[0])

    @classmethod
    def parse(cls, text: str, *, source: str) -> MasterKeys:
        """Read keys that stand one in a line, or separated by blanks. MasterKeyInvalid, which names only the source."""
        keys = []
        for word in text.split():
            try:
                key = base64.b64decode(word, validate=True)
            except (binascii.Error, ValueError):
                key = b""
            if len(key) != _KEY_BYTES:
                raise MasterKeyInvalid(f"{source} has something that is no master key: give {_REMEDY}")
            keys.append(key)
        if not keys:
            raise MasterKeyInvalid(f"{source} has no master key: give {_REMEDY}")
        return cls(keys)

    @classmethod
    def find(cls, path: str | None, *, env: Mapping[str, str]) -> MasterKeys | None:
        """Return the keys of a file, else those of ATOLL_MASTER_KEY; None without. MasterKeyInvalid."""
        if path is None:
            text = env.get(MASTER_KEY_VARIABLE, "")
            return cls.parse(text, source=MASTER_KEY_VARIABLE) if text.strip() else None
        try:
            with open(path, encoding="ascii") as file:
                text = file.read(_MAX_FILE_BYTES)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text"
            raise MasterKeyInvalid(f"{path}: {reason}: name the file of the master key") from None
        return cls.parse(text, source=path)

    def seal(self, plain: bytes, *, bound_to: bytes) -> bytes:
        """Encrypt with the first key."""
        nonce = os.urandom(_NONCE_BYTES)
        return _VERSION + self._first + nonce + self._ciphers[self._first].encrypt(nonce, plain, bound_to)

    def open(self, sealed: bytes, *, bound_to: bytes) -> bytes:
        """Decrypt what one of the keys encrypted, bound to the same. KeysLocked."""
        if sealed[:1] != _VERSION:
            raise KeysLocked("the stored keys have a form that this version does not know: upgrade the service")
        name, rest = sealed[1 : 1 + _ID_BYTES], sealed[1 + _ID_BYTES :]
        cipher = self._ciphers.get(name)
        if cipher is None:
            raise KeysLocked("the stored keys are under another master key: add that one behind the first")
        try:
            return cipher.decrypt(rest[:_NONCE_BYTES], rest[_NONCE_BYTES:], bound_to)
        except (InvalidTag, ValueError):
            raise KeysLocked("the stored keys were altered, or are those of another volume: set them again") from None

    def knows(self, sealed: bytes) -> bool:
        """Return whether one of the keys encrypted this."""
        return sealed[1 : 1 + _ID_BYTES] in self._ciphers

    def is_first(self, sealed: bytes) -> bool:
        """Return whether the first key encrypted this."""
        return sealed[: 1 + _ID_BYTES] == _VERSION + self._first


def _id_of(key: bytes) -> bytes:
    return hashlib.sha256(b"atollfs master key" + key).digest()[:_ID_BYTES]


class BucketKeys:
    """The keys of all volumes of a store."""

    def __init__(self, store: Store, master: MasterKeys | None) -> None:
        """``master`` None: there are none, and none are taken."""
        self._store = store
        self._master = master

    @property
    def has_master(self) -> bool:
        """Return whether keys can be kept."""
        return self._master is not None

    async def check(self) -> None:
        """Refuse to serve a store with keys that could not be read. KeysLocked."""
        stored = await self._store.settings(_PREFIX)
        if stored and self._master is None:
            raise KeysLocked(
                f"the store has the keys of {len(stored)} volumes: give their master key with --master-key-file "
                f"or {MASTER_KEY_VARIABLE}"
            )
        locked = [name for name, sealed in stored.items() if self._master is None or not self._master.knows(sealed)]
        if locked:
            raise KeysLocked(
                f"the keys of {len(locked)} volumes are under a master key that was not given: add it behind the first"
            )

    async def of(self, form: VolumeFormat) -> dict[str, str] | None:
        """Return the keys of a volume; None if they are not kept here. KeysLocked. One trip."""
        sealed = await self._store.setting(_name(form))
        if sealed is None:
            return None
        if self._master is None:
            raise KeysLocked("the volume's keys are kept under a master key that this process was not given")
        found = json.loads(self._master.open(sealed, bound_to=_bound_to(form)))
        return {str(name): str(value) for name, value in found.items()}

    async def has(self, form: VolumeFormat) -> bool:
        """Return whether keys of a volume are kept, also such as cannot be read. One trip."""
        return await self._store.setting(_name(form)) is not None

    async def put(self, form: VolumeFormat, keys: Mapping[str, str]) -> None:
        """Keep the keys of a volume, in place of those of before; durable when it returns. KeysLocked."""
        if self._master is None:
            raise KeysLocked(
                f"this service keeps no keys: start it with --master-key-file or {MASTER_KEY_VARIABLE} ({_REMEDY}), "
                "or give the keys to the environment of the service and of all clients"
            )
        sealed = self._master.seal(json.dumps(dict(keys)).encode(), bound_to=_bound_to(form))
        name = _name(form)
        while not await self._store.create_setting(name, sealed):
            before = await self._store.setting(name)
            if before is not None and await self._store.replace_setting(name, sealed, expected=before):
                break

    async def forget(self, form: VolumeFormat) -> None:
        """Forget the keys of a volume."""
        await self._store.delete_setting(_name(form))

    async def rotate(self) -> int:
        """Encrypt anew, with the first master key, what another one encrypted; how many. KeysLocked. May be repeated."""
        if self._master is None:
            raise KeysLocked(f"there is no master key: give the new one and the old one, with --master-key-file or "
                             f"{MASTER_KEY_VARIABLE}")  # fmt: skip
        forms = {_name(form): form for form in await self._store.list_volumes()}
        # Behind those: whoever is deleted is remembered first.
        for value in (await self._store.settings(DELETED)).values():
            form = parse_format(value.decode())
            forms.setdefault(_name(form), form)
        done = 0
        for name, sealed in (await self._store.settings(_PREFIX)).items():
            if self._master.is_first(sealed):
                continue
            owner = forms.get(name)
            if owner is None:
                # Of a volume whose deletion was interrupted.
                await self._store.delete_setting(name)
                continue
            bound_to = _bound_to(owner)
            anew = self._master.seal(self._master.open(sealed, bound_to=bound_to), bound_to=bound_to)
            # Whoever replaced them meanwhile did so with the first key of his process: looked at by the next rotation.
            done += await self._store.replace_setting(name, anew, expected=sealed)
        return done


def _name(form: VolumeFormat) -> str:
    return f"{_PREFIX}{form.uuid}"


def _bound_to(form: VolumeFormat) -> bytes:
    return "\0".join((form.tenant, form.uuid, _name(form))).encode()
