"""What the holder of a token may do: values, and the questions that are asked of them. Pure functions.

A token belongs to one of these:

=====================  ==============================================================================================
the administrator      everything in the service
a tenant's             everything in the volumes of one tenant: make, limit, check, dump, delete them; tokens of the tenant
administrator
a user of a volume     files of one volume, or of one directory of it, reading or also writing; whoever may write the whole
                       volume also clones, and restores from the trash
another process of     asks for volumes to be handed over. Made by a process for a minute, never given out
the service
=====================  ==============================================================================================

Whoever is refused learns nothing of what is out of reach: a volume of another tenant is refused like one that does not exist.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

from chunkstore.errors import AtollError
from metasvc.model import ROOT_INO, Ino

__all__ = ["EVERYTHING", "Rights", "TokenRefused"]


class TokenRefused(AtollError):
    """Say why a token is not accepted, or not for what was asked."""

    code = "token-refused"
    errno = 13


@dataclass(frozen=True, slots=True)
class Rights:
    """Of one token."""

    token_id: str
    tenant: str = ""
    """Whose volumes it is about; empty: everybody's."""
    volume: str = ""
    """Which of them; empty: all."""
    uuid: str = ""
    """Of that volume: another one of the same name is not meant."""
    root: Ino = ROOT_INO
    """The directory that is reached."""
    is_read_only: bool = False
    is_admin: bool = False
    """Administers what it is about."""
    is_process: bool = False
    """Another process of the service."""
    expires_s: float | None = None
    """Seconds since 1970."""

    @property
    def is_confined(self) -> bool:
        """Return whether it reaches only part of its volume."""
        return self.root != ROOT_INO

    def left_s(self) -> float | None:
        """Return for how many seconds the token is still good; None: for ever."""
        return None if self.expires_s is None else self.expires_s - time.time()

    def require_volume(self, tenant: str, name: str) -> None:
        """Refuse volumes that are out of reach."""
        if self.is_process or (self.tenant and self.tenant != tenant) or (self.volume and self.volume != name):
            raise TokenRefused(f"the token is not for {tenant}/{name}: use one that is")

    def require_same(self, uuid: str) -> None:
        """Refuse a volume that has only the name of the one that is meant."""
        if self.uuid not in ("", uuid):
            raise TokenRefused(
                "the token is for a volume of the same name that was deleted: use one for the new volume"
            )

    def require_whole(self, what: str) -> None:
        """Refuse a token of a part of a volume."""
        if self.is_confined:
            raise TokenRefused(f"the token reaches one directory of the volume only, and not {what}")

    def require_writing(self, what: str) -> None:
        """Refuse a token that may only read."""
        if self.is_read_only:
            raise TokenRefused(f"the token is read-only: {what} needs one that may write")

    def require_admin(self, what: str, *, tenant: str) -> None:
        """Refuse whoever does not administer a tenant (empty: the service)."""
        if not self.is_admin or self.volume or (self.tenant and self.tenant != tenant):
            of = f"tenant {tenant}" if tenant else "the service"
            raise TokenRefused(f"{what} needs a token of the administrator of {of}")

    def sees(self, tenant: str, name: str) -> bool:
        """Return whether a volume is shown to it."""
        return not self.is_process and self.tenant in ("", tenant) and self.volume in ("", name)


EVERYTHING: Final = Rights("", is_admin=True)
"""Of what runs in the service itself."""
