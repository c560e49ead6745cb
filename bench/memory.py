"""Measure what a mount needs for itself: memory after much work, and time to start.

`python bench/memory.py`. One mount walks all files of a volume, writes and reads a big file in pieces; then the peak of
resident memory (VmHWM) of the process that serves it is read, with those of its children. After that the volume is
mounted again and again. Figures are reported against the project's goals and never judged.
"""

import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Final

import click

# Started as a file, Python looks for modules beside it; the benchmark imports its own by their full names.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.environment import check_machine, describe
from bench.processes import StepFailed, drop_page_cache, interrupt_once
from bench.servers import Bucket, DirectoryBucket, redis_server, s3_server
from bench.systems import AtollFS, JuiceFS, Place, Purpose
from bench.worker import run_work
from bench.works import MIB, Options, Scale

PEAK_GOAL_BYTES: Final = 250 * MIB
START_GOAL_S: Final = 1.0
_LIMIT_S: Final = 3600.0
_SYSTEMS: Final[dict[str, type[AtollFS] | type[JuiceFS]]] = {"atoll": AtollFS, "juicefs": JuiceFS}


@dataclass(frozen=True, slots=True)
class Peak:
    """Peak resident memory of a process and of each of its descendants, after a step."""

    after: str
    process_bytes: int
    descendants_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Findings:
    """What was measured on one system."""

    system: str
    bucket: str
    files: int
    io_bytes: int
    creating: tuple[Peak, ...]
    working: tuple[Peak, ...]
    cold_start_s: tuple[float, ...]
    warm_start_s: tuple[float, ...]


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def peak_bytes(pid: int) -> int:
    """Return the peak of the resident memory of a process."""
    value, unit = _status(pid)["VmHWM"].split()
    if unit != "kB":
        raise StepFailed(f"/proc/{pid}/status: VmHWM in {unit}, expected kB")
    return int(value) * 1024


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (thread / "children").read_text().split()):
            found += [child, *_descendants(child)]
    return found


def _server_of(system: AtollFS | JuiceFS, mountpoint: Path) -> int:
    """Find the process that serves a mount."""
    match system:
        case AtollFS():
            return system.holder()
        case JuiceFS():
            return int(json.loads((mountpoint / ".config").read_bytes())["Pid"])


@dataclass(frozen=True, slots=True)
class Experiment:
    """One system in one place, with the amount of work."""

    system: AtollFS | JuiceFS
    options: Options
    logs: Path

    def _measured(self, directory: Path, functions: Sequence[str]) -> Iterator[Peak]:
        pid = _server_of(self.system, directory)
        yield self._peak("mount", pid)
        for function in functions:
            # So that reading reaches the mount's process and is not answered by the page cache.
            drop_page_cache()
            timing = run_work(function, directory, options=self.options, log=self.logs / function, limit_s=_LIMIT_S)
            yield self._peak(f"{function} ({timing.elapsed_ns / 1e9:.1f} s)", pid)

    @staticmethod
    def _peak(after: str, pid: int) -> Peak:
        peak = Peak(after, peak_bytes(pid), tuple(peak_bytes(child) for child in _descendants(pid)))
        click.echo(f"after {after}: {peak.process_bytes / MIB:.1f} MiB", err=True)
        return peak

    def peaks(self, functions: Sequence[str]) -> tuple[Peak, ...]:
        """Run works in a new mount and read the peaks after each of them."""
        with self.system.mounted(Purpose.WRITE) as directory:
            return tuple(self._measured(directory, functions))

    def starts_s(self, count: int, *, cold: bool) -> tuple[float, ...]:
        """Mount so many times and time each until the root answers."""
        laps_s = []
        for _ in range(count):
            if cold:
                drop_page_cache()
            begin_s = time.perf_counter()
            with self.system.mounted(Purpose.READ) as directory:
                directory.stat()
                laps_s.append(time.perf_counter() - begin_s)
        return tuple(laps_s)


@contextmanager
def _prepared(name: str, pair: str, root: Path) -> Iterator[AtollFS | JuiceFS]:
    with ExitStack() as stack:
        redis = stack.enter_context(redis_server(root / "redis")) if name == "juicefs" else None
        bucket: Bucket = DirectoryBucket(root / name / "bucket")
        if pair == "s3":
            bucket = stack.enter_context(s3_server(root / "s3")).bucket(f"bench-{name}")
        system = _SYSTEMS[name](Place(root / name, bucket, redis))
        system.prepare()
        yield system


def _verdict(figure: float, goal: float) -> str:
    return "met" if figure < goal else "MISSED"


def report(findings: Findings) -> str:
    """Write the figures with the project's goals beside them."""

    title = f"{findings.system}, bucket = {findings.bucket}, {findings.files:,} files"
    lines = [f"{title}, {findings.io_bytes / 2**30:.1f} GiB written and read"]
    for what, peaks in (("creating", findings.creating), ("walking and I/O", findings.working)):
        lines.append(f"{what}:")
        for peak in peaks:
            others = "".join(f" + {each / MIB:.1f}" for each in peak.descendants_bytes)
            lines.append(f"  VmHWM after {peak.after:<28} {peak.process_bytes / MIB:8.1f} MiB{others}")
    last = findings.working[-1]
    total_bytes = last.process_bytes + sum(last.descendants_bytes)
    peak_verdict = _verdict(total_bytes, PEAK_GOAL_BYTES)
    lines.append(f"peak {total_bytes / MIB:.1f} MiB, goal under {PEAK_GOAL_BYTES // MIB} MiB: {peak_verdict}")
    for what, laps_s in (("cold", findings.cold_start_s), ("warm", findings.warm_start_s)):
        middle_s = median(laps_s)
        figures = f"median {middle_s:.3f} s of {len(laps_s)} ({min(laps_s):.3f} to {max(laps_s):.3f})"
        goal = f"goal under {START_GOAL_S:g} s: {_verdict(middle_s, START_GOAL_S)}"
        lines.append(f"start, page cache {what}: {figures}, {goal}")
    return "\n".join(lines) + "\n"


@click.command(help="Measure memory and start time of a mount.")
@click.option("--system", "name", type=click.Choice(list(_SYSTEMS)), default="atoll", show_default=True)
@click.option("--pair", type=click.Choice(["directory", "s3"]), default="directory", show_default=True)
@click.option("--files", type=click.IntRange(1, 10_000_000), default=100_000, show_default=True, help="Files of 4 KiB.")
@click.option("--io-mib", type=click.IntRange(2), default=10 * 1024, show_default=True, help="Half written, half read.")
@click.option(
    "--mounts", type=click.IntRange(1, 99), default=5, show_default=True, help="Starts to take the median of."
)
@click.option("--output", type=click.Path(path_type=Path), help="File for the figures as JSON.")
@click.option(
    "--scratch",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default="/var/tmp",
    show_default=True,
    help="Directory on the disk to use.",
)
def main(*, name: str, pair: str, files: int, io_mib: int, mounts: int, output: Path | None, scratch: Path) -> None:
    """Run the experiment and print its findings."""
    size_bytes = io_mib // 2 * MIB
    scale = Scale(files_4k=files, files_64k=1, tree_files=1, random_reads=1000, big_size_bytes=size_bytes)
    interrupt_once(signal.SIGINT, signal.SIGTERM)
    place = Path(tempfile.mkdtemp(prefix="atoll-memory-", dir=scratch))
    try:
        check_machine(place, needed_bytes=3 * size_bytes + files * 3 * 8192 + 2**30)
        environment = describe(place)
        with _prepared(name, pair, place) as system:
            experiment = Experiment(system, Options(scale, check_modes=True), place)
            creating = experiment.peaks(("create_4k", "create_64k"))
            system.forget_cache()
            working = experiment.peaks(("walk", "write_big", "read_big", "read_random"))
            findings = Findings(
                system=name,
                bucket=pair,
                files=files,
                io_bytes=2 * size_bytes,
                creating=creating,
                working=working,
                cold_start_s=experiment.starts_s(mounts, cold=True),
                warm_start_s=experiment.starts_s(mounts, cold=False),
            )
    except StepFailed as error:
        raise click.ClickException(f"{error}") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)
    if output is not None:
        content = {"environment": asdict(environment), "findings": asdict(findings)}
        output.write_text(json.dumps(content, indent=1) + "\n")
    click.echo(report(findings), nl=False)


if __name__ == "__main__":
    main()
