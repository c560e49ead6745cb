"""Keys that the service keeps never come to a node: looked for in everything that a mount has, while it does real work."""

from __future__ import annotations

import base64
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from client.volume import TOKEN_VARIABLE
from tests.mount.keys import MASTER, MIB, SECRET, Relay, assert_without_secret, in_files, in_memory
from tests.mount.mounted import MountedVolume, atoll, mounted
from tests.mount.service import ServiceProcess, mounted_from, service
from tests.servers.buckets import Bucket
from tests.servers.certificates import Authority
from tests.servers.ports import HOST
from tests.servers.seaweedfs import SECRET_ACCESS_KEY


@contextmanager
def kept_and_mounted(running: ServiceProcess, directory: Path, bucket: Bucket) -> Iterator[MountedVolume]:
    """Mount a volume without keys."""
    options = ("--bucket", bucket.url, "--block-size", "1MiB", "--inline-limit", "1KiB")
    given = {name: value for name, value in running.environment.items() if name not in MASTER}
    with mounted_from(
        running, directory, *options, environment={**given, **bucket.environment}, keys_stay=True
    ) as volume:
        yield volume


def arguments_of_all() -> list[str]:
    """Return what all processes were started with, as any user sees it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            found.append(path.read_bytes().decode("utf-8", "replace"))
    return found


def files_of(seed: int) -> dict[str, bytes]:
    rand = random.Random(seed)
    sizes = [20 * MIB + 12345, 3 * MIB, *(rand.randrange(2000, 90_000) for _ in range(40))]
    return {f"file-{number}": rand.randbytes(size) for number, size in enumerate(sizes)}


def work(volume: MountedVolume, files: dict[str, bytes]) -> None:
    """Write, overwrite, copy, read cold and at random, remove."""
    directory = volume.path / "work"
    directory.mkdir()
    for name, data in files.items():
        (directory / name).write_bytes(data)
    with (directory / "file-0").open("r+b") as file:
        file.seek(5 * MIB + 17)
        file.write(b"changed" * 100_000)
    changed = bytearray(files["file-0"])
    changed[5 * MIB + 17 : 5 * MIB + 17 + 700_000] = b"changed" * 100_000
    volume.remount_with_empty_cache()
    assert (directory / "file-0").read_bytes() == changed
    for name, data in list(files.items())[1:]:
        assert (directory / name).read_bytes() == data
    volume.atoll("clone", str(directory), str(volume.path / "copy"))
    volume.remount_with_empty_cache()
    with (volume.path / "copy" / "file-0").open("rb") as file:
        for offset in (19 * MIB, 0, 5 * MIB, 11 * MIB + 1):
            file.seek(offset)
            assert file.read(5000) == changed[offset : offset + 5000]
    (directory / "file-1").unlink()
    # Parts of slices: the rest of their blocks is in no file any more.
    with (directory / "file-0").open("r+b") as file:
        file.truncate(2 * MIB + 100)
    with (volume.path / "tail").open("wb") as tail, (volume.path / "copy" / "file-0").open("rb") as source:
        os.copy_file_range(source.fileno(), tail.fileno(), 4 * MIB, 15 * MIB)
    volume.remount_with_empty_cache()
    assert (directory / "file-0").read_bytes() == changed[: 2 * MIB + 100]
    assert (volume.path / "tail").read_bytes() == changed[15 * MIB : 19 * MIB]


@pytest.mark.timeout(600)
def test_the_secret_is_nowhere_on_a_node_and_the_search_would_find_it(
    tmp_path: Path, bucket: Bucket, seed: int
) -> None:
    authority = Authority(tmp_path)
    environment = {**MASTER, "ATOLL_TLS_CA": str(authority.ca)}
    place = tmp_path / "service"
    place.mkdir()
    files = files_of(seed)
    with service(place, options=authority.issue(HOST).options, environment=environment) as running:
        with kept_and_mounted(running, tmp_path, bucket) as volume:
            work(volume, files)
            told = [volume.atoll("status", volume.address), volume.atoll("stats", str(volume.path))]
            told.append((volume.path / ".atoll" / "config").read_text())
            told.append((volume.path / ".atoll" / "stats").read_text())
            told += arguments_of_all()
            assert not any(SECRET_ACCESS_KEY in text for text in told)
            assert in_memory(running.pid, SECRET), "the search does not find what is there"
            assert_without_secret(volume, place)
        assert in_files(SECRET, tmp_path / "cache", place) == []
        assert SECRET_ACCESS_KEY not in running.log_path.read_text()


@pytest.mark.timeout(600)
def test_the_secret_is_in_no_message_and_the_search_would_find_it(tmp_path: Path, bucket: Bucket, seed: int) -> None:
    place = tmp_path / "service"
    place.mkdir()
    with service(place, environment=MASTER) as running:
        relay = Relay(running.port)
        try:
            through = replace(running, ports=(relay.port,))
            with kept_and_mounted(through, tmp_path, bucket) as volume:
                # `format` brings the keys to the service, in clear only because all is on one machine.
                assert relay.has_seen_secret, "the search does not find what is there"
                relay.has_seen_secret = False
                before = relay.seen_bytes
                work(volume, files_of(seed))
                assert relay.seen_bytes > before + 100_000
                assert not relay.has_seen_secret
        finally:
            relay.close()


@pytest.mark.timeout(600)
def test_a_service_that_is_restarted_goes_on_signing_and_refuses_without_its_master_key(
    tmp_path: Path, bucket: Bucket, seed: int
) -> None:
    data = random.Random(seed).randbytes(9 * MIB)
    place = tmp_path / "service"
    place.mkdir()
    with service(place, environment=MASTER) as running:
        with kept_and_mounted(running, tmp_path, bucket) as volume:
            (volume.path / "file").write_bytes(data)
            running.kill()
            refused = atoll("serve", "--store", running.store, "--listen", f"{HOST}:{running.port}")
            assert refused.returncode == 1
            assert "--master-key-file" in refused.stderr
            running.start()
            volume.remount_with_empty_cache()
            assert (volume.path / "file").read_bytes() == data
            # Keys that do not do are refused by the bucket: an error, never wrong data; and others are used at once.
            volume.remount_with_empty_cache()
            wrong = {**volume.environment, **bucket.environment, "AWS_SECRET_ACCESS_KEY": "wrong"}
            tried = atoll("keys", "set", volume.address, environment=wrong)
            assert tried.returncode == 1, tried
            right = atoll("keys", "set", volume.address, environment={**volume.environment, **bucket.environment})
            assert right.returncode == 0, right
            assert (volume.path / "file").read_bytes() == data
            for command in ("gc", "fsck"):
                # By URLs that the service signs for administrators: test_keys_admin.py.
                done = atoll(command, str(volume.path), environment=volume.environment)
                assert done.returncode == 0, done
            collected = atoll("gc", volume.address, environment={**volume.environment, **bucket.environment})
            assert collected.returncode == 0, collected
        (tmp_path / "mnt").mkdir()
        local = atoll(
            "mount", running.address(), str(tmp_path / "mnt"), "--cache-dir", str(tmp_path / "cache"), "--durability", "local",
            environment={TOKEN_VARIABLE: running.token},
        )  # fmt: skip
        assert local.returncode == 1
        assert "--durability local" in local.stderr


def test_a_service_without_a_master_key_leaves_keys_where_they_are_and_says_so(tmp_path: Path, bucket: Bucket) -> None:
    with service(tmp_path) as running:
        given = {TOKEN_VARIABLE: running.token, **bucket.environment}
        refused = atoll("format", running.address(), "--bucket", bucket.url, "--keys", "service", environment=given)
        assert refused.returncode == 1
        assert "--master-key-file" in refused.stderr
        made = atoll("format", running.address(), "--bucket", bucket.url, environment=given)
        assert made.returncode == 0, made
        assert "in their environment" in made.stdout
        told = atoll("keys", "set", running.address(), environment=given)
        assert told.returncode == 1
        assert "--master-key-file" in told.stderr


def test_keys_are_rotated_by_a_command(tmp_path: Path, bucket: Bucket) -> None:
    new = base64.b64encode(os.urandom(32)).decode()
    path = tmp_path / "master"
    path.write_text(f"{new}\n{MASTER['ATOLL_MASTER_KEY']}\n")
    with service(tmp_path, environment=MASTER) as running, mounted(
        tmp_path, "--bucket", bucket.url, environment={TOKEN_VARIABLE: running.token, **bucket.environment},
        address=running.address(),
    ) as volume:  # fmt: skip
        running.end()
        rotated = atoll("serve", "--store", running.store, "--rotate-keys", "--master-key-file", str(path))
        assert (rotated.returncode, rotated.stdout.split()[:4]) == (0, ["the", "keys", "of", "1"]), rotated
        path.write_text(new)
        running.environment = {}
        running.options = ("--master-key-file", str(path))
        running.start()
        (volume.path / "file").write_bytes(bytes(5 * MIB))
