"""The servers that the benchmark needs: Redis for JuiceFS, a metadata service for AtollFS, SeaweedFS as the S3 server of all.

Owns their settings, which every run shares: Redis makes every transaction durable (appendfsync always), SeaweedFS
checks signatures and listens on loopback only. Both keep everything in the directory that they are given.
"""

import json
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.processes import find_command, run_step, running, wait_until
from tests.servers.ports import free_ports

_START_DEADLINE_S: Final = 60.0
_ACCESS_KEY: Final = "benchaccess"
_SECRET_KEY: Final = "benchsecret"
REGION: Final = "us-east-1"


@dataclass(frozen=True, slots=True)
class DirectoryBucket:
    """A bucket that is a directory of the local file system."""

    path: Path


@dataclass(frozen=True, slots=True)
class S3Bucket:
    """A bucket of an S3 server, with the keys that may use it."""

    endpoint: str
    name: str
    access_key: str
    secret_key: str


Bucket = DirectoryBucket | S3Bucket


def keys_environment(access_key: str, secret_key: str) -> dict[str, str]:
    """Return keys as the environment in which AtollFS looks for them."""
    return {"AWS_ACCESS_KEY_ID": access_key, "AWS_SECRET_ACCESS_KEY": secret_key, "AWS_REGION": REGION}


@dataclass(frozen=True, slots=True)
class S3Server:
    """A running S3 server."""

    endpoint: str
    scratch: Path

    @property
    def environment(self) -> dict[str, str]:
        """Return the keys as the provider's usual environment."""
        return keys_environment(_ACCESS_KEY, _SECRET_KEY)

    def bucket(self, name: str) -> S3Bucket:
        """Make a bucket."""
        bucket = S3Bucket(self.endpoint, name, _ACCESS_KEY, _SECRET_KEY)
        run_step(
            [find_command("rclone"), "mkdir", f"bench:{name}"],
            log=self.scratch / f"mkdir-{name}",
            limit_s=60,
            environment=rclone_environment(bucket, config=self.scratch / "rclone.conf"),
        )
        return bucket


def rclone_environment(bucket: S3Bucket, *, config: Path) -> dict[str, str]:
    """Give rclone a remote named `bench` without a configuration file."""
    return {
        "RCLONE_CONFIG": str(config),
        "RCLONE_CONFIG_BENCH_TYPE": "s3",
        "RCLONE_CONFIG_BENCH_PROVIDER": "SeaweedFS",
        "RCLONE_CONFIG_BENCH_ENDPOINT": bucket.endpoint,
        "RCLONE_CONFIG_BENCH_ACCESS_KEY_ID": bucket.access_key,
        "RCLONE_CONFIG_BENCH_SECRET_ACCESS_KEY": bucket.secret_key,
        "RCLONE_CONFIG_BENCH_REGION": REGION,
    }


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _redis_answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
    except OSError:
        return False


@contextmanager
def redis_server(directory: Path) -> Iterator[str]:
    """Run a Redis that fsyncs before every reply to a write, and give its address."""
    directory.mkdir()
    [port] = free_ports(1)
    # One program with several names. Debian has this one in redis-tools; its redis-server also starts a daemon.
    program = directory / "redis-server"
    program.symlink_to(find_command("redis-check-rdb"))
    arguments = [str(program), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory)]
    arguments += ["--appendonly", "yes", "--appendfsync", "always", "--save", "", "--maxmemory-policy", "noeviction"]
    with running(arguments, log=directory / "redis.log") as child:
        wait_until(lambda: _redis_answers(port), what="redis-server", deadline_s=_START_DEADLINE_S, child=child)
        yield f"redis://127.0.0.1:{port}/1"


@dataclass(frozen=True, slots=True)
class MetadataService:
    """A running metadata service of this project."""

    address: str
    """atoll://HOST:PORT"""
    token: str
    pid: int
    metrics: str
    """http://HOST:PORT/metrics"""


def prepare_store(store: str, *, log: Path) -> str:
    """Prepare a store for `atoll serve`; return the administrator's token."""
    return run_step([find_command("atoll"), "serve", "--store", store, "--init"], log=log, limit_s=60).strip()


@contextmanager
def serving(
    store: str, token: str, directory: Path, *, environment: Mapping[str, str], options: Sequence[str] = ()
) -> Iterator[MetadataService]:
    """Run `atoll serve` on a prepared store; its log lies in the directory."""
    port, metrics_port = free_ports(2)
    metrics = f"127.0.0.1:{metrics_port}"
    arguments = [find_command("atoll"), "serve", "--store", store, "--listen", f"127.0.0.1:{port}"]
    arguments += ["--metrics", metrics, "--cache-dir", str(directory / "cache"), *options]
    with running(arguments, log=directory / "serve.log", environment=environment) as child:
        wait_until(lambda: _accepts(port), what="atoll serve", deadline_s=_START_DEADLINE_S, child=child)
        yield MetadataService(f"atoll://127.0.0.1:{port}", token, child.pid, f"http://{metrics}/metrics")


@contextmanager
def metadata_service(
    directory: Path, *, environment: Mapping[str, str], options: Sequence[str] = ()
) -> Iterator[MetadataService]:
    """Run `atoll serve` on a new SQLite store; its log lies in the directory."""
    directory.mkdir()
    store = f"sqlite:///{directory}/meta.db"
    token = prepare_store(store, log=directory / "init")
    with serving(store, token, directory, environment=environment, options=options) as service:
        yield service


@contextmanager
def s3_server(directory: Path) -> Iterator[S3Server]:
    """Run SeaweedFS with its S3 gateway and give its endpoint."""
    directory.mkdir()
    identities = directory / "identities.json"
    credential = {"accessKey": _ACCESS_KEY, "secretKey": _SECRET_KEY}
    identity = {"name": "bench", "credentials": [credential], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
    identities.write_text(json.dumps({"identities": [identity]}))
    names = ("master", "volume", "filer", "s3")
    ports = free_ports(2 * len(names))
    arguments = [find_command("weed"), f"-logdir={directory}", "server", f"-dir={directory}"]
    arguments += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    arguments += ["-filer", "-s3", f"-s3.config={identities}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    # Each bucket takes volumes of its own, seven at a time; the default allows eight in all.
    arguments += ["-master.telemetry=false", "-master.volumeSizeLimitMB=1024", "-volume.max=200"]
    arguments += [f"-{name}.localSocket={directory / name}.sock" for name in ("filer", "s3")]
    for name, port, grpc_port in zip(names, ports[: len(names)], ports[len(names) :], strict=True):
        arguments += [f"-{name}.port={port}", f"-{name}.port.grpc={grpc_port}"]
    s3_port = ports[names.index("s3")]
    try:
        # Ended by SIGKILL: it takes 17 s over SIGTERM, and its data are thrown away.
        with running(arguments, log=directory / "weed.log", goodbye=signal.SIGKILL) as child:
            wait_until(lambda: _accepts(s3_port), what="weed server", deadline_s=_START_DEADLINE_S, child=child)
            server = S3Server(f"http://127.0.0.1:{s3_port}", directory)
            _wait_until_writable(server)
            yield server
    finally:
        # It leaves these sockets behind, in a place that no option moves.
        for name, grpc_port in zip(names, ports[len(names) :], strict=True):
            Path(f"/tmp/seaweedfs-{name}-grpc-{grpc_port}.sock").unlink(missing_ok=True)


def _wait_until_writable(server: S3Server) -> None:
    """Wait until the gateway stores an object, which it does only when master, volume server and filer have met."""
    probe = server.scratch / "probe.object"
    probe.write_bytes(b"probe")
    bucket = S3Bucket(server.endpoint, "bench-probe", _ACCESS_KEY, _SECRET_KEY)
    retries = ["--retries", "30", "--retries-sleep", "200ms"]
    run_step(
        [find_command("rclone"), "copyto", str(probe), f"bench:{bucket.name}/probe", *retries],
        log=server.scratch / "probe",
        limit_s=_START_DEADLINE_S,
        environment=rclone_environment(bucket, config=server.scratch / "rclone.conf"),
    )
