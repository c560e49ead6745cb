"""Free ports on loopback for the servers that tests start."""

from __future__ import annotations

import contextlib
import os
import random
import socket
from pathlib import Path

HOST = "127.0.0.1"
_FIRST_PORT = 18_000
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_SHARERS = 16
"""Processes that share the tests of one run (pytest-xdist) have ports of their own, up to so many processes."""


def free_ports(count: int) -> list[int]:
    """Pick `count` different ports on which nothing listens.

    They lie below the range from which the kernel takes ports for outgoing connections, so that a server that was
    stopped finds its ports free when it starts again. Another process may still take one: who starts a server tries
    again with others. Which ones they are does not depend on the seed of the tests: others run with the same one.
    """
    ephemeral = int(_EPHEMERAL.read_text().split()[0])
    sharer = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _SHARERS
    own = range(_FIRST_PORT + sharer, ephemeral, _SHARERS)
    candidates = random.SystemRandom().sample(own, k=len(own))
    found: list[int] = []
    with contextlib.ExitStack() as held:
        for port in candidates:
            sock = held.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                sock.bind((HOST, port))
                found.append(port)
            if len(found) == count:
                return found
    raise OSError(f"no {count} free ports between {_FIRST_PORT} and {ephemeral}")
