"""SeaweedFS as the S3 server of the tests: one process on loopback, its data in a directory of its own.

Owns the process: it is started, stopped, paused and ended by its pid only. Must not know AtollFS.
It checks signatures (`-s3.config`), refuses unknown buckets, calls nobody, and counts its requests (`-metricsPort`).
"""

from __future__ import annotations

import contextlib
import datetime
import json
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

import obstore
from obstore.store import S3Store
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.servers.buckets import REGION, Bucket
from tests.servers.ports import HOST, free_ports

ACCESS_KEY_ID: Final = "ATOLLTESTKEY"
SECRET_ACCESS_KEY: Final = "atoll-test-secret"
_CANARY: Final = "atoll-canary"
_READY_S: Final = 60.0
_POLL_S: Final = 0.02
# Each port by the flag that sets it. The gRPC ones default to port + 10000, which may be taken.
_PORT_FLAGS: Final = (
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "s3.port",
    "s3.port.grpc",
    "metricsPort",
)


@dataclass(frozen=True, slots=True)
class RequestCounts:
    """Count what one bucket was asked since the server started."""

    by_type: dict[str, int]
    """Requests by the server's word for them: GET, PUT, DELETE, HEAD, LIST …"""
    by_status: dict[int, int]
    received_bytes: int
    sent_bytes: int

    @property
    def total(self) -> int:
        """Sum the requests of all types."""
        return sum(self.by_type.values())


class SeaweedFS:
    """Run one SeaweedFS, which keeps its ports and data over `kill` and `start`; a context manager.

    `directory` is taken over and removed at the end.
    """

    def __init__(self, directory: Path) -> None:
        """Prepare the directory; nothing runs yet."""
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self._ports: dict[str, int] = {}
        (directory / "data").mkdir(parents=True)
        # One file of data per bucket instead of seven: tests make many small buckets.
        (directory / "master.toml").write_text("[master.volume_growth]\ncopy_1 = 1\n")
        identity = {
            "name": "atoll",
            "credentials": [{"accessKey": ACCESS_KEY_ID, "secretKey": SECRET_ACCESS_KEY}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (directory / "identities.json").write_text(json.dumps({"identities": [identity]}))

    def __enter__(self) -> Self:
        """Start on free ports and wait until it serves; three sets of ports are tried."""
        for attempt in range(3):
            self._ports = dict(zip(_PORT_FLAGS, free_ports(len(_PORT_FLAGS)), strict=True))
            self._spawn()
            try:
                self._wait_until("serves", lambda: self._create(_CANARY))
                self._wait_until("stores", self._canary)
            except ChildProcessError:
                if attempt == 2:
                    raise
            except BaseException:
                self._end()
                raise
            else:
                return self
        raise AssertionError("unreachable")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the process and remove its data."""
        self._end()
        shutil.rmtree(self._directory)

    @property
    def endpoint(self) -> str:
        """Return the address of the S3 service."""
        return f"http://{HOST}:{self._ports['s3.port']}"

    @property
    def pid(self) -> int:
        """Return the pid of the running server; ProcessLookupError when it is stopped."""
        if self._process is None:
            raise ProcessLookupError("the server is not running")
        return self._process.pid

    def bucket(self, name: str, *, prefix: str = "") -> Bucket:
        """Name a bucket of this server, whether it exists or not."""
        return Bucket(
            name=name,
            prefix=prefix,
            endpoint=self.endpoint,
            access_key_id=ACCESS_KEY_ID,
            secret_access_key=SECRET_ACCESS_KEY,
        )

    def create_bucket(self, name: str) -> None:
        """Create a bucket; names have 3 to 63 characters of [a-z0-9.-]."""
        self._create(name)

    def delete_bucket(self, name: str) -> None:
        """Delete a bucket with all that is in it."""
        self._bucket_request("DELETE", name)

    def kill(self) -> None:
        """End it as a crash would, with SIGKILL; data and ports stay for `start`."""
        self._end()

    def start(self) -> None:
        """Start it again on the same ports and data; returns when it answers reads and writes (about 3 s)."""
        if self._process is not None:
            raise RuntimeError("the server is running already")
        self._spawn()
        self._wait_until("serves again", self._canary)

    def restart(self) -> None:
        """Kill and start."""
        self.kill()
        self.start()

    def pause(self) -> None:
        """Freeze it with SIGSTOP: connections stay open, or are made, and nothing answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after `pause`."""
        self._signal(signal.SIGCONT)

    def requests(self, bucket: str) -> RequestCounts:
        """Count the requests for one bucket, from the server's own metrics; they start at 0 with each start.

        A request that was answered before this call is counted: the server counts a request before it takes it out
        of those in flight, so this waits until none is. Nothing else may use the server meanwhile.
        """
        families = {}

        def idle() -> None:
            families.update({family.name: family.samples for family in self._metrics()})
            in_flight = sum(sample.value for sample in families["SeaweedFS_s3_in_flight_requests"])
            if in_flight:
                raise BlockingIOError(f"{in_flight:.0f} requests in flight")

        self._wait_until("is idle", idle)

        def samples(name: str) -> list[tuple[dict[str, str], int]]:
            return [(s.labels, int(s.value)) for s in families.get(name, []) if s.labels.get("bucket") == bucket]

        by_type: dict[str, int] = {}
        by_status: dict[int, int] = {}
        for labels, count in samples("SeaweedFS_s3_request"):
            by_type[labels["type"]] = by_type.get(labels["type"], 0) + count
            by_status[int(labels["code"])] = by_status.get(int(labels["code"]), 0) + count
        return RequestCounts(
            by_type=by_type,
            by_status=by_status,
            received_bytes=sum(n for _, n in samples("SeaweedFS_s3_bucket_traffic_received_bytes")),
            sent_bytes=sum(n for _, n in samples("SeaweedFS_s3_bucket_traffic_sent_bytes")),
        )

    def log_tail(self, *, lines: int = 20) -> str:
        """Return the end of the server's log."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])

    @property
    def _log(self) -> Path:
        return self._directory / "log"

    def _spawn(self) -> None:
        directory = self._directory
        command = [
            str(Path(sys.executable).with_name("weed")),
            "-logtostderr=true",
            "server",
            f"-ip={HOST}",
            f"-ip.bind={HOST}",
            f"-metricsIp={HOST}",
            f"-dir={directory / 'data'}",
            "-s3",
            f"-s3.config={directory / 'identities.json'}",
            "-s3.autoCreateBucket=false",
            "-s3.iam=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            f"-s3.localSocket={directory / 's3.sock'}",
            f"-filer.localSocket={directory / 'filer.sock'}",
            "-master.telemetry=false",
            # A restarted master waits this long for rivals before it leads; the default of 10 s made a restart 15 s.
            "-master.electionTimeout=1s",
            "-master.volumeSizeLimitMB=1024",
            "-volume.max=1000",
            *(f"-{flag}={port}" for flag, port in self._ports.items()),
        ]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=directory,
                # No other variables: with AWS_ACCESS_KEY_ID in its environment it would take that key as a further one.
                env={"HOME": str(directory), "PATH": "/usr/bin:/bin"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Control-C in the terminal is for pytest alone, which then ends this process.
                start_new_session=True,
            )

    def _signal(self, number: signal.Signals) -> None:
        if self._process is None:
            raise ProcessLookupError("the server is not running")
        self._process.send_signal(number)

    def _end(self) -> None:
        # SIGKILL: on SIGTERM it takes 17 s to say goodbye, and its data are thrown away or must survive a crash.
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=_READY_S)
            self._process = None

    def _wait_until(self, what: str, attempt: Callable[[], None]) -> None:
        """Repeat `attempt` until it raises nothing; TimeoutError after 60 s, ChildProcessError if the server ended."""
        deadline = time.monotonic() + _READY_S
        while True:
            try:
                return attempt()
            except (OSError, obstore.exceptions.BaseError) as error:
                if self._process is None or self._process.poll() is not None:
                    self._process = None
                    raise ChildProcessError(f"SeaweedFS ended:\n{self.log_tail()}") from error
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"SeaweedFS not seen to be one that {what}: {error}\n{self.log_tail()}"
                    ) from error
            time.sleep(_POLL_S)

    def _canary(self) -> None:
        store = self.bucket(_CANARY).store()
        obstore.put(store, "written", b"first", mode="overwrite")
        obstore.get(store, "written").bytes()

    def _create(self, name: str) -> None:
        # 409: a previous attempt was carried out although its answer was lost.
        with contextlib.suppress(FileExistsError):
            self._bucket_request("PUT", name)

    def _bucket_request(self, method: Literal["PUT", "DELETE"], name: str) -> None:
        """Send a request for the bucket itself, which obstore has no call for, but signs."""
        store = S3Store(
            name,
            endpoint=self.endpoint,
            region=REGION,
            access_key_id=ACCESS_KEY_ID,
            secret_access_key=SECRET_ACCESS_KEY,
            client_options={"allow_http": True},
        )
        url = obstore.sign(store, method, "", datetime.timedelta(minutes=1))
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=10):
                pass
        except urllib.error.HTTPError as error:
            with error:
                if error.code == HTTPStatus.CONFLICT:
                    raise FileExistsError(name) from error
                raise OSError(f"{method} {name}: {error.code} {error.read()[:300]!r}") from error

    def _metrics(self) -> list[Metric]:
        url = f"http://{HOST}:{self._ports['metricsPort']}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return list(text_string_to_metric_families(answer.read().decode()))
