"""Tokens: who may ask what of this service.

Owns the key that signs them and the list of those that are good, which lie in the store, and what is in them. A token is a JWT
(HS256) that says what its holder may do (metasvc.server.rights); it is good as long as its record is in the list, and until it
expires. So a token that was revoked is refused by every process at its next use; processes look twice a second whether one was
revoked, and cut off whoever uses it (metasvc.server.service).

Settings of the store:

==========================  ==========================================================================================
``token-key``               the key that signs, 32 random bytes
``token/TENANT/ID``         a token that is good: a JSON object, see TokenInfo. TENANT is empty for the administrator's
``tokens-revoked``          how many were revoked, in decimal: another number says that the list is to be looked at
==========================  ==========================================================================================
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final

import jwt

from chunkstore.errors import AtollError
from metasvc.errors import StoreError
from metasvc.model import ROOT_INO, Ino
from metasvc.server.rights import Rights, TokenRefused
from metasvc.store import Store

TOKEN_KEY: Final = "token-key"
_REVOKED: Final = "tokens-revoked"
_LIST: Final = "token/"
_ALGORITHM: Final = "HS256"
_ISSUER: Final = "atoll"
_PROCESS_S: Final = 60
"""So long a token is good with which a process asks another one."""
_REMEMBERED_S: Final = 30 * 86400.0
"""So long tokens that have expired are listed."""
_MAX_LABEL: Final = 200


class AlreadyPrepared(AtollError):
    """Say that a store has its first token."""

    code = "already-prepared"
    errno = 17


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenInfo:
    """What is known of a token that was made; not the token itself, which nobody keeps."""

    token_id: str
    tenant: str = ""
    volume: str = ""
    uuid: str = ""
    """Of the volume: another one of the same name is not meant."""
    root: int = ROOT_INO
    path: str = ""
    """Where ``root`` was when the token was made, for people."""
    is_read_only: bool = False
    is_admin: bool = False
    created_s: float = 0.0
    expires_s: float | None = None
    """Seconds since 1970."""
    made_by: str = ""
    """Id of the token with which it was made; empty: with the store's URL."""
    label: str = ""
    """What people said that it is for."""

    @property
    def rights(self) -> Rights:
        """Return what it allows."""
        return Rights(
            self.token_id,
            self.tenant,
            self.volume,
            self.uuid,
            Ino(self.root),
            is_read_only=self.is_read_only,
            is_admin=self.is_admin,
            expires_s=self.expires_s,
        )


class Tokens:
    """Make, check and revoke the tokens of a store."""

    def __init__(self, key: bytes, store: Store) -> None:
        """Take the key."""
        self._key = key
        self._store = store

    @classmethod
    async def load(cls, store: Store) -> Tokens:
        """Read the key. StoreError with the remedy if the store was not prepared."""
        key = await store.setting(TOKEN_KEY)
        if key is None:
            raise StoreError("the store is not prepared for a service: run `atoll serve --init --store URL` once")
        return cls(key, store)

    def for_this_process(self) -> str:
        """Return a token with which this process may ask the others of its service, for a minute."""
        claims = {"jti": secrets.token_hex(8), "process": True, "exp": int(time.time()) + _PROCESS_S}
        return self._signed(claims)

    async def check(self, token: str) -> Rights:
        """Return what a token allows. TokenRefused; StoreError where the list cannot be read. One trip to the store."""
        rights = self._read(token)
        if not rights.is_process and await self._store.setting(_name(rights.tenant, rights.token_id)) is None:
            raise TokenRefused("the token was revoked: ask for another one")
        return rights

    async def make(self, info: TokenInfo) -> str:
        """Put a token on the list and return it. One that has expired for long goes from the list."""
        await self._forget_expired(info.tenant)
        if not await self._store.create_setting(_name(info.tenant, info.token_id), json.dumps(asdict(info)).encode()):
            raise StoreError("a token of this id exists already: try again")
        claims: dict[str, Any] = {"jti": info.token_id, "tenant": info.tenant}
        if info.volume:
            claims |= {"volume": info.volume, "uuid": info.uuid, "root": info.root, "ro": info.is_read_only}
        else:
            claims["admin"] = info.is_admin
        if info.expires_s is not None:
            claims["exp"] = info.expires_s
        return self._signed(claims)

    async def all_of(self, tenant: str | None) -> list[TokenInfo]:
        """Return the tokens of a tenant, None: all there are, the oldest first."""
        found = await self._store.settings(_LIST if tenant is None else _name(tenant, ""))
        return sorted(map(_info, found.values()), key=lambda info: info.created_s)

    async def revoke(self, tokens: Iterable[TokenInfo]) -> None:
        """Take tokens from the list, durably."""
        for info in tokens:
            await self._store.delete_setting(_name(info.tenant, info.token_id))
        await self._note_revoked()

    async def revoked_count(self) -> bytes:
        """Return what is another value once a token was revoked."""
        return await self._store.setting(_REVOKED) or b""

    async def no_longer_good(self, rights: Iterable[Rights]) -> set[str]:
        """Return the ids of those that are no longer on the list. A trip for each token."""
        gone = set()
        for each in {each.token_id: each for each in rights if not each.is_process}.values():
            if await self._store.setting(_name(each.tenant, each.token_id)) is None:
                gone.add(each.token_id)
        return gone

    def _signed(self, claims: dict[str, Any]) -> str:
        return jwt.encode({"iss": _ISSUER, "iat": int(time.time()), **claims}, self._key, algorithm=_ALGORITHM)

    def _read(self, token: str) -> Rights:
        try:
            claims = jwt.decode(
                token, self._key, algorithms=[_ALGORITHM], issuer=_ISSUER, options={"require": ["iss", "jti", "iat"]}
            )
        except jwt.ExpiredSignatureError as error:
            raise TokenRefused("the token has expired: ask for another one") from error
        except jwt.PyJWTError as error:
            raise TokenRefused(f"the token is not accepted ({error}): use one of this service") from error
        if claims.get("process") is True:
            return Rights(claims["jti"], is_process=True)
        if "tenant" not in claims:
            raise TokenRefused(
                "the token is of a kind that this service does not know: make another, "
                "with `atoll token create` or `atoll serve --new-admin-token`"
            )
        return Rights(
            claims["jti"],
            claims["tenant"],
            claims.get("volume", ""),
            claims.get("uuid", ""),
            Ino(claims.get("root", ROOT_INO)),
            is_read_only=claims.get("ro", False),
            is_admin=claims.get("admin", False),
            expires_s=claims.get("exp"),
        )

    async def _forget_expired(self, tenant: str) -> None:
        for info in await self.all_of(tenant):
            if info.expires_s is not None and info.expires_s < time.time() - _REMEMBERED_S:
                await self._store.delete_setting(_name(tenant, info.token_id))

    async def _note_revoked(self) -> None:
        while not await self._store.create_setting(_REVOKED, b"1"):
            before = await self.revoked_count()
            if await self._store.replace_setting(_REVOKED, b"%d" % (int(before) + 1), expected=before):
                return


def new_token(
    *,
    tenant: str = "",
    volume: str = "",
    uuid: str = "",
    root: Ino = ROOT_INO,
    path: str = "",
    is_read_only: bool = False,
    is_admin: bool = False,
    lasts_s: float | None = None,
    made_by: str = "",
    label: str = "",
) -> TokenInfo:
    """Return what a token with a new id is to be. ``lasts_s``: None, for ever."""
    now_s = time.time()
    return TokenInfo(
        token_id=secrets.token_hex(8),
        tenant=tenant,
        volume=volume,
        uuid=uuid,
        root=root,
        path=path,
        is_read_only=is_read_only,
        is_admin=is_admin,
        created_s=now_s,
        expires_s=None if lasts_s is None else now_s + lasts_s,
        made_by=made_by,
        label=label[:_MAX_LABEL],
    )


async def prepare(store: Store) -> str:
    """Make the key of a store and return a token of the administrator. AlreadyPrepared if there is one."""
    key = secrets.token_bytes(32)
    if not await store.create_setting(TOKEN_KEY, key):
        raise AlreadyPrepared(
            "the store is prepared already, and its admin token was printed then and is not kept: "
            "make another with --new-admin-token"
        )
    return await Tokens(key, store).make(new_token(is_admin=True, label="made by --init"))


async def another_admin_token(store: Store) -> str:
    """Return another token of the administrator: whoever can write the store may do everything anyway. StoreError."""
    tokens = await Tokens.load(store)
    return await tokens.make(new_token(is_admin=True, label="made by --new-admin-token"))


def _name(tenant: str, token_id: str) -> str:
    return f"{_LIST}{tenant}/{token_id}"


def _info(data: bytes) -> TokenInfo:
    return TokenInfo(**json.loads(data))
