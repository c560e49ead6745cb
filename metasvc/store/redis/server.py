"""What a server must be, and what its settings promise: looked at with each new connection.

Owns the refusal of servers that would lose rows by design, and the warning of those that may lose what was acknowledged. Knows
no keys. docs/guides/redis.md says the same for people.

The settings are those of CONFIG GET. Where the user may not ask for them, as with managed services, INFO tells most.
"""

from __future__ import annotations

import logging
from typing import Final

from redis.exceptions import ResponseError

from metasvc.errors import StoreError
from metasvc.store.redis.link import Link

__all__ = ["MIN_VERSION", "check_server"]

MIN_VERSION: Final = (7, 0)
"""Scripts have flags since then: a script is refused before it begins, or not at all. Debian 12 has 7.0."""
_SETTINGS: Final = ("maxmemory", "maxmemory-policy", "appendonly", "appendfsync", "no-appendfsync-on-rewrite")
_KEEPS: Final = "noeviction"

log = logging.getLogger(__name__)
_told: set[str] = set()
"""What this process has warned of: once is enough."""


async def check_server(link: Link, at: str) -> None:
    """Refuse a server that cannot hold our rows, and warn of one that may lose them. StoreError, foreign errors. Two trips."""
    version = tuple(int(part) if part.isdigit() else 0 for part in link.hello.version.split(".")[:2])
    if version < MIN_VERSION:
        raise StoreError(
            f"{at} is version {link.hello.version or 'unknown'}: "
            f"use Redis {MIN_VERSION[0]}.{MIN_VERSION[1]} or newer, or Valkey"
        )
    settings = await _settings(link)
    policy = settings.get("maxmemory-policy")
    if settings.get("maxmemory", "0") != "0" and policy not in (None, _KEEPS):
        raise StoreError(
            f"{at} would remove names when its memory is full (maxmemory-policy {policy}): "
            f"set it to {_KEEPS}, then start again"
        )
    weak = _weak(settings)
    if weak:
        _warn(
            f"{at} {weak}: what was acknowledged may be lost when the server or its machine fails; see the guide on Redis"
        )
    if policy is None:
        _warn(f"{at} does not say whether it evicts keys: see to it that maxmemory-policy is {_KEEPS}")


async def _settings(link: Link) -> dict[str, str]:
    """Return what is known of the settings, by their names; those that nobody tells are missing."""
    settings: dict[str, str] = {}
    try:
        info = (await link.command(b"INFO", b"memory", b"persistence")).decode("utf-8", "replace")
        told = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
        for name, field in (("maxmemory", "maxmemory"), ("maxmemory-policy", "maxmemory_policy")):
            if field in told:
                settings[name] = told[field]
        if "aof_enabled" in told:
            settings["appendonly"] = "yes" if told["aof_enabled"] == "1" else "no"
    except ResponseError:
        pass  # not for this user
    try:
        answer = await link.command(b"CONFIG", b"GET", *_SETTINGS)
        settings |= {name.decode(): value.decode() for name, value in zip(answer[::2], answer[1::2], strict=True)}
    except ResponseError:
        pass  # not for this user, or not with this service
    return settings


def _weak(settings: dict[str, str]) -> str:
    """Return what does not keep what was acknowledged, "" if nothing is known of that kind."""
    if settings.get("appendonly") != "yes":
        return f"runs with appendonly {settings.get('appendonly', 'unknown')}"
    if settings.get("appendfsync") != "always":
        return f"runs with appendfsync {settings.get('appendfsync', 'unknown')}"
    if settings.get("no-appendfsync-on-rewrite") == "yes":
        return "runs with no-appendfsync-on-rewrite yes"
    return ""


def _warn(text: str) -> None:
    if text not in _told:
        _told.add(text)
        log.warning("%s", text)
