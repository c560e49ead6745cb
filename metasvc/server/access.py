"""How the service reaches the bucket of a volume that it owns: with keys that are kept for it, or with its environment.

Owns the keys while the volume is open. They are read once: whoever replaces them asks the owner, which is this process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from metasvc.api.bucket_keys import check_keys
from metasvc.model import VolumeFormat
from metasvc.server.keys import BucketKeys, KeysLocked

__all__ = ["VolumeAccess"]


class VolumeAccess:
    """The keys of one open volume."""

    def __init__(self, keys: BucketKeys | None, form: Callable[[], VolumeFormat]) -> None:
        """``form`` returns the format as clients need it. ``keys`` None: nothing is kept."""
        self._keys = keys
        self._form = form
        self._kept: Mapping[str, str] | None = None
        self._is_read = False
        self._reading = asyncio.Lock()

    async def kept(self) -> Mapping[str, str] | None:
        """Return the keys that are kept; None: there are none. KeysLocked, StoreError; asked again the next time."""
        if self._keys is not None and not self._is_read:
            async with self._reading:
                self._kept = await self._keys.of(self._form())
                self._is_read = True
        return self._kept

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
