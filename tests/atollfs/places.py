"""Volumes for tests of atollfs: an embedded one and one of a real service, each made by the real command's code."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from atollfs import AtollFileSystem
from client.cli.format import command as format_command
from tests.mount.mounted import atoll
from tests.mount.service import ServiceProcess


@dataclass(frozen=True, slots=True)
class Place:
    """A formatted volume."""

    options: dict[str, Any]
    """What makes a file system of it."""
    objects_dir: Path

    @contextmanager
    def opened(self, **more: Any) -> Iterator[AtollFileSystem]:
        """Open it as a file system of its own, and close it."""
        with AtollFileSystem(**self.options, **more, skip_instance_cache=True) as fs:
            yield fs

    def objects(self) -> list[str]:
        """Return the names of the objects in the bucket."""
        return sorted(path.name for path in self.objects_dir.rglob("*") if path.is_file())


def command(*arguments: str, token: str = "") -> str:
    """Run `atoll …`, which must succeed; its stdout."""
    done = atoll(*arguments, environment={"ATOLL_TOKEN": token})
    assert done.returncode == 0, done
    return done.stdout


def format_volume(*arguments: str, token: str = "") -> None:
    """Run `atoll format …` in this process: half a second less than in one of its own."""
    done = CliRunner().invoke(format_command, [*arguments, "--trash-days", "0"], env={"ATOLL_TOKEN": token})
    assert done.exit_code == 0, done.output


def embedded_place(directory: Path) -> Place:
    """Format an embedded volume."""
    address = directory / "volume"
    format_volume(str(address))
    return Place({"address": str(address), "cache_dir": str(directory / "cache")}, address / "objects")


def service_place(running: ServiceProcess, directory: Path) -> Place:
    """Format a volume of a service, under a name of its own."""
    bucket = directory / "bucket"
    bucket.mkdir()
    address = running.address(f"v{uuid.uuid4().hex[:12]}")
    format_volume(address, "--bucket", f"file://{bucket}", token=running.token)
    return Place({"address": address, "token": running.token, "cache_dir": str(directory / "cache")}, bucket)
