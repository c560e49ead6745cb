"""Tokens: who may ask what of this service.

Owns the key that signs them, which lies in the store, and what is in them. Here is one kind only, the admin's, which may do
everything; tokens for a tenant, a volume or a subtree are not there yet.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import Any, Final

import jwt

from chunkstore.errors import AtollError
from metasvc.errors import StoreError
from metasvc.store import Store

TOKEN_KEY: Final = "token-key"
"""Name of the setting."""
_ALGORITHM: Final = "HS256"
_ISSUER: Final = "atoll"


class TokenRefused(AtollError):
    """Say why a token is not accepted."""

    code = "token-refused"
    errno = 13


class AlreadyPrepared(AtollError):
    """Say that a store has its first token."""

    code = "already-prepared"
    errno = 17


@dataclass(frozen=True, slots=True)
class Identity:
    """Who asks."""

    token_id: str
    is_admin: bool


class Tokens:
    """Check tokens against the key of a store."""

    def __init__(self, key: bytes) -> None:
        """Take the key."""
        self._key = key

    @classmethod
    async def load(cls, store: Store) -> Tokens:
        """Read the key. StoreError with the remedy if the store was not prepared."""
        key = await store.setting(TOKEN_KEY)
        if key is None:
            raise StoreError("the store is not prepared for a service: run `atoll serve --init --store URL` once")
        return cls(key)

    def for_this_process(self) -> str:
        """Return a token with which this process may ask the others of its service, for a minute."""
        claims = {**_new_claims(), "admin": True, "exp": int(time.time()) + 60}
        return jwt.encode(claims, self._key, algorithm=_ALGORITHM)

    def check(self, token: str) -> Identity:
        """Return whose token it is. TokenRefused."""
        try:
            claims = jwt.decode(
                token, self._key, algorithms=[_ALGORITHM], issuer=_ISSUER, options={"require": ["iss", "jti", "iat"]}
            )
        except jwt.PyJWTError as error:
            raise TokenRefused(f"the token is not accepted ({error}): use one of this service") from error
        if claims.get("admin") is not True:
            raise TokenRefused("the token is of a kind that this service does not know: upgrade the service")
        return Identity(str(claims["jti"]), is_admin=True)


async def prepare(store: Store) -> str:
    """Make the key of a store and return the admin token. AlreadyPrepared if there is one."""
    key = secrets.token_bytes(32)
    if not await store.create_setting(TOKEN_KEY, key):
        raise AlreadyPrepared("the store is prepared already: its admin token was printed then and is not kept")
    return jwt.encode({**_new_claims(), "admin": True}, key, algorithm=_ALGORITHM)


def _new_claims() -> dict[str, Any]:
    return {"iss": _ISSUER, "jti": secrets.token_hex(8), "iat": int(time.time())}
