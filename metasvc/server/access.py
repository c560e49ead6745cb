"""How the service reaches the bucket of a volume that it owns: with keys that are kept for it, or with its environment.

Owns the keys while the volume is open. They are read once: whoever replaces them asks the owner, which is this process.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from chunkstore.errors import BucketDenied, BucketInvalid
from chunkstore.signing import S3Signer
from metasvc.api.bucket_keys import check_keys
from metasvc.errors import FsError
from metasvc.model import Slice, VolumeFormat
from metasvc.server.keys import BucketKeys, KeysLocked

__all__ = ["URL_LIFE_S", "VolumeAccess"]

URL_LIFE_S: Final = 900
"""So long a URL may be used: also by a client that has ended, for a file that is gone."""


class Packs(Protocol):
    """What reads packs for clients that may not have them whole."""

    async def read(self, pack: Slice, start: int, end: int) -> bytes:
        """Return bytes of a pack. Errors of the bucket."""

    async def prefetch(self, pack: Slice) -> None:
        """Start to fetch a pack whole."""


class VolumeAccess:
    """The keys of one open volume."""

    def __init__(self, keys: BucketKeys | None, form: Callable[[], VolumeFormat]) -> None:
        """``form`` returns the format as clients need it. ``keys`` None: nothing is kept."""
        self._keys = keys
        self._form = form
        self._kept: Mapping[str, str] | None = None
        self._is_read = False
        self._reading = asyncio.Lock()
        self._signer: tuple[Mapping[str, str], S3Signer] | None = None
        self.packs: Packs | None = None
        """What reads packs, while the jobs of the volume run."""

    async def kept(self) -> Mapping[str, str] | None:
        """Return the keys that are kept; None: there are none. KeysLocked, StoreError; asked again the next time."""
        if self._keys is not None and not self._is_read:
            async with self._reading:
                self._kept = await self._keys.of(self._form())
                self._is_read = True
        return self._kept

    @property
    def may_sign(self) -> bool:
        """Return whether URLs may be in use."""
        return self._keys is not None and self._keys.has_master

    async def signer(self) -> S3Signer | None:
        """Return what signs URLs for clients; None where they need keys: none are kept, or the bucket is not on S3."""
        kept = await self.kept()
        url = self._form().bucket_url
        if kept is None or not url.startswith("s3://"):
            return None
        if self._signer is None or self._signer[0] is not kept:
            self._signer = kept, S3Signer(url, kept)
        return self._signer[1]

    async def can_sign(self) -> bool:
        """Return whether URLs can be signed, also where the keys that are kept do not do. StoreError."""
        try:
            return await self.signer() is not None
        except (KeysLocked, BucketDenied, BucketInvalid):
            return False

    async def require_signer(self) -> S3Signer:
        """Return what signs URLs. ENOTSUP."""
        signer = await self.signer()
        if signer is None:
            raise FsError(errno.ENOTSUP, "the service signs no URLs for this volume: its keys are in the environment")
        return signer

    def require_packs(self) -> Packs:
        """Return what reads packs. EAGAIN while the volume is being opened or closed."""
        if self.packs is None:
            raise FsError(errno.EAGAIN, "the service does not read packs now: the volume is being opened or closed")
        return self.packs

    async def replace(self, variables: Mapping[str, str]) -> None:
        """Keep other keys from now on. KeysLocked, BucketKeysInvalid."""
        if self._keys is None:
            raise KeysLocked("this service keeps no keys")
        form = self._form()
        checked = check_keys(form.bucket_url, variables)
        async with self._reading:
            self._is_read = False
            await self._keys.put(form, checked)
            self._kept, self._is_read = checked, True
