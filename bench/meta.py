"""Compare operations on names with JuiceFS CE on the same PostgreSQL and the same Redis, through the mount.

`make bench-meta` calls this. Owns the order of things: in each round, for each server, for each number of processes, the two
systems take turns, in an order that changes with the round. A turn:

1. a mount: create, then stat of all again and again (`stat_again`, names cached as the system does it by default);
2. a new mount, the kernel's caches dropped: stat, each file once in an order of its own; until it has been timed for long
   enough, at most five mounts;
3. the same with readdir, each process its directory once; and in the last of these mounts rename and unlink.

Timings are reported and never judged; a wrong name, a hang or an error makes the run end with status 1.
"""

import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Final

import click

# Started as a file, Python looks for modules beside it; the benchmark imports its own by their full names.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.environment import check_machine, describe, load_average
from bench.meta_report import LAYOUTS, SYSTEMS, Failure, Measurement, Setting, write_report
from bench.meta_stores import STORES, Counters, Store, counters
from bench.meta_works import Options
from bench.processes import StepFailed, drop_page_cache, go_on_unless_interrupted, interrupt_once, run_step
from bench.servers import DirectoryBucket, MetadataService, prepare_store, serving
from bench.systems import AtollFS, JuiceFS, Place, Purpose, System
from bench.works import Timing

ROOT: Final = Path(__file__).resolve().parent.parent
_PASSES: Final = 5
_FILES: Final = {1: 3000, 4: 1000, 16: 500}
_QUICK_FILES: Final = {1: 300, 4: 100, 16: 40}


@dataclass(slots=True)
class Results:
    """What was measured and what failed so far."""

    measurements: list[Measurement] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Turn:
    """One system's turn in one setting; it leaves its volume empty."""

    setting: Setting
    number: int
    store: Store
    system: System
    service: MetadataService | None
    place: Place
    options: Options
    results: Results

    def run(self) -> None:
        """Run all works and record them; what fails is recorded, and ends the turn."""
        try:
            drop_page_cache()
            with self.system.mounted(Purpose.WRITE):
                self._record("create", *self._work("create"))
                self._record("stat_again", *self._work("stat_again"))
            self._record("stat", *self._in_new_mounts("stat"))
            self._record("readdir", *self._in_new_mounts("readdir", then=("rename", "unlink")))
        except (StepFailed, OSError) as error:
            go_on_unless_interrupted(error)
            self.results.failures.append(Failure(self.setting, self.system.name, self.number, f"{error}"))
            click.echo(f"{self._title} FAILED {error}", err=True)

    def _in_new_mounts(self, work: str, *, then: Sequence[str] = ()) -> tuple[Timing, Counters]:
        """Sum up passes, each in a mount of its own that knows nothing; go on with other works in the last mount."""
        total: tuple[Timing, Counters] | None = None
        for last in range(1, _PASSES + 1):
            drop_page_cache()
            with self.system.mounted(Purpose.READ):
                timing, counted = self._work(work)
                if total is not None:
                    elapsed_ns = total[0].elapsed_ns + timing.elapsed_ns
                    timing = Timing(total[0].operations + timing.operations, 0, elapsed_ns)
                    counted = counted.plus(total[1])
                total = timing, counted
                enough = timing.elapsed_ns >= self.options.at_least_s * 1e9 or last == _PASSES
                if enough:
                    for each in then:
                        self._record(each, *self._work(each))
                    return total
        raise AssertionError("unreachable: the last pass is enough")

    def _work(self, work: str) -> tuple[Timing, Counters]:
        """Run one work in a process of its own, with counters read before and after it."""
        mountpoint = self.place.mountpoint
        arguments = [sys.executable, "-m", "bench.meta_works", work, str(mountpoint), json.dumps(asdict(self.options))]
        before = counters(self.store, mountpoint, self.service)
        log = self.place.root / f"work-{work}"
        printed = run_step(arguments, log=log, limit_s=self.options.limit_s + 30, directory=ROOT)
        return Timing(**json.loads(printed)), counters(self.store, mountpoint, self.service).since(before)

    def _record(self, work: str, timing: Timing, counted: Counters) -> None:
        self.results.measurements.append(
            Measurement(self.setting, work, self.system.name, self.number, timing, counted, load_average())
        )
        rate = timing.operations / timing.elapsed_ns * 1e9
        click.echo(f"{self._title} {work:<10} {timing.elapsed_ns / 1e9:8.3f} s {rate:10,.0f}/s", err=True)

    @property
    def _title(self) -> str:
        setting = self.setting
        return (
            f"{setting.store:<10} round {self.number} {setting.layout:<6} {setting.processes:>2} {self.system.name:<7}"
        )


@dataclass(frozen=True, slots=True)
class Volumes:
    """The empty volumes of both systems on one server."""

    store: Store
    scratch: Path
    token: str

    def place(self, system: str) -> Place:
        root = self.scratch / system
        return Place(root, DirectoryBucket(root / "bucket"), self.store.juicefs)

    @contextmanager
    def system(self, name: str) -> Iterator[tuple[System, Place, MetadataService | None]]:
        """Give a system; the metadata service of ours runs only as long as this."""
        place = self.place(name)
        if name == "juicefs":
            yield JuiceFS(place), place, None
            return
        directory = self.scratch / "service"
        with serving(self.store.atoll, self.token, directory, environment={}) as service:
            place = replace(place, service=service)
            yield AtollFS(place), place, service

    def prepare(self, systems: Sequence[str]) -> None:
        for name in systems:
            with self.system(name) as (system, _, _):
                system.prepare()


def run_store(
    name: str,
    number: int,
    settings: Sequence[Setting],
    scratch: Path,
    results: Results,
    options: dict[Setting, Options],
) -> None:
    """Run one round on one new server."""
    scratch.mkdir()
    (scratch / "service").mkdir()
    order = SYSTEMS if number % 2 else SYSTEMS[::-1]
    with STORES[name]() as store:
        volumes = Volumes(store, scratch, prepare_store(store.atoll, log=scratch / "init"))
        volumes.prepare(order)
        for setting in settings:
            for system_name in order:
                with volumes.system(system_name) as (system, place, service):
                    Turn(setting, number, store, system, service, place, options[setting], results).run()


def _numbers(given: str) -> list[int]:
    try:
        numbers = [int(text) for text in given.split(",")]
    except ValueError:
        numbers = [0]
    if not all(1 <= number <= 256 for number in numbers):
        raise click.BadParameter("numbers from 1 to 256, with commas", param_hint="--processes")
    return numbers


def _chosen(given: str | None, known: Sequence[str], option: str) -> list[str]:
    names = list(known) if given is None else given.split(",")
    if not set(names) <= set(known):
        raise click.BadParameter(f"some of {', '.join(known)}, with commas", param_hint=option)
    return names


@click.command(help=__doc__.splitlines()[0])
@click.option("--quick", is_flag=True, help="A few hundred files, one round.")
@click.option("--stores", metavar="NAME,…", help=f"Only these: {', '.join(STORES)}.")
@click.option("--layouts", metavar="NAME,…", help="own: a directory for each process; shared: one for all.")
@click.option("--processes", default="1,4,16", show_default=True, help="Numbers of processes.")
@click.option("--rounds", type=click.IntRange(1, 99), help="Of which the median counts.  [3, quick 1]")
@click.option(
    "--files", type=click.IntRange(1, 100_000), help="Of each process.  [3000, 1000, 500; quick 300, 100, 40]"
)
@click.option(
    "--limit", "limit_s", type=click.FloatRange(1), default=300.0, show_default=True, help="Seconds for a work."
)
@click.option("--output", type=click.Path(path_type=Path), help="Directory of results.  [bench/results/local/TIME]")
@click.option(
    "--scratch",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default="/var/tmp",
    show_default=True,
    help="Directory on the disk to measure; the servers' data are there, too.",
)
def main(
    *,
    quick: bool,
    stores: str | None,
    layouts: str | None,
    processes: str,
    rounds: int | None,
    files: int | None,
    limit_s: float,
    output: Path | None,
    scratch: Path,
) -> None:
    """Run the benchmark and write its report."""
    try:
        check_machine(scratch, needed_bytes=2**30)
    except StepFailed as error:
        raise click.ClickException(f"{error}") from error
    names = _chosen(stores, list(STORES), "--stores")
    total, sizes = rounds or (1 if quick else 3), _QUICK_FILES if quick else _FILES
    options: dict[Setting, Options] = {}
    for name in names:
        for layout in _chosen(layouts, LAYOUTS, "--layouts"):
            for count in _numbers(processes):
                # One process has a directory of its own in any case.
                if layout == "own" or count > 1:
                    amount = files or sizes.get(count) or max(1, sizes[16] * 16 // count)
                    options[Setting(name, layout, count)] = Options(
                        count, amount, layout == "shared", 0.1 if quick else 0.5, limit_s
                    )
    interrupt_once(signal.SIGINT, signal.SIGTERM)
    place = Path(tempfile.mkdtemp(prefix="atoll-bench-", dir=scratch))
    # The servers make their directories where temporary files are, and PostgreSQL is not root.
    place.chmod(0o755)
    tempfile.tempdir = str(place)
    environment, results = describe(place), Results()
    target = output or ROOT / "bench" / "results" / "local" / f"meta-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        for number in range(1, total + 1):
            for name in names:
                settings = [setting for setting in options if setting.store == name]
                try:
                    run_store(name, number, settings, place / f"{name}-{number}", results, options)
                except (StepFailed, OSError) as error:
                    go_on_unless_interrupted(error)
                    results.failures.append(Failure(settings[0], "server", number, f"{error}"))
                    click.echo(f"{name} round {number} FAILED {error}", err=True)
                shutil.rmtree(place / f"{name}-{number}", ignore_errors=True)
    finally:
        if results.measurements or results.failures:
            each = {f"{key.processes} x {value.files:,}": None for key, value in options.items()}
            written = write_report(
                results.measurements,
                results.failures,
                amount=f"Processes x empty files: {', '.join(each)}.",
                environment=environment,
                rounds=total,
                output=target,
            )
            click.echo(written)
            click.echo(f"written to {target}", err=True)
        shutil.rmtree(place, ignore_errors=True)
    if results.failures or not results.measurements:
        raise click.ClickException(f"{len(results.failures)} turns failed")


if __name__ == "__main__":
    main()
