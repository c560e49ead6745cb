"""What lists, checks and deletes objects, by commands on a machine without any key: the service signs each request."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import obstore
import pytest

from chunkstore.geometry import parse_block_key
from tests.mount.keys import MASTER, MIB, SECRET, Relay, assert_without_secret, in_files, in_memory
from tests.mount.mounted import ATOLL, COMMAND_TIMEOUT_S, PROVIDER_VARIABLES, MountedVolume, atoll
from tests.mount.service import TENANT, ServiceProcess, mounted_from, service, services
from tests.servers.buckets import Bucket
from tests.servers.faults import FaultProxy, Hang
from tests.servers.postgresql import PostgreSQL
from tests.servers.seaweedfs import SECRET_ACCESS_KEY

WITHOUT = {**dict.fromkeys(PROVIDER_VARIABLES, ""), "AWS_EC2_METADATA_DISABLED": "true"}


@contextlib.contextmanager
def running_service(tmp_path: Path, *options: str) -> Iterator[ServiceProcess]:
    place = tmp_path / "service"
    place.mkdir()
    with service(place, environment=MASTER, options=options) as running:
        tenant = f"atoll://127.0.0.1:{running.port}/{TENANT}"
        made = atoll("tenant", "create", tenant, environment={"ATOLL_TOKEN": running.token})
        assert made.returncode == 0, made
        yield running


def admin_of(running: ServiceProcess) -> dict[str, str]:
    """Return the environment of a machine without keys, with a token of the tenant's administrator."""
    return {**WITHOUT, "ATOLL_TOKEN": token(running, f"atoll://127.0.0.1:{running.port}/{TENANT}")}


def token(running: ServiceProcess, address: str) -> str:
    made = atoll("token", "create", address, environment={"ATOLL_TOKEN": running.token})
    assert made.returncode == 0, made
    return made.stdout.strip()


def formatted(running: ServiceProcess, bucket: Bucket, volume: str = "data", *options: str) -> str:
    """Make a volume whose keys the service keeps; its address."""
    address = running.address(volume)
    given = {"ATOLL_TOKEN": running.token, **bucket.environment}
    made = atoll("format", address, "--bucket", bucket.url, "--block-size", "64KiB", *options, environment=given)
    assert made.returncode == 0, made
    assert "clients need none" in made.stdout
    return address


@contextlib.contextmanager
def volume_of(running: ServiceProcess, tmp_path: Path, bucket: Bucket) -> Iterator[MountedVolume]:
    """Mount a volume without keys, by the service's token."""
    options = ("--bucket", bucket.url, "--block-size", "64KiB", "--inline-limit", "0", "--trash-days", "0")
    with mounted_from(running, tmp_path, *options, environment=dict(bucket.environment), keys_stay=True) as volume:
        yield volume


def document(*arguments: str, environment: Mapping[str, str], code: int = 0) -> dict[str, Any]:
    ended = atoll(*arguments, "--json", environment=environment, timeout_s=2 * COMMAND_TIMEOUT_S)
    assert ended.returncode == code, ended
    found = json.loads(ended.stdout)
    assert isinstance(found, dict)
    return found


def uuid_of(address: str, environment: Mapping[str, str]) -> str:
    uuid = document("status", address, environment=environment)["format"]["uuid"]
    assert isinstance(uuid, str)
    return uuid


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + COMMAND_TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def put(bucket: Bucket, keys: list[str]) -> None:
    store = bucket.store()
    for key in keys:
        obstore.put(store, key, b"x")


def blocks(bucket: Bucket) -> list[str]:
    found = bucket.keys()
    return [key for key in found if parse_block_key(key) is not None]


@pytest.mark.timeout(600)
def test_gc_finds_and_deletes_what_leaked_and_what_is_garbage(tmp_path: Path, bucket: Bucket, seed: int) -> None:
    with running_service(tmp_path) as running:
        admin = admin_of(running)
        with volume_of(running, tmp_path, bucket) as volume:
            data = random.Random(seed).randbytes(MIB)
            (volume.path / "stays").write_bytes(data)
            (volume.path / "goes").write_bytes(data)
            uuid = uuid_of(volume.address, admin)
            volume.unmount()
            volume.mount()
            before = blocks(bucket)
            (volume.path / "goes").unlink()
            volume.unmount()
            leaked = [f"{uuid}/0/{number:x}.0" for number in range(5000, 6100)]
            foreign = [f"{uuid}/notes of mine.txt"]
            others = ["00000000-0000-0000-0000-000000000009/0/1.0", "backups/manifests/other/n", "top"]
            put(bucket, [*leaked, *foreign, *others])
            counted = document("gc", volume.address, "--dry-run", environment=admin)
            assert (counted["leaked_objects"], counted["deleted_objects"]) == (1100, 0)
            assert (counted["garbage_slices"], counted["foreign_objects"]) == (1, 1)
            done = document("gc", volume.address, environment=admin)
            assert (done["leaked_objects"], done["garbage_slices"]) == (1100, 1)
            assert done["deleted_objects"] == 1100 + done["garbage_objects"]
            again = document("gc", volume.address, environment=admin)
            assert (again["leaked_objects"], again["garbage_slices"], again["deleted_objects"]) == (0, 0, 0)
            left = set(bucket.keys())
            assert {*foreign, *others} <= left
            assert left - {*foreign, *others} < set(before)
            # From a mount by an administrator's token, too.
            volume.environment = {"ATOLL_TOKEN": admin["ATOLL_TOKEN"]}
            volume.mount()
            put(bucket, leaked[:3])
            in_mount = volume.document("fsck", str(volume.path), "--data")
            assert (in_mount["clean"], in_mount["verified_objects"]) == (True, 16)
            assert volume.document("gc", str(volume.path))["deleted_objects"] == 3
            assert (volume.path / "stays").read_bytes() == data
            assert_without_secret(volume)
        log = running.log_path.read_text()
        signed = [line for line in log.splitlines() if "sign URLs that delete objects" in line]
        assert 1 <= len(signed) <= 3, signed


@pytest.mark.timeout(600)
def test_fsck_finds_a_missing_and_a_damaged_object(tmp_path: Path, bucket: Bucket, seed: int) -> None:
    with running_service(tmp_path) as running:
        admin = admin_of(running)
        with volume_of(running, tmp_path, bucket) as volume:
            (volume.path / "file").write_bytes(random.Random(seed).randbytes(20 * 65536))
            volume.unmount()
            clean = document("fsck", volume.address, "--data", environment=admin)
            assert (clean["clean"], clean["checked_objects"], clean["verified_objects"]) == (True, 20, 20)
            first, second, third, *_ = blocks(bucket)
            store = bucket.store()
            kept = {key: bytes(obstore.get(store, key).bytes()) for key in (first, second, third)}
            obstore.delete(store, first)
            wrong = bytearray(kept[second])
            wrong[-1] ^= 1
            obstore.put(store, second, bytes(wrong))
            obstore.put(store, third, kept[third][:4])
            quick = document("fsck", volume.address, environment=admin, code=1)
            assert {row["object"]: row["code"] for row in quick["problems"]} == {
                first: "object-missing",
                third: "object-size",
            }
            found = document("fsck", volume.address, "--data", environment=admin, code=1)
            told = {row["object"]: (row["code"], row["files"][0]["paths"]) for row in found["problems"]}
            assert told == {
                first: ("object-missing", ["/file"]),
                second: ("object-corrupt", ["/file"]),
                third: ("object-size", ["/file"]),
            }
            for key, data in kept.items():
                obstore.put(store, key, data)
            assert document("fsck", volume.address, "--data", environment=admin)["clean"]


def test_backups_are_listed(tmp_path: Path, bucket: Bucket) -> None:
    with running_service(tmp_path, "--backup", "1m") as running:
        admin = admin_of(running)
        address = formatted(running, bucket)
        until(
            lambda: len(document("backups", "list", address, environment=admin)["backups"]) == 1,
            "the first backup",
        )
        [backup] = document("backups", "list", address, environment=admin)["backups"]
        assert (backup["volume"], backup["is_newest"]) == (f"{TENANT}/data", True)
        deleted = atoll("delete", address, "--yes", environment=admin)
        assert deleted.returncode == 0, deleted
        assert bucket.keys() == []


@pytest.mark.timeout(600)
def test_users_and_administrators_of_others_are_refused(tmp_path: Path, bucket: Bucket) -> None:
    with running_service(tmp_path) as running:
        service_address = f"atoll://127.0.0.1:{running.port}"
        made = atoll("tenant", "create", f"{service_address}/other", environment={"ATOLL_TOKEN": running.token})
        assert made.returncode == 0, made
        with volume_of(running, tmp_path, bucket) as volume:
            (volume.path / "inside").mkdir()
        address = running.address()
        put(bucket, [f"{uuid_of(address, admin_of(running))}/0/77.0"])
        before = bucket.keys()
        for place in (address, f"{address}:/inside", f"{service_address}/other"):
            text = token(running, place)
            environment = {**WITHOUT, "ATOLL_TOKEN": text}
            for command in (
                ("gc", address),
                ("gc", address, "--dry-run"),
                ("fsck", address),
                ("fsck", address, "--data"),
                ("backups", "list", address),
                ("delete", address, "--yes"),
                ("delete", address, "--resume"),
            ):
                refused = atoll(*command, environment=environment)
                assert refused.returncode == 1, (command, refused)
                [line] = [line for line in refused.stderr.splitlines() if line.strip()]
                assert "administrator" in line or "not for" in line, line
        assert bucket.keys() == before


@pytest.mark.timeout(600)
def test_delete_goes_on_after_it_was_killed_in_the_middle(
    tmp_path: Path, bucket: Bucket, fault_proxy: FaultProxy
) -> None:
    """The bucket hangs in the middle of deleting: the rows are gone, and the service remembers what is left."""
    through = bucket.at(fault_proxy.endpoint)
    with running_service(tmp_path) as running:
        admin = admin_of(running)
        address = formatted(running, through)
        uuid = uuid_of(address, admin)
        put(bucket, [f"{uuid}/0/{number:x}.0" for number in range(1, 1500)])
        put(bucket, [f"backups/manifests/{uuid}/n", f"backups/parts/{uuid}/n/00000000"])
        others = ["00000000-0000-0000-0000-000000000009/0/1.0"]
        put(bucket, others)
        fault_proxy.inject(Hang(), method="DELETE", key=r"/3e7\.0$")
        command = [str(ATOLL), "delete", address, "--yes"]
        with subprocess.Popen(command, env={**os.environ, **admin}, stderr=subprocess.PIPE) as process:
            until(lambda: fault_proxy.count(method="DELETE", key="/3e7.0") > 0, "the deletion gets there")
            assert in_memory(running.pid, SECRET), "the search does not find what is there"
            assert not in_memory(process.pid, SECRET)
            process.send_signal(signal.SIGKILL)
            process.wait(COMMAND_TIMEOUT_S)
        fault_proxy.clear()
        left = len(bucket.keys())
        assert 1 < left < 1500
        # Not forgotten by the service, nor when it is restarted.
        running.kill()
        running.start()
        service_address = f"atoll://127.0.0.1:{running.port}"
        refused = atoll("tenant", "delete", f"{service_address}/{TENANT}", environment={"ATOLL_TOKEN": running.token})
        assert refused.returncode == 1
        assert "--resume" in refused.stderr
        # Another volume of that name is not touched by it.
        again = formatted(running, bucket)
        assert again == address
        resumed = atoll("delete", address, "--resume", environment=admin)
        assert resumed.returncode == 0, resumed
        assert bucket.keys() == others
        assert uuid_of(address, admin) != uuid
        nothing = atoll("delete", address, "--resume", environment=admin)
        assert nothing.returncode == 1
        assert "interrupted" in nothing.stderr
        gone = atoll("delete", address, "--yes", environment=admin)
        assert gone.returncode == 0, gone
        missing = atoll("delete", address, "--yes", environment=admin)
        assert missing.returncode == 1
        assert bucket.keys() == others


def test_delete_says_where_objects_are_left_and_the_same_command_goes_on_or_lets_them_be(
    tmp_path: Path, bucket: Bucket, fault_proxy: FaultProxy
) -> None:
    through = bucket.at(fault_proxy.endpoint)
    with running_service(tmp_path) as running:
        admin = admin_of(running)
        for volume, keeps in (("one", False), ("two", True), ("three", None)):
            address = formatted(running, through, volume)
            uuid = uuid_of(address, admin)
            put(bucket, [f"{uuid}/0/1.0"])
            if keeps is None:
                kept = atoll("delete", address, "--yes", "--keep-objects", environment=admin)
                assert kept.returncode == 0, kept
                assert f"its objects are in {through.url} under {uuid}/" in kept.stdout
            else:
                fault_proxy.inject(Hang(), method="DELETE", key=f"{uuid}/0/1.0")
                command = [str(ATOLL), "delete", address, "--yes"]
                with subprocess.Popen(
                    command, env={**os.environ, **admin}, stderr=subprocess.PIPE, text=True
                ) as process:
                    until(lambda key=uuid: fault_proxy.count(method="DELETE", key=key) > 0, "a request")  # type: ignore[misc]
                    process.send_signal(signal.SIGINT)
                    _, told = process.communicate(timeout=COMMAND_TIMEOUT_S)
                assert f"objects are left in {through.url} under {uuid}/" in told
                assert "--resume" in told
                fault_proxy.clear()
                options = ("--keep-objects", "--resume") if keeps else ("--yes",)
                ended = atoll("delete", address, *options, environment=admin)
                assert ended.returncode == 0, ended
            left = bucket.keys()
            assert (f"{uuid}/0/1.0" in left) == (keeps is not False)
            nothing = atoll("delete", address, "--resume", environment=admin)
            assert nothing.returncode == 1


@pytest.mark.timeout(600)
def test_the_secret_does_not_come_to_who_checks_and_deletes(tmp_path: Path, bucket: Bucket, seed: int) -> None:
    """The search of test_keys.py: what passes between a command and the service, what it prints, and what it leaves."""
    with running_service(tmp_path) as running:
        relay = Relay(running.port)
        try:
            through = replace(running, ports=(relay.port,))
            address = formatted(through, bucket)
            # `format` brings the keys to the service, in clear only because all is on one machine.
            assert relay.has_seen_secret, "the search does not find what is there"
            relay.has_seen_secret = False
            before = relay.seen_bytes
            admin = {**admin_of(running), "TMPDIR": str(tmp_path / "tmp"), "HOME": str(tmp_path / "home")}
            for name in ("tmp", "home"):
                (tmp_path / name).mkdir()
            uuid = uuid_of(address, admin)
            put(bucket, [f"{uuid}/0/{number:x}.0" for number in range(0x9000, 0x9005)])
            told = []
            for command in (
                ("backups", "list", address),
                ("fsck", address, "--data"),
                ("gc", address),
                ("delete", address, "--yes"),
            ):
                ended = atoll(*command, environment=admin)
                assert ended.returncode == 0, ended
                told.append(ended.stdout + ended.stderr)
            assert bucket.keys() == []
            assert relay.seen_bytes > before + 1000
            assert not relay.has_seen_secret
            assert SECRET_ACCESS_KEY not in "".join(told)
            assert in_files(SECRET, tmp_path) == []
        finally:
            relay.close()


def test_any_process_of_a_service_signs(tmp_path: Path, bucket: Bucket, own_postgresql: PostgreSQL) -> None:
    with services(tmp_path, own_postgresql.url(), count=2, environment=MASTER) as processes:
        alone = [replace(process, ports=(process.port,)) for process in processes]
        admin = {**WITHOUT, "ATOLL_TOKEN": processes[0].token}
        for number in range(2):
            asked, other = alone[number].address(), alone[1 - number].address()
            uuid = uuid_of(formatted(alone[0], bucket), admin)
            put(bucket, [f"{uuid}/0/{each:x}.0" for each in range(0x9000, 0x9003)])
            for address in (asked, other):
                assert document("fsck", address, "--data", environment=admin)["clean"]
            assert document("gc", asked, environment=admin)["leaked_objects"] == 3
            put(bucket, [f"{uuid}/0/1.0"])
            gone = atoll("delete", other, "--yes", environment=admin)
            assert gone.returncode == 0, gone
            assert "with 1 objects" in gone.stdout
            assert bucket.keys() == []
            assert atoll("delete", asked, "--resume", environment=admin).returncode == 1
