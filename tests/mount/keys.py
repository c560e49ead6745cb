"""Volumes whose keys are kept by the service: mounted without any, and searched for them afterwards.

With ATOLL_TEST_KEYS=service in the environment, tests that mount through a service, and on S3, mount so
(tests/mount/service.py), and the mount is searched when they have ended.
"""

from __future__ import annotations

import base64
import os
import socket
import threading
from pathlib import Path
from typing import Final

from tests.mount.mounted import PROVIDER_VARIABLES, MountedVolume
from tests.servers.ports import HOST
from tests.servers.seaweedfs import SECRET_ACCESS_KEY

MASTER: Final = {"ATOLL_MASTER_KEY": base64.b64encode(os.urandom(32)).decode()}
SECRET: Final = SECRET_ACCESS_KEY.encode()
MIB: Final = 1 << 20
_VARIABLE: Final = "ATOLL_TEST_KEYS"


def are_kept() -> bool:
    """Return whether services of tests keep the keys of buckets."""
    return os.environ.get(_VARIABLE) == "service"


def in_memory(pid: int, secret: bytes) -> bool:
    """Return whether a process has some bytes anywhere in its memory."""
    overlap = len(secret) - 1
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in maps:
            span, permissions = line.split()[:2]
            start, end = (int(part, 16) for part in span.split("-"))
            if "r" not in permissions or line.rstrip().endswith(("[vvar]", "[vsyscall]", "[vvar_vclock]")):
                continue
            kept = b""
            while start < end:
                try:
                    memory.seek(start)
                    data = memory.read(min(4 * MIB, end - start))
                except OSError:
                    break  # behind the end of a mapped file
                if not data:
                    break
                if secret in kept + data:
                    return True
                kept = data[-overlap:]
                start += len(data)
    return False


def in_files(secret: bytes, *places: Path) -> list[Path]:
    """Return the files below some directories in which bytes are, sparse ones read as they are."""
    everything = (path for place in places for path in ([place] if place.is_file() else sorted(place.rglob("*"))))
    return [path for path in everything if path.is_file() and secret in path.read_bytes()]


class Relay:
    """Pass bytes on between a client and a service, and take note of whether a secret was among them."""

    def __init__(self, port: int) -> None:
        """Connect clients to this port."""
        self.seen_bytes = 0
        self.has_seen_secret = False
        self._to = port
        self._listener = socket.create_server((HOST, 0))
        self.port = int(self._listener.getsockname()[1])
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()
        self._sockets: list[socket.socket] = []

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection((HOST, self._to), timeout=60)
            except OSError:
                return
            server.settimeout(None)
            self._sockets += [client, server]
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self._pass_on, args=(source, target), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        before = b""
        try:
            while data := source.recv(1 << 16):
                self.seen_bytes += len(data)
                self.has_seen_secret |= SECRET in before + data
                before = data[-len(SECRET) :]
                target.sendall(data)
        except OSError:
            pass
        finally:
            source.close()
            target.close()

    def close(self) -> None:
        """Take no more, and end what is there."""
        self._listener.close()
        for each in self._sockets:
            each.close()


def assert_without_secret(volume: MountedVolume, *places: Path) -> None:
    """Look for the secret in the memory, the environment and the files of a mount."""
    assert not in_memory(volume.pid, SECRET)
    environment = Path(f"/proc/{volume.pid}/environ").read_bytes()
    assert not [name for name in PROVIDER_VARIABLES if name.encode() + b"=" in environment]
    assert SECRET not in environment + Path(f"/proc/{volume.pid}/cmdline").read_bytes()
    assert in_files(SECRET, volume.cache_dir, *places) == []
