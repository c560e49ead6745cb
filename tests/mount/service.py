"""A metadata service of a test: `atoll serve` as a process of its own, started, killed and started again at one address."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.mount import keys, stores
from tests.mount.mounted import ATOLL, COMMAND_TIMEOUT_S, PROVIDER_VARIABLES, MountedVolume, atoll, mounted
from tests.servers.ports import HOST, free_ports

TENANT: Final = "acme"


@dataclass(slots=True)
class ServiceProcess:
    """One service; made by `service()`, which also ends it."""

    directory: Path
    port: int
    token: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    options: Sequence[str] = ()
    store: str = ""
    """The URL."""
    ports: Sequence[int] = ()
    """Of all processes of the service, where it has several."""
    _process: subprocess.Popen[bytes] | None = None

    @property
    def log_path(self) -> Path:
        return self.directory / "serve.log"

    def address(self, volume: str = "data") -> str:
        servers = ",".join(f"{HOST}:{port}" for port in self.ports or (self.port,))
        scheme = "atolls" if "--tls-cert" in self.options else "atoll"
        return f"{scheme}://{servers}/{TENANT}/{volume}"

    def prepare(self) -> None:
        """Make the store and keep the admin token."""
        made = atoll("serve", "--init", "--store", self.store)
        assert made.returncode == 0, made
        self.token = made.stdout.strip()

    def start(self) -> None:
        """Start it; it takes connections when this returns."""
        options = ("--cache-dir", f"{self.directory}/serve-cache", *self.options)
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [ATOLL, "serve", "--store", self.store, "--listen", f"{HOST}:{self.port}", *options],
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + COMMAND_TIMEOUT_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection((HOST, self.port), timeout=1):
                return
            assert self._process.poll() is None, self.log_path.read_text()
            assert time.monotonic() < deadline, "the service does not listen"
            time.sleep(0.02)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End it with a signal; its exit code."""
        process, self._process = self._process, None
        assert process is not None
        process.send_signal(number)
        return process.wait(COMMAND_TIMEOUT_S)

    def kill(self) -> None:
        """End it with SIGKILL."""
        assert self.end(signal.SIGKILL) == -signal.SIGKILL

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def abandon(self) -> None:
        """Leave nothing behind."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(COMMAND_TIMEOUT_S)


@contextlib.contextmanager
def service(
    directory: Path,
    *,
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    store_url: str = "",
) -> Iterator[ServiceProcess]:
    """Run a service with a store of its own, of the environment's kind (tests/mount/stores.py) unless a URL is given."""
    given, store = dict(environment or {}), store_url or stores.new_url(directory)
    running = ServiceProcess(directory, free_ports(1)[0], environment=given, options=options, store=store)
    running.prepare()
    try:
        running.start()
        yield running
    finally:
        running.abandon()


@contextlib.contextmanager
def services(
    directory: Path,
    store_url: str,
    *,
    count: int,
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[list[ServiceProcess]]:
    """Run several processes on one store; each knows the addresses of all."""
    ports = free_ports(count)
    processes = []
    for number, port in enumerate(ports):
        place = directory / f"service-{number}"
        place.mkdir()
        given = dict(environment or {})
        processes.append(ServiceProcess(place, port, environment=given, options=options, store=store_url, ports=ports))
    processes[0].prepare()
    with contextlib.ExitStack() as stack:
        for process in processes:
            stack.callback(process.abandon)
            process.token = processes[0].token
            process.start()
        yield processes


@contextlib.contextmanager
def mounted_from(
    running: ServiceProcess,
    directory: Path,
    *format_options: str,
    mount_options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    keys_stay: bool = False,
) -> Iterator[MountedVolume]:
    """Format a volume of a service and mount it; at the end it is unmounted and must be clean."""
    with mounted(
        directory,
        *format_options,
        mount_options=mount_options,
        environment={**(environment or {}), "ATOLL_TOKEN": running.token},
        address=running.address(),
        keys_stay=keys_stay,
    ) as volume:
        yield volume


@contextlib.contextmanager
def served_and_mounted(
    directory: Path,
    *format_options: str,
    mount_options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    store_url: str = "",
) -> Iterator[MountedVolume]:
    """Run a service for one volume, and mount that."""
    place = directory / "service"
    place.mkdir()
    if "--bucket" not in format_options:
        (place / "objects").mkdir()
        format_options = (*format_options, "--bucket", f"file://{place}/objects")
    keys_stay = keys.are_kept() and not set(PROVIDER_VARIABLES).isdisjoint(environment or ())
    with (
        service(place, environment=keys.MASTER if keys_stay else environment, store_url=store_url) as running,
        mounted_from(
            running,
            directory,
            *format_options,
            mount_options=mount_options,
            environment=environment,
            keys_stay=keys_stay,
        ) as volume,
    ):
        yield volume
        if keys_stay:
            keys.assert_without_secret(volume, place)


@contextlib.contextmanager
def also_mounted(volume: MountedVolume, directory: Path) -> Iterator[MountedVolume]:
    """Mount a volume a second time, with a cache of its own."""
    cache_dir, path = directory / "second-cache", directory / "second"
    cache_dir.mkdir()
    path.mkdir()
    other = MountedVolume(volume.address, path, cache_dir, volume.environment)
    try:
        other.mount()
        yield other
        other.unmount()
    finally:
        other.abandon()
