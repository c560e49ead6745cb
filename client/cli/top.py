"""``atoll top PATH|ADDRESS``: what a mount, or a volume of a service, is doing now.

Owns the picture: two samples of the counters, what they differ by in a second. A mount is asked at its control socket, a volume
of a service through one session for as long as this runs. Redrawn at a terminal; elsewhere each picture is printed.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

import click

from client.address import EmbeddedAddress
from client.cli.ask import Named, ask, named_volume
from client.cli.status import tenant_line
from client.sizes import format_size

if TYPE_CHECKING:
    from rich.console import RenderableType

Sample = Mapping[str, float]


class Looked(NamedTuple):
    """What was seen at one moment."""

    sample: Sample
    lines: Sequence[str] = ()
    """Of a service's volume: who owns it, what its tenant has."""
    sessions: Sequence[tuple[str, ...]] = ()


Source = Callable[[], Looked]

OPERATIONS_SHOWN: Final = 12


@click.command("top")
@click.argument("address")
@click.option("--interval", type=click.FloatRange(0.1, 3600), default=1.0, show_default=True, help="Seconds.")
@click.option("--count", type=click.IntRange(1), help="End after so many pictures.  [until Ctrl-C]")
def command(address: str, *, interval: float, count: int | None) -> None:
    """Show what a mount, or a volume of a service, is doing now.

    ADDRESS is the volume, or a path under its mount.
    """
    from rich.console import Console
    from rich.live import Live

    named = named_volume(address)
    console = Console()
    with _source(named) as source, Live(console=console, auto_refresh=False, transient=False) as live:
        before, before_s = source().sample, time.monotonic()
        shown = 0
        while count is None or shown < count:
            time.sleep(interval)
            now, now_s = source(), time.monotonic()
            picture = _picture(str(named.address), before, now, now_s - before_s)
            if sys.stdout.isatty():
                live.update(picture, refresh=True)
            else:
                console.print(picture)
            before, before_s = now.sample, now_s
            shown += 1


@contextmanager
def _source(named: Named) -> Iterator[Source]:
    if isinstance(named.address, EmbeddedAddress) or named.mountpoint:
        yield lambda: Looked(_of_mount(named))
        return
    from client.volume import open_volume

    with asyncio.Runner() as runner:
        opening = open_volume(named.address, owner="`atoll top`", env=os.environ)
        volume = runner.run(opening.__aenter__())
        try:

            def look() -> Looked:
                status = runner.run(volume.admin.status())
                sessions: list[tuple[str, ...]] = [
                    (str(each.session_id), each.host, str(each.pid), each.mountpoint or "-") for each in status.sessions
                ]
                usage = {"used_bytes": status.statfs.used_bytes, "used_inodes": status.statfs.used_inodes}
                lines = [f"owner {status.owner}, epoch {status.epoch}"]
                if status.tenant is not None:
                    lines.append(f"tenant {tenant_line(status.format.tenant, status.tenant._asdict())}")
                return Looked({**status.counters, **usage}, lines, sessions)

            yield look
        finally:
            runner.run(opening.__aexit__(None, None, None))


def _of_mount(named: Named) -> Sample:
    from client.admin.stats import parse_metrics

    lines = ask(named, "stats", {}, command="top")["lines"]
    return {name: float(value) for name, value in parse_metrics("\n".join(lines)).items()}


def _picture(title: str, before: Sample, looked: Looked, seconds: float) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    now = looked.sample

    def rate(name: str) -> float:
        return max(0.0, now.get(name, 0.0) - before.get(name, 0.0)) / seconds

    parts: list[RenderableType] = [Text(title, style="bold")]
    if any(name.startswith("atoll_fuse_") for name in now):
        parts += [Text(line) for line in _mount_lines(now, rate)]
        table = Table("request", "per second", "mean ms", box=None)
        for operation, per_second, mean_ms in _operations(now, rate)[:OPERATIONS_SHOWN]:
            table.add_row(operation, f"{per_second:,.1f}", f"{mean_ms:.3f}")
        parts.append(table)
    else:
        parts += [Text(line) for line in (*looked.lines, *_service_lines(now, rate))]
        table = Table("session", "host", "pid", "mounted at", box=None)
        for row in looked.sessions:
            table.add_row(*map(Text, row))
        parts.append(table)
    return Group(*parts)


def _mount_lines(now: Sample, rate: Callable[[str], float]) -> Iterator[str]:
    hits, misses = rate("atoll_chunk_cache_hits_total"), rate("atoll_chunk_cache_misses_total")
    found = f"{100 * hits / (hits + misses):.0f} %" if hits + misses else "-"
    yield (
        f"read {_per_second(rate('atoll_read_bytes_total'))}  written {_per_second(rate('atoll_written_bytes_total'))}  "
        f"cache hits {found}  cached {format_size(int(now.get('atoll_chunk_cache_bytes', 0)))}"
    )
    requests = sum(rate(name) for name in now if name.startswith("atoll_bucket_requests_total"))
    moved = sum(rate(name) for name in now if name.startswith("atoll_bucket_bytes_total"))
    waiting = int(now.get("atoll_chunk_staged_bytes", 0))
    yield f"bucket {requests:,.1f} requests/s, {_per_second(moved)}  not uploaded {format_size(waiting)}"
    yield (
        f"metadata {rate('atoll_meta_operations_total'):,.1f} operations/s  "
        f"open files {now.get('atoll_open_files', 0):.0f}  dirty {now.get('atoll_dirty_files', 0):.0f}"
    )


def _service_lines(now: Sample, rate: Callable[[str], float]) -> Iterator[str]:
    batches, changes = rate("batches_total"), rate("changes_total")
    commit_ms = rate("commit_ns_total") / batches / 1e6 if batches else 0.0
    yield (
        f"{rate('operations_total'):,.1f} operations/s  {rate('loads_total'):,.1f} loads/s  "
        f"{batches:,.1f} commits/s of {changes / batches if batches else 0:.1f} rows in {commit_ms:.2f} ms"
    )
    yield f"{now.get('used_inodes', 0):,.0f} inodes  {format_size(int(now.get('used_bytes', 0)))} used"
    jobs = {name.split("_")[1] for name in now if name.startswith("job_")}
    for job in sorted(jobs):
        failures = now.get(f"job_{job}_failures_total", 0)
        yield f"job {job}: {now.get(f'job_{job}_done_total', 0):,.0f} done, {failures:,.0f} failures"


def _operations(now: Sample, rate: Callable[[str], float]) -> list[tuple[str, float, float]]:
    """Return operation, per second, mean ms, the busiest first."""
    found = []
    for name in now:
        if name.startswith("atoll_fuse_requests_total"):
            operation = name.partition('"')[2].partition('"')[0]
            per_second = rate(name)
            spent_s = rate(f'atoll_fuse_request_duration_seconds_sum{{op="{operation}"}}')
            if per_second:
                found.append((operation, per_second, spent_s / per_second * 1e3))
    return sorted(found, key=lambda row: -row[1])


def _per_second(size_bytes: float) -> str:
    return f"{format_size(int(size_bytes))}/s"
