"""``atoll serve``: the metadata service, from start to end.

Owns putting store, volumes and server together, and ending them in order: no new calls, running ones get a moment, what is
open is committed, the ownership of all volumes is given up. Sessions stay in the store: their clients go on when it is back.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from client.cli.options import SIZE, backup_options, backup_policy, ca_option
from client.cli.output import say
from metasvc.api.server import Server, is_loopback, parse_server

if TYPE_CHECKING:
    from client.meta.encryption import Trust
    from metasvc.jobs.backups import BackupPolicy
    from metasvc.server.certificate import Certificate
    from metasvc.server.keys import MasterKeys
    from metasvc.server.tokens import Tokens

GRACE_S: Final = 2.0
_HAND_OVER_S: Final = 30.0
_MEMORY_BYTES: Final = 1 << 30
_LEAST_MEMORY_BYTES: Final = 1 << 20
_CONTAINER_LIMIT: Final = Path("/sys/fs/cgroup/memory.max")


@click.command("serve")
@click.option(
    "--store",
    "store_url",
    metavar="URL",
    required=True,
    help="sqlite:///relative, sqlite:////absolute, postgresql://user:password@host/database, redis://user:password@host/db",
)
@click.option("--listen", metavar="HOST:PORT", help="Where to answer.")
@click.option(
    "--advertise",
    metavar="HOST:PORT",
    help="Where clients reach this process, as other processes tell them.  [--listen, or this machine's name for 0.0.0.0]",
)
@click.option("--init", "is_init", is_flag=True, help="Prepare the store, print the admin token, and exit.")
@click.option(
    "--new-admin-token",
    "is_new_token",
    is_flag=True,
    help="Print another admin token for a store that is prepared, and exit.",
)
@click.option("--tls-cert", metavar="FILE", help="The certificate with its chain, in PEM: answer by TLS only.")
@click.option("--tls-key", metavar="FILE", help="Its key, in PEM.")
@ca_option
@click.option("--insecure", is_flag=True, help="Answer without encryption to other machines, too.")
@click.option(
    "--master-key-file",
    metavar="FILE",
    help="32 bytes in base64, one key a line: the first encrypts keys of buckets, all decrypt  [default: ATOLL_MASTER_KEY]",
)
@click.option(
    "--rotate-keys", "is_rotating", is_flag=True, help="Encrypt all keys of buckets by the first one, and exit."
)
@click.option("--metrics", metavar="HOST:PORT", help="Where to answer /metrics for Prometheus.  [nowhere]")
@click.option("--memory", "memory_bytes", type=SIZE, help="For rows of all volumes.  [1 GiB, or 1/8 of the machine's]")
@click.option("--cache-dir", type=click.Path(path_type=Path), help="For compaction.  [/var/cache/atoll/serve]")
@backup_options
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True)
def command(
    store_url: str,
    *,
    listen: str | None,
    advertise: str | None,
    is_init: bool,
    is_new_token: bool,
    tls_cert: str | None,
    tls_key: str | None,
    insecure: bool,
    master_key_file: str | None,
    is_rotating: bool,
    metrics: str | None,
    memory_bytes: int | None,
    cache_dir: Path | None,
    backup: float | None,
    backup_window: float,
    log_format: str,
) -> None:
    """Serve the volumes of a store at HOST:PORT until SIGTERM, and do their background work. Logs go to stderr.

    Several processes on one store share its volumes, and take over those of one that ends. The keys of the volumes' buckets
    are kept in the store, under the master key; for volumes without they come from the environment, as for a mount.
    """
    import uvloop

    if is_init or is_new_token:
        click.echo(asyncio.run(_admin_token(store_url, create=is_init)))
        return
    from metasvc.server.keys import MasterKeys

    master = MasterKeys.find(master_key_file, env=os.environ)
    if is_rotating:
        count = asyncio.run(_rotate_keys(store_url, master))
        click.echo(f"the keys of {count} volumes are under the first master key now")
        return
    if listen is None:
        raise click.UsageError("--listen is missing: give HOST:PORT, for example 127.0.0.1:9410")
    host, separator, port = listen.rpartition(":")
    if not separator or not host or not port.isdigit() or int(port) >= 1 << 16:
        raise click.UsageError(f"--listen {listen} is no HOST:PORT: give for example 127.0.0.1:9410")
    if advertise is not None and parse_server(advertise) is None:
        raise click.UsageError(f"--advertise {advertise} is no HOST:PORT: give for example meta-1.example.net:9410")
    if metrics is not None:
        from client.metrics_server import parse_listen

        parse_listen(metrics)
    if memory_bytes is not None and memory_bytes < _LEAST_MEMORY_BYTES:
        raise click.UsageError("--memory is too little: give at least 1MiB")
    policy = backup_policy(backup, backup_window)
    from metasvc.store.open import without_password

    if (tls_cert is None) != (tls_key is None):
        raise click.UsageError("--tls-cert and --tls-key go together: give both")
    if tls_cert is None and not is_loopback(host) and not insecure:
        raise click.UsageError(
            f"{host} can be reached by other machines: give --tls-cert and --tls-key, or --insecure if the network is "
            "trusted, or an address of loopback"
        )
    certificate = None
    if tls_cert is not None and tls_key is not None:
        from metasvc.server.certificate import Certificate

        certificate = Certificate(os.path.abspath(tls_cert), os.path.abspath(tls_key))
    from client import logs
    from client.daemon import raise_limits

    log = logs.configure(
        None, volume=without_password(store_url), log_format="json" if log_format == "json" else "text"
    )
    raise_limits()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(
            _serve(
                store_url,
                listen,
                advertise=advertise,
                certificate=certificate,
                master=master,
                is_plain_allowed=insecure,
                metrics=metrics,
                memory_bytes=_memory_bytes() if memory_bytes is None else memory_bytes,
                cache_dir=cache_dir,
                backup=policy,
                log=log,
            )
        )


async def _admin_token(store_url: str, *, create: bool) -> str:
    from metasvc.server.tokens import another_admin_token, prepare
    from metasvc.store.open import open_store

    store = await open_store(store_url, create=create)
    try:
        return await (prepare(store) if create else another_admin_token(store))
    finally:
        await store.close()


async def _rotate_keys(store_url: str, master: MasterKeys | None) -> int:
    from metasvc.server.keys import BucketKeys
    from metasvc.store.open import open_store

    store = await open_store(store_url)
    try:
        return await BucketKeys(store, master).rotate()
    finally:
        await store.close()


async def _serve(
    store_url: str,
    listen: str,
    *,
    advertise: str | None,
    certificate: Certificate | None,
    master: MasterKeys | None,
    is_plain_allowed: bool,
    metrics: str | None,
    memory_bytes: int,
    cache_dir: Path | None,
    backup: BackupPolicy | None,
    log: Any,
) -> None:
    from client.meta.encryption import trust_of
    from client.metrics_server import metrics_server
    from client.volume import default_cache_dir
    from metasvc.jobs.served import ServedJobs
    from metasvc.server.keys import BucketKeys
    from metasvc.server.service import Service
    from metasvc.server.tokens import Tokens
    from metasvc.server.volumes import Volumes
    from metasvc.store.open import open_store, without_password

    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    store = await open_store(store_url)
    try:
        tokens = await Tokens.load(store)
        keys = BucketKeys(store, master)
        await keys.check()
        jobs = ServedJobs(
            cache_dir=cache_dir or default_cache_dir(os.environ) / "serve", env=os.environ, log=log, backup=backup
        )
        volumes = Volumes(
            store,
            memory_bytes=memory_bytes,
            objects_url=_objects_url(store_url),
            work=jobs.run,
            keys=keys,
        )
        service = Service(volumes, tokens)
        async with AsyncExitStack() as stack:
            if metrics is not None:
                stack.enter_context(metrics_server(metrics, volumes.metrics.text))
            stack.push_async_callback(volumes.close)
            server = Server(listen.rpartition(":")[0], await service.start(listen, certificate=certificate))
            stack.push_async_callback(service.stop, grace_s=GRACE_S)
            known_as = parse_server(advertise or "") or _reachable(server)
            volumes.serve_as(known_as)
            if certificate is not None:
                stack.callback(_watch(certificate))
            trust = trust_of(os.environ) if certificate is not None else None
            others = _Others(tokens, known_as, trust, is_plain_allowed=is_plain_allowed)
            keeping = asyncio.create_task(volumes.keep_open(others.ask_for_some), name="volumes that nobody owns")
            stack.callback(keeping.cancel)
            watching = asyncio.create_task(service.watch_tokens(), name="tokens that were revoked")
            stack.callback(watching.cancel)
            spacing = asyncio.create_task(volumes.space.watch(), name="quotas of tenants")
            stack.callback(spacing.cancel)
            known = "" if known_as == server else f", known as {known_as}"
            say(f"serving {without_password(store_url)} at {server}{known}, pid {os.getpid()}")
            await stop.wait()
    finally:
        await store.close()


class _Others:
    """The other processes of the service, as far as this one asks them something."""

    def __init__(self, tokens: Tokens, server: Server, trust: Trust | None, *, is_plain_allowed: bool) -> None:
        """They answer as this one does: by TLS, or all in plain text."""
        self._tokens = tokens
        self._server = server
        self._trust = trust
        self._is_plain_allowed = is_plain_allowed

    async def ask_for_some(self, other: Server, owned: int) -> list[str]:
        """Ask a process to give up volumes for this one, which owns so many; their names. ServiceUnavailable."""
        from client.meta.endpoint import Endpoint, ServiceUnavailable
        from metasvc.api import atoll_pb2 as pb

        request = pb.HandOverRequest(server=str(self._server), owned=owned).SerializeToString()
        try:
            async with asyncio.timeout(_HAND_OVER_S):
                token = self._tokens.for_this_process()
                endpoint = Endpoint([other], token, trust=self._trust, is_plain_allowed=self._is_plain_allowed)
                data = await endpoint.ask(pb.Opening.HAND_OVER, request)
        except TimeoutError as error:
            raise ServiceUnavailable(f"the process at {other} hands over nothing for {_HAND_OVER_S:.0f} s") from error
        return list(pb.HandOverReply.FromString(data).volumes)


def _watch(certificate: Certificate) -> Callable[[], object]:
    """Have the certificate read again when its files are replaced, and on SIGHUP; how to end that."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, lambda: certificate.look(is_asked=True))
    return asyncio.create_task(certificate.watch(), name="certificate").cancel


def _reachable(server: Server) -> Server:
    """Return where others reach this process, if nobody says: this machine by its name, where it listens on all addresses."""
    is_any = server.host.strip("[]") in ("0.0.0.0", "::")
    return server._replace(host=socket.gethostname()) if is_any else server


def _memory_bytes() -> int:
    """Return what rows may take where nobody says: an eighth of what this machine or container has, at most 1 GiB."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # "max": no bound
        there = min(there, int(_CONTAINER_LIMIT.read_text()))
    return min(_MEMORY_BYTES, there // 8)


def _objects_url(store_url: str) -> str:
    """Return the URL of the directory ``objects`` beside a SQLite file."""
    path = store_url.partition("sqlite:///")[2]
    return f"file://{os.path.dirname(os.path.abspath(path))}/objects" if path else ""
