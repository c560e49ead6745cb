"""Count what many small files cost at the bucket: written, gathered into packs, read in order and at random.

`python bench/packs.py`. A volume of a metadata service and JuiceFS CE on the same S3 server write the same files, one after
the other. The service gathers those that are older than a minute into objects; then all files are read with nothing cached,
in order of names, and once more at random. Requests are counted by the server. Figures are reported against the project's
goals and never judged.
"""

import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

import click

# Started as a file, Python looks for modules beside it; the benchmark imports its own by their full names.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.environment import check_machine, describe
from bench.processes import drop_page_cache, interrupt_once
from bench.servers import S3Bucket, keys_environment, metadata_service, redis_server
from bench.systems import AtollFS, JuiceFS, Place, Purpose, System
from tests.servers.seaweedfs import ACCESS_KEY_ID, SECRET_ACCESS_KEY, SeaweedFS

FILE_BYTES: Final = 4096
_FILES_PER_DIRECTORY: Final = 500
PUT_GOAL: Final = 50.0
IN_ORDER_GOAL: Final = 10.0
_STILL_S: Final = 100.0
"""Packs are looked for every 30 s, and files have to be 60 s old: whoever puts nothing for so long has nothing to put."""
_PACKING_LIMIT_S: Final = 1800.0


@dataclass(frozen=True, slots=True)
class Findings:
    """What one system asked of the bucket, and how long it took; seconds for all files."""

    system: str
    files: int
    write_s: float
    puts: int
    """Until all was packed, where something is."""
    deletes: int
    in_order_s: float
    in_order_gets: int
    at_random_s: float
    at_random_gets: int


def _paths(root: Path, files: int) -> list[Path]:
    return [root / f"d{number // _FILES_PER_DIRECTORY:04d}" / f"f{number:06d}" for number in range(files)]


def _content(number: int, seed: int) -> bytes:
    return random.Random(seed * 1_000_003 + number).randbytes(FILE_BYTES)


def _write(root: Path, files: int, seed: int) -> float:
    contents = [_content(number, seed) for number in range(files)]
    begin_s = time.perf_counter()
    for path, content in zip(_paths(root, files), contents, strict=True):
        if not path.parent.exists():
            path.parent.mkdir()
        path.write_bytes(content)
    return time.perf_counter() - begin_s


def _read(root: Path, order: Sequence[int], files: int, seed: int) -> float:
    paths = _paths(root, files)
    begin_s = time.perf_counter()
    contents = [paths[number].read_bytes() for number in order]
    taken_s = time.perf_counter() - begin_s
    for number, content in zip(order, contents, strict=True):
        if content != _content(number, seed):
            raise click.ClickException(f"{paths[number]} does not hold what was written")
    return taken_s


def _wait_until_still(puts: Callable[[], int]) -> None:
    """Return when nothing was put for `_STILL_S`."""
    seen, since_s, limit_s = puts(), time.monotonic(), time.monotonic() + _PACKING_LIMIT_S
    while time.monotonic() - since_s < _STILL_S:
        if time.monotonic() > limit_s:
            raise click.ClickException(f"objects are still being written after {_PACKING_LIMIT_S:.0f} s")
        time.sleep(2)
        if (now := puts()) != seen:
            seen, since_s = now, time.monotonic()


def measure(system: System, server: SeaweedFS, bucket: str, *, files: int, seed: int, packs: bool) -> Findings:
    """Write, wait for packs where there are any, read twice."""

    def count(kind: str) -> int:
        return server.requests(bucket).by_type.get(kind, 0)

    def cold_read(order: Sequence[int]) -> tuple[float, int]:
        system.forget_cache()
        with system.mounted(Purpose.READ) as root:
            drop_page_cache()
            before = count("GET")
            taken_s = _read(root, order, files, seed)
        return taken_s, count("GET") - before

    system.prepare()
    with system.mounted(Purpose.WRITE) as root:
        write_s = _write(root, files, seed)
    if packs:
        _wait_until_still(lambda: count("PUT"))
    puts, deletes = count("PUT"), count("DELETE")
    order = list(range(files))
    in_order_s, in_order_gets = cold_read(order)
    random.Random(seed).shuffle(order)
    at_random_s, at_random_gets = cold_read(order)
    return Findings(
        system=system.name,
        files=files,
        write_s=write_s,
        puts=puts,
        deletes=deletes,
        in_order_s=in_order_s,
        in_order_gets=in_order_gets,
        at_random_s=at_random_s,
        at_random_gets=at_random_gets,
    )


def _line(findings: Findings) -> str:
    each = 1e6 / findings.files
    return (
        f"{findings.system}: written {findings.write_s * each:.0f} us a file, {findings.puts} PUT, {findings.deletes} DELETE; "
        f"read in order {findings.in_order_s * each:.0f} us, {findings.in_order_gets} GET; "
        f"at random {findings.at_random_s * each:.0f} us, {findings.at_random_gets} GET"
    )


def _judged(name: str, value: float, goal: float) -> str:
    return f"{name} {value:.1f}x, goal {goal:.0f}x: {'met' if value >= goal else 'MISSED'}"


@click.command(help=__doc__)
@click.option("--files", type=click.IntRange(100, 10_000_000), default=50_000, show_default=True)
@click.option("--seed", type=int, default=20240229, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="File of results, JSON.")
@click.option("--scratch", type=click.Path(path_type=Path, exists=True, file_okay=False), default=Path("/var/tmp"))
def main(files: int, seed: int, output: Path | None, scratch: Path) -> None:
    check_machine(scratch, needed_bytes=20 * files * FILE_BYTES + (1 << 30))
    interrupt_once(signal.SIGTERM, signal.SIGHUP)
    root = Path(tempfile.mkdtemp(prefix="atoll-packs-", dir=scratch))
    keys = keys_environment(ACCESS_KEY_ID, SECRET_ACCESS_KEY)
    results = []
    try:
        with SeaweedFS(root / "s3") as server:
            for name in ("atoll", "juicefs"):
                server.create_bucket(f"packs-{name}")
            buckets = [
                S3Bucket(server.endpoint, f"packs-{name}", ACCESS_KEY_ID, SECRET_ACCESS_KEY)
                for name in ("atoll", "juicefs")
            ]
            place = Place(root / "atoll" / "files", buckets[0], None)
            place.root.parent.mkdir()
            with metadata_service(root / "service", environment=keys) as service:
                system: System = AtollFS(replace(place, service=service))
                results.append(measure(system, server, buckets[0].name, files=files, seed=seed, packs=True))
                click.echo(_line(results[-1]))
            with redis_server(root / "redis") as redis:
                system = JuiceFS(Place(root / "juicefs", buckets[1], redis))
                results.append(measure(system, server, buckets[1].name, files=files, seed=seed, packs=False))
                click.echo(_line(results[-1]))
        ours, theirs = results
        click.echo(_judged("PUT requests saved", theirs.puts / max(1, ours.puts), PUT_GOAL))
        click.echo(_judged("reading in order", theirs.in_order_s / ours.in_order_s, IN_ORDER_GOAL))
        if output is not None:
            output.write_text(
                json.dumps(
                    {"machine": asdict(describe(scratch)), "results": [asdict(each) for each in results]}, indent=1
                )
            )
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
