"""A mount whose S3 server stops, fails, is slow, tears or alters its answers: work waits or goes on, and nothing is lost.

EIO is right only where data are really gone. Two writers (`programs/writer.py`) and a reader work all the while; the cache is
smaller than what is read, so that reading needs the bucket.
"""

from __future__ import annotations

import errno
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import obstore
import pytest

from tests.mount.mounted import CommandFailed, MountedVolume, mounted
from tests.mount.programs import reader
from tests.mount.programs.writer import content
from tests.mount.writers import Writers
from tests.servers.buckets import Bucket
from tests.servers.faults import Altered, Delay, Dropped, Fault, FaultProxy, LostAnswer, Slow, Status, Torn
from tests.servers.seaweedfs import SeaweedFS

MIB: Final = 1 << 20
SMALL_CACHE: Final = ("--cache-size", "64MiB")
FILE_BYTES: Final = 3 * MIB + 11
FILES: Final = 30
DEADLINE_S: Final = 120

pytestmark = pytest.mark.timeout(900)


@dataclass(frozen=True, slots=True)
class Workload:
    """Hold what works on a volume: writers, and a reader of files that nobody changes."""

    volume: MountedVolume
    writers: Writers
    sums: Path
    outside: Path
    seed: int

    @classmethod
    def prepared(cls, volume: MountedVolume, outside: Path, seed: int) -> Workload:
        """Write the files to be read, and take them out of all caches."""
        outside.mkdir()
        files = volume.path / "read"
        files.mkdir()
        sums = {}
        for number in range(FILES):
            data = content(seed + number, FILE_BYTES)
            (files / f"file{number}").write_bytes(data)
            sums[f"file{number}"] = hashlib.sha256(data).hexdigest()
        (outside / "sums").write_text(json.dumps(sums))
        writers = Writers(volume.path, outside, count=2)
        writers.make_directories()
        volume.remount_with_empty_cache(*SMALL_CACHE)
        return cls(volume, writers, outside / "sums", outside, seed)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let all work while the body runs; afterwards end them, demand that none met an error, and compare."""
        with self.writers.working(self.seed):
            arguments = (self.volume.path / "read", self.sums, str(self.seed), self.read_log, self.writers.stop_file)
            command = [sys.executable, reader.__file__, *(str(argument) for argument in arguments)]
            with self.reader_errors.open("w") as errors, subprocess.Popen(command, stderr=errors) as process:
                try:
                    self.wait_for_progress(steps=20, reads=3)
                    yield
                    self.wait_for_progress(steps=20, reads=3)
                    self.writers.stop()
                    assert process.wait(timeout=DEADLINE_S) == 0, self.reader_errors.read_text()
                finally:
                    process.kill()
        self.writers.settle()

    @property
    def read_log(self) -> Path:
        """Return the file that has a line for each file read in this round."""
        return self.outside / f"round{self.writers.round}-reader.log"

    @property
    def reader_errors(self) -> Path:
        """Return the file that has what the reader of this round said before it ended with an error."""
        return self.outside / f"round{self.writers.round}-reader.errors"

    def reads(self) -> int:
        """Return how many files were read in this round."""
        return self.read_log.read_text().count("\n") if self.read_log.exists() else 0

    def wait_for_progress(self, *, steps: int, reads: int) -> None:
        """Return when so many further steps and reads were logged; AssertionError past the deadline."""
        deadline = time.monotonic() + DEADLINE_S
        steps_before, reads_before = self.writers.steps(), self.reads()
        while self.writers.steps() < steps_before + steps or self.reads() < reads_before + reads:
            messages = [log.message for log in self.writers.logs() if log.errno is not None]
            assert not messages, messages
            message = self.reader_errors.read_text()
            assert not message, message
            assert time.monotonic() < deadline, (
                f"in {DEADLINE_S} s {self.writers.steps() - steps_before} steps and {self.reads() - reads_before} reads"
            )
            time.sleep(0.01)

    def verify_from_bucket(self) -> None:
        """Compare all that was written with what a mount without any cache reads."""
        self.volume.remount_with_empty_cache()
        self.writers.verify()
        for name, expected in json.loads(self.sums.read_text()).items():
            with (self.volume.path / "read" / name).open("rb") as file:
                assert hashlib.file_digest(file, "sha256").hexdigest() == expected, name


@contextmanager
def volume_in(bucket: Bucket, directory: Path) -> Iterator[MountedVolume]:
    """Format and mount a volume with that bucket and a small cache; clean at the end."""
    options = ("--bucket", bucket.url)
    with mounted(directory, *options, mount_options=SMALL_CACHE, environment=bucket.environment) as volume:
        yield volume


@pytest.mark.parametrize(
    ("how", "outage_s"),
    [("killed", 5), *(pytest.param(how, 30, marks=pytest.mark.slow) for how in ("killed", "frozen"))],
)
def test_work_goes_on_after_the_server_was_away_and_nothing_is_lost(
    tmp_path: Path, own_s3_server: SeaweedFS, seed: int, how: str, outage_s: float
) -> None:
    own_s3_server.create_bucket("outage")
    bucket = own_s3_server.bucket("outage", prefix="volume")
    with volume_in(bucket, tmp_path) as volume:
        work = Workload.prepared(volume, tmp_path / "outside", seed)
        with work.running():
            # The length of the outage is the scenario; nothing is synchronised by it.
            if how == "killed":
                own_s3_server.kill()
                time.sleep(outage_s)
                own_s3_server.start()
            else:
                own_s3_server.pause()
                try:
                    time.sleep(outage_s)
                finally:
                    own_s3_server.resume()
        work.verify_from_bucket()


@pytest.mark.parametrize(
    ("fault", "method", "fraction"),
    [
        pytest.param(Status(503), None, 0.5, id="503"),
        pytest.param(LostAnswer(), None, 0.3, id="lost answer"),
        pytest.param(Torn(MIB), "GET", 0.5, id="torn late"),
        pytest.param(Altered(-100), "GET", 0.3, id="altered data"),
        pytest.param(Status(500), None, 0.3, id="500", marks=pytest.mark.slow),
        pytest.param(Status(429), None, 0.3, id="429", marks=pytest.mark.slow),
        pytest.param(Dropped(), None, 0.3, id="dropped", marks=pytest.mark.slow),
        pytest.param(Delay(0.5), None, 0.5, id="late", marks=pytest.mark.slow),
        pytest.param(Slow(2 * MIB), "GET", 1.0, id="slow", marks=pytest.mark.slow),
        pytest.param(Torn(1000), "GET", 0.3, id="torn early", marks=pytest.mark.slow),
        pytest.param(Altered(7), "GET", 0.3, id="altered head", marks=pytest.mark.slow),
    ],
)
def test_answers_that_fail_now_and_then_are_asked_for_again_and_no_program_notices(
    tmp_path: Path,
    bucket: Bucket,
    fault_proxy: FaultProxy,
    seed: int,
    fault: Fault,
    method: str | None,
    fraction: float,
) -> None:
    with volume_in(bucket.at(fault_proxy.endpoint), tmp_path) as volume:
        work = Workload.prepared(volume, tmp_path / "outside", seed)
        rule = fault_proxy.inject(fault, method=method, fraction=fraction)
        with work.running():
            work.wait_for_progress(steps=40, reads=20)
        assert rule.hits > 0
        fault_proxy.clear()
        work.verify_from_bucket()


def test_a_server_that_answers_500_to_everything_for_a_while_is_waited_for(
    tmp_path: Path, bucket: Bucket, fault_proxy: FaultProxy, seed: int
) -> None:
    with volume_in(bucket.at(fault_proxy.endpoint), tmp_path) as volume:
        work = Workload.prepared(volume, tmp_path / "outside", seed)
        with work.running():
            rule = fault_proxy.inject(Status(500))
            while rule.hits < 20:
                time.sleep(0.01)
            fault_proxy.clear()
        work.verify_from_bucket()


def keys_of(volume: MountedVolume, bucket: Bucket, path: Path, data: bytes) -> list[str]:
    """Write a file and return the keys of the objects that this made, once they are uploaded."""
    before = set(bucket.keys())
    path.write_bytes(data)
    volume.remount_with_empty_cache()
    return sorted(set(bucket.keys()) - before)


def read_errno(path: Path) -> int | None:
    """Read a file to its end and return the errno of what it met, None where it met nothing."""
    try:
        path.read_bytes()
    except OSError as error:
        return error.errno
    return None


@pytest.mark.parametrize(
    "damage",
    [
        *("deleted", "flipped in its data"),
        *(pytest.param(slow, marks=pytest.mark.slow) for slow in ("cut", "emptied", "flipped at its head", "swapped")),
    ],
)
def test_an_object_that_is_gone_or_changed_gives_eio_never_wrong_bytes_and_hurts_no_other_file(
    tmp_path: Path, bucket: Bucket, seed: int, damage: str
) -> None:
    with volume_in(bucket, tmp_path) as volume:
        data, other_data = content(seed, 5 * MIB), content(seed + 1, 5 * MIB)
        path, other = volume.path / "damaged", volume.path / "other"
        other_keys = keys_of(volume, bucket, other, other_data)
        keys = keys_of(volume, bucket, path, data)
        assert len(keys) == 2
        victim, store = keys[0], bucket.store()
        original = obstore.get(store, victim).bytes().to_bytes()
        changed = bytearray(original)
        match damage:
            case "deleted":
                obstore.delete(store, victim)
            case "cut":
                obstore.put(store, victim, original[: len(original) // 2])
            case "emptied":
                obstore.put(store, victim, b"")
            case "flipped at its head":
                changed[9] ^= 1
                obstore.put(store, victim, bytes(changed))
            case "flipped in its data":
                changed[len(changed) // 2] ^= 1
                obstore.put(store, victim, bytes(changed))
            case "swapped":
                # A sound object, but another file's.
                obstore.put(store, victim, obstore.get(store, other_keys[0]).bytes().to_bytes())
        volume.remount_with_empty_cache()
        assert read_errno(path) == errno.EIO
        assert read_errno(path) == errno.EIO  # and again: nothing wrong was kept
        assert other.read_bytes() == other_data
        with path.open("rb") as file:
            file.seek(4 * MIB)
            assert file.read() == data[4 * MIB :]
        logs = "".join(log.read_text() for log in volume.cache_dir.rglob("*.log"))
        assert victim in logs
        # Without reading them fsck sees which objects there are, and how long.
        for depth in [["--data"], *([[]] if damage in ("deleted", "emptied") else [])]:
            with pytest.raises(CommandFailed):
                volume.atoll("fsck", volume.address, *depth)
        # What comes back is read again.
        obstore.put(store, victim, original)
        assert path.read_bytes() == data
