"""kill -9 of the mount at random moments: what was acknowledged is there afterwards, and nothing else is left over.

Writers log each step after the call returned 0 (tests/mount/programs/writer.py). SIGKILL takes the process, not the
machine: what reached the kernel's page cache survives, so power loss is not what is tested here.
"""

from __future__ import annotations

import errno
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Final

import pytest

from chunkstore.geometry import parse_block_key
from tests.mount.mounted import MountedVolume, detach, mounted
from tests.mount.writers import Writers
from tests.servers.buckets import Bucket

DEAD_MOUNT: Final = {errno.ENOTCONN, errno.ECONNABORTED, None}
"""What calls answer when the daemon is gone; None where a writer died of SIGBUS in a mapping."""
SESSION_ENDS_S: Final = 120


def blocks_in(volume: MountedVolume, bucket: Bucket | None) -> list[str]:
    """List the blocks of slices in the bucket, behind the volume's back; what else it may hold is of no concern here."""
    if bucket is not None:
        keys = bucket.keys()
    else:
        keys = [str(path.relative_to(volume.objects)) for path in volume.objects.rglob("*") if path.is_file()]
    return sorted(key for key in keys if parse_block_key(key) is not None)


def leaked(volume: MountedVolume) -> int:
    """Collect garbage, then return what a second collection still finds in the bucket that nothing refers to."""
    volume.atoll("gc", volume.address)
    count = volume.document("gc", volume.address)["leaked_objects"]
    assert isinstance(count, int)
    return count


def kill_once(volume: MountedVolume, writers: Writers, rng: random.Random) -> None:
    """Let the writers work, kill the mount while they do, mount again and compare."""
    durability = rng.choice(("object", "local"))
    volume.mount("--durability", durability)
    # None at all hits what runs after the start: uploads of staged data, the first requests.
    lines = rng.choice((0, rng.randrange(30), rng.randrange(600)))
    with writers.working(rng.randrange(1 << 32)):
        writers.wait_for_steps(lines)
        # Spreads the moment over a step; nothing waits for this.
        time.sleep(rng.random() * 0.01)
        volume.kill_daemon()
        exit_codes = writers.wait_for_end()
        logs = writers.logs()
    print(  # noqa: T201
        f"round {writers.round}: {durability}, asked for {lines} lines, acknowledged"
        f" {[len(log.acknowledged) for log in logs]}, under way {[log.under_way and log.under_way['op'] for log in logs]}"
    )
    assert set(exit_codes) <= {0, -signal.SIGBUS}
    assert {log.errno for log in logs} <= DEAD_MOUNT, [log.message for log in logs]

    # A dead mount may be taken away first, or be mounted over: both must do.
    if rng.random() < 0.5:
        detach(volume.path)
    volume.mount("--durability", rng.choice(("object", "local")))
    writers.settle()
    assert leaked(volume) == 0
    volume.unmount()
    volume.fsck()


def survive(volume: MountedVolume, bucket: Bucket | None, outside: Path, seed: int, rounds: int) -> None:
    """Kill it again and again, then remove everything: the bucket must be as empty as the volume."""
    rng = random.Random(seed)
    outside.mkdir()
    writers = Writers(volume.path, outside, count=2)
    writers.make_directories()
    volume.unmount()
    for _ in range(rounds):
        kill_once(volume, writers, rng)
    volume.mount()
    writers.verify()
    volume.remount_with_empty_cache()
    writers.verify()
    # One block for certain, so that the empty list below says something: the writers may have been killed before any.
    certain = volume.path / "certain"
    certain.write_bytes(rng.randbytes(300_000))
    assert blocks_in(volume, bucket) != []
    certain.unlink()
    for number in range(writers.count):
        shutil.rmtree(writers.directory(number))
    assert leaked(volume) == 0
    # What was removed while it was open is held until its session ends: a service waits a minute for one that was killed.
    deadline = time.monotonic() + SESSION_ENDS_S
    while blocks_in(volume, bucket) and time.monotonic() < deadline:
        time.sleep(1)
        assert leaked(volume) == 0
    assert blocks_in(volume, bucket) == []


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("rounds", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_what_was_acknowledged_survives_kills_of_the_mount_and_no_object_is_leaked(
    tmp_path: Path, seed: int, rounds: int
) -> None:
    with mounted(tmp_path, "--trash-days", "0") as volume:
        survive(volume, None, tmp_path / "logs", seed, rounds)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("rounds", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_what_was_acknowledged_survives_kills_of_the_mount_with_the_bucket_on_s3(
    tmp_path: Path, bucket: Bucket, seed: int, rounds: int
) -> None:
    options = ("--trash-days", "0", "--bucket", bucket.url)
    with mounted(tmp_path, *options, environment=bucket.environment) as volume:
        survive(volume, bucket, tmp_path / "logs", seed, rounds)
