"""The world of the SQLite store, for the contract suite and the store's own tests."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from metasvc.store import Store, VolumeStore
from metasvc.store.sqlite import SqliteStore
from metasvc.store.tables import COUNTER
from tests.metasvc.store.contract import World

PROGRAMS = Path(__file__).parent / "programs"
DEADLINE_S = 60


class SqliteWorld(World):
    """Each process is a SqliteStore of its own on one file. An owner's claim ends when its lock file is taken away."""

    lasting = True

    def __init__(self, directory: Path, **options: Any) -> None:
        """``options`` are those of SqliteStore.open()."""
        super().__init__()
        self.path = directory / "meta.db"
        self.lock_path = directory / "meta.db.1.owner"
        self._options = options

    def journal_path(self, epoch: int = 1) -> Path:
        """Return the path of the journal of volume 1's owner with an epoch."""
        return self.path.with_name(f"meta.db.1.journal-{epoch}")

    async def open_store(self) -> Store:
        return await SqliteStore.open(str(self.path), create=True, **self._options)

    async def lapse(self) -> None:
        self.lock_path.unlink()

    async def show(self, volume: VolumeStore) -> None:
        # What is in a journal becomes rows as soon as something that reads needs it, a scan for instance.
        await volume.scan(COUNTER, after=None, limit=0)

    def files(self) -> dict[str, int]:
        """Return names and modes of the files in the database's directory."""
        return {path.name: path.lstat().st_mode for path in sorted(self.path.parent.iterdir())}


class Program:
    """A process that runs one of the programs beside this file; talks in lines; killed in the end if it still runs."""

    def __init__(self, name: str, *arguments: str) -> None:
        self._command = (sys.executable, str(PROGRAMS / name), *arguments)

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.returncode is None:
            self._process.kill()
            await self._process.communicate()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    async def line(self) -> str:
        """Return the next line of its output without the end of line; "" when the output ended."""
        assert self._process.stdout is not None
        async with asyncio.timeout(DEADLINE_S):
            return (await self._process.stdout.readline()).decode().rstrip("\n")

    async def kill(self) -> list[str]:
        """Send SIGKILL, wait for the end; the lines that were not read yet."""
        self._process.kill()
        async with asyncio.timeout(DEADLINE_S):
            rest, _ = await self._process.communicate()
        return rest.decode().splitlines()
