"""Measure how a metadata service behaves under many clients at once: throughput, latency, fairness, memory.

`python bench/clients.py`. A service on SQLite runs in a process of its own; sessions over the wire, spread over a few worker
processes, each do the same mix of operations on names of their own and on a directory that all share. For each number of
clients the figures are reported, never judged; an error of an operation makes the run end with status 1.

What one client does in a turn: create a file with 1 KiB inline and close it, stat it by name, rename it into the shared
directory, look up somebody's name there, list its own directory, unlink what it renamed a few turns before.
"""

import asyncio
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Final, TypeVar

import click

# Started as a file, Python looks for modules beside it; the benchmark imports its own by their full names.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.environment import describe
from bench.memory import peak_bytes
from bench.processes import StepFailed, find_command, interrupt_once, run_step
from bench.servers import MetadataService, metadata_service

WORKERS: Final = 4
"""Processes that the clients are spread over."""
INLINE_BYTES: Final = 1024
KEPT: Final = 8
"""Files of a client that lie in the shared directory."""
MIB: Final = 1024 * 1024
_BUCKETS_PER_OCTAVE: Final = 8

T = TypeVar("T")


@dataclass(slots=True)
class Tally:
    """What some clients did: durations by operation, as counts of buckets, eight to an octave, and what went wrong."""

    durations: dict[str, Counter[int]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    operations: list[int] = field(default_factory=list)
    """Of each client."""
    messages: int = 0
    requests: int = 0

    def observe(self, operation: str, duration_ns: int) -> None:
        """Count one operation."""
        bucket = _bucket(duration_ns)
        self.durations.setdefault(operation, Counter())[bucket] += 1

    def add(self, other: "Tally") -> None:
        """Add what others did."""
        for name, counts in other.durations.items():
            self.durations.setdefault(name, Counter()).update(counts)
        self.errors += other.errors
        self.operations += other.operations
        self.messages += other.messages
        self.requests += other.requests

    def percentile_ms(self, share: float, operation: str | None = None) -> float:
        """Return the duration that a share of the operations did not exceed."""
        counts: Counter[int] = Counter()
        for name, each in self.durations.items():
            if operation in (None, name):
                counts.update(each)
        left = share * sum(counts.values())
        for bucket in sorted(counts):
            left -= counts[bucket]
            if left <= 0:
                octave, part = divmod(bucket + 1, _BUCKETS_PER_OCTAVE)
                return float((1 << octave) * (1 + part / _BUCKETS_PER_OCTAVE) / 1e6)
        return 0.0


def _bucket(duration_ns: int) -> int:
    """Return the number of the bucket: eight to an octave."""
    octave = duration_ns.bit_length() - 1
    return octave * _BUCKETS_PER_OCTAVE + ((duration_ns << 3) >> octave) - _BUCKETS_PER_OCTAVE if octave > 0 else 0


@dataclass(frozen=True, slots=True)
class Step:
    """The figures for one number of clients."""

    clients: int
    seconds: float
    operations: int
    per_second: float
    p50_ms: float
    p99_ms: float
    lookup_p50_ms: float
    slowest_share: float
    """What the slowest client did, divided by what the average client did."""
    messages_per_operation: float
    errors: int
    service_peak_bytes: int


class _Client:
    """One session and its files."""

    def __init__(self, number: int, meta: Any, shared: int, seed: int, tally: Tally) -> None:
        from metasvc.model import Caller

        self._number = number
        self._meta = meta
        self._shared = shared
        self._rand = random.Random(seed)
        self._tally = tally
        self._root = Caller()
        self.done = 0

    async def _timed(self, operation: str, work: Awaitable[T]) -> T:
        begin_ns = time.perf_counter_ns()
        result = await work
        self._tally.observe(operation, time.perf_counter_ns() - begin_ns)
        self.done += 1
        return result

    async def work_until(self, end_s: float) -> None:
        from chunkstore.errors import AtollError

        try:
            await self._work(end_s)
        except AtollError as error:
            self._tally.errors.append(f"client {self._number}: {error}")

    async def _work(self, end_s: float) -> None:
        from chunkstore.geometry import SliceId
        from metasvc.errors import FsError
        from metasvc.model import ROOT_INO, Commit, RenameFlags, SliceKind, SliceRef, WrittenSlice

        meta, root, rand = self._meta, self._root, self._rand
        own = (await meta.mkdir(root, ROOT_INO, b"client-%d-%d" % (self._number, time.time_ns()), mode=0o755)).ino
        ids: Iterator[SliceId] = iter(())
        kept: list[bytes] = []
        turn = 0
        while time.monotonic() < end_s:
            turn += 1
            name = b"%d-%d" % (self._number, turn)
            opened = await self._timed("create", meta.create(root, own, name, mode=0o644, exclusive=True))
            slice_id = next(ids, None)
            if slice_id is None:
                ids = map(SliceId, await meta.allocate_slices(1024))
                slice_id = next(ids)
            data = rand.randbytes(INLINE_BYTES)
            ref = SliceRef(0, slice_id, 0, len(data))
            written = WrittenSlice(slice_id, len(data), SliceKind.INLINE, data, (ref,))
            change = Commit(
                slices=(written,), end=len(data), size_epoch=opened.inode.size_epoch, mtime_ns=time.time_ns()
            )
            ino = opened.inode.ino
            await self._timed("commit", meta.commit(root, ino, change))
            await self._timed("release", meta.release(ino))
            await self._timed("lookup", meta.lookup(own, name))
            moved = b"%d-%d" % (self._number, turn % KEPT)
            if moved in kept:
                await self._timed("unlink", meta.unlink(root, self._shared, moved))
                kept.remove(moved)
            rename = meta.rename(root, own, name, self._shared, moved, flags=RenameFlags(0))
            await self._timed("rename", rename)
            kept.append(moved)
            try:
                other = b"%d-%d" % (rand.randrange(self._number + 1), rand.randrange(KEPT))
                await self._timed("lookup", meta.lookup(self._shared, other))
            except FsError:
                pass  # it is being replaced
            await self._timed("readdir", meta.readdir(own, after=None, limit=100))


async def _worker(arguments: dict[str, Any]) -> Tally:
    """Run some clients in this process."""
    from client.meta.connection import SessionConnection
    from client.meta.endpoint import Endpoint
    from client.meta.remote import RemoteMeta
    from metasvc.api.server import Server
    from metasvc.errors import FsError
    from metasvc.model import ROOT_INO, Caller

    host, _, port = arguments["address"].removeprefix("atoll://").partition(":")
    endpoint = Endpoint([Server(host, int(port))], arguments["token"])
    tally = Tally()
    async with AsyncExitStack() as stack:
        clients = []
        connections = []
        for number in arguments["numbers"]:
            connection = SessionConnection(
                endpoint, arguments["volume"], host="bench", pid=number, mountpoint=f"/{number}", timeout_s=300
            )
            await connection.open(timeout_s=60)
            stack.push_async_callback(connection.close)
            meta = RemoteMeta(connection)
            try:
                shared = (await meta.mkdir(Caller(), ROOT_INO, b"shared", mode=0o777)).ino
            except FsError:
                shared = (await meta.lookup(ROOT_INO, b"shared")).ino
            connections.append(connection)
            clients.append(_Client(number, meta, shared, arguments["seed"] + number, tally))
        # All begin together.
        await asyncio.sleep(max(0.0, arguments["begin_s"] - time.time()))
        before = [(connection.messages_sent, connection.requests) for connection in connections]
        end_s = time.monotonic() + arguments["seconds"]
        await asyncio.gather(*(client.work_until(end_s) for client in clients))
        for connection, (messages, requests) in zip(connections, before, strict=True):
            tally.messages += connection.messages_sent - messages
            tally.requests += connection.requests - requests
        tally.operations = [client.done for client in clients]
    return tally


def _encoded(tally: Tally) -> str:
    return json.dumps(
        {
            "durations": {name: dict(counts) for name, counts in tally.durations.items()},
            "errors": tally.errors,
            "operations": tally.operations,
            "messages": tally.messages,
            "requests": tally.requests,
        }
    )


def _decoded(text: str) -> Tally:
    document = json.loads(text)
    durations = {
        name: Counter({int(bucket): count for bucket, count in counts.items()})
        for name, counts in document.pop("durations").items()
    }
    return Tally(durations, **document)


def run_step_of(service: MetadataService, volume: str, *, clients: int, seconds: float, pid: int, seed: int) -> Step:
    """Let so many clients work for so long, and put their figures together."""
    workers = min(WORKERS, clients)
    begin_s = time.time() + 2.0 + 0.05 * clients
    processes = []
    for worker in range(workers):
        arguments = {
            "address": service.address,
            "token": service.token,
            "volume": volume,
            "numbers": list(range(worker, clients, workers)),
            "begin_s": begin_s,
            "seconds": seconds,
            "seed": seed,
        }
        command = [sys.executable, __file__, "--worker", json.dumps(arguments)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL))
    tally = Tally()
    try:
        for process in processes:
            answer, _ = process.communicate(timeout=seconds + 120)
            if process.returncode:
                tally.errors.append(f"a worker ended with status {process.returncode}")
            else:
                tally.add(_decoded(answer))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    total = sum(tally.operations)
    for error in tally.errors[:5]:
        click.echo(error, err=True)
    return Step(
        clients=clients,
        seconds=seconds,
        operations=total,
        per_second=total / seconds,
        p50_ms=tally.percentile_ms(0.5),
        p99_ms=tally.percentile_ms(0.99),
        lookup_p50_ms=tally.percentile_ms(0.5, "lookup"),
        slowest_share=min(tally.operations, default=0) * len(tally.operations) / total if total else 0.0,
        messages_per_operation=tally.messages / tally.requests if tally.requests else 0.0,
        errors=len(tally.errors),
        service_peak_bytes=peak_bytes(pid),
    )


def _table(steps: Sequence[Step]) -> str:
    head = (
        "| clients | ops/s | p50 ms | p99 ms | lookup p50 ms | slowest / mean | messages / op | errors | service MiB |"
    )
    lines = [head, "|" + " ---: |" * 9]
    lines += [
        f"| {s.clients} | {s.per_second:,.0f} | {s.p50_ms:.2f} | {s.p99_ms:.2f} | {s.lookup_p50_ms:.2f} | "
        f"{s.slowest_share:.2f} | {s.messages_per_operation:.2f} | {s.errors} | {s.service_peak_bytes / MIB:.0f} |"
        for s in steps
    ]
    return "\n".join(lines) + "\n"


def _plot(steps: Sequence[Step], path: Path) -> None:
    matplotlib: Any = import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot: Any = import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    clients = [step.clients for step in steps]
    axes.plot(clients, [step.per_second for step in steps], marker="o", label="operations per second")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("clients")
    axes.set_ylabel("operations per second")
    axes.set_ylim(bottom=0)
    right = axes.twinx()
    right.plot(clients, [step.p99_ms for step in steps], marker="s", color="tab:red", label="P99, ms")
    right.set_ylabel("P99, ms")
    right.set_ylim(bottom=0)
    figure.legend(loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


@click.command(help=__doc__.splitlines()[0])
@click.option(
    "--clients", default="1,2,4,8,16,32,64", show_default=True, help="Numbers of clients, one after the other."
)
@click.option("--seconds", type=click.FloatRange(1, 3600), default=20.0, show_default=True, help="For each number.")
@click.option(
    "--last-seconds", type=click.FloatRange(1, 3600), default=600.0, show_default=True, help="For the last one."
)
@click.option("--memory", default="256MiB", show_default=True, help="What the service may take for rows.")
@click.option("--output", type=click.Path(path_type=Path), help="Directory of results.")
@click.option("--scratch", type=click.Path(exists=True, file_okay=False, path_type=Path), default="/var/tmp")
@click.option("--seed", type=int, default=20_240_229, show_default=True)
@click.option("--worker", hidden=True)
def main(
    *,
    clients: str,
    seconds: float,
    last_seconds: float,
    memory: str,
    output: Path | None,
    scratch: Path,
    seed: int,
    worker: str | None,
) -> None:
    """Run the steps and write the report."""
    if worker is not None:
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            tally = runner.run(_worker(json.loads(worker)))
        click.echo(_encoded(tally))
        return
    numbers = [int(text) for text in clients.split(",")]
    interrupt_once(signal.SIGINT, signal.SIGTERM)
    place = Path(tempfile.mkdtemp(prefix="atoll-clients-", dir=scratch))
    try:
        steps = _run(place, numbers, seconds=seconds, last_seconds=last_seconds, memory=memory, seed=seed)
        text = _table(steps)
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            document = {"environment": asdict(describe(place)), "steps": [asdict(step) for step in steps]}
            (output / "clients.json").write_text(json.dumps(document, indent=2) + "\n")
            (output / "clients.md").write_text(text)
            _plot(steps, output / "clients.png")
        click.echo(text)
    except StepFailed as error:
        raise click.ClickException(str(error)) from error
    finally:
        shutil.rmtree(place, ignore_errors=True)
    if any(step.errors for step in steps):
        raise click.ClickException("operations failed")


def _run(
    place: Path, numbers: Sequence[int], *, seconds: float, last_seconds: float, memory: str, seed: int
) -> list[Step]:
    steps = []
    (place / "bucket").mkdir()
    with metadata_service(place / "service", environment={}, options=("--memory", memory)) as service:
        run_step(
            [find_command("atoll"), "format", f"{service.address}/bench/clients", "--bucket", f"file://{place}/bucket"],
            log=place / "format",
            limit_s=60,
            environment={"ATOLL_TOKEN": service.token},
        )
        for position, count in enumerate(numbers):
            length_s = last_seconds if position == len(numbers) - 1 else seconds
            step = run_step_of(service, "bench/clients", clients=count, seconds=length_s, pid=service.pid, seed=seed)
            click.echo(f"{count} clients: {step.per_second:,.0f} operations/s, P99 {step.p99_ms:.1f} ms", err=True)
            steps.append(step)
    return steps


if __name__ == "__main__":
    main()
