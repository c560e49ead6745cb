"""Compare AtollFS with its peers: the same works on all of them, in one run.

`make bench` calls this. Owns the order of things: rounds, within a round sessions, within a session one system after
the other, so that a drift of the machine hits all alike. Every round begins with new servers and new volumes, and only
one file system is mounted at a time. Timings are reported and never judged; contents are verified, and a wrong byte, a
hang or an error makes the run end with status 1, after all other works were run.
"""

import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import click

# Started as a file, Python looks for modules beside it; the benchmark imports its own by their full names.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.environment import check_machine, describe, load_average
from bench.plan import WORKS, Session, Work, choose
from bench.processes import StepFailed, drop_page_cache, go_on_unless_interrupted, interrupt_once
from bench.report import Failure, Measurement, write_report
from bench.servers import Bucket, DirectoryBucket, metadata_service, redis_server, s3_server
from bench.systems import SYSTEMS, Place, Purpose, System
from bench.worker import run_work
from bench.works import MIB, Options, Scale, Timing

ROOT: Final = Path(__file__).resolve().parent.parent
FULL: Final = Scale(files_4k=4000, files_64k=1000, tree_files=1500, random_reads=4000, big_size_bytes=1024 * MIB)
QUICK: Final = Scale(files_4k=300, files_64k=100, tree_files=200, random_reads=500, big_size_bytes=64 * MIB)
PAIR_HELP: Final = "Embedded volume on a directory, on S3 (both), or a service with S3."
PAIRS: Final = ("directory", "s3", "service")


def _reason(error: BaseException) -> str:
    """Put an error into one line, the first one first: a hang makes the unmounting fail as well."""
    reasons = [f"{error}"]
    while (earlier := error.__context__) is not None and not error.__suppress_context__:
        error = earlier
        reasons.append(f"{error}")
    return "; then ".join(reversed(reasons))


@dataclass(slots=True)
class Results:
    """What was measured and what failed so far."""

    measurements: list[Measurement] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)


@dataclass(slots=True)
class Contender:
    """A system in a round, with the functions that have already worked on it."""

    system: System
    done: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Round:
    """One round of one pair: its systems, made anew."""

    pair: str
    number: int
    scratch: Path
    scale: Scale
    limit_s: float
    results: Results
    # Where the logs of what failed are kept; everything else of a round is removed.
    kept: Path

    def work(self, contender: Contender, directory: Path, function: str) -> Timing:
        """Run a work on a mounted system; raise StepFailed on an error, a wrong byte or at the time limit."""
        timing = run_work(
            function,
            directory,
            options=Options(self.scale, check_modes=contender.system.keeps_modes),
            log=self.scratch / f"{contender.system.name}-{function}",
            limit_s=self.limit_s,
        )
        contender.done.add(function)
        return timing

    def fail(self, system: str, works: Sequence[Work], reason: str) -> None:
        for work in works:
            self.results.failures.append(Failure(self.pair, work.key, system, self.number, reason))
        click.echo(f"{self.pair} round {self.number} {system:<8} FAILED {reason}", err=True)
        root = self.scratch / system
        target = self.kept / f"{self.pair}-{self.number}-{works[0].key}-{system}"
        target.mkdir(parents=True, exist_ok=True)
        for pattern in ("*.log", "*.err", "cache/*.log", "cache/*/*.log"):
            for log in root.glob(pattern):
                shutil.copy(log, target / log.name)

    def run_session(self, contender: Contender, session: Session) -> None:
        """Bring the system into the state that the session asks for, run its works, and record what happens."""
        system, left = contender.system, list(session.works)
        try:
            self._make_what_is_missing(contender, session)
            system.forget_cache()
            if session.fill:
                drop_page_cache()
                with system.mounted(session.purpose) as directory:
                    for function in session.fill:
                        self.work(contender, directory, function)
                    system.settle()
            drop_page_cache()
            with system.mounted(session.purpose) as directory:
                while left:
                    load, before = load_average(), system.messages()
                    timing = self.work(contender, directory, left[0].function)
                    after = system.messages()
                    exchanged = after.since(before) if after is not None and before is not None else None
                    work = left.pop(0)
                    self.results.measurements.append(
                        Measurement(self.pair, work.key, system.name, self.number, timing, load, exchanged)
                    )
                    click.echo(
                        f"{self.pair} round {self.number} {system.name:<8} {work.key:<14} "
                        f"{timing.elapsed_ns / 1e9:9.3f} s {timing.elapsed_ns / timing.operations / 1e3:12.1f} us/op",
                        err=True,
                    )
        except (StepFailed, OSError) as error:
            go_on_unless_interrupted(error)
            # What is left has no figure; a failure after the last work (an unmount) is charged to the whole session.
            self.fail(system.name, left or session.works, _reason(error))

    def _make_what_is_missing(self, contender: Contender, session: Session) -> None:
        here = {work.function for work in session.works}
        missing = list(dict.fromkeys(need for work in session.works for need in work.needs))
        missing = [function for function in missing if function not in contender.done | here]
        if missing:
            with contender.system.mounted(Purpose.WRITE) as directory:
                for function in missing:
                    self.work(contender, directory, function)


@contextmanager
def _contenders(round_: Round, names: Sequence[str], works: Sequence[Work]) -> Iterator[list[Contender]]:
    """Start the servers of a round and make a volume of every system; a system that cannot be made is left out."""
    with ExitStack() as stack:
        redis = stack.enter_context(redis_server(round_.scratch / "redis")) if "juicefs" in names else None
        server = stack.enter_context(s3_server(round_.scratch / "s3")) if round_.pair != "directory" else None
        service = None
        if round_.pair == "service" and server is not None and "atoll" in names:
            running = metadata_service(round_.scratch / "service", environment=server.environment)
            service = stack.enter_context(running)
        contenders = []
        for name in names:
            root = round_.scratch / name
            try:
                bucket: Bucket
                if server is not None and name != "ext4":
                    bucket = server.bucket(f"bench-{name}")
                else:
                    bucket = DirectoryBucket(root / "bucket")
                system = SYSTEMS[name](Place(root, bucket, redis, service))
                system.prepare()
                contenders.append(Contender(system))
            except (StepFailed, OSError) as error:
                go_on_unless_interrupted(error)
                round_.fail(name, works, _reason(error))
        yield contenders


def run_round(round_: Round, sessions: Sequence[Session], names: Sequence[str]) -> None:
    """Run every session on every system, the systems in an order that moves by one with each round."""
    present = [name for name in names if round_.pair != "directory" or name != "rclone"]
    shift = (round_.number - 1) % max(1, len(present))
    works = [work for session in sessions for work in session.works]
    round_.scratch.mkdir()
    try:
        with _contenders(round_, present[shift:] + present[:shift], works) as contenders:
            for session in sessions:
                for contender in contenders:
                    round_.run_session(contender, session)
    finally:
        shutil.rmtree(round_.scratch, ignore_errors=True)


def _comma_separated(known: Sequence[str], option: str, given: str | None) -> list[str]:
    if given is None:
        return list(known)
    names = [name.strip() for name in given.split(",")]
    for name in names:
        if name not in known:
            raise click.BadParameter(f"{name}: not one of {', '.join(known)}", param_hint=option)
    return [name for name in known if name in names]


@click.command(help="Compare AtollFS with JuiceFS, rclone and a plain directory.")
@click.option("--quick", is_flag=True, help="A few hundred files and 64 MiB, one round.")
@click.option("--pair", type=click.Choice([*PAIRS, "both", "all"]), default="all", show_default=True, help=PAIR_HELP)
@click.option("--only", metavar="WORK,…", help=f"Only these works: {', '.join(WORKS)}.")
@click.option("--systems", metavar="NAME,…", help=f"Only these systems: {', '.join(SYSTEMS)}.")
@click.option("--rounds", type=click.IntRange(1, 99), help="Rounds, of which the median counts.  [3, quick 1]")
@click.option("--files", type=click.IntRange(1, 1_000_000), help="Number of 4 KiB files; a quarter of it of 64 KiB.")
@click.option("--big-mib", type=click.IntRange(1, 1_048_576), help="Size of the big file in MiB.")
@click.option("--limit", "limit_s", type=click.FloatRange(1), help="Seconds for one work.  [900, quick 180]")
@click.option("--output", type=click.Path(path_type=Path), help="Directory of results.  [bench/results/local/TIME]")
@click.option(
    "--scratch",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default="/var/tmp",
    show_default=True,
    help="Directory on the disk to measure.",
)
def main(
    *,
    quick: bool,
    pair: str,
    only: str | None,
    systems: str | None,
    rounds: int | None,
    files: int | None,
    big_mib: int | None,
    limit_s: float | None,
    output: Path | None,
    scratch: Path,
) -> None:
    """Run the benchmark and write its report."""
    base = QUICK if quick else FULL
    scale = Scale(
        files_4k=files or base.files_4k,
        files_64k=max(1, files // 4) if files else base.files_64k,
        tree_files=base.tree_files,
        random_reads=base.random_reads,
        big_size_bytes=big_mib * MIB if big_mib else base.big_size_bytes,
    )
    names = _comma_separated(list(SYSTEMS), "--systems", systems)
    sessions = choose(_comma_separated(list(WORKS), "--only", only))
    pairs = {"all": PAIRS, "both": PAIRS[:2]}.get(pair, (pair,))
    total = rounds or (1 if quick else 3)
    # Per system at most: the file in the bucket, in the cache directory, and once more as garbage of the S3 server.
    needed_bytes = len(names) * 3 * scale.big_size_bytes + 2**30
    try:
        check_machine(scratch, needed_bytes=needed_bytes)
    except StepFailed as error:
        raise click.ClickException(f"{error}") from error
    target = output or ROOT / "bench" / "results" / "local" / time.strftime("%Y%m%d-%H%M%S")
    interrupt_once(signal.SIGINT, signal.SIGTERM)
    results = Results()
    place = Path(tempfile.mkdtemp(prefix="atoll-bench-", dir=scratch))
    click.echo(f"working in {place}", err=True)
    environment = describe(place)
    try:
        for each in pairs:
            for number in range(1, total + 1):
                directory = place / f"{each}-{number}"
                limit = limit_s or (180.0 if quick else 900.0)
                run_round(Round(each, number, directory, scale, limit, results, target / "logs"), sessions, names)
    finally:
        shutil.rmtree(place, ignore_errors=True)
        if results.measurements:
            written = write_report(
                results.measurements,
                results.failures,
                names,
                scale=scale,
                environment=environment,
                rounds=total,
                output=target,
            )
            click.echo(written)
            click.echo(f"written to {target}", err=True)
    if results.failures or not results.measurements:
        raise click.ClickException(f"{len(results.failures)} works failed")


if __name__ == "__main__":
    main()
