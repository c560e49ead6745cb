"""Scripts of the server: sent by their digest, and as they are where the server does not know them.

A script is one step: nothing else runs between its first and its last command, and what it changes is one transaction of the
append-only file, which is found there wholly or not at all. But nothing that it did before an error is taken back. So each
script that changes anything looks at everything first: who owns the volume, types of the keys, the number of its arguments, and
whether the user may run the commands; behind the first command that writes there is none that can fail.

Scripts begin with ``#!lua`` (Redis 7): the server refuses one that may write, before it begins, where it is out of memory, a
replica, cut off from its own replicas (min-replicas-to-write) or cannot save. Scripts of reads say ``flags=no-writes`` and
run there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from redis.exceptions import NoScriptError

from metasvc.store.redis.link import Link

__all__ = ["Script"]


class Script:
    """One script."""

    def __init__(self, source: str) -> None:
        self._source = source.strip().encode()
        self._sha = hashlib.sha1(self._source, usedforsecurity=False).hexdigest().encode()

    async def run(self, link: Link, keys: Sequence[bytes], arguments: Sequence[bytes]) -> Any:
        """Run it; its answer. Foreign errors. One trip; two where the server has restarted since."""
        try:
            return await link.command(b"EVALSHA", self._sha, b"%d" % len(keys), *keys, *arguments)
        except NoScriptError:
            # Nothing was run: the same again does no harm.
            return await link.command(b"EVAL", self._source, b"%d" % len(keys), *keys, *arguments)
