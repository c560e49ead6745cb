"""Redis for the tests: servers on loopback with data of their own, or one that the environment names.

The program is Debian's: one binary with several names, which redis-tools brings without a daemon. ATOLL_TEST_REDIS may be the
URL of a server that tests share then, with a user who may do everything; tests that stop or reconfigure a server always start
one. What tests put there stays, under prefixes that begin with `world-`.

Servers are ended by their pids only. Must not know AtollFS.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import quote, unquote, urlsplit

import redis

from tests.servers.ports import HOST, free_ports

__all__ = ["PASSWORD", "USER", "Redis", "RedisAt", "named_server", "redis_cluster"]

USER: Final = "atoll"
PASSWORD: Final = "of:the@tests/?#%"
_VARIABLE: Final = "ATOLL_TEST_REDIS"
_PROGRAM: Final = "redis-check-rdb"
"""Debian's name for the file that is all of Redis's programs; it is the server where it is called redis-server."""
_READY_S: Final = 60.0
_POLL_S: Final = 0.01
_prefixes = itertools.count(1)


class RedisAt:
    """A server that runs somewhere, and the user for it."""

    def __init__(self, host: str, port: int, *, user: str, password: str, database: int = 0) -> None:
        self.host = host
        self.port = port
        self.user = user
        self.password = password
        self.database = database

    def url(self, *, port: int | None = None, **parameters: str | int) -> str:
        """Return the URL for the user, at another port (of a proxy) where one is given."""
        query = "&".join(f"{name}={quote(str(value), safe='')}" for name, value in parameters.items())
        user = f"{quote(self.user, safe='')}:{quote(self.password, safe='')}"
        host = self.host if port is None else HOST
        return f"redis://{user}@{host}:{port or self.port}/{self.database}{'?' if query else ''}{query}"

    def command(self, *arguments: Any) -> Any:
        """Run a command; its answer as the server gave it, or its error."""
        connection = redis.Connection(  # type: ignore[no-untyped-call]
            host=self.host,
            port=self.port,
            db=self.database,
            username=self.user,
            password=self.password,
            protocol=2,
            socket_timeout=_READY_S,
        )
        try:
            connection.connect()  # type: ignore[no-untyped-call]
            connection.send_command(*arguments)  # type: ignore[no-untyped-call]
            return connection.read_response()
        finally:
            connection.disconnect()  # type: ignore[no-untyped-call]

    @staticmethod
    def new_prefix() -> str:
        """Return a prefix of keys that nobody has."""
        return f"world-{os.getpid()}-{next(_prefixes)}-{time.time_ns():x}"


def named_server() -> RedisAt | None:
    """Return the server that the environment names; None if it names none."""
    url = os.environ.get(_VARIABLE)
    if not url:
        return None
    parts = urlsplit(url)
    assert parts.scheme == "redis", f"{_VARIABLE} is no redis:// URL"
    return RedisAt(
        parts.hostname or HOST,
        parts.port or 6379,
        user=unquote(parts.username or "") or "default",
        password=unquote(parts.password or ""),
        database=int(parts.path.removeprefix("/") or 0),
    )


class Redis(RedisAt):
    """Run one server, which keeps its port and data over `kill` and `start`; a context manager.

    It syncs each change before it answers, and has a user with a password who may do everything.
    """

    def __init__(self, **settings: str) -> None:
        """Nothing runs yet. ``settings`` are those of redis.conf, with _ for -."""
        super().__init__(HOST, 0, user=USER, password=PASSWORD)
        self._settings = {
            "bind": HOST,
            "appendonly": "yes",
            "appendfsync": "always",
            "save": '""',
            "loglevel": "notice",
            "requirepass": "administrator",
            "masteruser": USER,
            "masterauth": PASSWORD,
        } | {name.replace("_", "-"): value for name, value in settings.items()}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Start it in an empty directory."""
        self.directory = Path(tempfile.mkdtemp(prefix="atoll-redis-"))
        try:
            program = shutil.which(_PROGRAM)
            assert program is not None, "no Redis here: install redis-tools (scripts/setup.sh test)"
            (self.directory / "redis-server").symlink_to(program)
            self._settings.setdefault("dir", str(self.directory))
            self.port = free_ports(1)[0]
            self.start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the server and remove its data."""
        self._end()

    @property
    def pid(self) -> int:
        """Return the pid of the running server; ProcessLookupError when it is stopped."""
        if self._process is None:
            raise ProcessLookupError("the server is not running")
        return self._process.pid

    def start(self, **settings: str) -> None:
        """Start it, with settings changed, and wait until it answers."""
        assert self._process is None
        self._settings |= {name.replace("_", "-"): value for name, value in settings.items()}
        lines = [f"{name} {value}" for name, value in self._settings.items()]
        lines += [f"port {self.port}", f"user {USER} on >{PASSWORD} ~* &* +@all"]
        configuration = self.directory / "redis.conf"
        configuration.write_text("\n".join(lines) + "\n")
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self.directory / "redis-server", configuration],
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Wait until it answers, and has read its data."""
        deadline_s = time.monotonic() + _READY_S
        while not self._is_ready():
            if self._process is None or self._process.poll() is not None or time.monotonic() > deadline_s:
                raise ChildProcessError(f"Redis does not answer\n{self.log()[-2000:]}")
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """Shut it down."""
        os.kill(self.pid, signal.SIGTERM)
        self._wait()

    def kill(self) -> None:
        """End it by SIGKILL, at once."""
        os.kill(self.pid, signal.SIGKILL)
        self._wait()

    def wait_for_end(self) -> None:
        """Wait until it has ended by itself."""
        self._wait()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop it by SIGSTOP while the block runs: connections stay, and nobody answers."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGCONT)

    @contextmanager
    def replica(self, **settings: str) -> Iterator[Redis]:
        """Run a replica of this server until the block ends; it has what the server has."""
        with Redis(
            **self._as_given(settings), replicaof=f"{self.host} {self.port}", repl_diskless_sync_delay="0"
        ) as other:
            deadline_s = time.monotonic() + _READY_S
            while b"master_link_status:up" not in other.command("INFO", "replication"):
                assert time.monotonic() < deadline_s, other.log()[-2000:]
                time.sleep(_POLL_S)
            yield other

    def log(self) -> str:
        """Return what the server has logged."""
        return (self.directory / "log").read_text("utf-8", "replace")

    def _as_given(self, settings: Mapping[str, str]) -> dict[str, str]:
        return {name.replace("-", "_"): value for name, value in settings.items()}

    def _is_ready(self) -> bool:
        with contextlib.suppress(redis.RedisError, OSError):
            return bool(self.command("PING") == b"PONG")
        return False

    def _wait(self) -> None:
        assert self._process is not None
        self._process.wait(timeout=_READY_S)
        self._process = None

    def _end(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)


@contextmanager
def redis_cluster(count: int = 3) -> Iterator[list[Redis]]:
    """Run a cluster of masters without replicas; each has a share of the slots."""
    with contextlib.ExitStack() as stack:
        # A node has a second port, 10,000 above the first one unless it is told.
        nodes = []
        for port in free_ports(count):
            settings = {"cluster_enabled": "yes", "cluster_port": str(port), "cluster_node_timeout": "2000"}
            nodes.append(stack.enter_context(Redis(**settings)))
        for index, node in enumerate(nodes):
            # As redis-cli does: servers that all begin at epoch 0 settle it later, and then take back slots that have moved.
            node.command("CLUSTER", "SET-CONFIG-EPOCH", index + 1)
            node.command("CLUSTER", "ADDSLOTSRANGE", 16384 * index // count, 16384 * (index + 1) // count - 1)
            bus = int(node.command("CONFIG", "GET", "cluster-port")[1])
            nodes[0].command("CLUSTER", "MEET", node.host, node.port, bus)
        deadline_s = time.monotonic() + _READY_S
        while not all(
            b"cluster_state:ok" in node.command("CLUSTER", "INFO")
            and f"cluster_known_nodes:{count}".encode() in node.command("CLUSTER", "INFO")
            for node in nodes
        ):
            assert time.monotonic() < deadline_s, "the cluster does not come up"
            time.sleep(_POLL_S)
        yield nodes
